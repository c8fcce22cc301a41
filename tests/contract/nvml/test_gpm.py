"""GPU performance monitoring: the one utilization that MIG has, on Hopper and later."""

import time
from collections.abc import Callable
from ctypes import byref
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver
from tests.contract.nvml.holding import BURN, HOLD, python_process

INTERVAL_SECONDS = 0.11  # nvml.h asks for more than 100 ms


def _sample(device: Any, instance: int | None) -> Any:
    sample = pynvml.nvmlGpmSampleAlloc()
    if instance is None:
        return pynvml.nvmlGpmSampleGet(device, sample)
    return pynvml.nvmlGpmMigSampleGet(device, instance, sample)


def _metrics(first: Any, second: Any, *metrics: int) -> list[Any]:
    request = pynvml.c_nvmlGpmMetricsGet_t()
    request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
    request.numMetrics = len(metrics)
    request.sample1, request.sample2 = first, second
    for position, metric in enumerate(metrics):
        request.metrics[position].metricId = metric
    return list(pynvml.nvmlGpmMetricsGet(request).metrics[: len(metrics)])


def _utilization(first: Any, second: Any) -> float:
    sm, graphics = _metrics(first, second, pynvml.NVML_GPM_METRIC_SM_UTIL, pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL)
    assert (sm.nvmlReturn, graphics.nvmlReturn) == (0, 0)
    assert sm.value == graphics.value
    value: float = sm.value
    return value


@pytest.fixture
def slice_3g(h100: Any) -> int:
    instance = calls.create(h100, 9, 0, 4)
    calls.create_full_compute(instance)
    number: int = pynvml.nvmlGpuInstanceGetInfo(instance).id
    return number


def test_hopper_supports_gpm_and_ampere_does_not(any_driver: str) -> None:
    for index in range(pynvml.nvmlDeviceGetCount()):
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        hopper = pynvml.nvmlDeviceGetArchitecture(device) >= pynvml.NVML_DEVICE_ARCH_HOPPER
        assert pynvml.nvmlGpmQueryDeviceSupport(device).isSupportedDevice == hopper


def test_ampere_answers_not_supported_to_all_of_it(a100: Any) -> None:
    sample = pynvml.nvmlGpmSampleAlloc()
    attempts: list[Callable[[], Any]] = [
        lambda: pynvml.nvmlGpmSampleGet(a100, sample),
        lambda: pynvml.nvmlGpmMigSampleGet(a100, 1, sample),
        lambda: pynvml.nvmlGpmQueryIfStreamingEnabled(a100),
        lambda: pynvml.nvmlGpmSetStreamingEnabled(a100, 1),
    ]
    for call in attempts:
        with pytest.raises(pynvml.NVMLError_NotSupported):
            call()


def test_an_empty_slice_is_not_utilized(h100: Any, slice_3g: int) -> None:
    first = _sample(h100, slice_3g)
    time.sleep(INTERVAL_SECONDS)
    assert _utilization(first, _sample(h100, slice_3g)) == 0


def test_a_process_that_computes_utilizes_its_own_slice_only(driver: EmulatedDriver, h100: Any, slice_3g: int) -> None:
    other = calls.create(h100, 14, 4, 2)
    calls.create_full_compute(other)
    ids = {"own": slice_3g, "other": pynvml.nvmlGpuInstanceGetInfo(other).id, "card": None}
    with python_process(BURN, calls.cap_node(driver, f"gpu0/gi{slice_3g}/ci0/access")) as process:
        first = {name: _sample(h100, number) for name, number in ids.items()}
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        second = {name: _sample(h100, number) for name, number in ids.items()}
    own, unrelated, card = (_utilization(first[name], second[name]) for name in ids)
    assert 5 < own <= 100
    assert unrelated == 0
    assert card == pytest.approx(own * 3 / 7, rel=0.2)


def test_a_process_that_only_holds_its_slice_does_not_utilize_it(
    driver: EmulatedDriver, h100: Any, slice_3g: int
) -> None:
    with python_process(HOLD, calls.cap_node(driver, f"gpu0/gi{slice_3g}/access")):
        first = _sample(h100, slice_3g)
        time.sleep(INTERVAL_SECONDS)
        assert _utilization(first, _sample(h100, slice_3g)) < 10


def test_a_process_that_took_the_slice_in_between_counts(driver: EmulatedDriver, h100: Any, slice_3g: int) -> None:
    first = _sample(h100, slice_3g)
    with python_process(BURN, calls.cap_node(driver, f"gpu0/gi{slice_3g}/ci0/access")) as process:
        assert process.stdout is not None
        process.stdout.readline()
        second = _sample(h100, slice_3g)
    assert _utilization(first, second) > 5


