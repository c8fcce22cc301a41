"""What earlier runs of the same code do to a prediction."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_onnx import Observation, Prediction, Tier, blended, required_mib

GIB = 1024.0


def predicted(p50: float = 8 * GIB, p90: float = 9 * GIB, p99: float = 10 * GIB) -> Prediction:
    parts = {"context": p50 / 4, "activations": 3 * p50 / 4}
    return Prediction(p50, p90, p99, Tier.STATIC_NAMED, "The model says so.", parts, {}, "0" * 12)


def peaked(*peaks: float) -> list[Observation]:
    return [Observation(peak_mib=peak) for peak in peaks]


def quantiles(prediction: Prediction) -> tuple[float, float, float]:
    return prediction.p50_mib, prediction.p90_mib, prediction.p99_mib


def widths(prediction: Prediction) -> tuple[float, float]:
    return prediction.p90_mib / prediction.p50_mib, prediction.p99_mib / prediction.p50_mib


memory = st.floats(1.0, 200_000.0)
models = st.tuples(memory, st.floats(1.0, 3.0), st.floats(1.0, 3.0)).map(
    lambda one: predicted(one[0], one[0] * one[1], one[0] * one[1] * one[2])
)
observations = st.builds(
    Observation, peak_mib=st.none() | memory, at_least_mib=st.none() | memory, duration_s=st.none() | st.floats(0, 1e6)
)


@given(models)
def test_without_history_it_is_the_models_answer(model: Prediction) -> None:
    assert blended(model, []) is model
    assert blended(model, [Observation(duration_s=3.0, utilization=0.5), Observation(peak_mib=0.0)]) is model


def test_one_bound_among_many_runs_is_outvoted_and_still_counts() -> None:
    model, runs = predicted(8 * GIB, 9 * GIB, 10 * GIB), [Observation(peak_mib=8 * GIB)] * 49
    steady, odd = blended(model, runs), blended(model, [*runs, Observation(at_least_mib=80 * GIB)])
    assert steady.p90_mib < odd.p90_mib < 20 * GIB
    assert blended(model, [*runs[:1], Observation(at_least_mib=80 * GIB)]).p50_mib >= 80 * GIB


@given(models, st.lists(observations, max_size=20))
def test_never_below_what_ran_out_of_memory(model: Prediction, seen: list[Observation]) -> None:
    after = blended(model, seen)
    peaks = [one.peak_mib for one in seen if one.peak_mib is not None]
    bounds = [one.at_least_mib for one in seen if one.at_least_mib is not None]
    floor = max((bound for bound in bounds if sum(peak < bound for peak in peaks) < 2), default=0.0)
    assert min(quantiles(after)) >= floor * (1 - 1e-12)
    assert required_mib(after) > floor


@given(models, st.lists(observations, max_size=20))
def test_quantiles_stay_in_order_and_parts_add_up(model: Prediction, seen: list[Observation]) -> None:
    after = blended(model, seen)
    assert after.p50_mib <= after.p90_mib <= after.p99_mib < math.inf
    assert sum(after.breakdown_mib.values()) == pytest.approx(after.p50_mib)


@given(models, st.randoms(use_true_random=False), st.lists(observations, max_size=10))
def test_the_order_of_runs_does_not_matter(model: Prediction, chance: random.Random, seen: list[Observation]) -> None:
    other = list(seen)
    chance.shuffle(other)
    assert quantiles(blended(model, other)) == pytest.approx(quantiles(blended(model, seen)), rel=1e-9)


@given(models, memory, st.lists(st.floats(0.7, 1.4), min_size=2, max_size=6))
def test_with_many_runs_it_converges_to_them(model: Prediction, peak: float, factors: list[float]) -> None:
    peaks = [max(1.0, peak * factor) for factor in factors]
    after = blended(model, peaked(*(peaks * 2000)))
    logs = [math.log(one) for one in peaks]
    assert after.p50_mib == pytest.approx(math.exp(statistics.fmean(logs)), rel=0.01)
    spread = math.sqrt(statistics.pvariance(logs))
    assert math.log(after.p90_mib / after.p50_mib) == pytest.approx(1.2816 * spread, abs=0.01)


@given(models, st.lists(memory, max_size=12))
def test_another_run_that_agrees_never_widens(model: Prediction, peaks: list[float]) -> None:
    before = blended(model, peaked(*peaks))
    agrees = math.exp(statistics.fmean([math.log(one) for one in peaks])) if peaks else model.p50_mib
    after = blended(model, peaked(*peaks, agrees))
    for quantile, old, new in zip((1.2816, 2.3263), widths(before), widths(after), strict=True):
        # No model is believed that claims to be surer than one percent.
        assert new <= max(old, math.exp(quantile * 0.01)) * (1 + 1e-4)


def test_one_run_outweighs_a_model_that_was_wrong() -> None:
    after = blended(predicted(5 * GIB, 5.5 * GIB, 6 * GIB), peaked(11.2 * GIB))
    assert after.p50_mib == pytest.approx(11.2 * GIB, rel=0.01)
    assert 11.2 * GIB < after.p90_mib < 12.5 * GIB
    after = blended(predicted(20 * GIB, 22 * GIB, 24 * GIB), peaked(11.2 * GIB))
    assert after.p90_mib < 12.5 * GIB


def test_a_model_that_agrees_keeps_its_weight() -> None:
    after = blended(predicted(), peaked(8.4 * GIB))
    assert 8 * GIB < after.p50_mib < 8.4 * GIB
    assert after.p90_mib < 9.2 * GIB


@pytest.mark.parametrize("error", [0.1, 0.3])
@pytest.mark.parametrize("runs", [1, 3, 10])
def test_the_next_run_fits_as_often_as_p90_promises_also_after_a_model_that_claimed_too_much(
    error: float, runs: int
) -> None:
    """Runs vary by 5 %, and the model claims to be off by 10 %. Without history 10 % or 32 % would not fit."""
    chance = random.Random(runs)
    too_small, room = 0, []
    for _ in range(2000):
        needs = math.exp(chance.uniform(math.log(2000), math.log(60_000)))
        p50 = needs * math.exp(chance.gauss(0, error))
        *seen, following = (needs * math.exp(chance.gauss(0, 0.05)) for _ in range(runs + 1))
        model = predicted(p50, p50 * math.exp(1.2816 * 0.1), p50 * math.exp(2.3263 * 0.1))
        required = required_mib(blended(model, peaked(*seen)))
        too_small += following > required
        room.append(required / following - 1)
    assert too_small / 2000 < 0.14
    assert statistics.fmean(room) < 0.12


def test_runs_that_differ_widen_it() -> None:
    steady, unsteady = (
        blended(predicted(), peaked(*[8 * GIB] * 10)),
        blended(predicted(), peaked(*[6 * GIB, 10.6 * GIB] * 5)),
    )
    assert widths(unsteady)[0] > widths(steady)[0]
    assert unsteady.p90_mib > 10 * GIB


def test_code_that_seemed_to_use_no_accelerator_is_believed_when_it_does() -> None:
    nothing = Prediction(0.0, 0.0, 0.0, Tier.NO_ACCELERATOR_USE, "It uses no GPU.", {}, {}, "0" * 12)
    after = blended(nothing, peaked(3 * GIB, 3 * GIB))
    assert after.p50_mib == pytest.approx(3 * GIB)
    assert after.breakdown_mib == {"observed": after.p50_mib}
    assert blended(nothing, [Observation(at_least_mib=9856.0)]).p50_mib == 9856.0


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (peaked(11.2 * GIB, 11.22 * GIB, 11.21 * GIB), "3 earlier runs of this code peaked at 11.2 GiB. The model"),
        (
            [Observation(peak_mib=700.0, emulated=True)],
            "1 earlier run of this code peaked at 700 MiB (seen on emulated cards). The model",
        ),
        (peaked(700.0), "1 earlier run of this code peaked at 700 MiB. The model"),
        (peaked(10.1 * GIB, 11.2 * GIB), "2 earlier runs of this code peaked at 10.1 GiB to 11.2 GiB. The model"),
        (
            [Observation(at_least_mib=9856.0)],
            "an earlier run of this code did not come to its end and needs more than 9.6 GiB. The model",
        ),
        (
            [*peaked(7 * GIB), Observation(at_least_mib=9856.0)],
            "1 earlier run of this code peaked at 7.0 GiB, and one did not come to its end and needs more than 9.6 GiB",
        ),
    ],
)
def test_the_reason_says_what_was_seen(seen: list[Observation], said: str) -> None:
    assert blended(predicted(), seen).reason.startswith(said)
