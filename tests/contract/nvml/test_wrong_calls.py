"""Calls that would crash or corrupt memory on the real library raise here."""

from ctypes import ArgumentError, byref, c_uint
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from tests.contract.nvml import calls

PLACEMENT = pynvml.c_nvmlGpuInstancePlacement_t


def test_a_placement_by_value_raises(h100: Any) -> None:
    with pytest.raises(ArgumentError, match="passed by value"):
        pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(h100, 9, PLACEMENT(0, 4))
    assert calls.all_placements(h100) == []


def test_a_count_by_value_raises(h100: Any) -> None:
    with pytest.raises(ArgumentError, match="passed by value"):
        pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(h100, 9, None, c_uint(4))


@pytest.mark.parametrize("handle", [0, 1, "GPU", 1.5])
def test_a_number_or_a_text_is_no_handle(driver: EmulatedDriver, handle: object) -> None:
    with pytest.raises(ArgumentError):
        pynvml.nvmlDeviceGetName(handle)


def test_one_kind_of_handle_is_not_another(h100: Any) -> None:
    instance = calls.create(h100, 9, 0, 4)
    with pytest.raises(ArgumentError):
        pynvml.nvmlDeviceGetName(instance)
    with pytest.raises(ArgumentError):
        pynvml.nvmlGpuInstanceDestroy(h100)


def test_a_null_handle_is_an_invalid_argument(driver: EmulatedDriver) -> None:
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetName(pynvml.c_nvmlDevice_t())


def test_null_where_an_answer_goes_is_an_invalid_argument(h100: Any) -> None:
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetGpuInstances(h100, 9, None, byref(c_uint(4)))
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(h100, 9, None)


def test_arrays_may_be_passed_as_they_are_or_by_reference(h100: Any) -> None:
    for passed in (lambda array: array, byref):
        places = (PLACEMENT * 2)()
        count = c_uint(2)
        pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(h100, 9, passed(places), byref(count))
        assert [(p.start, p.size) for p in places] == [(0, 4), (4, 4)]


def test_an_array_that_is_too_short_is_not_written_past(h100: Any) -> None:
    places = (PLACEMENT * 1)()
    count = c_uint(1)
    with pytest.raises(pynvml.NVMLError_InsufficientSize):
        pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(h100, 19, places, byref(count))
    assert count.value == 7
    assert (places[0].start, places[0].size) == (0, 0)


def test_a_profile_structure_of_another_version_is_refused(h100: Any) -> None:
    info = pynvml.c_nvmlGpuInstanceProfileInfo_v2_t()
    info.version = 1
    function = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetGpuInstanceProfileInfoV")
    assert function(h100, 0, byref(info)) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_a_destroyed_instance_leaves_its_handle_invalid(h100: Any) -> None:
    stale = calls.create(h100, 9, 0, 4)
    pynvml.nvmlGpuInstanceDestroy(stale)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlGpuInstanceDestroy(stale)
    again = calls.create(h100, 9, 0, 4)
    assert pynvml.nvmlGpuInstanceGetInfo(again).id == 1
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlGpuInstanceGetInfo(stale)
