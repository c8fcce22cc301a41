from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.fleet import Geometry
from controlplane.sizing import choices_for, size, size_of_session
from puhui.v1 import job_pb2, prediction_pb2
from puhui.v1.prediction_pb2 import SIZING_ORIGIN_MEMORY, SIZING_ORIGIN_PREDICTION, SIZING_ORIGIN_PROFILE
from tests.unit.controlplane.samples import GEOMETRY

H200 = Geometry(
    "NVIDIA H200",
    tuple(
        replace(shape, profile=profile, memory_mib=memory)
        for shape, profile, memory in zip(
            GEOMETRY.shapes,
            ("1g.18gb", "1g.18gb+me", "1g.35gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb"),
            (16384, 16384, 33280, 33280, 71168, 71168, 143360),
            strict=True,
        )
    ),
    8,
)


def names(profile: str, required_mib: int, *geometries: Geometry) -> list[str]:
    return [choice.profile for choice in choices_for(profile, required_mib, geometries)]


def test_the_smallest_slice_with_enough_memory_wins_and_fewer_compute_slices_come_first() -> None:
    assert names("", 0, GEOMETRY) == ["1g.10gb"]
    assert names("", 9984, GEOMETRY) == ["1g.10gb"]
    assert names("", 9985, GEOMETRY) == ["1g.20gb", "2g.20gb"]
    assert names("", 30_000, GEOMETRY) == ["3g.40gb", "4g.40gb"]
    assert names("", 60_000, GEOMETRY) == ["7g.80gb"]
    assert names("", 90_000, GEOMETRY) == []


def test_every_model_has_its_own_choice_and_less_memory_comes_first() -> None:
    assert names("", 9000, H200, GEOMETRY) == ["1g.10gb", "1g.18gb"]
    assert names("", 15_000, GEOMETRY, H200) == ["1g.18gb", "1g.20gb", "2g.20gb"]


def test_a_named_profile_is_the_only_choice() -> None:
    assert names("4g.40gb", 0, GEOMETRY, H200) == ["4g.40gb"]
    assert names("1g.10gb+me", 0, GEOMETRY) == ["1g.10gb+me"]


@given(st.integers(0, 200_000))
def test_whatever_is_chosen_is_enough(required_mib: int) -> None:
    found = choices_for("", required_mib, [GEOMETRY, H200])
    assert all(choice.memory_mib >= required_mib for choice in found)
    for geometry in (GEOMETRY, H200):
        fitting = [s.memory_mib for s in geometry.shapes if s.memory_mib >= required_mib]
        mine = [choice.memory_mib for choice in found if choice.gpu_model == geometry.gpu_model]
        assert bool(mine) == bool(fitting)
        assert not mine or min(mine) == min(fitting)


PREDICTION = prediction_pb2.Prediction(required_mib=30_000)


@pytest.mark.parametrize(
    ("resources", "origin", "profile", "words"),
    [
        (job_pb2.Resources(), SIZING_ORIGIN_PREDICTION, "3g.40gb", "30000 MiB are predicted"),
        (job_pb2.Resources(memory_mib=5000), SIZING_ORIGIN_MEMORY, "1g.10gb", "5000 MiB were asked for"),
        (job_pb2.Resources(memory_mib=5000, profile="7g.80gb"), SIZING_ORIGIN_PROFILE, "7g.80gb", "by name"),
    ],
)
def test_the_user_wins_over_the_prediction(resources, origin, profile, words) -> None:  # type: ignore[no-untyped-def]
    sizing = size(resources, PREDICTION, [GEOMETRY])
    assert (sizing.origin, sizing.choices[0].profile) == (origin, profile)
    assert words in sizing.reason


def test_what_fits_nowhere_is_said_to() -> None:
    too_large = size(job_pb2.Resources(memory_mib=500_000), None, [GEOMETRY])
    assert not too_large.choices
    assert "no card here is that large" in too_large.reason
    assert "no GPU of this centre is known yet" in size(job_pb2.Resources(memory_mib=5), None, []).reason


@pytest.mark.parametrize(
    ("default_mib", "chosen", "said"),
    [(0, "1g.10gb", "the smallest slice"), (20000, "1g.20gb", "default of 20000 MiB"), (10**6, "", "1000000 MiB")],
)
def test_a_session_that_asks_for_nothing_gets_what_the_centre_says(default_mib: int, chosen: str, said: str) -> None:
    sizing = size_of_session(job_pb2.Resources(), [GEOMETRY], default_mib)
    assert [choice.profile for choice in sizing.choices][:1] == [chosen] * bool(chosen)
    assert sizing.required_mib == default_mib
    assert said in sizing.reason
    named = size_of_session(job_pb2.Resources(profile="3g.40gb"), [GEOMETRY], default_mib)
    assert [choice.profile for choice in named.choices] == ["3g.40gb"]
