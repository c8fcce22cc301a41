"""What dashboards and exporters read of a board, in MIG mode and without."""

from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_uint, c_ulonglong, cast
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver
from tests.contract.nvml.holding import HOLD, python_process

# Each takes a device; on every real board of these families they either answer or say that it cannot.
READINGS: dict[str, Callable[[Any], Any]] = {
    "serial": pynvml.nvmlDeviceGetSerial,
    "vbios": pynvml.nvmlDeviceGetVbiosVersion,
    "brand": pynvml.nvmlDeviceGetBrand,
    "board id": pynvml.nvmlDeviceGetBoardId,
    "compute mode": pynvml.nvmlDeviceGetComputeMode,
    "performance state": pynvml.nvmlDeviceGetPerformanceState,
    "clock": lambda device: pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM),
    "highest clock": lambda device: pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_MEM),
    "event reasons": pynvml.nvmlDeviceGetCurrentClocksEventReasons,
    "power": pynvml.nvmlDeviceGetPowerUsage,
    "power limits": pynvml.nvmlDeviceGetPowerManagementLimitConstraints,
    "temperature": lambda device: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
    "link generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration,
    "link width": pynvml.nvmlDeviceGetMaxPcieLinkWidth,
    "traffic": lambda device: pynvml.nvmlDeviceGetPcieThroughput(device, pynvml.NVML_PCIE_UTIL_TX_BYTES),
    "ECC": pynvml.nvmlDeviceGetEccMode,
    "affinity": lambda device: list(pynvml.nvmlDeviceGetCpuAffinity(device, 4)),
    "display": pynvml.nvmlDeviceGetDisplayActive,
    "fields": lambda device: pynvml.nvmlDeviceGetFieldValues(device, [pynvml.NVML_FI_DEV_POWER_INSTANT])[0].nvmlReturn,
}


@pytest.mark.parametrize("name", READINGS)
def test_a_reading_is_there_or_said_to_be_unsupported(any_driver: str, name: str) -> None:
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            assert READINGS[name](pynvml.nvmlDeviceGetHandleByIndex(index)) is not None
        except pynvml.NVMLError_NotSupported:
            continue


def test_an_idle_h100_in_mig_mode_reads_as_recorded(h100: Any) -> None:
    clocks = [pynvml.nvmlDeviceGetClockInfo(h100, domain) for domain in range(4)]
    assert clocks == [345, 345, 2619, 765]
    assert [pynvml.nvmlDeviceGetMaxClockInfo(h100, domain) for domain in range(4)] == [1980, 1980, 2619, 1545]
    assert pynvml.nvmlDeviceGetMaxCustomerBoostClock(h100, pynvml.NVML_CLOCK_GRAPHICS) == 1980
    assert pynvml.nvmlDeviceGetPerformanceState(h100) == 0
    assert pynvml.nvmlDeviceGetBAR1MemoryInfo(h100).bar1Total == 131072 << 20
    assert pynvml.nvmlDeviceGetPowerManagementLimitConstraints(h100) == [200_000, 700_000]
    assert pynvml.nvmlDeviceGetSupportedClocksEventReasons(h100) == 0x1FF
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(h100) == pynvml.nvmlClocksThrottleReasonGpuIdle
    assert pynvml.nvmlDeviceGetRowRemapperHistogram(h100).max == 2560
    assert pynvml.nvmlDeviceGetComputeMode(h100) == pynvml.NVML_COMPUTEMODE_DEFAULT


