"""Looks at one GPU and all its slices: who is there, how much memory is in use, how busy it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pynvml

from nodedaemon.driver_facts import DriverError, GpuFacts, ask
from nodedaemon.gpm import Gpm, GpmSample, Means
from nodedaemon.utilization import SHORTEST_S, Card, Look, Reading
from puhui.rpc.moment import now

__all__ = ["DriverMeter", "Meter"]

# What a slice's handle, or its id, answers when the slice has just gone.
_GONE = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_UNINITIALIZED)
_NO_INSTANCE = 0xFFFFFFFF
_ASK_FOR_ACCESS = "give the daemon's user read access to /dev/nvidia-caps/nvidia-cap2, as root"
_MARGIN_S = 0.0005


class Meter(Protocol):
    """What reads GPUs. Calls block, and are made on one thread at a time per GPU."""

    def look(self, gpu: GpuFacts) -> Look:
        """Reads a GPU and its slices.

        Raises:
            DriverError: the GPU does not answer; nothing is left to be freed.
        """

    def means(self, first: GpmSample, second: GpmSample) -> Means:
        """Returns what two samples of one card say of the time between them."""

    def free(self, sample: GpmSample) -> None:
        """Gives a sample back.

        Raises:
            DriverError: it was given back before.
        """


@dataclass(frozen=True)
class _Presence:
    """Who is on a GPU: (pid, GPU instance, compute instance) each; None when the driver does not say."""

    processes: list[tuple[int, int, int]] | None
    notices: tuple[str, ...] = ()

    def on(self, card: Card) -> int | None:
        """Returns how many processes hold a card."""
        if self.processes is None:
            return None
        return len({pid for pid, gi, ci in self.processes if _is_on(card, gi, ci)})


class DriverMeter:
    """Reads GPUs through NVML.

    Handles of slices are resolved at every look: NVML gives them out anew.

    Args:
        monotonic: seconds that never jump.
        wall: seconds since the epoch.
        sleep: waits, in seconds, on this thread.
    """

    def __init__(
        self,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = now,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gpm = Gpm()
        self._monotonic = monotonic
        self._wall = wall
        self._sleep = sleep
        self._handles: dict[str, Any] = {}
        self._has_gpm: dict[str, bool] = {}
        self._sampled: dict[str, dict[int | None, float]] = {}

    def look(self, gpu: GpuFacts) -> Look:  # noqa: D102 - see Meter
        try:
            handle = self._handle(gpu.uuid)
            return self._look(gpu.uuid, handle)
        except DriverError:
            # A GPU that was reset, or fell off the bus, has another handle when it is back.
            self._handles.pop(gpu.uuid, None)
            raise

    def means(self, first: GpmSample, second: GpmSample) -> Means:  # noqa: D102 - see Meter
        return self._gpm.means(first, second)

    def free(self, sample: GpmSample) -> None:  # noqa: D102 - see Meter
        self._gpm.free(sample)

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            self._handles[uuid] = ask(pynvml.nvmlDeviceGetHandleByUUID, uuid)
        return self._handles[uuid]

    def _look(self, uuid: str, handle: Any) -> Look:
        mig = _mig_enabled(handle)
        if uuid not in self._has_gpm:
            self._has_gpm[uuid] = self._gpm.supported(handle)
        found: list[tuple[Card, Any]] = [(Card(uuid), handle)]
        found += list(_slices(handle)) if mig else []
        presence = _presence(handle)
        memory = {card: _memory_used_mib(device) for card, device in found}
        readings: dict[Card, Reading] = {}
        # Memory is read before GPM: some drivers have been seen to refuse it just after a GPM sample of a slice.
        samples: dict[int | None, GpmSample | DriverError | None] = {}
        taken: dict[int | None, tuple[float, float]] = {}
        for card, device in found:
            if card.gi not in samples:
                samples[card.gi] = self._sample(uuid, handle, card.gi)
                taken[card.gi] = self._monotonic(), self._wall()
            sample = samples[card.gi]
            if isinstance(sample, DriverError) and sample.code in _GONE and _has_gone(card, device):
                continue
            mib, unread = memory[card]
            at_s, time_s = taken[card.gi]
            trouble, notices = _why_not(sample)
            rate = None
            if not mig and not isinstance(sample, GpmSample):
                rate, why = _rate(handle)
                notices += why
            if sum(other.gi == card.gi for other, _ in found) > 1:
                notices += ("its GPU instance has several slices in it; utilization is that of all of them together",)
            readings[card] = Reading(
                card,
                at_s,
                time_s,
                processes=presence.on(card),
                memory_used_mib=mib,
                gpm=sample if isinstance(sample, GpmSample) else None,
                rate_percent=rate,
                trouble=trouble,
                notices=(*notices, *presence.notices, *unread),
            )
        return Look(uuid, readings)

    def _sample(self, uuid: str, handle: Any, gi: int | None) -> GpmSample | DriverError | None:
        """Takes a GPM sample, later than 100 ms after the last one; None when the GPU has no GPM."""
        if not self._has_gpm[uuid]:
            return None
        sampled = self._sampled.setdefault(uuid, {})
        wait_s = sampled.get(gi, 0.0) + SHORTEST_S + _MARGIN_S - self._monotonic()
        if wait_s > 0:
            self._sleep(wait_s)
        try:
            return self._gpm.sample(handle, gi)
        except DriverError as error:
            return error
        finally:
            # After the call, since the driver may have read its counters at any time during it.
            sampled[gi] = self._monotonic()


def _mig_enabled(handle: Any) -> bool:
    try:
        current, _pending = ask(pynvml.nvmlDeviceGetMigMode, handle)
    except DriverError as error:
        if error.code == pynvml.NVML_ERROR_NOT_SUPPORTED:
            return False
        raise
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _slices(handle: Any) -> Iterator[tuple[Card, Any]]:
    """Yields every MIG device of a GPU with its handle, whoever made it."""
    for index in range(ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)):
        try:
            device = ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            gi = int(ask(pynvml.nvmlDeviceGetGpuInstanceId, device))
            ci = int(ask(pynvml.nvmlDeviceGetComputeInstanceId, device))
            yield Card(str(ask(pynvml.nvmlDeviceGetUUID, device)), gi, ci), device
        except DriverError as error:
            # Indices have holes, and a slice may go at any time.
            if error.code not in _GONE:
                raise


def _has_gone(card: Card, device: Any) -> bool:
    if card.gi is None:
        return False
    try:
        return bool(ask(pynvml.nvmlDeviceGetUUID, device) != card.uuid)
    except DriverError as error:
        return error.code in _GONE


def _presence(handle: Any) -> _Presence:
    try:
        # The whole GPU is asked, once for all its slices.
        listed = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    except DriverError as error:
        return _Presence(None, (_unread("which processes hold it", error),))
    return _Presence([(int(one.pid), int(one.gpuInstanceId), int(one.computeInstanceId)) for one in listed])


def _is_on(card: Card, gi: int, ci: int) -> bool:
    if card.gi is None:
        return True
    # Who holds the GPU instance only, or of whom no compute instance is told, may be on any slice in it.
    return gi == card.gi and ci in (card.ci, _NO_INSTANCE)


def _memory_used_mib(device: Any) -> tuple[int | None, tuple[str, ...]]:
    try:
        return int(ask(pynvml.nvmlDeviceGetMemoryInfo, device).used) // 2**20, ()
    except DriverError as error:
        return None, (_unread("its memory", error),)


def _why_not(sample: GpmSample | DriverError | None) -> tuple[str, tuple[str, ...]]:
    """Returns why there is no GPM sample: as trouble when presence must not stand in for it, or as notices."""
    if not isinstance(sample, DriverError):
        return "", ()
    if sample.code == pynvml.NVML_ERROR_NOT_SUPPORTED:
        return "", ()
    why = _unread("its utilization", sample)
    if sample.code == pynvml.NVML_ERROR_NO_PERMISSION:
        return "", (why,)
    return why, ()


def _rate(handle: Any) -> tuple[float | None, tuple[str, ...]]:
    """Returns the driver's own rate: the share of time in which a kernel ran, in percent."""
    try:
        return float(ask(pynvml.nvmlDeviceGetUtilizationRates, handle).gpu), ()
    except DriverError as error:
        if error.code == pynvml.NVML_ERROR_NOT_SUPPORTED:
            return None, ()
        return None, (_unread("its utilization rate", error),)


def _unread(what: str, error: DriverError) -> str:
    advice = f"; {_ASK_FOR_ACCESS}" if error.code == pynvml.NVML_ERROR_NO_PERMISSION else ""
    return f"{what} could not be read ({error}){advice}"
