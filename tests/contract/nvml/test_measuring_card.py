"""What the measuring harness reads of a card or a slice through NVML, on the emulated driver."""

import time
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import EmulatedDriver
from predictor_onnx.measure.card import Card, NoCardError
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver

INTERVAL_SECONDS = 0.11  # nvml.h asks for more than 100 ms


@pytest.fixture
def slice_uuid(h100: Any) -> str:
    calls.create_full_compute(calls.create(h100, 9, 0, 4))
    return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(h100, 0)))


def burn() -> None:
    time.sleep(INTERVAL_SECONDS)


def test_a_whole_card_is_told_by_its_uuid_with_or_without_its_kind(start_driver: StartDriver) -> None:
    start_driver("H100-80GB-SXM5", mig_enabled=False)
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    uuid = str(pynvml.nvmlDeviceGetUUID(handle))

    for spelled in (uuid, uuid.removeprefix("GPU-")):
        card = Card(spelled)
        assert (card.name, card.mig_profile) == (pynvml.nvmlDeviceGetName(handle), "")
        assert card.total_mib == pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**20
        assert "emulated" in card.driver


def test_a_slice_has_its_profile_and_its_own_memory(driver: EmulatedDriver, h100: Any, slice_uuid: str) -> None:
    card = Card(slice_uuid)

    assert (card.name, card.mig_profile) == (pynvml.nvmlDeviceGetName(h100), "3g.40gb")
    assert 30_000 < card.total_mib < 41_000
    assert card.free_mib <= card.total_mib


def test_memory_is_that_of_this_process_or_the_growth_of_all(driver: EmulatedDriver, slice_uuid: str) -> None:
    memory = Card(slice_uuid).memory()

    assert (memory.used_mib, memory.source) == (0.0, "difference")


def test_a_hopper_slice_tells_sm_activity(driver: EmulatedDriver, slice_uuid: str) -> None:
    percent, source = Card(slice_uuid).activity(burn)

    assert source == "gpm"
    assert percent == 0.0


def test_an_ampere_slice_tells_no_activity(driver: EmulatedDriver, a100: Any) -> None:
    calls.create_full_compute(calls.create(a100, 9, 0, 4))
    uuid = str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(a100, 0)))

    assert Card(uuid).activity(burn) == (None, "unavailable")


def test_an_ampere_card_tells_the_share_of_time_with_a_kernel(start_driver: StartDriver) -> None:
    start_driver("A100-40GB", mig_enabled=False)
    uuid = str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0)))

    percent, source = Card(uuid).activity(burn)

    assert source == "utilization-rates"
    assert percent is not None


def test_a_card_that_is_not_there_is_named(driver: EmulatedDriver) -> None:
    with pytest.raises(NoCardError, match="GPU-00000000-0000-0000-0000-000000000000"):
        Card("GPU-00000000-0000-0000-0000-000000000000")
