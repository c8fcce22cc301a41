"""What every driver with a GPU promises to whoever only reads; runs on a real GPU too."""

from typing import Any

import pynvml
import pytest

from tests.contract.nvml import calls


@pytest.fixture
def device(any_driver: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(0)


def _mig_is_on(device: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(device)[0])
    except pynvml.NVMLError_NotSupported:
        return False  # a card that cannot be cut at all


def _mig_devices(device: Any) -> list[Any]:
    found = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        try:
            found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index))
        except pynvml.NVMLError_NotFound:
            continue
    return found


def test_the_emulation_says_that_it_is_one(any_driver: str) -> None:
    says_emulated = "emulated" in pynvml.nvmlSystemGetDriverVersion()
    assert says_emulated == (any_driver == "emulated")


def test_versions_start_with_numbers(any_driver: str) -> None:
    assert int(pynvml.nvmlSystemGetDriverVersion().split(".")[0]) >= 470
    assert int(pynvml.nvmlSystemGetNVMLVersion().split(".")[0]) >= 11
    assert pynvml.nvmlSystemGetCudaDriverVersion() >= 11000


def test_one_index_past_the_last_is_an_invalid_argument(any_driver: str) -> None:
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetHandleByIndex(pynvml.nvmlDeviceGetCount())


def test_index_uuid_and_pci_bus_id_lead_to_the_same_device(device: Any) -> None:
    uuid = pynvml.nvmlDeviceGetUUID(device)
    bus_id = pynvml.nvmlDeviceGetPciInfo(device).busId
    assert uuid.startswith("GPU-")
    for again in (
        pynvml.nvmlDeviceGetHandleByUUID(uuid),
        pynvml.nvmlDeviceGetHandleByPciBusId(bus_id),
        pynvml.nvmlDeviceGetHandleByPciBusId(bus_id.removeprefix("0000")),
    ):
        assert pynvml.nvmlDeviceGetIndex(again) == 0
        assert pynvml.nvmlDeviceGetUUID(again) == uuid


def test_an_unknown_uuid_is_not_found(any_driver: str) -> None:
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetHandleByUUID("GPU-00000000-0000-0000-0000-000000000000")


def test_the_name_says_nvidia(device: Any) -> None:
    assert pynvml.nvmlDeviceGetName(device).startswith("NVIDIA ")


def test_both_versions_of_memory_agree_on_the_total(device: Any) -> None:
    old = pynvml.nvmlDeviceGetMemoryInfo(device)
    new = pynvml.nvmlDeviceGetMemoryInfo(device, pynvml.nvmlMemory_v2)
    assert old.total == new.total == old.free + old.used
    assert new.total == new.free + new.used + new.reserved


def test_a_memory_structure_of_another_version_is_refused(device: Any) -> None:
    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlDeviceGetMemoryInfo(device, 0x01000000)


def test_a_card_is_no_mig_device(device: Any) -> None:
    assert pynvml.nvmlDeviceIsMigDeviceHandle(device).value == 0


def test_a_card_has_no_instance_attributes(device: Any) -> None:
    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlDeviceGetAttributes(device)


def test_sensors_are_within_what_a_board_survives(device: Any) -> None:
    assert 0 < pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU) < 110
    limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(device)
    assert 0 < pynvml.nvmlDeviceGetPowerUsage(device) < 2 * limit


def test_mig_devices_can_exist_in_mig_mode_only(device: Any) -> None:
    assert (pynvml.nvmlDeviceGetMaxMigDeviceCount(device) > 0) == _mig_is_on(device)


def test_a_profile_enum_out_of_range_is_refused(device: Any) -> None:
    # With MIG mode off the driver may look at the mode first or at the enum first.
    refusal = pynvml.NVMLError_InvalidArgument if _mig_is_on(device) else pynvml.NVMLError
    with pytest.raises(refusal):
        pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, 0xFFFF)


def test_both_versions_of_a_profile_agree(device: Any) -> None:
    for enum in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            new = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, enum, version=2)
        except pynvml.NVMLError_NotSupported:
            with pytest.raises(pynvml.NVMLError_NotSupported):
                pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, enum, version=1)
            continue
        old = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, enum, version=1)
        for field, _ in pynvml.c_nvmlGpuInstanceProfileInfo_t._fields_:
            assert getattr(old, field) == getattr(new, field)


def test_every_placement_has_one_size_per_profile_and_fits_the_card(device: Any) -> None:
    found = {name: calls.placements(device, p.id) for name, p in calls.profiles(device).items()}
    if not _mig_is_on(device):
        assert not found
        return
    slices = max(start + size for places in found.values() for start, size in places)
    for name, places in found.items():
        assert len({size for _, size in places}) == 1, name
        assert places == sorted(set(places)), name
        assert slices in (4, 8)


def test_mig_devices_lead_back_to_their_card(device: Any) -> None:
    for mig in _mig_devices(device):
        parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)
        assert pynvml.nvmlDeviceGetUUID(parent) == pynvml.nvmlDeviceGetUUID(device)
        assert pynvml.nvmlDeviceGetUUID(mig).startswith("MIG-")


def test_in_mig_mode_the_card_has_no_utilization(device: Any) -> None:
    if _mig_is_on(device):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            pynvml.nvmlDeviceGetUtilizationRates(device)
    else:
        assert 0 <= pynvml.nvmlDeviceGetUtilizationRates(device).gpu <= 100


def test_after_shutdown_everything_is_uninitialized(any_driver: str) -> None:
    pynvml.nvmlShutdown()
    try:
        with pytest.raises(pynvml.NVMLError_Uninitialized):
            pynvml.nvmlDeviceGetCount()
        with pytest.raises(pynvml.NVMLError_Uninitialized):
            pynvml.nvmlShutdown()
    finally:
        pynvml.nvmlInit()


def test_init_is_counted(any_driver: str) -> None:
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetCount() > 0


def test_error_codes_have_texts(any_driver: str) -> None:
    assert pynvml.nvmlErrorString(pynvml.NVML_ERROR_NOT_FOUND) == "Not Found"
    assert pynvml.nvmlErrorString(123456)
