"""Compute instances: profiles, create, list, destroy, and the MIG devices that they are."""

from ctypes import byref, c_uint
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver, UuidPolicy
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver


def _full_slice(device: Any, profile_id: int, start: int, size: int) -> tuple[Any, Any]:
    instance = calls.create(device, profile_id, start, size)
    return instance, calls.create_full_compute(instance)


def test_the_full_width_profile_has_the_whole_instance(h100: Any) -> None:
    instance = calls.create(h100, 9, 0, 4)
    for version in (1, 2):
        info = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, 2, 0, version)
        assert (info.id, info.sliceCount, info.instanceCount) == (2, 3, 1)
        assert (info.multiprocessorCount, info.sharedDecoderCount) == (60, 3)
    assert info.name == "MIG 3g.40gb"


def test_a_profile_wider_than_the_instance_is_not_supported(h100: Any) -> None:
    instance = calls.create(h100, 14, 0, 2)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, 2, 0)


def test_profile_enums_out_of_range_are_invalid(h100: Any) -> None:
    instance = calls.create(h100, 14, 0, 2)
    for profile, engine in ((99, 0), (1, 1)):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, profile, engine)


def test_one_slice_wide_instances_are_known_on_the_a100(a100: Any) -> None:
    instance = calls.create(a100, 9, 0, 4)
    info = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, 0, 0)
    assert (info.instanceCount, info.multiprocessorCount, info.name) == (3, 14, "MIG 1c.3g.20gb")
    for left in (2, 1, 0):
        pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 0)
        assert pynvml.nvmlGpuInstanceGetComputeInstanceRemainingCapacity(instance, 0) == left
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 2)


def test_one_slice_wide_instances_are_not_recorded_on_the_h100(h100: Any) -> None:
    instance = calls.create(h100, 9, 0, 4)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 0)


def test_a_compute_instance_can_be_placed(a100: Any) -> None:
    instance = calls.create(a100, 9, 0, 4)
    count = c_uint(3)
    places = (pynvml.c_nvmlComputeInstancePlacement_t * 3)()
    pynvml.nvmlGpuInstanceGetComputeInstancePossiblePlacements(instance, 0, places, byref(count))
    assert [(p.start, p.size) for p in places] == [(0, 1), (1, 1), (2, 1)]
    made = pynvml.nvmlGpuInstanceCreateComputeInstanceWithPlacement(instance, 0, byref(places[2]))
    assert pynvml.nvmlComputeInstanceGetInfo(made).placement.start == 2
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        pynvml.nvmlGpuInstanceCreateComputeInstanceWithPlacement(instance, 0, byref(places[2]))


def test_compute_instances_are_listed_and_found(h100: Any) -> None:
    instance, compute = _full_slice(h100, 9, 4, 4)
    info = pynvml.nvmlComputeInstanceGetInfo(compute)
    assert (info.id, info.profileId, info.placement.size) == (0, 2, 3)
    assert len(calls.compute_instances(instance, 2)) == 1
    assert pynvml.nvmlGpuInstanceGetInfo(info.gpuInstance).placement.start == 4
    found = pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, 0)
    assert pynvml.nvmlComputeInstanceGetInfo(found).profileId == 2
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, 1)


def test_a_mig_device_describes_its_slice(h100: Any) -> None:
    _full_slice(h100, 9, 4, 4)
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    assert pynvml.nvmlDeviceIsMigDeviceHandle(mig).value == 1
    assert pynvml.nvmlDeviceGetName(mig) == "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    assert pynvml.nvmlDeviceGetGpuInstanceId(mig) == 1
    assert pynvml.nvmlDeviceGetComputeInstanceId(mig) == 0
    assert pynvml.nvmlDeviceGetMemoryInfo(mig).total == 40448 << 20
    attributes = pynvml.nvmlDeviceGetAttributes(mig)
    assert attributes.multiprocessorCount == 60
    assert (attributes.gpuInstanceSliceCount, attributes.computeInstanceSliceCount) == (3, 3)
    assert attributes.memorySizeMB == 40448
    by_uuid = pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(mig))
    assert pynvml.nvmlDeviceGetGpuInstanceId(by_uuid) == 1


