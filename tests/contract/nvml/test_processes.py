"""Real processes: who is busy, who shares the state, and what a kill -9 leaves."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import CARDS, started
from tests.contract.nvml.holding import HOLD, OTHER, python_process


@pytest.fixture
def slice_3g(h100: Any) -> tuple[Any, Any]:
    instance = calls.create(h100, 9, 0, 4)
    return instance, calls.create_full_compute(instance)


def test_a_slice_that_a_process_holds_is_in_use(driver: EmulatedDriver, h100: Any, slice_3g: tuple[Any, Any]) -> None:
    instance, compute = slice_3g
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(mig) == []
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/ci0/access")) as process:
        with pytest.raises(pynvml.NVMLError_InUse):
            pynvml.nvmlComputeInstanceDestroy(compute)
        for device in (mig, h100):
            (running,) = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
            assert running.pid == process.pid
            assert (running.gpuInstanceId, running.computeInstanceId) == (1, 0)
            assert running.usedGpuMemory is None
        assert pynvml.nvmlSystemGetProcessName(process.pid) == sys.executable
    pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlGpuInstanceDestroy(instance)


def test_a_process_keeps_the_gpu_instance_alone(driver: EmulatedDriver, h100: Any) -> None:
    instance = calls.create(h100, 9, 0, 4)
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/access")) as process:
        with pytest.raises(pynvml.NVMLError_InUse):
            pynvml.nvmlGpuInstanceDestroy(instance)
        (running,) = pynvml.nvmlDeviceGetComputeRunningProcesses(h100)
        assert (running.pid, running.computeInstanceId) == (process.pid, 0xFFFFFFFF)
    pynvml.nvmlGpuInstanceDestroy(instance)


def test_the_node_counts_by_whatever_path_it_was_opened(
    driver: EmulatedDriver, slice_3g: tuple[Any, Any], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.hardlink_to(calls.cap_node(driver, "gpu0/gi1/ci0/access"))
    with python_process(HOLD, elsewhere), pytest.raises(pynvml.NVMLError_InUse):
        pynvml.nvmlComputeInstanceDestroy(slice_3g[1])


def test_one_busy_slice_leaves_its_neighbour_free(driver: EmulatedDriver, h100: Any, slice_3g: tuple[Any, Any]) -> None:
    neighbour = calls.create(h100, 9, 4, 4)
    compute = calls.create_full_compute(neighbour)
    with python_process(HOLD, calls.cap_node(driver, "gpu0/gi1/ci0/access")):
        pynvml.nvmlComputeInstanceDestroy(compute)
        pynvml.nvmlGpuInstanceDestroy(neighbour)


def test_a_holder_of_an_old_slice_does_not_hold_the_new_one(driver: EmulatedDriver, a100: Any) -> None:
    calls.create_full_compute(calls.create(a100, 9, 0, 4))
    node = calls.cap_node(driver, "gpu1/gi1/ci0/access")
    with python_process(HOLD, node):
        driver.reboot()
        assert not node.exists()
        instance = calls.create(a100, 9, 0, 4)
        pynvml.nvmlComputeInstanceDestroy(calls.create_full_compute(instance))
        pynvml.nvmlGpuInstanceDestroy(instance)


def test_two_processes_share_the_cards(driver: EmulatedDriver, h100: Any) -> None:
    code = OTHER + (
        "calls.create_full_compute(calls.create(device, 9, 0, 4))\n"
        "print(pynvml.nvmlDeviceGetUUID(device), flush=True)\n"
        "sys.stdin.readline()\n"
        "print(calls.all_placements(device), flush=True)\n"
    )
    with python_process(code, driver.state_dir) as other:
        with pytest.raises(pynvml.NVMLError_InsufficientResources):
            calls.create(h100, 9, 0, 4)
        calls.create(h100, 9, 4, 4)
        output, _ = other.communicate("\n")
    assert output == "[(0, 4), (4, 4)]\n"


def test_processes_that_race_for_a_place_get_it_once(driver: EmulatedDriver, h100: Any) -> None:
    code = OTHER + (
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "made = 0\n"
        "for start in range(7):\n"
        "    try:\n"
        "        calls.create(device, 19, start, 1)\n"
        "        made += 1\n"
        "    except pynvml.NVMLError_InsufficientResources:\n"
        "        pass\n"
        "print(made)\n"
    )
    with python_process(code, driver.state_dir) as one, python_process(code, driver.state_dir) as two:
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        made = [int(process.communicate()[0]) for process in (one, two)]
    assert sum(made) == 7
    assert calls.all_placements(h100) == [(start, 1) for start in range(7)]


def test_instances_outlive_a_killedpython_process(driver: EmulatedDriver, h100: Any) -> None:
    code = OTHER + (
        "calls.create_full_compute(calls.create(device, 9, 4, 4))\nprint('made', flush=True)\nsys.stdin.read()\n"
    )
    with python_process(code, driver.state_dir) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    assert calls.all_placements(h100) == [(4, 4)]
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    assert pynvml.nvmlDeviceGetUUID(mig).startswith("MIG-")


def test_a_kill_in_the_middle_of_a_change_leaves_a_whole_state(driver: EmulatedDriver) -> None:
    code = OTHER + (
        "while True:\n"
        "    instance = calls.create(device, 9, 0, 4)\n"
        "    compute = calls.create_full_compute(instance)\n"
        "    print('made', flush=True)\n"
        "    pynvml.nvmlComputeInstanceDestroy(compute)\n"
        "    pynvml.nvmlGpuInstanceDestroy(instance)\n"
    )
    for lines in (1, 5, 12):
        with python_process(code, driver.state_dir) as other:
            assert other.stdout is not None
            for _ in range(lines):
                other.stdout.readline()
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
        with started(driver.state_dir, CARDS) as again:
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
            nodes = {path.name for path in again.caps.directory.iterdir()}
            for instance in calls.instances(device, 9):
                number = pynvml.nvmlGpuInstanceGetInfo(instance).id
                nodes.remove(calls.cap_node(again, f"gpu0/gi{number}/access").name)
                for compute in calls.compute_instances(instance, 2):
                    nodes.remove(calls.cap_node(again, f"gpu0/gi{number}/ci0/access").name)
                    pynvml.nvmlComputeInstanceDestroy(compute)
                pynvml.nvmlGpuInstanceDestroy(instance)
            assert nodes == {"nvidia-cap1", "nvidia-cap2"}
            assert calls.remaining(device, 0) == 1
