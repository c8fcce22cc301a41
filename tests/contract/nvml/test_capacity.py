"""Whatever is created and destroyed, instances never overlap and the capacity is the true one."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pynvml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.nvml import calls
from tests.contract.nvml.conftest import started

Place = tuple[int, int]
# Which of the possible actions to take, as indices into what is possible then.
ACTIONS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 63), st.integers(0, 63)))


def _overlap(one: Place, other: Place) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


@cache
def _most_disjoint(free: tuple[Place, ...]) -> int:
    """The largest number of places of which no two overlap, found by trying all."""
    if not free:
        return 0
    first, *rest = free
    compatible = tuple(place for place in rest if not _overlap(first, place))
    return max(_most_disjoint(tuple(rest)), 1 + _most_disjoint(compatible))


def _check(device: Any, profiles: dict[str, Any]) -> None:
    taken = calls.all_placements(device)
    assert not any(_overlap(a, b) for i, a in enumerate(taken) for b in taken[:i])
    counts = {name: len(calls.instances(device, p.id)) for name, p in profiles.items()}
    media = sum(count * profiles[name].ofaCount for name, count in counts.items())
    for name, profile in profiles.items():
        places = calls.placements(device, profile.id)
        free = tuple(p for p in places if not any(_overlap(p, t) for t in taken))
        fitting = min(_most_disjoint(free), profile.instanceCount - counts[name])
        if profile.ofaCount and media:
            fitting = 0  # one optical flow engine on a card
        assert calls.remaining(device, profile.id) == fitting, (name, taken)


def _act(device: Any, profiles: dict[str, Any], kind: int, first: int, second: int) -> None:
    profile = list(profiles.values())[first % len(profiles)]
    existing = calls.instances(device, profile.id)
    if kind == 0 and existing:
        pynvml.nvmlGpuInstanceDestroy(existing[second % len(existing)])
        return
    before = calls.remaining(device, profile.id)
    places = calls.placements(device, profile.id)
    try:
        if kind == 1:
            pynvml.nvmlDeviceCreateGpuInstance(device, profile.id)
        else:
            calls.create(device, profile.id, *places[second % len(places)])
    except pynvml.NVMLError_InsufficientResources:
        assert kind != 1 or before == 0
    else:
        assert before > 0


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["A100-40GB", "H100-80GB-SXM5", "A30-24GB"]), ACTIONS)
def test_capacity_is_what_fits(model: str, actions: list[tuple[int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory, started(Path(directory), model):
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        profiles = calls.profiles(device)
        _check(device, profiles)
        for action in actions:
            _act(device, profiles, *action)
            _check(device, profiles)


def test_as_many_fit_as_the_capacity_says(tmp_path: Path) -> None:
    for model in ("A30-24GB", "A100-80GB", "H100-NVL-94GB", "H200-141GB"):
        with started(tmp_path / model, model) as driver:
            device = pynvml.nvmlDeviceGetHandleByIndex(0)
            for name, profile in calls.profiles(device).items():
                for left in reversed(range(calls.remaining(device, profile.id))):
                    pynvml.nvmlDeviceCreateGpuInstance(device, profile.id)
                    assert calls.remaining(device, profile.id) == left, name
                assert len(calls.instances(device, profile.id)) == profile.instanceCount
                driver.reset_gpu(0)
