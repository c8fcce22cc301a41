"""Each card is cut as it was seen to be cut on hardware.

The rows are transcribed from ``nvidia-smi mig -lgip`` and ``-lgipp`` listings; the sources stand
with each card in ``geometry.json``. They are written down here a second time, so that a slip in
that file does not pass. None is what no listing shows.
"""

from typing import Any, NamedTuple

import pynvml
import pytest

from tests.contract.nvml import calls
from tests.contract.nvml.conftest import StartDriver


class Row(NamedTuple):
    """One profile: memory in MiB, sizes and starts in memory slices."""

    id: int
    enum: int
    most: int
    size: int
    starts: tuple[int, ...] | None
    memory: int | None
    sm: int | None


RECORDED = {
    "A30-24GB": {
        "1g.6gb": Row(14, 0, 4, 1, (0, 1, 2, 3), 5952, 14),
        "1g.6gb+me": Row(21, 7, 1, 1, (0, 1, 2, 3), 5952, 14),
        "2g.12gb": Row(5, 1, 2, 2, (0, 2), 11968, 28),
        "2g.12gb+me": Row(6, 8, 1, 2, (0, 2), 11968, 28),
        "4g.24gb": Row(0, 3, 1, 4, (0,), 24064, 56),
    },
    "A100-40GB": {
        "1g.5gb": Row(19, 0, 7, 1, (0, 1, 2, 3, 4, 5, 6), 4864, 14),
        "1g.5gb+me": Row(20, 7, 1, 1, (0, 1, 2, 3, 4, 5, 6), 4864, 14),
        "1g.10gb": Row(15, 9, 4, 2, (0, 2, 4, 6), 9984, 14),
        "2g.10gb": Row(14, 1, 3, 2, (0, 2, 4), 9984, 28),
        "3g.20gb": Row(9, 2, 2, 4, (0, 4), 20096, 42),
        "4g.20gb": Row(5, 3, 1, 4, (0,), 20096, 56),
        "7g.40gb": Row(0, 4, 1, 8, (0,), 40320, 98),
    },
    "A100-80GB": {
        "1g.10gb": Row(19, 0, 7, 1, (0, 1, 2, 3, 4, 5, 6), 9728, 14),
        "1g.10gb+me": Row(20, 7, 1, 1, (0, 1, 2, 3, 4, 5, 6), 9728, 14),
        "1g.20gb": Row(15, 9, 4, 2, (0, 2, 4, 6), 19968, 14),
        "2g.20gb": Row(14, 1, 3, 2, (0, 2, 4), 19968, 28),
        "3g.40gb": Row(9, 2, 2, 4, (0, 4), 40192, 42),
        "4g.40gb": Row(5, 3, 1, 4, (0,), 40192, 56),
        "7g.80gb": Row(0, 4, 1, 8, (0,), 80896, 98),
    },
    "H100-80GB-SXM5": {
        "1g.10gb": Row(19, 0, 7, 1, (0, 1, 2, 3, 4, 5, 6), 9984, 16),
        "1g.10gb+me": Row(20, 7, 1, 1, (0, 1, 2, 3, 4, 5, 6), 9984, 16),
        "1g.20gb": Row(15, 9, 4, 2, (0, 2, 4, 6), 20096, 26),
        "2g.20gb": Row(14, 1, 3, 2, (0, 2, 4), 20096, 32),
        "3g.40gb": Row(9, 2, 2, 4, (0, 4), 40448, 60),
        "4g.40gb": Row(5, 3, 1, 4, (0,), 40448, 64),
        "7g.80gb": Row(0, 4, 1, 8, (0,), 81152, 132),
    },
    "H100-80GB-PCIe": {
        "1g.10gb": Row(19, 0, 7, 1, (0, 1, 2, 3, 4, 5, 6), 9984, 14),
        "1g.10gb+me": Row(20, 7, 1, 1, (0, 1, 2, 3, 4, 5, 6), 9984, 14),
        "1g.20gb": Row(15, 9, 4, 2, (0, 2, 4, 6), 20096, 14),
        "2g.20gb": Row(14, 1, 3, 2, (0, 2, 4), 20096, 30),
        "3g.40gb": Row(9, 2, 2, 4, (0, 4), 40448, 46),
        "4g.40gb": Row(5, 3, 1, 4, (0,), 40448, 62),
        "7g.80gb": Row(0, 4, 1, 8, (0,), 81152, 114),
    },
    "H100-NVL-94GB": {
        "1g.12gb": Row(19, 0, 7, 1, (0, 1, 2, 3, 4, 5, 6), 11008, 16),
        "1g.12gb+me": Row(20, 7, 1, 1, (0, 1, 2, 3, 4, 5, 6), 11008, 16),
        "1g.24gb": Row(15, 9, 4, 2, (0, 2, 4, 6), 22144, 26),
        "2g.24gb": Row(14, 1, 3, 2, (0, 2, 4), 22144, 32),
        "3g.47gb": Row(9, 2, 2, 4, (0, 4), 47488, 60),
        "4g.47gb": Row(5, 3, 1, 4, (0,), 47488, 64),
        "7g.94gb": Row(0, 4, 1, 8, (0,), 95360, 132),
    },
    "H200-141GB": {
        "1g.18gb": Row(19, 0, 7, 1, (0, 1, 2, 3, 4, 5, 6), 16384, 16),
        "1g.18gb+me": Row(20, 7, 1, 1, (0, 1, 2, 3, 4, 5, 6), 16384, 16),
        "1g.35gb": Row(15, 9, 4, 2, (0, 2, 4, 6), 33024, 26),
        "2g.35gb": Row(14, 1, 3, 2, (0, 2, 4), 33024, 32),
        "3g.71gb": Row(9, 2, 2, 4, (0, 4), 71168, 60),
        "4g.71gb": Row(5, 3, 1, 4, (0,), 71168, 64),
        "7g.141gb": Row(0, 4, 1, 8, (0,), 143104, 132),
    },
    "B200-180GB": {
        "1g.23gb": Row(19, 0, 7, 1, (0, 1, 2, 3, 4, 5, 6), 22528, 18),
        "1g.23gb+me": Row(20, 7, 1, 1, (0, 1, 2, 3, 4, 5, 6), 22528, 18),
        "1g.45gb": Row(15, 9, 4, 2, (0, 2, 4, 6), 45312, 30),
        "2g.45gb": Row(14, 1, 3, 2, (0, 2, 4), 45312, 36),
        "3g.90gb": Row(9, 2, 2, 4, (0, 4), None, None),
        "4g.90gb": Row(5, 3, 1, 4, (0,), None, None),
        "7g.180gb": Row(0, 4, 1, 8, (0,), None, None),
    },
    "RTX-PRO-6000-Blackwell-96GB": {
        "1g.24gb": Row(14, 0, 4, 1, None, 24192, 46),
        "1g.24gb+me": Row(21, 7, 1, 1, None, 24192, 46),
        "1g.24gb+gfx": Row(47, 10, 4, 1, None, 24192, 46),
        "1g.24gb+me.all": Row(65, 15, 1, 1, None, 24192, 46),
        "1g.24gb-me": Row(67, 13, 4, 1, None, 24192, 46),
        "2g.48gb": Row(5, 1, 2, 2, None, 48512, 94),
        "2g.48gb+gfx": Row(35, 11, 2, 2, None, 48512, 94),
        "2g.48gb+me.all": Row(64, 16, 1, 2, None, 48512, 94),
        "2g.48gb-me": Row(66, 14, 2, 2, None, 48512, 94),
        "4g.96gb": Row(0, 3, 1, 4, None, 97280, 188),
        "4g.96gb+gfx": Row(32, 12, 1, 4, None, 97280, 188),
    },
}
# GPU instance ids by size in memory slices of a card with eight: whole, half, quarter, eighth.
ID_RANGES = {8: range(1), 4: range(1, 3), 2: range(3, 7), 1: range(7, 15)}
# On the H100: size, then what nvidia-smi shows of a slice on hardware: CE, ENC, DEC, OFA, JPG.
H100_ENGINES = {"3g.40gb": (3, 0, 3, 0, 3), "2g.20gb": (2, 0, 2, 0, 2)}


