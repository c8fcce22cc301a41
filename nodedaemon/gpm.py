"""What is asked of NVML's GPU performance monitoring (GPM), through pynvml: Hopper and later.

Two samples of one GPU or GPU instance, more than 100 ms apart, become means over the time between them. A sample
is a buffer of the driver's that must be given back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynvml

from nodedaemon.driver_facts import DriverError, ask

__all__ = ["Gpm", "GpmSample", "Means"]

_METRICS = (pynvml.NVML_GPM_METRIC_SM_UTIL, pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL)
_ROUNDING = 0.5


@dataclass(frozen=True, eq=False)
class GpmSample:
    """One sample. `buffer` is the driver's; `Gpm.free` gives it back."""

    buffer: Any


@dataclass(frozen=True)
class Means:
    """Means over the time between two samples, in percent (0 to 100); None is not told."""

    multiprocessor_percent: float | None = None
    engine_percent: float | None = None
    trouble: str = ""
    """Why neither is told, in a sentence; empty when one is, or when the two samples do not belong together."""


class Gpm:
    """The GPM of this node's driver. Every call blocks for as long as the driver takes."""

    def supported(self, handle: Any) -> bool:
        """Says whether a GPU has GPM.

        Args:
            handle: the NVML handle of a physical GPU.

        Raises:
            DriverError: the GPU does not answer.
        """
        try:
            return bool(ask(pynvml.nvmlGpmQueryDeviceSupport, handle).isSupportedDevice)
        except DriverError as error:
            # A driver of before GPM does not have the function.
            if error.code in (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED):
                return False
            raise

    def sample(self, handle: Any, gi: int | None) -> GpmSample:
        """Takes a sample of a GPU instance, or of a whole GPU.

        Args:
            handle: the NVML handle of the physical GPU, also for a GPU instance.
            gi: id of the GPU instance; None for the whole GPU.

        Raises:
            DriverError: it cannot be sampled; nothing is left to be freed.
        """
        sample = GpmSample(ask(pynvml.nvmlGpmSampleAlloc))
        try:
            if gi is None:
                ask(pynvml.nvmlGpmSampleGet, handle, sample.buffer)
            else:
                ask(pynvml.nvmlGpmMigSampleGet, handle, gi, sample.buffer)
        except DriverError:
            self.free(sample)
            raise
        return sample

    def means(self, first: GpmSample, second: GpmSample) -> Means:
        """Returns what two samples of the same card say of the time between them."""
        request = pynvml.c_nvmlGpmMetricsGet_t()
        request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(_METRICS)
        request.sample1, request.sample2 = first.buffer, second.buffer
        for position, metric in enumerate(_METRICS):
            request.metrics[position].metricId = metric
        try:
            ask(pynvml.nvmlGpmMetricsGet, request)
        except DriverError as error:
            if error.code == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                # The GPU instance was destroyed and another one made under its id.
                return Means()
            return Means(trouble=f"the driver does not compute utilization ({error})")
        answers = [request.metrics[position] for position in range(len(_METRICS))]
        told = [_percent(int(answer.nvmlReturn), float(answer.value)) for answer in answers]
        if all(value is None for value in told):
            answer = answers[0]
            return Means(
                trouble=f"the driver does not tell utilization (return {answer.nvmlReturn}: {answer.value:g} %)"
            )
        return Means(multiprocessor_percent=told[0], engine_percent=told[1])

    def free(self, sample: GpmSample) -> None:
        """Gives a sample's buffer back.

        Raises:
            DriverError: it was freed before.
        """
        ask(pynvml.nvmlGpmSampleFree, sample.buffer)


def _percent(code: int, value: float) -> float | None:
    """Returns a metric that can be believed, within 0 to 100. Counters that were reset give absurd ones, or NaN."""
    if code != pynvml.NVML_SUCCESS or not -_ROUNDING <= value <= 100 + _ROUNDING:
        return None
    return min(max(value, 0.0), 100.0)
