"""Which form of the slowdown is used, fitted and judged with whole workloads left out.

The form is chosen by leaving workloads out *of the training workloads*; what a chosen form scores on a workload that
neither its fit nor its choice has seen is the figure that is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt

from predictor_onnx.train.conformal import group_quantile
from predictor_onnx.train.slowdown_data import Row
from predictor_onnx.train.slowdown_form import Array, Curve, Form, Points, fit, points

#: What is known before any run: the program alone.
STATIC: Final = tuple(
    Form(power, own, given, fitted)
    for power, own, (given, fitted) in product(
        (1.0, 2.0, 4.0), (False, True), ((("log_card_per_host",), ()), ((), ("log_card_per_host",)))
    )
)
#: With utilization that was seen in an earlier run on a whole card.
OBSERVED: Final = tuple(
    Form(power, own, (), fitted)
    for power, own, fitted in product(
        (1.0, 2.0, 4.0),
        (False, True),
        (
            ("log_bandwidth_utilization",),
            ("log_bandwidth_utilization", "log_sm_utilization"),
            ("log_bandwidth_utilization", "logit_sm_utilization"),
        ),
    )
)
LEVEL: Final = 0.9


@dataclass(frozen=True)
class Chosen:
    """One variant of the slowdown.

    Attributes:
        form: which of the candidates.
        curve: fitted on all rows.
        left_out: slowdown of each row by a curve whose form and fit had not seen the row's workload.
        spread: logarithm of p90 over p50, from ``left_out``.
        candidates_mape_pct: least and largest left-out error of any candidate form, chosen or not.
    """

    form: Form
    curve: Curve
    left_out: Array
    spread: float
    candidates_mape_pct: tuple[float, float]


def points_of(rows: Sequence[Row]) -> Points:
    """The rows as inputs of a curve."""
    return points([(row.work, row.sm_utilization, row.bandwidth_utilization, row.share.compute, row.share.memory)
                   for row in rows])  # fmt: skip


def slowdowns_of(rows: Sequence[Row]) -> Array:
    """The measured slowdowns."""
    return np.array([row.slowdown for row in rows])


def mape_pct(predicted: Array, measured: Array) -> float:
    """Mean absolute percentage error."""
    return float(100 * np.abs(predicted / measured - 1).mean())


def leave_one_out(form: Form, rows: Sequence[Row]) -> Array:
    """Slowdown of each row by a fit without its workload."""
    at, measured = points_of(rows), slowdowns_of(rows)
    names = np.array([row.workload for row in rows])
    predicted = np.zeros(len(rows))
    for name in np.unique(names):
        out = names == name
        predicted[out] = fit(form, at.take(~out), measured[~out]).slowdown(at.take(out))
    return predicted


def candidates(forms: Sequence[Form], rows: Sequence[Row]) -> dict[Form, float]:
    """Error in percent of each form on workloads left out of ``rows``."""
    measured = slowdowns_of(rows)
    return {form: mape_pct(leave_one_out(form, rows), measured) for form in forms}


def covered_pct(left_out: Array, measured: Array, names: npt.NDArray[np.str_]) -> float:
    """Share of rows at or under p90 in percent, where each workload's p90 is as wide as the others' residuals say.

    The model's own width comes from all workloads; asked about them it would flatter itself.
    """
    residual = np.log(measured / left_out)
    covered = np.zeros(len(measured), dtype=bool)
    for name in np.unique(names):
        out = names == name
        spread = max(0.0, group_quantile(residual[~out], list(names[~out]), LEVEL))
        covered[out] = residual[out] <= spread
    return float(100 * covered.mean())


def choose(forms: Sequence[Form], rows: Sequence[Row]) -> Chosen:
    """Choose, fit and judge one variant; choice and fit are repeated without each workload."""
    names = np.array([row.workload for row in rows])
    at, measured = points_of(rows), slowdowns_of(rows)
    left_out = np.zeros(len(rows))
    for name in np.unique(names):
        out = names == name
        kept = [row for row in rows if row.workload != name]
        scores = candidates(forms, kept)
        left_out[out] = fit(min(scores, key=scores.__getitem__), at.take(~out), measured[~out]).slowdown(at.take(out))
    scores = candidates(forms, rows)
    form = min(scores, key=scores.__getitem__)
    spread = group_quantile(np.log(measured / left_out), list(names), LEVEL)
    return Chosen(form, fit(form, at, measured), left_out, max(0.0, spread),
                  (min(scores.values()), max(scores.values())))  # fmt: skip