def _known(card: str) -> dict[str, Row]:
    """The profiles of which the listings tell enough to describe an instance."""
    return {name: row for name, row in RECORDED[card].items() if row.memory is not None}


@pytest.fixture
def device(start_driver: StartDriver, card: str) -> Any:
    start_driver(card)
    return pynvml.nvmlDeviceGetHandleByIndex(0)


@pytest.mark.parametrize("card", RECORDED)
def test_the_driver_lists_what_was_recorded_and_nothing_else(device: Any, card: str) -> None:
    listed = {
        name: (info.id, info.instanceCount, info.memorySizeMB, info.multiprocessorCount)
        for name, info in calls.profiles(device).items()
    }
    assert listed == {name: (row.id, row.most, row.memory, row.sm) for name, row in _known(card).items()}
    for name, row in _known(card).items():
        by_enum = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, row.enum)
        assert by_enum.name == f"MIG {name}"
        by_id = pynvml.nvmlDeviceGetGpuInstanceProfileInfoByIdV(device, row.id)
        assert (by_id.name, by_id.id) == (f"MIG {name}", row.id)


@pytest.mark.parametrize("card", RECORDED)
def test_instances_are_made_at_every_recorded_place_and_no_other(device: Any, card: str) -> None:
    for row in _known(card).values():
        if row.starts is None:
            with pytest.raises(pynvml.NVMLError_NotSupported):
                calls.placements(device, row.id)
            continue
        places = [(start, row.size) for start in row.starts]
        assert calls.placements(device, row.id) == places
        for start, size in places:
            instance = calls.create(device, row.id, start, size)
            info = pynvml.nvmlGpuInstanceGetInfo(instance)
            assert (info.placement.start, info.placement.size) == (start, size)
            if card != "A30-24GB":
                assert info.id in ID_RANGES[size]
            pynvml.nvmlGpuInstanceDestroy(instance)
        for start in set(range(8)) - set(row.starts):
            with pytest.raises(pynvml.NVMLError_InvalidArgument):
                calls.create(device, row.id, start, row.size)


