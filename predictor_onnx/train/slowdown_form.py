"""The form of the slowdown: a roofline in which host time does not shrink with the slice, and its fit.

With the step's work ``d`` on the card over the time that no slice changes (host, launches), and ``x`` how many times
slower a slice does that work,

    slowdown = ((1 + (d x)^p) / (1 + d^p))^(1/p),    x = f / compute share + (1 - f) / memory share

``p = 1`` adds host and card time, a larger ``p`` overlaps them (Williams, Waterman and Patterson, "Roofline", CACM
2009, is the limit of two such terms). ``f`` is the part of the work that compute bounds. ``d`` is a product of powers
of the terms below, all powers positive: so the slowdown is at least 1, and no smaller on a smaller slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from predictor_onnx.step_work import StepWork

Array = npt.NDArray[np.float64]

#: Round figures of an A100 at float32 set before any fit: only ratios matter, and the fit sets their level.
CARD_FLOPS: Final = 15e12
CARD_BYTES: Final = 1.2e12
STEP_S: Final = 1e-3
LAUNCH_S: Final = 1e-5
#: Utilization is clipped away from 0 and 1, where its logarithms have no value.
CLIP: Final = 1e-3
#: Terms of ``log d``.
TERMS: Final = ("log_card_per_host", "log_bandwidth_utilization", "log_sm_utilization", "logit_sm_utilization")
#: Half a power of how much of the card's time is arithmetic goes into ``f``, where ``f`` depends on the workload.
OWN_MIX: Final = 0.5
_PULL: Final = 0.1
_TURNS: Final = 60


@dataclass(frozen=True)
class Points:
    """Steps on slices, one row each.

    Attributes:
        terms: of shape (n, 4), in the order of ``TERMS``.
        mix: logarithm of arithmetic time over memory time.
        slower: of shape (n, 2), one over the shares of compute and of memory.
    """

    terms: Array
    mix: Array
    slower: Array

    def take(self, rows: npt.NDArray[np.bool_]) -> Points:
        """Some of the rows."""
        return Points(self.terms[rows], self.mix[rows], self.slower[rows])


def card_times(work: StepWork) -> tuple[float, float, float]:
    """Seconds of arithmetic, of memory traffic and of host work of a step on the reference card."""
    return (
        max(work.flops / CARD_FLOPS, 1e-9),
        max((work.moved_bytes + work.state_bytes) / CARD_BYTES, 1e-9),
        STEP_S + LAUNCH_S * work.launches,
    )


def points(steps: list[tuple[StepWork, float, float, float, float]]) -> Points:
    """From (work, SM utilization, bandwidth utilization, compute share, memory share); utilizations are 0 to 1."""
    terms, mix, slower = [], [], []
    for work, sm, bandwidth, compute, memory in steps:
        arithmetic, traffic, host = card_times(work)
        busy, moving = np.clip([sm, bandwidth], CLIP, 1 - CLIP)
        terms.append([np.log((arithmetic + traffic) / host), np.log(moving), np.log(busy), np.log(busy / (1 - busy))])
        mix.append(np.log(arithmetic / traffic))
        slower.append([1 / compute, 1 / memory])
    return Points(np.array(terms), np.array(mix), np.array(slower))


@dataclass(frozen=True)
class Form:
    """What the fit may vary.

    Attributes:
        power: ``p``.
        own_mix: whether ``f`` depends on the workload's arithmetic and traffic.
        given: terms that enter ``d`` as they are.
        fitted: terms whose power is fitted.
    """

    power: float
    own_mix: bool
    given: tuple[str, ...]
    fitted: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """A fitted form: ``log d = level + powers . terms`` and ``logit f = mix_level + mix_power * mix``."""

    power: float
    level: float
    powers: tuple[float, ...]
    mix_level: float
    mix_power: float

    def slowdown(self, at: Points) -> Array:
        """At least 1, one value per row."""
        demand = np.exp(np.clip(self.level + at.terms @ np.array(self.powers), -20.0, 20.0))
        bound = 1 / (1 + np.exp(-self.mix_level - self.mix_power * at.mix))
        slower = bound * at.slower[:, 0] + (1 - bound) * at.slower[:, 1]
        over = (1 + (demand * slower) ** self.power) / (1 + demand**self.power)
        result: Array = over ** (1 / self.power)
        return result


def curve_of(form: Form, theta: Array) -> Curve:
    """The curve of a parameter vector: mix level, level, logarithms of the fitted powers."""
    powers = dict.fromkeys(form.given, 1.0)
    powers.update(zip(form.fitted, (float(np.exp(value)) for value in theta[2:]), strict=True))
    return Curve(form.power, float(theta[1]), tuple(powers.get(term, 0.0) for term in TERMS), float(theta[0]),
                 OWN_MIX if form.own_mix else 0.0)  # fmt: skip


def fit(form: Form, at: Points, slowdown: Array) -> Curve:
    """Least squares on logarithms, robust to outliers (soft L1 at 10 %), drawn gently towards zero.

    Levenberg and Marquardt's method on at most five parameters, with differences for derivatives.
    """
    target = np.log(slowdown)
    theta = np.zeros(2 + len(form.fitted))

    def misses(of: Array) -> Array:
        error = (np.log(curve_of(form, of).slowdown(at)) - target) / 0.1
        # The root of the soft L1 loss, with the sign of the error.
        robust = np.sign(error) * 0.1 * np.sqrt(2 * (np.sqrt(1 + error**2) - 1))
        return np.concatenate([robust, _PULL * of])

    damping, now = 1e-2, misses(theta)
    for _ in range(_TURNS):
        slope = np.stack([(misses(theta + step) - now) / 1e-6 for step in 1e-6 * np.eye(len(theta))], axis=1)
        normal = slope.T @ slope
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope.T @ now)
        then = misses(theta + np.clip(move, -1.0, 1.0))
        if then @ then < now @ now:
            theta, now, damping = theta + np.clip(move, -1.0, 1.0), then, damping / 3
            if np.abs(move).max() < 1e-7:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return curve_of(form, theta)
