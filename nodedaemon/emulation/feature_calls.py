"""NVML calls about features that exporters ask for and that an emulated card has none of."""

import ctypes
from typing import Any

import pynvml

from nodedaemon.emulation.abi import UINT_OUT, CallTable, PointerTo
from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.system_calls import DEVICE

# nvml.h says unsigned int; pynvml passes pointers to something wider, whose lower half the library
# writes. Only what is 0 can be answered so without asking which of the two it is.
_ZERO_OUT = PointerTo(ctypes.c_ulonglong)

table = CallTable()


def _require_card(driver: EmulatedDriver, handle: Any) -> None:
    driver.gpu(driver.read(), handle, on_mig=Code.NOT_SUPPORTED)


@table.export("nvmlDeviceGetVirtualizationMode", arguments=(DEVICE, _ZERO_OUT))
def _virtualization(driver: EmulatedDriver, handle: Any, mode: Any) -> None:
    _require_card(driver, handle)
    mode[0] = pynvml.NVML_GPU_VIRTUALIZATION_MODE_NONE


@table.export("nvmlDeviceGetEncoderStats", arguments=(DEVICE, _ZERO_OUT, _ZERO_OUT, _ZERO_OUT))
def _encoder(driver: EmulatedDriver, handle: Any, sessions: Any, frames_per_second: Any, microseconds: Any) -> None:
    _require_card(driver, handle)
    sessions[0] = frames_per_second[0] = microseconds[0] = 0


@table.export("nvmlDeviceGetAccountingMode", arguments=(DEVICE, UINT_OUT))
def _accounting(driver: EmulatedDriver, handle: Any, mode: Any) -> None:
    _require_card(driver, handle)
    mode[0] = pynvml.NVML_FEATURE_DISABLED


@table.export("nvmlDeviceGetGpuOperationMode", arguments=(DEVICE, UINT_OUT, UINT_OUT))
def _operation_mode(driver: EmulatedDriver, handle: Any, current: Any, pending: Any) -> None:
    _require_card(driver, handle)
    raise Refusal(Code.NOT_SUPPORTED)


@table.export("nvmlDeviceGetTotalEnergyConsumption", arguments=(DEVICE, PointerTo(ctypes.c_ulonglong)))
def _energy(driver: EmulatedDriver, handle: Any, millijoules: Any) -> None:
    _require_card(driver, handle)
    raise Refusal(Code.NOT_SUPPORTED)  # hardware counts it; there is nothing here that could be counted


@table.export("nvmlDeviceGetTemperatureThreshold", arguments=(DEVICE, ctypes.c_uint, UINT_OUT))
def _threshold(driver: EmulatedDriver, handle: Any, threshold: int, celsius: Any) -> None:
    _require_card(driver, handle)
    if threshold >= pynvml.NVML_TEMPERATURE_THRESHOLD_COUNT:
        raise Refusal(Code.INVALID_ARGUMENT)
    raise Refusal(Code.NOT_SUPPORTED)  # Hopper tells limits as margins; those of Ampere are not recorded


@table.export("nvmlUnitGetCount", arguments=(UINT_OUT,))
def _units(driver: EmulatedDriver, count: Any) -> None:
    count[0] = 0
