"""What NVML says of the card, or of the MIG slice, that a process measures on. Reads only; changes no setting."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pynvml

MIB: Final = 2**20
_MIG_NAME: Final = " MIG "
_MIG_UUID: Final = "MIG-"


class NoCardError(Exception):
    """NVML does not know the card; the message says why."""


@dataclass(frozen=True)
class Memory:
    """Device memory in use, in MiB, and whose: ``process`` or, where NVML names no processes, ``difference``."""

    used_mib: float
    source: str


class Card:
    """A card or a slice, by the UUID that CUDA gives it.

    Attributes:
        name: of the product, without the slice.
        mig_profile: such as ``1g.10gb``; empty for a whole card.
        total_mib: its memory.
        free_mib: what of it was free when this object was made.
        driver: version of the driver.
    """

    def __init__(self, uuid: str) -> None:
        """Find it.

        Args:
            uuid: with or without ``GPU-`` or ``MIG-`` before it.

        Raises:
            NoCardError: there is no driver, or no such card.
        """
        try:
            pynvml.nvmlInit()
            self._handle = _find(uuid)
            name, _, self.mig_profile = str(pynvml.nvmlDeviceGetName(self._handle)).partition(_MIG_NAME)
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
            self.driver = str(pynvml.nvmlSystemGetDriverVersion())
            self._gi: int | None = None
            self._gpu = self._handle
            if pynvml.nvmlDeviceIsMigDeviceHandle(self._handle):
                self._gi = int(pynvml.nvmlDeviceGetGpuInstanceId(self._handle))
                self._gpu = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle)
        except pynvml.NVMLError as error:
            raise NoCardError(f"NVML does not tell of the card {uuid}: {error}") from error
        self.name = name
        self.total_mib = memory.total / MIB
        self.free_mib = memory.free / MIB
        self._used_before = memory.used / MIB

    def memory(self) -> Memory:
        """What this process uses now.

        Raises:
            NoCardError: NVML answers no more.
        """
        try:
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                # In a container NVML may name processes by ids of another namespace, or without their memory.
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return Memory(process.usedGpuMemory / MIB, "process")
        except pynvml.NVMLError_NotSupported:
            pass
        except pynvml.NVMLError as error:
            raise NoCardError(f"NVML does not tell who uses the card: {error}") from error
        try:
            used = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used / MIB
        except pynvml.NVMLError as error:
            raise NoCardError(f"NVML does not tell the card's memory: {error}") from error
        return Memory(max(0.0, used - self._used_before), "difference")

    def activity(self, work: Callable[[], None]) -> tuple[float | None, str]:
        """How busy the card is while something runs.

        Args:
            work: what runs; it must keep the card at work for longer than the 100 ms that nvml.h asks for between two
                samples of GPM, and for longer than the second at most over which the driver takes utilization rates.

        Returns:
            Percent and its source: ``gpm``, ``utilization-rates``, or None and ``unavailable``.
        """
        samples = self._gpm_sample()
        work()
        if samples is not None:
            found = self._gpm_between(samples)
            if found is not None:
                return found, "gpm"
        if self._gi is None:
            try:
                return float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu), "utilization-rates"
            except pynvml.NVMLError:
                return None, "unavailable"
        return None, "unavailable"

    def _gpm_sample(self) -> Any | None:
        try:
            if not pynvml.nvmlGpmQueryDeviceSupport(self._gpu).isSupportedDevice:
                return None
            sample = pynvml.nvmlGpmSampleAlloc()
        except pynvml.NVMLError:
            return None
        try:
            if self._gi is None:
                return pynvml.nvmlGpmSampleGet(self._gpu, sample)
            return pynvml.nvmlGpmMigSampleGet(self._gpu, self._gi, sample)
        except pynvml.NVMLError:
            pynvml.nvmlGpmSampleFree(sample)
            return None

    def _gpm_between(self, first: Any) -> float | None:
        second = self._gpm_sample()
        try:
            if second is None:
                return None
            request = pynvml.c_nvmlGpmMetricsGet_t()
            request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
            request.numMetrics = 1
            request.sample1, request.sample2 = first, second
            request.metrics[0].metricId = pynvml.NVML_GPM_METRIC_SM_UTIL
            pynvml.nvmlGpmMetricsGet(request)
            answer = request.metrics[0]
            value = float(answer.value)
            # Counters that were reset give absurd values, or NaN.
            return value if answer.nvmlReturn == pynvml.NVML_SUCCESS and 0 <= value <= 100 else None
        except pynvml.NVMLError:
            return None
        finally:
            for sample in (first, second):
                if sample is not None:
                    pynvml.nvmlGpmSampleFree(sample)


def _find(uuid: str) -> Any:
    bare = uuid.removeprefix("GPU-").removeprefix(_MIG_UUID)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"{_MIG_UUID}{bare}")
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
