"""Switching MIG mode, and who may do what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver


@dataclass
class FakeCaller:
    """Passes for root or not, and for one who may read the config cap node or not."""

    root: bool
    config: bool

    def is_root(self) -> bool:
        return self.root

    def may_read(self, node: Path) -> bool:
        return self.config


ROOT = FakeCaller(root=True, config=True)
DELEGATE = FakeCaller(root=False, config=True)
NOBODY = FakeCaller(root=False, config=False)


def _cards() -> tuple[Any, Any]:
    return pynvml.nvmlDeviceGetHandleByIndex(0), pynvml.nvmlDeviceGetHandleByIndex(1)


def test_hopper_switches_at_once(start_driver: StartDriver) -> None:
    start_driver(mig_enabled=False, caller=ROOT)
    h100, _ = _cards()
    assert pynvml.nvmlDeviceGetMigMode(h100) == [0, 0]
    assert pynvml.nvmlDeviceSetMigMode(h100, 1) == pynvml.NVML_SUCCESS
    assert pynvml.nvmlDeviceGetMigMode(h100) == [1, 1]
    assert pynvml.nvmlDeviceSetMigMode(h100, 0) == pynvml.NVML_SUCCESS
    assert pynvml.nvmlDeviceGetMigMode(h100) == [0, 0]


def test_ampere_waits_for_a_reset(start_driver: StartDriver) -> None:
    driver = start_driver(mig_enabled=False, caller=ROOT)
    _, a100 = _cards()
    assert pynvml.nvmlDeviceSetMigMode(a100, 1) == pynvml.NVML_ERROR_RESET_REQUIRED
    assert pynvml.nvmlDeviceGetMigMode(a100) == [0, 1]
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceCreateGpuInstance(a100, 19)
    driver.reset_gpu(1)
    assert pynvml.nvmlDeviceGetMigMode(a100) == [1, 1]
    driver.reboot()
    assert pynvml.nvmlDeviceGetMigMode(a100) == [1, 1]


def test_hopper_with_instances_is_in_use(start_driver: StartDriver) -> None:
    start_driver(caller=ROOT)
    h100, _ = _cards()
    instance = calls.create(h100, 9, 0, 4)
    assert pynvml.nvmlDeviceSetMigMode(h100, 0) == pynvml.NVML_ERROR_IN_USE
    assert pynvml.nvmlDeviceGetMigMode(h100) == [1, 0]
    pynvml.nvmlGpuInstanceDestroy(instance)
    assert pynvml.nvmlDeviceSetMigMode(h100, 0) == pynvml.NVML_SUCCESS


def test_a_mode_that_is_none_is_invalid(start_driver: StartDriver) -> None:
    start_driver(caller=ROOT)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceSetMigMode(_cards()[0], 2)


def test_with_mig_off_instances_are_not_supported(start_driver: StartDriver) -> None:
    start_driver(mig_enabled=False, caller=ROOT)
    h100, _ = _cards()
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(h100) == 0
    for attempt in (
        lambda: pynvml.nvmlDeviceGetGpuInstanceProfileInfo(h100, 0),
        lambda: pynvml.nvmlDeviceGetGpuInstanceProfileInfoById(h100, 19),
        lambda: calls.placements(h100, 19),
        lambda: calls.remaining(h100, 19),
        lambda: calls.instances(h100, 19),
        lambda: pynvml.nvmlDeviceGetGpuInstanceById(h100, 1),
        lambda: pynvml.nvmlDeviceCreateGpuInstance(h100, 19),
        lambda: calls.create(h100, 19, 0, 1),
        lambda: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0),
    ):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            attempt()
    assert pynvml.nvmlDeviceGetUtilizationRates(h100).gpu == 0


def test_only_root_toggles_the_mode(start_driver: StartDriver) -> None:
    start_driver(caller=DELEGATE)
    h100, _ = _cards()
    with pytest.raises(pynvml.NVMLError_NoPermission):
        pynvml.nvmlDeviceSetMigMode(h100, 0)
    assert pynvml.nvmlDeviceGetMigMode(h100) == [1, 1]


def test_the_config_cap_node_delegates_instances(start_driver: StartDriver) -> None:
    driver = start_driver(caller=DELEGATE)
    config = calls.cap_node(driver, "config")
    assert config.stat().st_mode & 0o777 == 0o400
    instance = calls.create(_cards()[0], 9, 0, 4)
    pynvml.nvmlComputeInstanceDestroy(calls.create_full_compute(instance))
    pynvml.nvmlGpuInstanceDestroy(instance)


def test_without_it_instances_are_not_managed(start_driver: StartDriver) -> None:
    start_driver(caller=ROOT)
    h100, _ = _cards()
    instance = calls.create(h100, 9, 0, 4)
    compute = calls.create_full_compute(instance)
    start_driver(caller=NOBODY)
    for attempt in (
        lambda: calls.create(h100, 9, 4, 4),
        lambda: calls.placements(h100, 9),
        lambda: calls.remaining(h100, 9),
        lambda: calls.instances(h100, 9),
        lambda: pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 2),
        lambda: pynvml.nvmlComputeInstanceDestroy(compute),
        lambda: pynvml.nvmlGpuInstanceDestroy(instance),
    ):
        with pytest.raises(pynvml.NVMLError_NoPermission):
            attempt()
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    assert pynvml.nvmlDeviceGetUUID(mig).startswith("MIG-")
    assert calls.profiles(h100)


def test_the_flag_says_how_the_cards_start(start_driver: StartDriver) -> None:
    start_driver(mig_enabled=False)
    assert [pynvml.nvmlDeviceGetMigMode(card) for card in _cards()] == [[0, 0], [0, 0]]


def test_by_default_mig_mode_is_on(driver: EmulatedDriver) -> None:
    assert [pynvml.nvmlDeviceGetMigMode(card) for card in _cards()] == [[1, 1], [1, 1]]