@pytest.mark.parametrize(
    "call",
    [
        pynvml.nvmlDeviceGetFanSpeed,
        pynvml.nvmlDeviceGetUtilizationRates,
        pynvml.nvmlDeviceGetEncoderUtilization,
        pynvml.nvmlDeviceGetJpgUtilization,
        pynvml.nvmlDeviceGetOfaUtilization,
        pynvml.nvmlDeviceGetRemappedRows,
        pynvml.nvmlDeviceGetDriverModel,
        pynvml.nvmlDeviceGetRetiredPagesPendingStatus,
        lambda device: pynvml.nvmlDeviceGetRetiredPages(device, pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR),
        lambda device: pynvml.nvmlDeviceGetNvLinkState(device, 0),
        pynvml.nvmlDeviceGetGpuOperationMode,
    ],
)
def test_mig_mode_does_not_support_what_it_does_not_on_hardware(h100: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(pynvml.NVMLError_NotSupported):
        call(h100)


def test_without_mig_mode_the_card_tells_more(start_driver: StartDriver) -> None:
    start_driver(mig_enabled=False)
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    assert pynvml.nvmlDeviceGetUtilizationRates(device).gpu == 0
    assert list(pynvml.nvmlDeviceGetRemappedRows(device)) == [0, 0, 0, 0]


def test_features_that_no_emulated_card_has_are_off(h100: Any) -> None:
    assert pynvml.nvmlDeviceGetVirtualizationMode(h100) == pynvml.NVML_GPU_VIRTUALIZATION_MODE_NONE
    assert pynvml.nvmlDeviceGetEncoderStats(h100) == (0, 0, 0)
    assert pynvml.nvmlDeviceGetAccountingMode(h100) == pynvml.NVML_FEATURE_DISABLED
    assert pynvml.nvmlUnitGetCount() == 0


def test_what_cannot_be_derived_is_not_invented(h100: Any) -> None:
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetTotalEnergyConsumption(h100)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetTemperatureThreshold(h100, pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN)


def test_clocks_rise_while_a_process_holds_a_slice(driver: EmulatedDriver, h100: Any) -> None:
    calls.create_full_compute(calls.create(h100, 9, 0, 4))
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/ci0/access")):
        assert pynvml.nvmlDeviceGetClockInfo(h100, pynvml.NVML_CLOCK_SM) == 1980
        assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(h100) == pynvml.nvmlClocksThrottleReasonNone
    assert pynvml.nvmlDeviceGetClockInfo(h100, pynvml.NVML_CLOCK_SM) == 345


def test_what_no_recording_of_a_board_shows_is_not_supported(driver: EmulatedDriver) -> None:
    a30 = pynvml.nvmlDeviceGetHandleByIndex(2)
    for call in (pynvml.nvmlDeviceGetBAR1MemoryInfo, pynvml.nvmlDeviceGetCurrPcieLinkWidth):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            call(a30)


def test_a_slice_has_its_share_of_bar1_and_no_sensors(a100: Any) -> None:
    calls.create_full_compute(calls.create(a100, 9, 0, 4))
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(a100, 0)
    assert pynvml.nvmlDeviceGetBAR1MemoryInfo(mig).bar1Total == 32768 << 20
    sensors: list[Callable[[Any], Any]] = [
        pynvml.nvmlDeviceGetPowerUsage,
        pynvml.nvmlDeviceGetSerial,
        pynvml.nvmlDeviceGetPerformanceState,
    ]
    for call in sensors:
        with pytest.raises(pynvml.NVMLError_NotSupported):
            call(mig)


def test_serials_and_boards_are_told_apart(driver: EmulatedDriver) -> None:
    cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(4)]
    assert len({pynvml.nvmlDeviceGetSerial(card) for card in cards}) == 4
    assert len({pynvml.nvmlDeviceGetBoardId(card) for card in cards}) == 4
    assert all(len(pynvml.nvmlDeviceGetSerial(card)) == 13 for card in cards)
    assert pynvml.nvmlDeviceGetTopologyCommonAncestor(cards[0], cards[1]) == pynvml.NVML_TOPOLOGY_NODE
    assert pynvml.nvmlDeviceOnSameBoard(cards[0], cards[0])
    assert not pynvml.nvmlDeviceOnSameBoard(cards[0], cards[1])


