"""The node's GPUs, asked from the event loop, and refusing in words."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pynvml
import structlog

from nodedaemon.driver import Driver, DriverError, GpuFacts, GpuInstance, Mig, ProfileFacts
from puhui.rpc.errors import Refusal

__all__ = ["Gpus"]

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")


class Gpus:
    """The GPUs of this node.

    Args:
        driver: the GPU driver.
        emulated: whether it is emulated.

    Raises:
        DriverError: the driver does not answer at all.
    """

    def __init__(self, driver: Driver, *, emulated: bool) -> None:
        self.driver = driver
        self.emulated = emulated
        found = driver.gpus()
        self._facts = {gpu.uuid: gpu for gpu in found if gpu.uuid}
        # A GPU that does not even tell its UUID may be any.
        self._nameless = any(not gpu.uuid for gpu in found)
        self._silent: set[str] = set()
        # NVML lets calls on one GPU overlap, and then two creates race for one place. Other GPUs go on.
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def lock(self, gpu: GpuFacts) -> asyncio.Lock:
        """Returns the lock under which one GPU is changed."""
        return self._locks[gpu.uuid]

    def gpu(self, uuid: str) -> GpuFacts:
        """Returns a GPU.

        Raises:
            Refusal: NOT_FOUND with GPU_NOT_FOUND.
        """
        if uuid not in self._facts:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "GPU_NOT_FOUND",
                f"this node has no GPU {uuid!r}; GetNode shows what it has",
                gpu_uuid=uuid,
            )
        return self._facts[uuid]

    def known(self, uuid: str) -> GpuFacts:
        """Returns a GPU, or what its slices tell of it when this node does not have it any more."""
        gone = GpuFacts(uuid, 0, 0, "", 0, "", Mig.UNKNOWN, "this node does not show this GPU any more")
        return self._facts.get(uuid, gone)

    async def refresh(self) -> list[GpuFacts]:
        """Reads the GPUs anew, by index: an operator may have switched MIG mode.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED.
        """
        found = await asyncio.to_thread(_translated, "this node", self.driver.gpus)
        # A GPU that fell off the bus is still known: slices of the journal are on it.
        self._nameless = any(not gpu.uuid for gpu in found)
        self._facts.update({gpu.uuid: gpu for gpu in found if gpu.uuid})
        return found

    async def profile(self, gpu: GpuFacts, name: str) -> ProfileFacts:
        """Returns a profile that a GPU offers.

        Raises:
            Refusal: NOT_FOUND with PROFILE_NOT_FOUND; FAILED_PRECONDITION with MIG_DISABLED; as `ask` does.
        """
        if gpu.mig is not Mig.ENABLED:
            gpu = next((one for one in await self.refresh() if one.uuid == gpu.uuid), gpu)
        if gpu.mig is Mig.UNKNOWN:
            raise _silent(gpu)
        if gpu.mig is not Mig.ENABLED:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "MIG_DISABLED",
                f"GPU {gpu.index} cannot be cut now; if its model can, enable MIG with "
                f"`nvidia-smi -i {gpu.index} -mig 1`",
                gpu_uuid=gpu.uuid,
            )
        profiles = await self.ask(gpu, self.driver.profiles, gpu.uuid)
        for profile in profiles:
            if profile.name == name:
                return profile
        offered = ", ".join(profile.name for profile in profiles)
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "PROFILE_NOT_FOUND",
            f"GPU {gpu.index} has no profile {name!r}; it offers {offered}",
            gpu_uuid=gpu.uuid,
        )

    async def instances(self, gpu: GpuFacts) -> list[GpuInstance]:
        """Returns every GPU instance on a GPU, whoever made it, by placement; none when it cannot be cut.

        Raises:
            Refusal: as `ask` does.
        """
        now = self._facts.get(gpu.uuid, gpu)
        if now.mig is Mig.UNKNOWN:
            raise _silent(now)
        return await self.ask(gpu, self.driver.instances, gpu.uuid) if now.mig is Mig.ENABLED else []

    async def all_instances(self) -> list[tuple[GpuFacts, GpuInstance]]:
        """Returns every GPU instance of the node with its GPU, but for GPUs that do not answer: `may_have` knows."""
        found = []
        self._silent = set()
        for gpu in list(self._facts.values()):
            try:
                found.extend([(gpu, instance) for instance in await self.instances(gpu)])
            except Refusal as error:
                self._silent.add(gpu.uuid)
                _log.warning("a GPU does not list its slices", gpu=gpu.index, error=error.message)
        return found

    def may_have(self, uuid: str) -> bool:
        """Says whether a GPU may be there though `all_instances` could not look at it when it last did."""
        return uuid in self._silent or (uuid not in self._facts and self._nameless)

    async def holders(self, gpu: GpuFacts, gi: int) -> list[str]:
        """Returns the processes that use a GPU instance, each as its id and its command; none if it cannot be said."""
        try:
            pids = await self.ask(gpu, self.driver.processes, gpu.uuid, gi)
        except Refusal as error:  # NO_PERMISSION for an unprivileged user, say
            _log.info("the driver does not name who holds a slice", gpu=gpu.index, error=error.message)
            return []
        return [f"{pid} ({_command(pid)})" for pid in pids]

    async def ask(self, gpu: GpuFacts, call: Callable[..., _T], *arguments: Any) -> _T:
        """Calls the driver on a thread.

        Raises:
            Refusal: FAILED_PRECONDITION with PLACEMENT_TAKEN or SLICE_IN_USE; PERMISSION_DENIED with
                DRIVER_PERMISSION; INTERNAL with DRIVER_REFUSED.
        """
        return await asyncio.to_thread(_translated, f"GPU {gpu.index}", call, *arguments)


def _silent(gpu: GpuFacts) -> Refusal:
    return Refusal(
        grpc.StatusCode.INTERNAL,
        "DRIVER_REFUSED",
        f"GPU {gpu.index} cannot be used now: {gpu.notice}",
        gpu_uuid=gpu.uuid,
    )


def _translated(where: str, call: Callable[..., _T], *arguments: Any) -> _T:
    """Calls the driver, and turns what it refuses into words."""
    try:
        return call(*arguments)
    except DriverError as error:
        if error.code == pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "PLACEMENT_TAKEN",
                f"the driver has no room for that on {where}: {error}",
            ) from error
        if error.code == pynvml.NVML_ERROR_IN_USE:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "SLICE_IN_USE", str(error)) from error
        if error.code == pynvml.NVML_ERROR_NO_PERMISSION:
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                "DRIVER_PERMISSION",
                f"{error}; give the daemon's user read access to /dev/nvidia-caps/nvidia-cap1, as root",
            ) from error
        raise Refusal(
            grpc.StatusCode.INTERNAL,
            "DRIVER_REFUSED",
            f"the driver refused on {where}: {error}",
            nvml_call=error.call,
            nvml_code=str(error.code),
        ) from error


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "ended meanwhile"
    return b" ".join(words).decode(errors="replace").strip()[:200] or "no command line"