def test_what_is_measured_on_a_card_is_not_supported_on_a_mig_device(h100: Any) -> None:
    _full_slice(h100, 9, 4, 4)
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    for read in (
        pynvml.nvmlDeviceGetUtilizationRates,
        pynvml.nvmlDeviceGetEncoderUtilization,
        pynvml.nvmlDeviceGetPowerUsage,
        pynvml.nvmlDeviceGetEccMode,
    ):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            read(mig)


def test_a_mig_device_is_no_card_to_cut(h100: Any) -> None:
    _full_slice(h100, 9, 4, 4)
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetMigMode(mig)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        calls.create(mig, 19, 0, 1)


def test_a_hole_among_the_mig_devices_is_not_found(h100: Any) -> None:
    slices = [_full_slice(h100, 19, start, 1) for start in range(3)]
    pynvml.nvmlComputeInstanceDestroy(slices[1][1])
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 1)
    assert pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 2)
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(h100) == 7
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 7)


def test_the_handle_of_a_mig_device_that_is_gone_is_invalid(h100: Any) -> None:
    _, compute = _full_slice(h100, 9, 4, 4)
    mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)
    pynvml.nvmlComputeInstanceDestroy(compute)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetUUID(mig)


@pytest.mark.parametrize("policy", UuidPolicy)
def test_a_mig_device_created_again_has_a_new_or_its_old_uuid(start_driver: StartDriver, policy: UuidPolicy) -> None:
    start_driver(uuid_policy=policy)
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    uuids = []
    for _ in range(2):
        instance, compute = _full_slice(device, 9, 4, 4)
        mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 0)
        uuids.append(pynvml.nvmlDeviceGetUUID(mig))
        pynvml.nvmlComputeInstanceDestroy(compute)
        pynvml.nvmlGpuInstanceDestroy(instance)
    assert (uuids[0] == uuids[1]) == (policy is UuidPolicy.REUSED)


def test_cap_nodes_come_and_go_with_their_instances(driver: EmulatedDriver, h100: Any) -> None:
    gpu_node = calls.cap_node(driver, "gpu0/gi1/access")
    compute_node = calls.cap_node(driver, "gpu0/gi1/ci0/access")
    assert (gpu_node.name, compute_node.name) == ("nvidia-cap12", "nvidia-cap13")
    instance = calls.create(h100, 9, 0, 4)
    assert gpu_node.exists()
    assert not compute_node.exists()
    compute = calls.create_full_compute(instance)
    assert compute_node.stat().st_mode & 0o777 == 0o444
    pynvml.nvmlComputeInstanceDestroy(compute)
    assert not compute_node.exists()
    pynvml.nvmlGpuInstanceDestroy(instance)
    assert not gpu_node.exists()


def test_a_cap_node_left_by_a_crash_is_replaced(driver: EmulatedDriver, h100: Any) -> None:
    left = calls.cap_node(driver, "gpu0/gi1/access")
    left.touch(mode=0o600)
    with left.open():
        instance = calls.create(h100, 9, 0, 4)
        assert left.stat().st_mode & 0o777 == 0o444
        pynvml.nvmlGpuInstanceDestroy(instance)


def test_minors_are_those_of_the_user_guide(driver: EmulatedDriver) -> None:
    names = {
        path: calls.cap_node(driver, path).name.removeprefix("nvidia-cap")
        for path in ("config", "monitor", "gpu0/gi0/access", "gpu0/gi1/ci1/access")
    }
    assert list(names.values()) == ["1", "2", "3", "14"]
    assert calls.cap_node(driver, "gpu1/gi0/access").name == "nvidia-cap138"
