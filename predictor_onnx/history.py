"""What earlier runs of the same code needed, blended with what the model says. Pure.

Peaks vary by factors rather than by amounts, so everything here is in logarithms. The model's answer is the prior of
the median: at ``ln p50``, with a variance that its own p90 implies. Each run that ended well is a draw around the true
median. Median and spread of the answer are those of the normal model with a normal prior (Gelman et al., *Bayesian
Data Analysis*, 3rd edition, 2.5 and 3.3, with the variance plugged in)::

    w    = n / (n + s² / t²)                   weight of n runs against the model
    p50  = exp(w · mean(ln peak) + (1 - w) · ln model p50)
    sd²  = s² + (1 - w) · t²                   of the next run
    s²   = (c · v + Σ (ln peak - mean)²) / (c + n)   between runs: ``v`` before any was seen, worth c runs
    t²   = max(V - v, (mean - ln model p50)²)  of the median, before anything was seen

``V`` is the variance that the model's p90 implies. A model that missed by more than it claimed is believed as little
as it missed (the second part of ``t²``: an empirical Bayes estimate of how far off it is). p90 and p99 keep their
distances from the median in the model's own proportion, both times ``sd / √V``, and longer by as much as p90 of
Student's t with ``c + n`` degrees of freedom is than the normal one's, because ``s²`` is known from so few (the same,
3.3).
Another run that agrees with the earlier ones never widens the answer; one that does not agree may.

A run that ran out of memory, or ended before its time, tells a lower bound and no value: the answer is raised as a
whole until its median is not below any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from predictor_onnx.prediction import Prediction, gib

#: Standard normal quantile of 0.9.
_Z90: Final = 1.2815515655446004
_Z99: Final = 2.3263478740408408
#: Standard deviation of ln(peak) between runs of the same code, before any was seen: a judgement. The allocator repeats
#: itself; autotuned workspaces, data loaders and GPU models do not.
_BETWEEN_RUNS: Final = 0.05
#: How many runs that judgement weighs as much as.
_JUDGED_RUNS: Final = 3.0
#: No model is surer of a median than this standard deviation of ln(peak).
_SUREST: Final = 0.01
#: p99 is at most so many times as far from the median as p90; of a normal distribution, 1.8 times.
_LONGEST_TAIL: Final = 4.0
#: A prediction below this has no median whose logarithm means anything.
_LEAST_MIB: Final = 1.0


@dataclass(frozen=True)
class Observation:
    """What one earlier run of the same code showed.

    Attributes:
        peak_mib: most device memory that it used, in MiB; None when that was not seen.
        at_least_mib: it would have used this much or more, in MiB; None when nothing says so.
        duration_s: for how long its command ran, in seconds; None when that is not known.
        utilization: share of the time with its slice in which it used it, from 0 to 1; None when not known.
        emulated: whether its card was.
    """

    peak_mib: float | None = None
    at_least_mib: float | None = None
    duration_s: float | None = None
    utilization: float | None = None
    emulated: bool = False


def blended(prediction: Prediction, observations: Sequence[Observation]) -> Prediction:
    """Blend a prediction with what was observed of the same code.

    Args:
        prediction: the model's answer.
        observations: earlier runs, in any order; those that tell nothing of memory count for nothing.

    Returns:
        ``prediction`` with other quantiles, and a breakdown that adds up to the new median; itself when nothing was
        observed.
    """
    quantiles = (prediction.p50_mib, prediction.p90_mib, prediction.p99_mib)
    peaks = [one.peak_mib for one in observations if one.peak_mib is not None and one.peak_mib >= _LEAST_MIB]
    if peaks:
        quantiles = _towards(quantiles, [math.log(peak) for peak in peaks])
    floor = max((one.at_least_mib for one in observations if one.at_least_mib is not None), default=0.0)
    quantiles = _raised(quantiles, floor)
    if not peaks and floor <= prediction.p50_mib:
        return prediction
    p50, p90, p99 = quantiles
    parts = {"observed": p50}
    if prediction.p50_mib >= _LEAST_MIB:
        parts = {name: mib * p50 / prediction.p50_mib for name, mib in prediction.breakdown_mib.items()}
    return replace(
        prediction,
        p50_mib=p50,
        p90_mib=p90,
        p99_mib=p99,
        breakdown_mib=parts,
        reason=f"{told(observations)}. {prediction.reason}",
    )


def told(observations: Sequence[Observation]) -> str:
    """Say in a sentence without its full stop what earlier runs needed; "" when none tells anything of memory."""
    peaks = sorted(one.peak_mib for one in observations if one.peak_mib is not None and one.peak_mib >= _LEAST_MIB)
    floor = max((one.at_least_mib for one in observations if one.at_least_mib is not None), default=0.0)
    said = []
    if peaks:
        runs = "1 earlier run" if len(peaks) == 1 else f"{len(peaks)} earlier runs"
        low, high = gib(peaks[0]), gib(peaks[-1])
        said.append(f"{runs} of this code peaked at {high if low == high else f'{low} to {high}'}")
    if floor:
        more = "one" if peaks else "an earlier run of this code"
        said.append(f"{more} did not come to its end and needs more than {gib(floor)}")
    telling = [one for one in observations if one.peak_mib is not None or one.at_least_mib is not None]
    emulated = " (seen on emulated cards)" if any(one.emulated for one in telling) else ""
    return ", and ".join(said) + emulated


def _towards(quantiles: tuple[float, float, float], logs: Sequence[float]) -> tuple[float, float, float]:
    """Returns the quantiles after some peaks were seen, given by their logarithms."""
    mean = math.fsum(logs) / len(logs)
    to90, to99 = _distances(quantiles)
    model = math.log(quantiles[0]) if quantiles[0] >= _LEAST_MIB else mean
    variance = (to90 / _Z90) ** 2
    between = min(_BETWEEN_RUNS**2, variance / 2)
    scatter = math.fsum((one - mean) ** 2 for one in logs)
    seen = (_JUDGED_RUNS * between + scatter) / (_JUDGED_RUNS + len(logs))
    of_median = max(variance - between, (mean - model) ** 2)
    weight = len(logs) / (len(logs) + seen / of_median)
    median = weight * mean + (1 - weight) * model
    shrunk = math.sqrt((seen + (1 - weight) * of_median) / variance)
    shrunk *= _longer(_JUDGED_RUNS + len(logs))
    return math.exp(median), math.exp(median + to90 * shrunk), math.exp(median + to99 * shrunk)


def _longer(freedom: float) -> float:
    """p90 of Student's t over that of the normal distribution (Abramowitz and Stegun, 26.7.5, two terms)."""
    square = _Z90**2
    return 1 + (square + 1) / (4 * freedom) + (5 * square**2 + 16 * square + 3) / (96 * freedom**2)


def _distances(quantiles: tuple[float, float, float]) -> tuple[float, float]:
    """Returns how far p90 and p99 are from the median, in logarithms; without a median, what is usual between runs."""
    p50, p90, p99 = quantiles
    if p50 < _LEAST_MIB:
        return _Z90 * _BETWEEN_RUNS, _Z99 * _BETWEEN_RUNS
    to90 = max(math.log(p90 / p50), _Z90 * _SUREST)
    return to90, min(max(math.log(p99 / p50), to90), _LONGEST_TAIL * to90)


def _raised(quantiles: tuple[float, float, float], floor: float) -> tuple[float, float, float]:
    """Returns the quantiles, all raised by the factor that brings the median to `floor` when it is below."""
    p50 = quantiles[0]
    if floor <= p50:
        return quantiles
    to90, to99 = _distances(quantiles)
    return floor, floor * math.exp(to90), floor * math.exp(to99)
