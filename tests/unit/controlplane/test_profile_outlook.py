"""What is expected of a job on each profile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.fleet import Geometry
from controlplane.profile_outlook import Pace, chance_of_fit, confidence, outlooks
from controlplane.sizing import size
from puhui.v1 import job_pb2, prediction_pb2
from tests.unit.controlplane.samples import GEOMETRY

STATIC = prediction_pb2.PREDICTION_TIER_STATIC


def quantiles(p50: float, p90: float, p99: float) -> prediction_pb2.MemoryQuantiles:
    return prediction_pb2.MemoryQuantiles(p50_mib=p50, p90_mib=p90, p99_mib=p99)


def predicted(p50: float, p90: float, p99: float, tier: int = STATIC) -> prediction_pb2.Prediction:
    return prediction_pb2.Prediction(tier=tier, memory=quantiles(p50, p90, p99), required_mib=round(p90))  # type: ignore[arg-type]


sizes = st.floats(1, 1e6)


@given(sizes, st.floats(1, 3), st.floats(1, 3))
def test_the_quantiles_have_their_own_chances(p50: float, wider: float, widest: float) -> None:
    memory = quantiles(p50, p50 * (1 + wider), p50 * (1 + wider) * (1 + widest))
    assert chance_of_fit(memory, memory.p50_mib) == pytest.approx(0.5)
    assert chance_of_fit(memory, memory.p90_mib) == pytest.approx(0.9)
    assert chance_of_fit(memory, memory.p99_mib) == pytest.approx(0.99)


@given(sizes, st.floats(1, 4), st.floats(1, 4), sizes, sizes)
def test_more_memory_never_fits_less(p50: float, to90: float, to99: float, one: float, other: float) -> None:
    memory = quantiles(p50, p50 * to90, p50 * to90 * to99)
    low, high = chance_of_fit(memory, min(one, other)), chance_of_fit(memory, max(one, other))
    assert low is not None
    assert high is not None
    assert 0 <= low <= high <= 1


def test_without_quantiles_there_is_no_chance() -> None:
    assert chance_of_fit(quantiles(0, 0, 0), 9728) is None


@pytest.mark.parametrize(
    ("prediction", "sure"),
    [
        (prediction_pb2.Prediction(), "UNSPECIFIED"),
        (predicted(1000, 1050, 1100), "HIGH"),
        (predicted(1000, 1200, 1500), "MEDIUM"),
        (predicted(1000, 2000, 3000), "LOW"),
        (predicted(1000, 1050, 1100, prediction_pb2.PREDICTION_TIER_UNKNOWN), "LOW"),
        (predicted(0, 0, 0, prediction_pb2.PREDICTION_TIER_NO_ACCELERATOR), "HIGH"),
    ],
)
def test_how_sure_it_is(prediction: prediction_pb2.Prediction, sure: str) -> None:
    assert prediction_pb2.PredictionConfidence.Name(confidence(prediction)) == f"PREDICTION_CONFIDENCE_{sure}"


def shown(prediction: prediction_pb2.Prediction, paces: dict[tuple[str, str], Pace] | None = None,
          geometry: Geometry = GEOMETRY, **asked: str) -> dict[str, prediction_pb2.ProfileOutlook]:  # fmt: skip
    sizing = size(job_pb2.Resources(**asked), prediction, [geometry])  # type: ignore[arg-type]
    return {one.profile: one for one in outlooks(prediction, sizing, [geometry, geometry], paces or {})}


def test_each_profile_is_told_of_once_and_one_is_chosen() -> None:
    found = shown(predicted(9000, 12000, 15000))
    assert list(found) == [
        shape.profile
        for shape in sorted(GEOMETRY.shapes, key=lambda one: (one.memory_mib, one.compute_slices, one.profile))
    ]
    (chosen,) = (one for one in found.values() if one.chosen)
    assert chosen.satisfies
    assert chosen.reason == "the smallest with enough memory"
    for one in found.values():
        assert (one.reason == "too small") == (one.memory_mib < 12000)
        assert 0 < one.chance_of_fit <= 1
        assert not one.HasField("slowdown_p50")
        assert not one.HasField("duration_p50")


def test_what_is_known_of_its_pace_is_told() -> None:
    profiles = [shape.profile for shape in GEOMETRY.shapes]
    paces = {
        (GEOMETRY.gpu_model, profiles[0]): Pace(2.0, 3.0, 60.0, 90.0),
        (GEOMETRY.gpu_model, profiles[1]): Pace(4.0, 5.0),
    }
    found = shown(predicted(1000, 1100, 1200), paces)
    first, second = found[profiles[0]], found[profiles[1]]
    assert (first.slowdown_p50, first.slowdown_p90) == (2.0, 3.0)
    assert (first.duration_p50.seconds, first.duration_p90.seconds) == (60, 90)
    assert second.slowdown_p50 == 4.0
    assert not second.HasField("duration_p50")


def test_a_profile_that_was_asked_for_says_so() -> None:
    name = GEOMETRY.shapes[0].profile
    found = shown(predicted(1000, 1100, 1200), profile=name)
    assert found[name].reason == "asked for"
    assert {one.reason for profile, one in found.items() if profile != name} == {"not what was asked for"}


def test_without_use_of_an_accelerator_all_fit() -> None:
    nothing = prediction_pb2.Prediction(tier=prediction_pb2.PREDICTION_TIER_NO_ACCELERATOR, required_mib=1)
    assert {one.chance_of_fit for one in shown(nothing).values()} == {1.0}
