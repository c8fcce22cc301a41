"""NVML calls that read a board as dashboards do: identity, clocks, PCIe, power limits, memory health.

What MIG mode takes away follows recordings of H100 and H200 boards with MIG on (``boards.json``):
no utilization, no fan, no remapped rows; clocks, PCIe traffic and ECC stay. Nothing is measured:
traffic and errors are 0 because there are none, clocks are the recorded idle or highest ones.
"""

import ctypes
import os
import uuid
from collections.abc import Callable
from typing import Any

import pynvml

from nodedaemon.emulation.abi import TEXT_OUT, UINT, UINT_OUT, CallTable, PointerTo, set_fields, write_text
from nodedaemon.emulation.boards import Board, Clocks, board
from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.geometry import known
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.sensors import busy_share
from nodedaemon.emulation.state import Gpu
from nodedaemon.emulation.system_calls import DEVICE, pci_bus

_ULONGLONG_OUT = PointerTo(ctypes.c_ulonglong)
_INT_OUT = PointerTo(ctypes.c_int)
_SERIAL_DIGITS = 13
_CLOCKS: dict[int, Callable[[Clocks], int]] = {
    pynvml.NVML_CLOCK_GRAPHICS: lambda clocks: clocks.graphics,
    pynvml.NVML_CLOCK_SM: lambda clocks: clocks.graphics,
    pynvml.NVML_CLOCK_MEM: lambda clocks: clocks.memory,
    pynvml.NVML_CLOCK_VIDEO: lambda clocks: clocks.video,
}
_EVENT_REASONS = 0x1FF  # as recorded on the H100
_COUNTED_LOCATIONS = (pynvml.NVML_MEMORY_LOCATION_DEVICE_MEMORY, pynvml.NVML_MEMORY_LOCATION_SRAM)
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)

table = CallTable()


def _gpu(driver: EmulatedDriver, handle: Any) -> Gpu:
    """Return the card; what is read of a whole board is not supported on a MIG device."""
    return driver.gpu(driver.read(), handle, on_mig=Code.NOT_SUPPORTED)


def _board(driver: EmulatedDriver, handle: Any) -> Board:
    return board(_gpu(driver, handle).model)


# Identity.


@table.export("nvmlDeviceGetSerial", arguments=(DEVICE, TEXT_OUT, UINT))
def _serial(driver: EmulatedDriver, handle: Any, serial: Any, length: int) -> None:
    gpu = _gpu(driver, handle)
    digits = uuid.UUID(gpu.uuid.removeprefix("GPU-")).int % 10**_SERIAL_DIGITS
    write_text(serial, length, f"{digits:0{_SERIAL_DIGITS}}")


@table.export("nvmlDeviceGetVbiosVersion", arguments=(DEVICE, TEXT_OUT, UINT))
def _vbios(driver: EmulatedDriver, handle: Any, version: Any, length: int) -> None:
    _gpu(driver, handle)
    write_text(version, length, "emulated")


@table.export("nvmlDeviceGetBrand", arguments=(DEVICE, UINT_OUT))
def _brand(driver: EmulatedDriver, handle: Any, brand: Any) -> None:
    _gpu(driver, handle)
    brand[0] = pynvml.NVML_BRAND_NVIDIA


@table.export("nvmlDeviceGetBoardId", arguments=(DEVICE, UINT_OUT))
def _board_id(driver: EmulatedDriver, handle: Any, number: Any) -> None:
    number[0] = pci_bus(_gpu(driver, handle).minor) << 8


@table.export("nvmlDeviceGetMultiGpuBoard", arguments=(DEVICE, UINT_OUT))
def _multi_gpu(driver: EmulatedDriver, handle: Any, answer: Any) -> None:
    _gpu(driver, handle)
    answer[0] = 0


# What a board without a display, a fan, or Windows answers.


@table.export("nvmlDeviceGetDisplayMode", arguments=(DEVICE, UINT_OUT))
def _display_mode(driver: EmulatedDriver, handle: Any, mode: Any) -> None:
    _gpu(driver, handle)
    mode[0] = pynvml.NVML_FEATURE_ENABLED


@table.export("nvmlDeviceGetDisplayActive", arguments=(DEVICE, UINT_OUT))
def _display_active(driver: EmulatedDriver, handle: Any, active: Any) -> None:
    _gpu(driver, handle)
    active[0] = pynvml.NVML_FEATURE_DISABLED


@table.export("nvmlDeviceGetFanSpeed", arguments=(DEVICE, UINT_OUT))
def _fan(driver: EmulatedDriver, handle: Any, percent: Any) -> None:
    _gpu(driver, handle)
    raise Refusal(Code.NOT_SUPPORTED)


@table.export("nvmlDeviceGetNumFans", arguments=(DEVICE, UINT_OUT))
def _fans(driver: EmulatedDriver, handle: Any, count: Any) -> None:
    _gpu(driver, handle)
    count[0] = 0


