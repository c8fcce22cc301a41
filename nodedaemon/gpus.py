"""The node's GPUs, asked from the event loop, and refusing in words."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc
import pynvml
import structlog

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import DriverError, GpuFacts, GpuInstance, Mig, ProfileFacts
from nodedaemon.holders import Holder, holder
from nodedaemon.threads import Worker, on_thread
from puhui.rpc.errors import Refusal

__all__ = ["Gpus", "Listing"]

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Listing:
    """What the driver lists of the whole node at one time."""

    instances: list[tuple[GpuFacts, GpuInstance]]
    """Every GPU instance, whoever made it, with its GPU."""
    silent: frozenset[str]
    """UUIDs of the GPUs that do not answer."""
    named: frozenset[str] | None
    """UUIDs of the GPUs that are known, when there is one that does not even tell its UUID; otherwise None."""

    def may_have(self, uuid: str) -> bool:
        """Says whether a GPU may be there though it could not be looked at."""
        return uuid in self.silent or (self.named is not None and uuid not in self.named)


class Gpus:
    """The GPUs of this node. One that hangs holds up neither the others nor the event loop.

    Args:
        driver: the GPU driver.
        emulated: whether it is emulated.
        patience_s: how long a GPU may take to tell what it has, in seconds. What changes a GPU may take any time:
            its outcome must be known.

    Raises:
        DriverError: the driver does not answer at all.
    """

    def __init__(self, driver: Driver, *, emulated: bool, patience_s: float = 3.0) -> None:
        self.driver = driver
        self.emulated = emulated
        self._patience_s = patience_s
        self._hanging: dict[int, Future[GpuFacts]] = {}
        self._reads: dict[str, asyncio.Future[Any]] = {}
        self._workers: dict[tuple[str, str], Worker] = {}
        self._surveying: asyncio.Future[list[GpuFacts]] | None = None
        self.driver_version = driver.version()
        self.nvml_version = driver.nvml_version()
        found = self._survey()
        self._facts = {gpu.uuid: gpu for gpu in found if gpu.uuid}
        # A GPU that does not even tell its UUID may be any.
        self._nameless = any(not gpu.uuid for gpu in found)
        # NVML lets calls on one GPU overlap, and then two creates race for one place. Other GPUs go on.
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def _survey(self) -> list[GpuFacts]:
        """Reads every GPU at once, each on a thread of its own."""
        deadline = time.monotonic() + self._patience_s
        asked: dict[int, Future[GpuFacts]] = {}
        for index in range(self.driver.count()):
            hanging = self._hanging.pop(index, None)
            # One thread at most is ever caught in one GPU.
            asked[index] = (
                hanging
                if hanging and not hanging.done()
                else on_thread(partial(self.driver.gpu, index), f"gpu-{index}")
            )
        found = []
        for index, facts in asked.items():
            try:
                found.append(facts.result(max(deadline - time.monotonic(), 0)))
            except TimeoutError:
                self._hanging[index] = facts
                found.append(self.driver.unanswered(index, f"it has not answered for {self._patience_s:g} s"))
        return found

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

    async def find(self, uuid: str) -> GpuFacts:
        """Returns a GPU, after another look when it is not known: it may not have answered when this daemon started.

        Raises:
            Refusal: NOT_FOUND with GPU_NOT_FOUND; INTERNAL with DRIVER_REFUSED.
        """
        if uuid not in self._facts:
            await self.refresh()
        return self.gpu(uuid)

    def every(self) -> list[GpuFacts]:
        """Returns the GPUs as they were known last, by index."""
        return sorted(self._facts.values(), key=lambda gpu: gpu.index)

    def known(self, uuid: str) -> GpuFacts:
        """Returns a GPU, or what its slices tell of it when this node does not have it any more."""
        gone = GpuFacts(uuid, 0, 0, "", 0, "", Mig.UNKNOWN, "this node does not show this GPU any more")
        return self._facts.get(uuid, gone)

    async def refresh(self) -> list[GpuFacts]:
        """Reads the GPUs anew, by index: an operator may have switched MIG mode.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED.
        """
        if self._surveying is None or self._surveying.done():
            # Whoever comes meanwhile waits for the same: each GPU is asked by one thread at a time.
            self._surveying = asyncio.ensure_future(asyncio.to_thread(_translated, "this node", self._survey))
        found = await asyncio.shield(self._surveying)
        # A GPU that fell off the bus is still known: slices of the journal are on it.
        self._nameless = any(not gpu.uuid for gpu in found)
        self._facts.update({gpu.uuid: gpu for gpu in found if gpu.uuid})
        return found

    async def cut_minors(self) -> list[int]:
        """Returns the device minors of the GPUs that have MIG mode on now, ascending.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED.
        """
        return sorted(gpu.minor for gpu in await self.refresh() if gpu.mig is Mig.ENABLED)

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
                f"`{mig_command(gpu.index, emulated=self.emulated)}`",
                gpu_uuid=gpu.uuid,
            )
        profiles = self.driver.known_profiles(gpu.uuid)
        if profiles is None:
            profiles = await self.read(gpu, partial(self.driver.profiles, gpu.uuid))
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

    async def instances(self, gpu: GpuFacts, *, compute: bool = True) -> list[GpuInstance]:
        """Returns every GPU instance that is listed on a GPU, whoever made it, by placement; none when it is not cut.

        Raises:
            Refusal: as `read` does.
        """
        now = self._facts.get(gpu.uuid, gpu)
        if now.mig is Mig.UNKNOWN:
            raise _silent(now)
        if now.mig is not Mig.ENABLED:
            return []
        return await self.read(gpu, partial(self.driver.instances, gpu.uuid, compute=compute))

    async def list_all(self) -> Listing:
        """Returns every GPU instance of the node, as far as its GPUs answer."""
        gpus = list(self._facts.values())
        answers = await asyncio.gather(*(self.instances(gpu) for gpu in gpus), return_exceptions=True)
        found, silent = [], set()
        for gpu, answer in zip(gpus, answers, strict=True):
            if isinstance(answer, list):
                found.extend([(gpu, instance) for instance in answer])
            elif isinstance(answer, Refusal):
                silent.add(gpu.uuid)
                _log.warning("a GPU does not list its slices", gpu=gpu.index, error=answer.message)
            else:
                raise answer
        if self._nameless:
            return Listing(found, frozenset(silent), frozenset(gpu.uuid for gpu in gpus))
        return Listing(found, frozenset(silent), None)

    async def holders(self, gpu: GpuFacts, gi: int) -> list[Holder]:
        """Returns the processes that use a GPU instance; none if it cannot be said.

        Raises:
            Refusal: the driver does not say; PERMISSION_DENIED for an unprivileged user, say.
        """
        pids = await self.read(gpu, partial(self.driver.processes, gpu.uuid, gi))
        # Each is looked up in /proc.
        return await asyncio.to_thread(lambda: [holder(pid) for pid in pids]) if pids else []

    async def read(self, gpu: GpuFacts, call: Callable[[], _T]) -> _T:
        """Asks the driver for something that changes nothing, and waits no longer than a patience for it.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED when the GPU hangs; otherwise as `ask` does.
        """
        caught = self._reads.get(gpu.uuid)
        if caught is None or caught.done():
            caught = None
            answer = self._worker(gpu, "read").run(partial(_translated, f"GPU {gpu.index}", call))
            done, _ = await asyncio.wait([answer], timeout=self._patience_s)
            if done:
                return answer.result()
            # Its thread may be caught for long; nobody else is sent after it until it is back.
            answer.add_done_callback(lambda late: late.cancelled() or late.exception())
            self._reads[gpu.uuid] = answer
        known = self._facts.get(gpu.uuid, gpu)
        raise _silent(replace(known, notice=f"it has not answered for {self._patience_s:g} s; see `dmesg`"))

    async def ask(self, gpu: GpuFacts, call: Callable[..., _T], *arguments: Any) -> _T:
        """Calls the driver on a thread, and waits until it is done: what changes a GPU has an outcome.

        Raises:
            Refusal: FAILED_PRECONDITION with PLACEMENT_TAKEN or SLICE_IN_USE; PERMISSION_DENIED with
                DRIVER_PERMISSION; INTERNAL with DRIVER_REFUSED.
        """
        return await self._worker(gpu, "change").run(partial(_translated, f"GPU {gpu.index}", call, *arguments))

    def _worker(self, gpu: GpuFacts, use: str) -> Worker:
        """Returns the thread for one use of one GPU: a call that hangs there holds up no other GPU, and no reading."""
        key = gpu.uuid, use
        if key not in self._workers:
            self._workers[key] = Worker(f"gpu-{gpu.index}-{use}")
        return self._workers[key]

    def close(self) -> None:
        """Ends the threads, but for what hangs."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def mig_command(index: int, *, emulated: bool) -> str:
    """Returns the command by which an operator enables MIG mode on a GPU."""
    return f"puhui-nodedaemon emulation mig {index} on" if emulated else f"nvidia-smi -i {index} -mig 1"


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
