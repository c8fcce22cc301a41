"""Injected faults and latency."""

import time
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver, Latency
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver


def test_a_fault_fails_as_many_calls_as_asked_and_changes_nothing(driver: EmulatedDriver, h100: Any) -> None:
    driver.faults.inject("nvmlDeviceCreateGpuInstanceWithPlacement", pynvml.NVML_ERROR_UNKNOWN, count=2)
    for _ in range(2):
        with pytest.raises(pynvml.NVMLError_Unknown):
            calls.create(h100, 9, 0, 4)
    assert calls.all_placements(h100) == []
    calls.create(h100, 9, 0, 4)


def test_the_compute_instance_can_fail_after_the_gpu_instance(driver: EmulatedDriver, h100: Any) -> None:
    driver.faults.inject("nvmlGpuInstanceCreateComputeInstance", pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
    instance = calls.create(h100, 9, 0, 4)
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        calls.create_full_compute(instance)
    pynvml.nvmlGpuInstanceDestroy(instance)


def test_faults_are_named_without_the_version_of_the_symbol(driver: EmulatedDriver) -> None:
    driver.faults.inject("nvmlDeviceGetCount", pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        pynvml.nvmlDeviceGetCount()
    driver.faults.inject("nvmlDeviceGetCount", pynvml.NVML_ERROR_GPU_IS_LOST)
    driver.faults.clear()
    assert pynvml.nvmlDeviceGetCount() == 4


def test_a_call_takes_its_latency(start_driver: StartDriver) -> None:
    latency = Latency(by_function_seconds={"nvmlDeviceCreateGpuInstanceWithPlacement": 0.05})
    start_driver(latency=latency)
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = time.monotonic()
    calls.create(device, 9, 0, 4)
    assert time.monotonic() - before >= 0.05
