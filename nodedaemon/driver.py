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

from nodedaemon.driver_facts import ComputeInstance, DriverError, GpuFacts, GpuInstance, Mig, ProfileFacts, Span, ask

__all__ = ["Driver"]

# What asking for an instance by id, or about one, answers when it is not there (any more).
_NO_SUCH_INSTANCE = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT)
# Ids seen on hardware end at 14; a later architecture may go on.
_GPU_INSTANCE_IDS = 32
_COMPUTE_INSTANCE_IDS = 8
_MIG_DEVICES = 64


class Driver:
    """The driver of this node.

    Usage::

        driver = Driver()  # nvmlInit
        driver.close()

    Raises:
        DriverError: no driver is loaded, or it refuses to start.
    """

    def __init__(self) -> None:
        ask(pynvml.nvmlInit)
        self._handles: dict[str, Any] = {}
        self._known: dict[int, GpuFacts] = {}
        self._profiles: dict[str, tuple[ProfileFacts, ...]] = {}
        self._compute: dict[tuple[str, int], list[tuple[int, int, int]]] = {}

    def close(self) -> None:
        """Lets go of the driver."""
        ask(pynvml.nvmlShutdown)

    def version(self) -> str:
        """Returns the driver's version."""
        return str(ask(pynvml.nvmlSystemGetDriverVersion))

    def nvml_version(self) -> str:
        """Returns NVML's version."""
        return str(ask(pynvml.nvmlSystemGetNVMLVersion))

    def gpus(self) -> list[GpuFacts]:
        """Returns the node's GPUs, by index. One that does not answer has a notice, and spoils no other.

        Raises:
            DriverError: the driver cannot say how many there are.
        """
        return [self.gpu(index) for index in range(self.count())]

    def count(self) -> int:
        """Returns the number of GPUs.

        Raises:
            DriverError: the driver does not answer.
        """
        return int(ask(pynvml.nvmlDeviceGetCount))

    def gpu(self, index: int) -> GpuFacts:
        """Returns one GPU; one that does not answer has a notice."""
        try:
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            uuid = str(ask(pynvml.nvmlDeviceGetUUID, handle))
            facts = GpuFacts(
                uuid=uuid,
                index=index,
                minor=int(ask(pynvml.nvmlDeviceGetMinorNumber, handle)),
                model=str(ask(pynvml.nvmlDeviceGetName, handle)),
                memory_mib=0,
                pci_bus_id=_text(ask(pynvml.nvmlDeviceGetPciInfo, handle).busId),
                mig=self._mig(handle),
            )
            self._handles[uuid] = handle
            facts = replace(facts, memory_mib=self._memory_mib(handle, facts))
        except DriverError as error:
            return self.unanswered(index, str(error))
        self._known[index] = facts
        return facts

    def unanswered(self, index: int, why: str) -> GpuFacts:
        """Returns what was known of a GPU that does not answer: its slices are found by its UUID."""
        known = self._known.get(index, GpuFacts("", index, index, "", 0, "", Mig.UNKNOWN))
        notice = f"the driver does not answer for this GPU ({why}); see `dmesg` and `nvidia-smi -i {index} -q`"
        return replace(known, mig=Mig.UNKNOWN, notice=notice)

    def _memory_mib(self, handle: Any, gpu: GpuFacts) -> int:
        try:
            return int(ask(pynvml.nvmlDeviceGetMemoryInfo, handle).total) // 2**20
        except DriverError as error:
            # With MIG mode on, an unprivileged user may be refused this; the largest profile spans the whole GPU.
            if error.code not in (pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_NOT_SUPPORTED):
                raise
        profiles = self.profiles(gpu.uuid) if gpu.mig is Mig.ENABLED else ()
        return max((profile.memory_mib for profile in profiles), default=0)

    def _mig(self, handle: Any) -> Mig:
        try:
            current, _pending = ask(pynvml.nvmlDeviceGetMigMode, handle)
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

    def known_profiles(self, gpu_uuid: str) -> tuple[ProfileFacts, ...] | None:
        """Returns the profiles that the GPU offers, if it was asked for them before; the driver is not asked."""
        return self._profiles.get(gpu_uuid)

    def _read_profiles(self, handle: Any) -> Iterator[ProfileFacts]:
        for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
            try:
                info = ask(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, number)
            except DriverError as error:
                # A number that this model lacks is NOT_SUPPORTED, one that an older driver has never heard
                # of is INVALID_ARGUMENT.
                if error.code in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                    continue
                raise
            count = c_uint(0)
            ask(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, info.id, None, byref(count))
            spans = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
            ask(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, handle, info.id, spans, byref(count))
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
        return int(ask(pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity, self._handle(gpu_uuid), profile_id))

    def instances(self, gpu_uuid: str, *, compute: bool = True) -> list[GpuInstance]:
        """Returns every GPU instance that the driver lists on a GPU, whoever made it, by placement.

        Args:
            gpu_uuid: the GPU.
            compute: whether to look for their compute instances, too, which takes longer.

        Raises:
            DriverError: the GPU does not answer.
        """
        handle = self._handle(gpu_uuid)
        found = [
            self._instance(gpu_uuid, instance, compute=compute)
            for profile in self.profiles(gpu_uuid)
            for instance in _listed(
                pynvml.nvmlDeviceGetGpuInstances,
                handle,
                profile.profile_id,
                pynvml.c_nvmlGpuInstance_t,
                profile.max_instances,
            )
        ]
        return sorted((one for one in found if one is not None), key=lambda instance: instance.span)

    def instance(self, gpu_uuid: str, gi: int) -> GpuInstance | None:
        """Returns the GPU instance with an id, or None when there is none.

        It is asked for by its id: the lists have been seen to lag behind.

        Raises:
            DriverError: the GPU does not answer.
        """
        try:
            handle = self._gpu_instance(gpu_uuid, gi)
        except DriverError as error:
            off = error.code == pynvml.NVML_ERROR_NOT_SUPPORTED and self._mig(self._handle(gpu_uuid)) is not Mig.ENABLED
            if off or error.code in _NO_SUCH_INSTANCE:
                return None
            raise
        return self._instance(gpu_uuid, handle, compute=True)

    def instance_at(self, gpu_uuid: str, profile_id: int, span: Span) -> GpuInstance | None:
        """Returns the GPU instance of a profile at a place, or None, by asking for every id there can be.

        Raises:
            DriverError: the GPU does not answer.
        """
        for gi in range(_GPU_INSTANCE_IDS):
            found = self.instance(gpu_uuid, gi)
            if found is not None and (found.profile.profile_id, found.span) == (profile_id, span):
                return found
        return None

    def _instance(self, gpu_uuid: str, handle: Any, *, compute: bool) -> GpuInstance | None:
        """Returns what a handle stands for; None when it was destroyed meanwhile."""
        try:
            info = ask(pynvml.nvmlGpuInstanceGetInfo, handle)
            gi, profile = int(info.id), self._profile(gpu_uuid, int(info.profileId))
            span = Span(int(info.placement.start), int(info.placement.size))
            instances: tuple[ComputeInstance, ...] = ()
            if compute and (listed := self._compute_instances(gpu_uuid, profile, handle)):
                uuids = self._mig_uuids(self._handle(gpu_uuid), gi, len(listed))
                instances = tuple(ComputeInstance(ci, slices, uuids.get(ci, "")) for ci, slices in listed)
        except DriverError as error:
            if error.code in _NO_SUCH_INSTANCE:
                return None
            raise
        return GpuInstance(gpu_uuid, gi, profile, span, instances)

    def _profile(self, gpu_uuid: str, profile_id: int) -> ProfileFacts:
        known = (profile for profile in self.profiles(gpu_uuid) if profile.profile_id == profile_id)
        return next(known, ProfileFacts(f"profile {profile_id}", profile_id, 0, 0, 0, 0, ()))

    def _compute_instances(self, gpu_uuid: str, profile: ProfileFacts, handle: Any) -> list[tuple[int, int]]:
        """Returns (id, compute slices) of each compute instance of a GPU instance."""
        return [
            (int(ask(pynvml.nvmlComputeInstanceGetInfo, compute).id), width)
            for profile_id, width, most in self._compute_profiles(gpu_uuid, profile, handle)
            for compute in _listed(
                pynvml.nvmlGpuInstanceGetComputeInstances, handle, profile_id, pynvml.c_nvmlComputeInstance_t, most
            )
        ]

    def _compute_profiles(self, gpu_uuid: str, profile: ProfileFacts, handle: Any) -> list[tuple[int, int, int]]:
        """Returns (id, compute slices, the most of it) of each compute instance profile of a GPU instance profile."""
        key = gpu_uuid, profile.profile_id
        if key not in self._compute:
            self._compute[key] = [
                (int(one.id), int(one.sliceCount), int(one.instanceCount)) for one in _compute_profiles(handle)
            ]
        return self._compute[key]

    def _mig_uuids(self, handle: Any, gi: int, most: int) -> dict[int, str]:
        """Returns the UUIDs of the MIG devices of a GPU instance by compute instance id.

        Args:
            handle: the GPU.
            gi: the GPU instance.
            most: how many there are, so that the rest need not be looked at.
        """
        uuids: dict[int, str] = {}
        for device in self._mig_devices(handle):
            try:
                if int(ask(pynvml.nvmlDeviceGetGpuInstanceId, device)) == gi:
                    ci = int(ask(pynvml.nvmlDeviceGetComputeInstanceId, device))
                    uuids[ci] = str(ask(pynvml.nvmlDeviceGetUUID, device))
            except DriverError as error:
                if error.code not in _NO_SUCH_INSTANCE:
                    raise
                continue  # another slice, destroyed meanwhile
            if len(uuids) == most:
                break
        return uuids

    def _mig_devices(self, handle: Any) -> Iterator[Any]:
        # Indices have holes, and handles are given out anew: they are never kept.
        for index in range(_MIG_DEVICES):
            try:
                yield ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            except DriverError as error:
                if error.code == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                    return  # past the last index that this GPU has
                if error.code != pynvml.NVML_ERROR_NOT_FOUND:
                    raise

    def create_gpu_instance(self, gpu_uuid: str, profile_id: int, span: Span) -> int:
        """Creates a GPU instance exactly there, and returns its id.

        Raises:
            DriverError: INSUFFICIENT_RESOURCES when the place is taken, NO_PERMISSION when this user may not.
        """
        placement = pynvml.c_nvmlGpuInstancePlacement_t(span.start, span.size)
        # By reference: passed by value it would crash the C library.
        instance = ask(
            pynvml.nvmlDeviceCreateGpuInstanceWithPlacement, self._handle(gpu_uuid), profile_id, byref(placement)
        )
        return int(ask(pynvml.nvmlGpuInstanceGetInfo, instance).id)

    def create_compute_instance(self, gpu_uuid: str, gi: int, compute_slices: int) -> int:
        """Creates the compute instance that spans the whole GPU instance, and returns its id.

        Args:
            gpu_uuid: the GPU.
            gi: id of the GPU instance.
            compute_slices: width of the GPU instance.

        Raises:
            DriverError: the driver refuses, or offers no profile that wide (NOT_SUPPORTED).
        """
        handle = self._gpu_instance(gpu_uuid, gi)
        profile = self._profile(gpu_uuid, int(ask(pynvml.nvmlGpuInstanceGetInfo, handle).profileId))
        for profile_id, width, _ in self._compute_profiles(gpu_uuid, profile, handle):
            if width == compute_slices:
                created = ask(pynvml.nvmlGpuInstanceCreateComputeInstance, handle, profile_id)
                return int(ask(pynvml.nvmlComputeInstanceGetInfo, created).id)
        raise DriverError(
            "nvmlGpuInstanceGetComputeInstanceProfileInfoV",
            pynvml.NVML_ERROR_NOT_SUPPORTED,
            f"no compute instance profile spans {compute_slices} slices",
        )

    def has_compute_instance(self, gpu_uuid: str, gi: int) -> bool:
        """Says whether a GPU instance has a compute instance, by asking for every id there can be.

        Raises:
            DriverError: NOT_FOUND, there is no such GPU instance.
        """
        handle = self._gpu_instance(gpu_uuid, gi)
        for ci in range(_COMPUTE_INSTANCE_IDS):
            try:
                ask(pynvml.nvmlGpuInstanceGetComputeInstanceById, handle, ci)
            except DriverError as error:
                if error.code not in _NO_SUCH_INSTANCE:
                    raise
            else:
                return True
        return False

    def destroy_compute_instance(self, gpu_uuid: str, gi: int, ci: int) -> None:
        """Destroys a compute instance.

        Raises:
            DriverError: IN_USE while a process holds it, NOT_FOUND when it is gone already.
        """
        instance = ask(pynvml.nvmlGpuInstanceGetComputeInstanceById, self._gpu_instance(gpu_uuid, gi), ci)
        ask(pynvml.nvmlComputeInstanceDestroy, instance)

    def destroy_gpu_instance(self, gpu_uuid: str, gi: int) -> None:
        """Destroys a GPU instance that has no compute instance any more.

        Raises:
            DriverError: IN_USE while it has, NOT_FOUND when it is gone already.
        """
        ask(pynvml.nvmlGpuInstanceDestroy, self._gpu_instance(gpu_uuid, gi))

    def processes(self, gpu_uuid: str, gi: int) -> list[int]:
        """Returns the ids of the processes that use a GPU instance, ascending.

        Raises:
            DriverError: the GPU does not answer.
        """
        # The whole GPU is asked: a MIG device is gone as soon as its compute instance is, its processes may not be.
        listed = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, self._handle(gpu_uuid))
        return sorted({int(process.pid) for process in listed if process.gpuInstanceId == gi})

    def _handle(self, gpu_uuid: str) -> Any:
        if gpu_uuid not in self._handles:
            self._handles[gpu_uuid] = ask(pynvml.nvmlDeviceGetHandleByUUID, gpu_uuid)
        return self._handles[gpu_uuid]

    def _gpu_instance(self, gpu_uuid: str, gi: int) -> Any:
        return ask(pynvml.nvmlDeviceGetGpuInstanceById, self._handle(gpu_uuid), gi)


def _compute_profiles(instance: Any) -> Iterator[Any]:
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            yield ask(
                pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo,
                instance,
                number,
                pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED,
            )
        except DriverError as error:
            if error.code not in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                raise


def _listed(call: Callable[..., Any], owner: Any, profile_id: int, kind: Any, most: int) -> list[Any]:
    """Asks for the instances of one profile, as NVML fills an array of handles."""
    handles = (kind * max(int(most), 1))()
    count = c_uint(len(handles))
    ask(call, owner, profile_id, handles, byref(count))
    return list(handles[: count.value])


def _text(value: bytes | str) -> str:
    """Returns a name out of a structure: some of pynvml's decode theirs, some do not."""
    return value.decode() if isinstance(value, bytes) else value
