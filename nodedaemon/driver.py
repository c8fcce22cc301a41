"""Everything the daemon asks of the GPU driver, through pynvml.

Real and emulated drivers are asked in the same way. Profiles and placements are what the driver reports;
nothing here knows a shape. The calls block for as long as the driver takes: call them on a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import byref, c_uint
from dataclasses import replace
from typing import Any

import pynvml

from nodedaemon.driver_facts import ComputeInstance, DriverError, GpuFacts, GpuInstance, Mig, ProfileFacts, Span

__all__ = ["ComputeInstance", "Driver", "DriverError", "GpuFacts", "GpuInstance", "Mig", "ProfileFacts", "Span"]


class Driver:
    """The driver of this node.

    Usage::

        driver = Driver()  # nvmlInit
        driver.close()

    Raises:
        DriverError: no driver is loaded, or it refuses to start.
    """

    def __init__(self) -> None:
        _ask(pynvml.nvmlInit)
        self._handles: dict[str, Any] = {}
        self._known: dict[int, GpuFacts] = {}
        self._profiles: dict[str, tuple[ProfileFacts, ...]] = {}

    def close(self) -> None:
        """Lets go of the driver."""
        _ask(pynvml.nvmlShutdown)

    def version(self) -> str:
        """Returns the driver's version."""
        return str(_ask(pynvml.nvmlSystemGetDriverVersion))

    def nvml_version(self) -> str:
        """Returns NVML's version."""
        return str(_ask(pynvml.nvmlSystemGetNVMLVersion))

    def gpus(self) -> list[GpuFacts]:
        """Returns the node's GPUs, by index. One that does not answer has a notice, and spoils no other.

        Raises:
            DriverError: the driver cannot say how many there are.
        """
        return [self._gpu(index) for index in range(_ask(pynvml.nvmlDeviceGetCount))]

    def _gpu(self, index: int) -> GpuFacts:
        try:
            handle = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            uuid = str(_ask(pynvml.nvmlDeviceGetUUID, handle))
            facts = GpuFacts(
                uuid=uuid,
                index=index,
                minor=int(_ask(pynvml.nvmlDeviceGetMinorNumber, handle)),
                model=str(_ask(pynvml.nvmlDeviceGetName, handle)),
                memory_mib=0,
                pci_bus_id=_text(_ask(pynvml.nvmlDeviceGetPciInfo, handle).busId),
                mig=self._mig(handle),
            )
            self._handles[uuid] = handle
            facts = replace(facts, memory_mib=self._memory_mib(handle, facts))
        except DriverError as error:
            # What was known of it is told on: its slices are found by its UUID.
            known = self._known.get(index, GpuFacts("", index, index, "", 0, "", Mig.UNKNOWN))
            notice = f"the driver does not answer for this GPU ({error}); see `dmesg` and `nvidia-smi -i {index} -q`"
            return replace(known, mig=Mig.UNKNOWN, notice=notice)
        self._known[index] = facts
        return facts

    def _memory_mib(self, handle: Any, gpu: GpuFacts) -> int:
        try:
            return int(_ask(pynvml.nvmlDeviceGetMemoryInfo, handle).total) // 2**20
        except DriverError as error:
            # With MIG mode on, an unprivileged user may be refused this; the largest profile spans the whole GPU.
            if error.code not in (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED):
                raise
        profiles = self.profiles(gpu.uuid) if gpu.mig is Mig.ENABLED else ()
        return max((profile.memory_mib for profile in profiles), default=0)

    def _mig(self, handle: Any) -> Mig:
        try:
            current, _pending = _ask(pynvml.nvmlDeviceGetMigMode, handle)
        except DriverError as error:
            if error.code == pynvml.NVML_ERROR_NOT_SUPPORTED:
                return Mig.NOT_SUPPORTED
            raise
        return Mig.ENABLED if current == pynvml.NVML_DEVICE_MIG_ENABLE else Mig.DISABLED

    def profiles(self, gpu_uuid: str) -> tuple[ProfileFacts, ...]:
        """Returns the profiles that the GPU offers; it must have MIG mode on.

        They are asked for once: a GPU's shapes do not change while its driver runs.

        Raises:
            DriverError: MIG mode is off (NVML_ERROR_NOT_SUPPORTED), or the GPU does not answer.
        """
        if gpu_uuid not in self._profiles:
            self._profiles[gpu_uuid] = tuple(self._read_profiles(self._handle(gpu_uuid)))
        return self._profiles[gpu_uuid]

    def _read_profiles(self, handle: Any) -> Iterator[ProfileFacts]:
        for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
            try:
                info = _ask(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, number)
            except DriverError as error:
                # A number that this model lacks is NOT_SUPPORTED, one that an older driver has never heard
                # of is INVALID_ARGUMENT.
                if error.code in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                    continue
                raise
            count = c_uint(0)
            _ask(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, info.id, None, byref(count))
            spans = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
            _ask(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, info.id, spans, byref(count))
            yield ProfileFacts(
                name=_text(info.name).removeprefix("MIG "),
                profile_id=int(info.id),
                memory_mib=int(info.memorySizeMB),
                compute_slices=int(info.sliceCount),
                multiprocessors=int(info.multiprocessorCount),
                max_instances=int(info.instanceCount),
                placements=tuple(sorted(Span(int(span.start), int(span.size)) for span in spans[: count.value])),
            )

    def remaining(self, gpu_uuid: str, profile_id: int) -> int:
        """Returns how many more instances of a profile the GPU can take now.

        Raises:
            DriverError: the GPU does not answer.
        """
        return int(_ask(pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity, self._handle(gpu_uuid), profile_id))

    def instances(self, gpu_uuid: str) -> list[GpuInstance]:
        """Returns every GPU instance on a GPU, whoever made it, by placement.

        Raises:
            DriverError: the GPU does not answer.
        """
        handle = self._handle(gpu_uuid)
        uuids: dict[tuple[int, int], str] | None = None
        found = []
        for profile in self.profiles(gpu_uuid):
            for instance in _listed(
                pynvml.nvmlDeviceGetGpuInstances,
                handle,
                profile.profile_id,
                pynvml.c_nvmlGpuInstance_t,
                profile.max_instances,
            ):
                info = _ask(pynvml.nvmlGpuInstanceGetInfo, instance)
                if uuids is None:
                    uuids = self._mig_uuids(handle)
                gi = int(info.id)
                found.append(
                    GpuInstance(
                        gpu_uuid,
                        gi,
                        profile,
                        Span(int(info.placement.start), int(info.placement.size)),
                        tuple(
                            ComputeInstance(ci, slices, uuids.get((gi, ci), ""))
                            for ci, slices in _compute_instances(instance)
                        ),
                    )
                )
        return sorted(found, key=lambda instance: instance.span)

    def _mig_uuids(self, handle: Any) -> dict[tuple[int, int], str]:
        """Returns the UUID of each MIG device by (GPU instance id, compute instance id)."""
        uuids = {}
        for device in self._mig_devices(handle):
            gi = int(_ask(pynvml.nvmlDeviceGetGpuInstanceId, device))
            ci = int(_ask(pynvml.nvmlDeviceGetComputeInstanceId, device))
            uuids[gi, ci] = str(_ask(pynvml.nvmlDeviceGetUUID, device))
        return uuids

    def _mig_devices(self, handle: Any) -> Iterator[Any]:
        # Indices have holes, and handles are given out anew: they are never kept.
        for index in range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)):
            try:
                yield _ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            except DriverError as error:
                if error.code != pynvml.NVML_ERROR_NOT_FOUND:
                    raise

    def create_gpu_instance(self, gpu_uuid: str, profile_id: int, span: Span) -> int:
        """Creates a GPU instance exactly there, and returns its id.

        Raises:
            DriverError: INSUFFICIENT_RESOURCES when the place is taken, NO_PERMISSION when this user may not.
        """
        placement = pynvml.c_nvmlGpuInstancePlacement_t(span.start, span.size)
        # By reference: passed by value it would crash the C library.
        instance = _ask(
            pynvml.nvmlDeviceCreateGpuInstanceWithPlacement, self._handle(gpu_uuid), profile_id, byref(placement)
        )
        return int(_ask(pynvml.nvmlGpuInstanceGetInfo, instance).id)

    def create_compute_instance(self, gpu_uuid: str, gi: int, compute_slices: int) -> int:
        """Creates the compute instance that spans the whole GPU instance, and returns its id.

        Args:
            gpu_uuid: the GPU.
            gi: id of the GPU instance.
            compute_slices: width of the GPU instance.

        Raises:
            DriverError: the driver refuses, or offers no profile that wide (NOT_SUPPORTED).
        """
        instance = self._gpu_instance(gpu_uuid, gi)
        for profile in _compute_profiles(instance):
            if int(profile.sliceCount) == compute_slices:
                created = _ask(pynvml.nvmlGpuInstanceCreateComputeInstance, instance, profile.id)
                return int(_ask(pynvml.nvmlComputeInstanceGetInfo, created).id)
        raise DriverError(
            "nvmlGpuInstanceGetComputeInstanceProfileInfoV",
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            f"no compute instance profile spans {compute_slices} slices",
        )

    def destroy_compute_instance(self, gpu_uuid: str, gi: int, ci: int) -> None:
        """Destroys a compute instance.

        Raises:
            DriverError: IN_USE while a process holds it, NOT_FOUND when it is gone already.
        """
        instance = _ask(pynvml.nvmlGpuInstanceGetComputeInstanceById, self._gpu_instance(gpu_uuid, gi), ci)
        _ask(pynvml.nvmlComputeInstanceDestroy, instance)

    def destroy_gpu_instance(self, gpu_uuid: str, gi: int) -> None:
        """Destroys a GPU instance that has no compute instance any more.

        Raises:
            DriverError: IN_USE while it has, NOT_FOUND when it is gone already.
        """
        _ask(pynvml.nvmlGpuInstanceDestroy, self._gpu_instance(gpu_uuid, gi))

    def processes(self, gpu_uuid: str, gi: int) -> list[int]:
        """Returns the ids of the processes that use a GPU instance, ascending.

        Raises:
            DriverError: the GPU does not answer.
        """
        # The whole GPU is asked: a MIG device is gone as soon as its compute instance is, its processes may not be.
        listed = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle(gpu_uuid))
        return sorted({int(process.pid) for process in listed if process.gpuInstanceId == gi})

    def _handle(self, gpu_uuid: str) -> Any:
        if gpu_uuid not in self._handles:
            self._handles[gpu_uuid] = _ask(pynvml.nvmlDeviceGetHandleByUUID, gpu_uuid)
        return self._handles[gpu_uuid]

    def _gpu_instance(self, gpu_uuid: str, gi: int) -> Any:
        return _ask(pynvml.nvmlDeviceGetGpuInstanceById, self._handle(gpu_uuid), gi)