def test_memory_errors_are_counted_where_the_board_counts_them(h100: Any) -> None:
    kind, counter = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_AGGREGATE_ECC
    for place in (pynvml.NVML_MEMORY_LOCATION_DEVICE_MEMORY, pynvml.NVML_MEMORY_LOCATION_SRAM):
        assert pynvml.nvmlDeviceGetMemoryErrorCounter(h100, kind, counter, place) == 0
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetMemoryErrorCounter(h100, kind, counter, pynvml.NVML_MEMORY_LOCATION_REGISTER_FILE)


def test_each_field_answers_for_itself(h100: Any) -> None:
    power, link, ecc = pynvml.nvmlDeviceGetFieldValues(
        h100,
        [pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT, pynvml.NVML_FI_DEV_ECC_CURRENT],
    )
    assert (power.nvmlReturn, link.nvmlReturn, ecc.nvmlReturn) == (0, pynvml.NVML_ERROR_NOT_SUPPORTED, 0)
    assert power.value.uiVal == pynvml.nvmlDeviceGetPowerUsage(h100)
    assert ecc.value.uiVal == 1


def test_process_details_name_who_holds_a_slice(driver: EmulatedDriver, h100: Any) -> None:
    calls.create_full_compute(calls.create(h100, 9, 0, 4))
    version = pynvml.nvmlProcessDetailList_v1
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/ci0/access")) as process:
        (detail,) = pynvml.nvmlDeviceGetRunningProcessDetailList(h100, version, 0)
        assert (detail.pid, detail.gpuInstanceId, detail.computeInstanceId) == (process.pid, 1, 0)
        assert pynvml.nvmlDeviceGetRunningProcessDetailList(h100, version, 1) == []


class _SameMemory(Structure):
    """nvmlMemory_t as some programs declare it again for themselves."""

    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _ShorterMemory(Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong)]


def test_a_structure_declared_again_is_taken_and_another_is_not(h100: Any) -> None:
    function = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetMemoryInfo")
    memory = _SameMemory()
    assert function(h100, byref(memory)) == pynvml.NVML_SUCCESS
    assert memory.total == 81559 << 20
    with pytest.raises(Exception, match="expected LP_c_nvmlMemory_t"):
        function(h100, byref(_ShorterMemory()))


def test_a_change_of_mig_configuration_is_an_event(h100: Any, a100: Any) -> None:
    events = pynvml.nvmlEventSetCreate()
    kinds = pynvml.nvmlDeviceGetSupportedEventTypes(h100)
    pynvml.nvmlDeviceRegisterEvents(h100, kinds, events)
    calls.create(a100, 9, 0, 4)
    with pytest.raises(pynvml.NVMLError_Timeout):
        pynvml.nvmlEventSetWait(events, 0)
    calls.create(h100, 9, 0, 4)
    event = pynvml.nvmlEventSetWait(events, 1000)
    assert event.eventType == pynvml.nvmlEventMigConfigChange
    assert pynvml.nvmlDeviceGetIndex(event.device) == 0
    with pytest.raises(pynvml.NVMLError_Timeout):
        pynvml.nvmlEventSetWait(events, 30)
    pynvml.nvmlEventSetFree(events)
    attempts: list[Callable[[], Any]] = [
        lambda: pynvml.nvmlEventSetFree(events),
        lambda: pynvml.nvmlEventSetWait(events, 0),
    ]
    for call in attempts:
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            call()


def test_events_that_never_come_are_not_registered(h100: Any) -> None:
    events = pynvml.nvmlEventSetCreate()
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceRegisterEvents(h100, pynvml.nvmlEventTypeClock, events)


def test_a_pointer_may_come_from_a_cast(h100: Any) -> None:
    count = c_uint()
    function = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetNumFans")
    assert function(h100, cast(byref(count), POINTER(c_uint))) == pynvml.NVML_SUCCESS