@table.export("nvmlDeviceGetDriverModel", "nvmlDeviceGetDriverModel_v2", arguments=(DEVICE, UINT_OUT, UINT_OUT))
def _driver_model(driver: EmulatedDriver, handle: Any, current: Any, pending: Any) -> None:
    _gpu(driver, handle)
    raise Refusal(Code.NOT_SUPPORTED)


# State, clocks and power.


@table.export("nvmlDeviceGetComputeMode", arguments=(DEVICE, UINT_OUT))
def _compute_mode(driver: EmulatedDriver, handle: Any, mode: Any) -> None:
    _gpu(driver, handle)
    mode[0] = pynvml.NVML_COMPUTEMODE_DEFAULT


@table.export("nvmlDeviceGetPerformanceState", arguments=(DEVICE, UINT_OUT))
def _performance_state(driver: EmulatedDriver, handle: Any, state: Any) -> None:
    _gpu(driver, handle)
    state[0] = pynvml.NVML_PSTATE_0


@table.export("nvmlDeviceGetClockInfo", arguments=(DEVICE, UINT, UINT_OUT))
def _clock(driver: EmulatedDriver, handle: Any, domain: int, megahertz: Any) -> None:
    gpu = _gpu(driver, handle)
    rates = board(gpu.model)
    clocks = rates.max_clocks if busy_share(driver, gpu) else rates.idle_clocks
    megahertz[0] = _of_domain(clocks, domain)


@table.export("nvmlDeviceGetMaxClockInfo", arguments=(DEVICE, UINT, UINT_OUT))
def _max_clock(driver: EmulatedDriver, handle: Any, domain: int, megahertz: Any) -> None:
    megahertz[0] = _of_domain(_board(driver, handle).max_clocks, domain)


@table.export("nvmlDeviceGetMaxCustomerBoostClock", arguments=(DEVICE, UINT, UINT_OUT))
def _boost_clock(driver: EmulatedDriver, handle: Any, domain: int, megahertz: Any) -> None:
    clocks = _board(driver, handle).max_clocks
    if domain != pynvml.NVML_CLOCK_GRAPHICS:
        raise Refusal(Code.NOT_SUPPORTED)
    megahertz[0] = known(clocks).graphics


def _of_domain(clocks: Clocks | None, domain: int) -> int:
    if domain not in _CLOCKS:
        raise Refusal(Code.INVALID_ARGUMENT)
    return _CLOCKS[domain](known(clocks))


@table.export(
    "nvmlDeviceGetSupportedClocksThrottleReasons",
    "nvmlDeviceGetSupportedClocksEventReasons",
    arguments=(DEVICE, _ULONGLONG_OUT),
)
def _supported_reasons(driver: EmulatedDriver, handle: Any, reasons: Any) -> None:
    _gpu(driver, handle)
    reasons[0] = _EVENT_REASONS


@table.export(
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetCurrentClocksEventReasons",
    arguments=(DEVICE, _ULONGLONG_OUT),
)
def _reasons(driver: EmulatedDriver, handle: Any, reasons: Any) -> None:
    idle = not busy_share(driver, _gpu(driver, handle))
    reasons[0] = pynvml.nvmlClocksThrottleReasonGpuIdle if idle else pynvml.nvmlClocksThrottleReasonNone


@table.export("nvmlDeviceGetPowerManagementMode", arguments=(DEVICE, UINT_OUT))
def _power_management(driver: EmulatedDriver, handle: Any, mode: Any) -> None:
    _gpu(driver, handle)
    mode[0] = pynvml.NVML_FEATURE_ENABLED


@table.export("nvmlDeviceGetPowerManagementLimitConstraints", arguments=(DEVICE, UINT_OUT, UINT_OUT))
def _power_constraints(driver: EmulatedDriver, handle: Any, lowest: Any, highest: Any) -> None:
    gpu = _gpu(driver, handle)
    lowest[0] = 1000 * known(board(gpu.model).power_min_watts)
    highest[0] = 1000 * known(gpu.card.power_limit_watts)


# The PCIe link.


@table.export(
    "nvmlDeviceGetCurrPcieLinkGeneration",
    "nvmlDeviceGetMaxPcieLinkGeneration",
    "nvmlDeviceGetGpuMaxPcieLinkGeneration",
    arguments=(DEVICE, UINT_OUT),
)
def _link_generation(driver: EmulatedDriver, handle: Any, generation: Any) -> None:
    generation[0] = known(_board(driver, handle).pcie_generation)


@table.export("nvmlDeviceGetCurrPcieLinkWidth", "nvmlDeviceGetMaxPcieLinkWidth", arguments=(DEVICE, UINT_OUT))
def _link_width(driver: EmulatedDriver, handle: Any, lanes: Any) -> None:
    lanes[0] = known(_board(driver, handle).pcie_width)


