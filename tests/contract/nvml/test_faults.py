"""Injected faults and latency."""

import json
import time
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver, Fault, Latency, UuidPolicy, When
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import CARDS, StartDriver, started
from tests.contract.nvml.holding import OTHER, python_process


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


def test_a_lost_answer_has_done_its_work(driver: EmulatedDriver, h100: Any) -> None:
    create = "nvmlDeviceCreateGpuInstanceWithPlacement"
    driver.operator.inject(Fault(create, pynvml.NVML_ERROR_TIMEOUT, when=When.AFTER))
    with pytest.raises(pynvml.NVMLError_Timeout):
        calls.create(h100, 9, 0, 4)
    assert calls.all_placements(h100) == [(0, 4)]


def test_some_calls_are_let_pass_first(driver: EmulatedDriver, h100: Any) -> None:
    driver.operator.inject(Fault("nvmlDeviceGetName", pynvml.NVML_ERROR_GPU_IS_LOST, count=2, skip=1))
    pynvml.nvmlDeviceGetName(h100)
    for _ in range(2):
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            pynvml.nvmlDeviceGetName(h100)
    pynvml.nvmlDeviceGetName(h100)
    assert driver.operator.look().faults == []


def test_a_fault_of_one_card_leaves_the_others_alone(driver: EmulatedDriver, h100: Any, a100: Any) -> None:
    driver.operator.inject(Fault("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_UNKNOWN, gpu=1))
    driver.operator.inject(Fault("nvmlDeviceGetName", pynvml.NVML_ERROR_UNKNOWN, gpu=1))
    mine, other = calls.create(a100, 9, 0, 4), calls.create(h100, 9, 0, 4)
    pynvml.nvmlGpuInstanceDestroy(other)
    pynvml.nvmlDeviceGetName(h100)
    with pytest.raises(pynvml.NVMLError_Unknown):
        pynvml.nvmlGpuInstanceDestroy(mine)
    with pytest.raises(pynvml.NVMLError_Unknown):
        pynvml.nvmlDeviceGetName(a100)


@pytest.mark.parametrize("when", When)
def test_a_delayed_call_answers_as_ever(driver: EmulatedDriver, h100: Any, when: When) -> None:
    driver.operator.inject(Fault("nvmlDeviceGetName", delay_seconds=0.05, when=when))
    before = time.monotonic()
    assert pynvml.nvmlDeviceGetName(h100) == "NVIDIA H100 80GB HBM3"
    assert time.monotonic() - before >= 0.05


def test_stale_lists_show_what_was_before_the_last_change(driver: EmulatedDriver, h100: Any) -> None:
    first = calls.create(h100, 14, 0, 2)
    calls.create_full_compute(first)
    driver.operator.inject(Fault("nvmlDeviceGetGpuInstances", stale=True, count=1))
    driver.operator.inject(Fault("nvmlGpuInstanceGetComputeInstances", stale=True))
    driver.operator.inject(Fault("nvmlDeviceGetMigDeviceHandleByIndex", stale=True))
    second = calls.create(h100, 14, 2, 2)
    assert len(calls.instances(h100, 14)) == 1
    assert len(calls.instances(h100, 14)) == 2
    calls.create_full_compute(second)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        calls.compute_instances(calls.create(h100, 14, 4, 2), 1)
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 2)
    assert driver.operator.look().before is None


def test_every_process_of_the_node_meets_what_one_of_them_injected(driver: EmulatedDriver, h100: Any) -> None:
    code = OTHER + (
        "from nodedaemon.emulation import Fault, Latency, Operator, UuidPolicy\n"
        "operator = Operator.of_existing(Path(sys.argv[1]))\n"
        "operator.inject(Fault('nvmlDeviceGetName', 15))\n"
        "operator.set_latency(Latency(by_function_seconds={'nvmlDeviceGetUUID': 0.05}))\n"
        "operator.set_uuid_policy(UuidPolicy.REUSED)\n"
        "print('done', flush=True)\n"
    )
    with python_process(code, driver.state_dir):
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            pynvml.nvmlDeviceGetName(h100)
        before = time.monotonic()
        pynvml.nvmlDeviceGetUUID(h100)
        assert time.monotonic() - before >= 0.05
        instance = calls.create(h100, 9, 0, 4)
        uuids = set()
        for _ in range(2):
            compute = calls.create_full_compute(instance)
            uuids.add(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)))
            pynvml.nvmlComputeInstanceDestroy(compute)
        assert len(uuids) == 1


def test_a_restart_keeps_faults_latency_and_uuid_policy(tmp_path: Path) -> None:
    with started(tmp_path, CARDS) as driver:
        driver.operator.inject(Fault("nvmlDeviceGetName", pynvml.NVML_ERROR_UNKNOWN))
        driver.operator.set_uuid_policy(UuidPolicy.REUSED)
    with started(tmp_path, CARDS) as again:
        assert [fault.function for fault in again.operator.look().faults] == ["nvmlDeviceGetName"]
        assert again.operator.look().uuid_policy is UuidPolicy.REUSED
        assert again.operator.clear_faults() == 1
        pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))


def test_a_state_of_the_first_version_is_read(tmp_path: Path) -> None:
    with started(tmp_path, "H100-80GB-SXM5"):
        uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
    state = json.loads((tmp_path / "state.json").read_text())
    for later in ("uuid_policy", "latency", "faults", "before"):
        del state[later]
    del state["gpus"][0]["gpm_streaming"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with started(tmp_path, "H100-80GB-SXM5"):
        assert pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0)) == uuid
