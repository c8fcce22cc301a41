"""GPU performance monitoring: what a sample holds, and how two of them become a percentage.

Nothing here is measured on silicon, because there is none. The utilization of a slice is the CPU
share of the live processes that hold one of its cap nodes open: the CPU time that they used between
the two samples (utime + stime of ``/proc/PID/stat``), divided by the time that passed, at most
100 %. What cannot be derived from that (occupancy, tensor cores, memory bandwidth) is not answered.
"""

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pynvml

from nodedaemon.emulation.refusal import Code, Refusal

SHORTEST_INTERVAL_SECONDS = 0.1
"""nvml.h at nvmlGpmMetricsGet: the interval between two samples "should be greater than 100ms due to
the internal sample refresh rate"."""

_SUPPORTED_METRICS = frozenset({pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL, pynvml.NVML_GPM_METRIC_SM_UTIL})
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat after the command's name, which is field 2 (proc(5)).
_UTIME, _STIME, _STARTTIME = 11, 12, 19


@dataclass(frozen=True, slots=True)
class ProcessTime:
    """CPU time of one process.

    Attributes:
        started: When it started, in seconds of the boot clock; tells processes with one pid apart.
        used: What it has used since then, in seconds.
    """

    started: float
    used: float


@dataclass(frozen=True, slots=True)
class Share:
    """Who uses one GPU instance.

    Attributes:
        instance: Serial of the GPU instance.
        weight: Its compute slices, as a share of what was sampled.
        processes: Who holds one of its cap nodes, by pid.
        unseen: Whether it is held by nobody who could be seen, so that nothing can be said.
    """

    instance: int
    weight: float
    processes: Mapping[int, ProcessTime]
    unseen: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """What one sample buffer was filled with.

    Attributes:
        gpu: Index of the card.
        instance: Serial of the GPU instance, None for the whole card.
        taken: When the call was made, in seconds of the boot clock.
        counted: When the CPU times were read, in seconds of the boot clock.
        shares: One for a GPU instance, one per GPU instance for a whole card.
    """

    gpu: int
    instance: int | None
    taken: float
    counted: float
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class MetricAnswer:
    """One metric: a return code, and a value in percent when that is SUCCESS."""

    code: Code
    percent: float = 0.0


class Samples:
    """The sample buffers of this process, by number; a number is never given out twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._readings: dict[int, Reading | None] = {}

    def __len__(self) -> int:
        """Return how many buffers have not been freed."""
        return len(self._readings)

    def allocate(self) -> int:
        """Return the number of a new, empty buffer."""
        with self._lock:
            self._last += 1
            self._readings[self._last] = None
            return self._last

    def free(self, number: int) -> None:
        """Forget a buffer.

        Raises:
            Refusal: INVALID_ARGUMENT, when there is none of that number.
        """
        with self._lock:
            if number not in self._readings:
                raise Refusal(Code.INVALID_ARGUMENT)
            del self._readings[number]

    def fill(self, number: int, reading: Reading) -> None:
        """Put a reading into a buffer.

        Raises:
            Refusal: INVALID_ARGUMENT, when there is none of that number.
        """
        with self._lock:
            if number not in self._readings:
                raise Refusal(Code.INVALID_ARGUMENT)
            self._readings[number] = reading

    def reading(self, number: int) -> Reading:
        """Return what a buffer was filled with.

        Raises:
            Refusal: INVALID_ARGUMENT, when there is none of that number, or it is empty.
        """
        with self._lock:
            reading = self._readings.get(number)
        if reading is None:
            raise Refusal(Code.INVALID_ARGUMENT)
        return reading


def boot_clock() -> float:
    """Return the seconds since boot, the clock of a process's start time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_time(pid: int) -> ProcessTime | None:
    """Return the CPU time of a process, all its threads together; None when it is gone."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name may hold spaces and brackets; what follows the last bracket may not.
    fields = line.rpartition(")")[2].split()
    ticks = int(fields[_UTIME]) + int(fields[_STIME])
    return ProcessTime(int(fields[_STARTTIME]) / _TICKS_PER_SECOND, ticks / _TICKS_PER_SECOND)


def answer(metric: int, first: Reading, second: Reading) -> MetricAnswer:
    """Return one metric over the time between two readings of the same device.

    Returns:
        INVALID_ARGUMENT for no metric of nvml.h, NOT_SUPPORTED for one that the emulation cannot
        derive, NO_DATA for readings that are no more than 100 ms apart, UNKNOWN when a holder could
        not be seen.
    """
    if not 0 < metric < pynvml.NVML_GPM_METRIC_MAX:
        return MetricAnswer(Code.INVALID_ARGUMENT)
    if metric not in _SUPPORTED_METRICS:
        return MetricAnswer(Code.NOT_SUPPORTED)
    if second.taken - first.taken < SHORTEST_INTERVAL_SECONDS:
        return MetricAnswer(Code.NO_DATA)
    if any(share.unseen for share in (*first.shares, *second.shares)):
        return MetricAnswer(Code.UNKNOWN)
    return MetricAnswer(Code.SUCCESS, 100 * _busy(first, second))


def check_pair(first: Reading, second: Reading) -> None:
    """Refuse with INVALID_ARGUMENT two readings that are not of one device, or in no order."""
    if (first.gpu, first.instance) != (second.gpu, second.instance) or second.taken < first.taken:
        raise Refusal(Code.INVALID_ARGUMENT)


def _busy(first: Reading, second: Reading) -> float:
    elapsed = second.counted - first.counted
    if elapsed <= 0:
        return 0.0
    before = {share.instance: share.processes for share in first.shares}
    total = 0.0
    for share in second.shares:
        used = sum(
            _used_between(before.get(share.instance, {}).get(pid), now, elapsed) for pid, now in share.processes.items()
        )
        total += share.weight * min(used / elapsed, 1.0)
    return min(total, 1.0)


def _used_between(before: ProcessTime | None, now: ProcessTime, elapsed: float) -> float:
    """Return the CPU time that a process used between two readings, in seconds.

    Of one that took the slice in between, only what it has used since it began is known; so it
    counts as busy for the whole time at most, rather than as idle. What a process that ended in
    between used after the first reading is not known and not counted.
    """
    if before is not None and before.started == now.started:
        return now.used - before.used
    return min(now.used, elapsed)
