"""NVML's readings by field id, of which a dashboard asks for several in one call."""

import ctypes
import time
from collections.abc import Callable
from typing import Any

import pynvml

from nodedaemon.emulation import sensors
from nodedaemon.emulation.abi import CallTable, PointerTo
from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.geometry import known
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import Gpu
from nodedaemon.emulation.system_calls import DEVICE

table = CallTable()


def _power(driver: EmulatedDriver, gpu: Gpu) -> int:
    return sensors.power_milliwatts(known(gpu.card.power_limit_watts), sensors.busy_share(driver, gpu))


def _enabled(driver: EmulatedDriver, gpu: Gpu) -> int:
    return int(pynvml.NVML_FEATURE_ENABLED)


# Every one of them is an unsigned int. What is not here answers NOT_SUPPORTED for itself alone.
_READINGS: dict[int, Callable[[EmulatedDriver, Gpu], int]] = {
    pynvml.NVML_FI_DEV_ECC_CURRENT: _enabled,
    pynvml.NVML_FI_DEV_ECC_PENDING: _enabled,
    pynvml.NVML_FI_DEV_POWER_AVERAGE: _power,
    pynvml.NVML_FI_DEV_POWER_INSTANT: _power,
}


@table.export(
    "nvmlDeviceGetFieldValues",
    arguments=(DEVICE, ctypes.c_int, PointerTo(pynvml.c_nvmlFieldValue_t)),
)
def _field_values(driver: EmulatedDriver, handle: Any, count: int, values: Any) -> None:
    if count <= 0:
        raise Refusal(Code.INVALID_ARGUMENT)
    gpu = driver.gpu(driver.read(), handle, on_mig=Code.NOT_SUPPORTED)
    for position in range(count):
        value = values[position]
        begun = time.time_ns()
        try:
            reading = _READINGS.get(value.fieldId)
            if reading is None:
                raise Refusal(Code.NOT_SUPPORTED)
            value.value.uiVal = reading(driver, gpu)
            value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
            value.nvmlReturn = int(Code.SUCCESS)
        except Refusal as refusal:
            value.nvmlReturn = refusal.code
        ended = time.time_ns()
        value.timestamp = ended // 1000
        value.latencyUsec = (ended - begun) // 1000