def _compute_profiles(instance: Any) -> Iterator[Any]:
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            yield _ask(
                pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo,
                instance,
                number,
                pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED,
            )
        except DriverError as error:
            if error.code not in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                raise


def _compute_instances(instance: Any) -> Iterator[tuple[int, int]]:
    """Yields (id, compute slices) of each compute instance of a GPU instance."""
    for profile in _compute_profiles(instance):
        for compute in _listed(
            pynvml.nvmlGpuInstanceGetComputeInstances,
            instance,
            profile.id,
            pynvml.c_nvmlComputeInstance_t,
            profile.instanceCount,
        ):
            yield int(_ask(pynvml.nvmlComputeInstanceGetInfo, compute).id), int(profile.sliceCount)


def _listed(call: Callable[..., Any], owner: Any, profile_id: int, kind: Any, most: int) -> list[Any]:
    """Asks for the instances of one profile, as NVML fills an array of handles."""
    handles = (kind * max(int(most), 1))()
    count = c_uint(len(handles))
    _ask(call, owner, profile_id, handles, byref(count))
    return list(handles[: count.value])


def _text(value: bytes | str) -> str:
    """Returns a name out of a structure: some of pynvml's decode theirs, some do not."""
    return value.decode() if isinstance(value, bytes) else value


def _ask(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        code = int(error.value)
        raise DriverError(call.__name__, code, str(error)) from error
