"""GPU instances: profiles, placements, capacity, create, list, destroy."""

from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from tests.contract.nvml import calls

# nvmlDeviceGetGpuInstanceRemainingCapacity of each profile id, recorded on an A100-40GB after
# each creation (profile id, start, size).
RECORDED_ORDER = (19, 20, 15, 14, 9, 5, 0)
RECORDED_STEPS = (
    (None, (7, 1, 4, 3, 2, 1, 1)),
    ((5, 0, 4), (3, 1, 2, 1, 1, 0, 0)),
    ((14, 4, 2), (1, 1, 1, 0, 0, 0, 0)),
    ((19, 6, 1), (0, 0, 0, 0, 0, 0, 0)),
)


def test_the_recorded_remaining_capacities_are_reproduced(a100: Any) -> None:
    for created, expected in RECORDED_STEPS:
        if created is not None:
            calls.create(a100, *created)
        assert tuple(calls.remaining(a100, number) for number in RECORDED_ORDER) == expected


def test_profiles_of_the_h100_are_those_recorded(h100: Any) -> None:
    found = {
        name: (p.id, p.sliceCount, p.instanceCount, p.multiprocessorCount, p.memorySizeMB)
        for name, p in calls.profiles(h100).items()
    }
    assert found == {
        "1g.10gb": (19, 1, 7, 16, 9984),
        "1g.10gb+me": (20, 1, 1, 16, 9984),
        "1g.20gb": (15, 1, 4, 26, 20096),
        "2g.20gb": (14, 2, 3, 32, 20096),
        "3g.40gb": (9, 3, 2, 60, 40448),
        "4g.40gb": (5, 4, 1, 64, 40448),
        "7g.80gb": (0, 7, 1, 132, 81152),
    }


def test_a_profile_is_found_by_id_as_by_enum(h100: Any) -> None:
    for name, profile in calls.profiles(h100).items():
        by_id = pynvml.nvmlDeviceGetGpuInstanceProfileInfoById(h100, profile.id)
        assert by_id.name == f"MIG {name}"
        assert by_id.memorySizeMB == profile.memorySizeMB


def test_profile_id_and_enum_are_different_numbers(h100: Any) -> None:
    with pytest.raises(pynvml.NVMLError_NotSupported):
        calls.placements(h100, pynvml.NVML_GPU_INSTANCE_PROFILE_3_SLICE)


def test_placements_do_not_depend_on_what_is_taken(h100: Any) -> None:
    before = calls.placements(h100, 9)
    calls.create(h100, 0, 0, 8)
    assert calls.placements(h100, 9) == before == [(0, 4), (4, 4)]


def test_an_instance_is_where_it_was_asked_for(h100: Any) -> None:
    info = pynvml.nvmlGpuInstanceGetInfo(calls.create(h100, 14, 2, 2))
    assert (info.profileId, info.placement.start, info.placement.size) == (14, 2, 2)
    assert pynvml.nvmlDeviceGetUUID(info.device) == pynvml.nvmlDeviceGetUUID(h100)


def test_without_a_placement_the_driver_takes_the_last_free_one(h100: Any) -> None:
    starts = []
    for _ in range(2):
        instance = pynvml.nvmlDeviceCreateGpuInstance(h100, 9)
        starts.append(pynvml.nvmlGpuInstanceGetInfo(instance).placement.start)
    assert starts == [4, 0]
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        pynvml.nvmlDeviceCreateGpuInstance(h100, 9)


@pytest.mark.parametrize("wanted", [(9, 0, 4), (14, 2, 2), (19, 3, 1), (0, 0, 8), (5, 0, 4)])
def test_an_overlap_has_insufficient_resources(h100: Any, wanted: tuple[int, int, int]) -> None:
    calls.create(h100, 9, 0, 4)
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        calls.create(h100, *wanted)
    assert calls.all_placements(h100) == [(0, 4)]


@pytest.mark.parametrize("wanted", [(9, 2, 4), (9, 0, 3), (9, 4, 8), (19, 7, 1), (14, 6, 2), (14, 1, 2), (99, 0, 1)])
def test_a_place_that_the_profile_never_has_is_invalid(h100: Any, wanted: tuple[int, int, int]) -> None:
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        calls.create(h100, *wanted)


def test_media_extensions_exist_once(h100: Any) -> None:
    calls.create(h100, 20, 0, 1)
    assert calls.remaining(h100, 20) == 0
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        calls.create(h100, 20, 3, 1)
    assert calls.remaining(h100, 19) == 6


def test_ids_come_from_the_range_of_their_size(h100: Any) -> None:
    wanted = [(9, 0, 4), (14, 4, 2), (19, 6, 1)]
    ids = [pynvml.nvmlGpuInstanceGetInfo(calls.create(h100, *place)).id for place in wanted]
    assert ids == [1, 3, 7]


def test_instances_are_listed_by_profile_and_found_by_id(h100: Any) -> None:
    calls.create(h100, 9, 4, 4)
    calls.create(h100, 19, 0, 1)
    listed = calls.instances(h100, 9)
    assert [pynvml.nvmlGpuInstanceGetInfo(i).placement.start for i in listed] == [4]
    found = pynvml.nvmlDeviceGetGpuInstanceById(h100, 7)
    assert pynvml.nvmlGpuInstanceGetInfo(found).profileId == 19
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetGpuInstanceById(h100, 8)


def test_cards_are_cut_independently(driver: EmulatedDriver, h100: Any, a100: Any) -> None:
    calls.create(h100, 0, 0, 8)
    assert calls.remaining(a100, 0) == 1


def test_a_gpu_instance_with_a_compute_instance_is_in_use(h100: Any) -> None:
    instance = calls.create(h100, 9, 0, 4)
    compute = calls.create_full_compute(instance)
    with pytest.raises(pynvml.NVMLError_InUse):
        pynvml.nvmlGpuInstanceDestroy(instance)
    pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlGpuInstanceDestroy(instance)
    assert calls.remaining(h100, 0) == 1


def test_the_a30_lends_its_media_engines_to_one_profile_only(driver: EmulatedDriver) -> None:
    a30 = pynvml.nvmlDeviceGetHandleByIndex(2)
    calls.create(a30, 21, 0, 1)
    assert calls.remaining(a30, 6) == 0
    assert calls.remaining(a30, 5) == 1