@pytest.mark.parametrize("card", [card for card in RECORDED if not card.startswith("RTX")])
def test_as_many_instances_fit_as_were_recorded(device: Any, card: str) -> None:
    for row in _known(card).values():
        assert calls.remaining(device, row.id) == row.most
        made = [pynvml.nvmlDeviceCreateGpuInstance(device, row.id) for _ in range(row.most)]
        assert calls.remaining(device, row.id) == 0
        with pytest.raises(pynvml.NVMLError_InsufficientResources):
            pynvml.nvmlDeviceCreateGpuInstance(device, row.id)
        for instance in made:
            pynvml.nvmlGpuInstanceDestroy(instance)


@pytest.mark.parametrize("card", RECORDED)
def test_a_profile_that_is_not_known_well_enough_refuses(device: Any, card: str) -> None:
    for row in RECORDED[card].values():
        if row.memory is None or row.starts is None:
            with pytest.raises(pynvml.NVMLError_NotSupported):
                pynvml.nvmlDeviceCreateGpuInstance(device, row.id)


@pytest.mark.parametrize("card", ["H100-80GB-SXM5"])
def test_a_slice_has_the_engines_that_were_seen(device: Any, card: str) -> None:
    for start, name in zip((0, 4), H100_ENGINES, strict=True):
        row = RECORDED[card][name]
        instance = calls.create(device, row.id, start, row.size)
        calls.create_full_compute(instance)
    for index, (name, engines) in enumerate(H100_ENGINES.items()):
        seen = pynvml.nvmlDeviceGetAttributes(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index))
        row = RECORDED[card][name]
        assert (seen.multiprocessorCount, seen.memorySizeMB) == (row.sm, row.memory)
        assert engines == (
            seen.sharedCopyEngineCount,
            seen.sharedEncoderCount,
            seen.sharedDecoderCount,
            seen.sharedOfaCount,
            seen.sharedJpegCount,
        )
