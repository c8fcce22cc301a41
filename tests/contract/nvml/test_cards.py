"""Which cards an emulated node has, and that it keeps them."""

from pathlib import Path
from typing import Any

import pynvml
import pytest

from nodedaemon.emulation import (
    CardBusyError,
    CardsChangedError,
    CardSpec,
    DamagedStateError,
    EmulatedDriver,
    UnknownCardError,
    parse_cards,
)
from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver, started

# nvmlDeviceGetName and total memory (MiB), as nvidia-smi prints them on these boards.
BOARDS = {
    "A30-24GB": ("NVIDIA A30", 24576),
    "A100-40GB": ("NVIDIA A100-SXM4-40GB", 40960),
    "A100-80GB": ("NVIDIA A100-SXM4-80GB", 81920),
    "H100-80GB-SXM5": ("NVIDIA H100 80GB HBM3", 81559),
    "H100-80GB-PCIe": ("NVIDIA H100 PCIe", 81559),
    "H100-NVL-94GB": ("NVIDIA H100 NVL", 95830),
    "H200-141GB": ("NVIDIA H200", 143771),
}


def _uuids() -> list[str]:
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]


def test_a_list_of_cards_is_read_in_order() -> None:
    assert parse_cards("H100-80GB-SXM5:4, A100-80GB") == (
        CardSpec("H100-80GB-SXM5", 4),
        CardSpec("A100-80GB", 1),
    )


@pytest.mark.parametrize("text", ["", "H100", "A100-80GB:", "A100-80GB:x", "A100-80GB:-1", "A100-80GB:0", ",", "A30:1"])
def test_a_list_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UnknownCardError):
        parse_cards(text)


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'RTX4090'\. Known models: .*H100-80GB-SXM5.*H200-141GB"):
        parse_cards("RTX4090:2")


@pytest.mark.parametrize("model", BOARDS)
def test_a_card_reports_what_the_board_reports(start_driver: StartDriver, model: str) -> None:
    start_driver(model)
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    name, total_mib = BOARDS[model]
    assert pynvml.nvmlDeviceGetName(device) == name
    assert pynvml.nvmlDeviceGetMemoryInfo(device).total == total_mib << 20
    assert pynvml.nvmlDeviceGetMinorNumber(device) == 0


def test_a_restart_finds_the_same_cards_and_instances(tmp_path: Path) -> None:
    with started(tmp_path, "H100-80GB-SXM5:2"):
        calls.create(pynvml.nvmlDeviceGetHandleByIndex(1), 9, 4, 4)
        uuids = _uuids()
    with started(tmp_path, "H100-80GB-SXM5:2", mig_enabled=False):
        assert _uuids() == uuids
        assert calls.all_placements(pynvml.nvmlDeviceGetHandleByIndex(1)) == [(4, 4)]


def test_two_nodes_never_share_a_uuid(tmp_path: Path) -> None:
    uuids = []
    for name in ("one", "two"):
        with started(tmp_path / name, "H100-80GB-SXM5:2"):
            uuids += _uuids()
    assert len(set(uuids)) == 4


def test_other_cards_on_a_directory_with_state_are_refused(tmp_path: Path) -> None:
    EmulatedDriver(tmp_path, parse_cards("A30-24GB"))
    with pytest.raises(CardsChangedError, match="same cards, or use another directory"):
        EmulatedDriver(tmp_path, parse_cards("A30-24GB:2"))


def test_a_damaged_state_is_refused_with_what_to_do(tmp_path: Path) -> None:
    EmulatedDriver(tmp_path, parse_cards("A30-24GB"))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DamagedStateError, match=r"Remove .* to start with empty cards"):
        EmulatedDriver(tmp_path, parse_cards("A30-24GB"))


def test_a_reboot_wipes_instances_and_hopper_forgets_mig_mode(driver: EmulatedDriver) -> None:
    h100, a100 = map(pynvml.nvmlDeviceGetHandleByIndex, (0, 1))
    for device in (h100, a100):
        calls.create_full_compute(calls.create(device, 9, 0, 4))
    uuids = _uuids()
    driver.reboot()
    assert pynvml.nvmlDeviceGetMigMode(h100) == [0, 0]
    assert pynvml.nvmlDeviceGetMigMode(a100) == [1, 1]
    assert calls.all_placements(a100) == []
    assert sorted(p.name for p in driver.caps.directory.iterdir()) == ["nvidia-cap1", "nvidia-cap2"]
    assert _uuids() == uuids


def test_a_reboot_of_the_host_wipes_instances(tmp_path: Path) -> None:
    with started(tmp_path, "H100-80GB-SXM5"):
        calls.create(pynvml.nvmlDeviceGetHandleByIndex(0), 9, 0, 4)
    state = tmp_path / "state.json"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    state.write_text(state.read_text().replace(boot_id, "another boot"))
    with started(tmp_path, "H100-80GB-SXM5"):
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        assert pynvml.nvmlDeviceGetMigMode(device) == [1, 1]
        assert calls.all_placements(device) == []


def test_a_card_in_use_is_not_reset(driver: EmulatedDriver, h100: Any) -> None:
    calls.create(h100, 9, 0, 4)
    with (
        calls.cap_node(driver, "gpu0/gi1/access").open(),
        pytest.raises(CardBusyError, match="GPU 0 is in use"),
    ):
        driver.reset_gpu(0)
    assert calls.all_placements(h100) == [(0, 4)]
    driver.reset_gpu(0)
    assert calls.all_placements(h100) == []


def test_what_no_recording_shows_is_not_supported(start_driver: StartDriver) -> None:
    start_driver("RTX-PRO-6000-Blackwell-96GB,B200-180GB")
    rtx, b200 = map(pynvml.nvmlDeviceGetHandleByIndex, (0, 1))
    assert calls.profiles(rtx)["1g.24gb"].multiprocessorCount == 46
    with pytest.raises(pynvml.NVMLError_NotSupported):
        calls.placements(rtx, 14)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceCreateGpuInstance(rtx, 14)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetMemoryInfo(rtx)
    assert "3g.90gb" not in calls.profiles(b200)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        calls.create(b200, 9, 0, 4)
    assert calls.create(b200, 14, 0, 2)


def test_a_symbol_that_is_missing_says_function_not_found(h100: Any) -> None:
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        pynvml.nvmlDeviceGetBridgeChipInfo(h100)