def test_samples_too_close_to_each_other_have_no_data(h100: Any, slice_3g: int) -> None:
    first, second = _sample(h100, slice_3g), _sample(h100, slice_3g)
    (metric,) = _metrics(first, second, pynvml.NVML_GPM_METRIC_SM_UTIL)
    assert metric.nvmlReturn == pynvml.NVML_ERROR_NO_DATA


def test_what_cannot_be_derived_says_so_per_metric(h100: Any, slice_3g: int) -> None:
    first = _sample(h100, slice_3g)
    time.sleep(INTERVAL_SECONDS)
    wanted = (
        pynvml.NVML_GPM_METRIC_SM_UTIL,
        pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,
        pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
        0,
        pynvml.NVML_GPM_METRIC_MAX,
    )
    codes = [metric.nvmlReturn for metric in _metrics(first, _sample(h100, slice_3g), *wanted)]
    assert codes == [
        pynvml.NVML_SUCCESS,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
    ]


def test_samples_of_two_instances_do_not_go_together(h100: Any, slice_3g: int) -> None:
    first = _sample(h100, slice_3g)
    (instance,) = calls.instances(h100, 9)
    (compute,) = calls.compute_instances(instance, 2)
    pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlGpuInstanceDestroy(instance)
    again = calls.create(h100, 9, 0, 4)
    assert pynvml.nvmlGpuInstanceGetInfo(again).id == slice_3g
    for second in (_sample(h100, slice_3g), _sample(h100, None)):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            _metrics(first, second, pynvml.NVML_GPM_METRIC_SM_UTIL)


def test_a_sample_is_used_only_between_its_allocation_and_its_end(h100: Any, slice_3g: int) -> None:
    sample, other = pynvml.nvmlGpmSampleAlloc(), _sample(h100, slice_3g)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        _metrics(sample, other, pynvml.NVML_GPM_METRIC_SM_UTIL)  # never filled
    pynvml.nvmlGpmSampleFree(sample)
    attempts: list[Callable[[], Any]] = [
        lambda: pynvml.nvmlGpmSampleFree(sample),
        lambda: pynvml.nvmlGpmMigSampleGet(h100, slice_3g, sample),
        lambda: _metrics(sample, other, pynvml.NVML_GPM_METRIC_SM_UTIL),
        lambda: pynvml.nvmlGpmSampleFree(pynvml.c_nvmlGpmSample_t()),
    ]
    for call in attempts:
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            call()


def test_an_instance_is_sampled_through_its_card(h100: Any, slice_3g: int) -> None:
    sample = pynvml.nvmlGpmSampleAlloc()
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlGpmMigSampleGet(mig, slice_3g, sample)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlGpmMigSampleGet(h100, slice_3g + 1, sample)


def test_without_mig_mode_there_is_no_instance_to_sample(start_driver: StartDriver) -> None:
    start_driver(mig_enabled=False)
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        _sample(device, 0)
    first = _sample(device, None)
    time.sleep(INTERVAL_SECONDS)
    assert _utilization(first, _sample(device, None)) == 0


def test_structures_of_another_version_are_refused(h100: Any) -> None:
    support = pynvml.c_nvmlGpmSupport_t()
    request = pynvml.c_nvmlGpmMetricsGet_t()
    query = pynvml._nvmlGetFunctionPointer("nvmlGpmQueryDeviceSupport")
    assert query(h100, byref(support)) == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
    get = pynvml._nvmlGetFunctionPointer("nvmlGpmMetricsGet")
    assert get(byref(request)) == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH


def test_streaming_is_remembered(h100: Any, driver: EmulatedDriver) -> None:
    assert pynvml.nvmlGpmQueryIfStreamingEnabled(h100) == 0
    pynvml.nvmlGpmSetStreamingEnabled(h100, 1)
    assert pynvml.nvmlGpmQueryIfStreamingEnabled(h100) == 1
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlGpmSetStreamingEnabled(h100, 2)


class _Blindfold:
    """Finds that nodes are held, and by nobody that may be seen."""

    def is_held(self, node: Path) -> bool:
        return True

    def processes(self, nodes: Any) -> dict[Path, list[int]]:
        return {node: [] for node in nodes}


def test_a_holder_that_cannot_be_seen_is_unknown_not_idle(start_driver: StartDriver) -> None:
    start_driver(holders=_Blindfold())
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    number = pynvml.nvmlGpuInstanceGetInfo(calls.create(device, 9, 0, 4)).id
    first = _sample(device, number)
    time.sleep(INTERVAL_SECONDS)
    (metric,) = _metrics(first, _sample(device, number), pynvml.NVML_GPM_METRIC_SM_UTIL)
    assert metric.nvmlReturn == pynvml.NVML_ERROR_UNKNOWN