@table.export("nvmlDeviceGetPcieThroughput", arguments=(DEVICE, UINT, UINT_OUT))
def _pcie_throughput(driver: EmulatedDriver, handle: Any, counter: int, kib_per_second: Any) -> None:
    _gpu(driver, handle)
    if counter >= pynvml.NVML_PCIE_UTIL_COUNT:
        raise Refusal(Code.INVALID_ARGUMENT)
    kib_per_second[0] = 0


@table.export("nvmlDeviceGetPcieReplayCounter", arguments=(DEVICE, UINT_OUT))
def _replays(driver: EmulatedDriver, handle: Any, count: Any) -> None:
    _gpu(driver, handle)
    count[0] = 0


# Memory health.


@table.export("nvmlDeviceGetMemoryErrorCounter", arguments=(DEVICE, UINT, UINT, UINT, _ULONGLONG_OUT))
def _memory_errors(driver: EmulatedDriver, handle: Any, kind: int, counter: int, place: int, count: Any) -> None:
    _gpu(driver, handle)
    if kind >= pynvml.NVML_MEMORY_ERROR_TYPE_COUNT or counter >= pynvml.NVML_ECC_COUNTER_TYPE_COUNT:
        raise Refusal(Code.INVALID_ARGUMENT)
    if place not in _COUNTED_LOCATIONS:
        raise Refusal(Code.NOT_SUPPORTED)
    count[0] = 0


@table.export("nvmlDeviceGetRemappedRows", arguments=(DEVICE, UINT_OUT, UINT_OUT, UINT_OUT, UINT_OUT))
def _remapped_rows(
    driver: EmulatedDriver, handle: Any, correctable: Any, uncorrectable: Any, pending: Any, failed: Any
) -> None:
    if _gpu(driver, handle).mig:
        raise Refusal(Code.NOT_SUPPORTED)
    correctable[0] = uncorrectable[0] = pending[0] = failed[0] = 0


@table.export(
    "nvmlDeviceGetRowRemapperHistogram",
    arguments=(DEVICE, PointerTo(pynvml.c_nvmlRowRemapperHistogramValues)),
)
def _remap_histogram(driver: EmulatedDriver, handle: Any, histogram: Any) -> None:
    banks = known(_board(driver, handle).remap_banks)
    set_fields(histogram, max=banks, high=0, partial=0, low=0, none=0)


@table.export(
    "nvmlDeviceGetRetiredPages",
    arguments=(DEVICE, UINT, UINT_OUT, PointerTo(ctypes.c_ulonglong, nullable=True)),
)
def _retired_pages(driver: EmulatedDriver, handle: Any, cause: int, count: Any, addresses: Any) -> None:
    _gpu(driver, handle)
    raise Refusal(Code.NOT_SUPPORTED)  # these boards remap rows instead


@table.export("nvmlDeviceGetRetiredPagesPendingStatus", arguments=(DEVICE, UINT_OUT))
def _retirement_pending(driver: EmulatedDriver, handle: Any, pending: Any) -> None:
    _gpu(driver, handle)
    raise Refusal(Code.NOT_SUPPORTED)


# Where the board sits in the host: no two emulated cards share more than the host itself.


@table.export("nvmlDeviceGetCpuAffinity", arguments=(DEVICE, UINT, PointerTo(ctypes.c_ulong)))
def _cpu_affinity(driver: EmulatedDriver, handle: Any, words: int, mask: Any) -> None:
    _gpu(driver, handle)
    cpus = range(os.cpu_count() or 1)
    for word in range(words):
        mask[word] = sum(1 << (cpu - word * _BITS) for cpu in cpus if word * _BITS <= cpu < (word + 1) * _BITS)


@table.export("nvmlDeviceGetTopologyCommonAncestor", arguments=(DEVICE, DEVICE, UINT_OUT))
def _common_ancestor(driver: EmulatedDriver, one: Any, other: Any, level: Any) -> None:
    same = _gpu(driver, one).minor == _gpu(driver, other).minor
    level[0] = pynvml.NVML_TOPOLOGY_INTERNAL if same else pynvml.NVML_TOPOLOGY_NODE


@table.export("nvmlDeviceOnSameBoard", arguments=(DEVICE, DEVICE, _INT_OUT))
def _same_board(driver: EmulatedDriver, one: Any, other: Any, answer: Any) -> None:
    answer[0] = int(_gpu(driver, one).minor == _gpu(driver, other).minor)


@table.export("nvmlDeviceGetNvLinkState", arguments=(DEVICE, UINT, UINT_OUT))
def _nvlink(driver: EmulatedDriver, handle: Any, link: int, active: Any) -> None:
    _gpu(driver, handle)
    raise Refusal(Code.NOT_SUPPORTED)  # no links are emulated
