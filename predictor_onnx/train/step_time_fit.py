"""Time of one training step on a whole card: a roofline, and trees that correct it by architecture.

``step = max(flops x a + activation bytes x b + state bytes x c, host)``, with non-negative a, b and c fitted robustly
on relative errors on one card. ``host`` is the same estimate that the slowdown uses; kernels are queued ahead, so host
and card overlap. The correction is kept only when it lessens the error on families left out of the training families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import lightgbm
import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from predictor_onnx.step_work import StepWork
from predictor_onnx.train.conformal import group_quantile
from predictor_onnx.train.slowdown_form import LAUNCH_S, STEP_S
from predictor_onnx.train.step_time_data import Row

Array = npt.NDArray[np.float64]

#: Bounds of the correction's logarithm: a kernel is at most this much faster or slower than the roofline says.
LARGEST_CORRECTION: Final = 1.0
LEVEL: Final = 0.9
_FOLDS: Final = 5
_TREES: Final[dict[str, Any]] = {
    "objective": "huber", "alpha": 0.1, "num_leaves": 8, "learning_rate": 0.05, "min_child_samples": 15,
    "lambda_l2": 3.0, "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1, "verbosity": -1,
    "deterministic": True, "force_row_wise": True, "num_threads": 1,
}  # fmt: skip
_ROUNDS: Final = 150


def terms(works: Sequence[StepWork]) -> Array:
    """What the card does: flops, activation bytes, state bytes; of shape (n, 3)."""
    return np.array([[work.flops, work.moved_bytes, work.state_bytes] for work in works])


def shapes(works: Sequence[StepWork]) -> Array:
    """What the correction sees, in the order of ``step_work.SHAPE``."""
    return np.array([work.shape() for work in works])


def roofline_times(works: Sequence[StepWork], roofline: Array) -> Array:
    """Seconds: the card's sum, or the host where it is slower."""
    host = np.array([STEP_S + LAUNCH_S * work.launches for work in works])
    result: Array = np.maximum(terms(works) @ roofline, host)
    return result


def works_of(rows: Sequence[Row]) -> list[StepWork]:
    """The steps of the rows."""
    return [row.work for row in rows]


def times(rows: Sequence[Row]) -> Array:
    """Measured seconds."""
    return np.array([row.step_s for row in rows])


def fit_roofline(rows: Sequence[Row]) -> Array:
    """Seconds per unit of each of ``terms``; none is negative."""
    x, y = terms(works_of(rows)), times(rows)
    unit = x.mean(axis=0)
    robust = np.ones(len(y))
    found = np.zeros(x.shape[1])
    for _ in range(30):
        scale = robust / y
        found, _ = nnls(x / unit * scale[:, None], y * scale)
        error = np.abs(x / unit @ found / y - 1)
        robust = 1 / np.sqrt(np.maximum(error, 0.05) / 0.05)
    result: Array = found / unit
    return result


def _correct(rows: Sequence[Row], roofline: Array, seed: int) -> Any:
    works = works_of(rows)
    data = lightgbm.Dataset(shapes(works), np.log(times(rows) / roofline_times(works, roofline)))
    return lightgbm.train({**_TREES, "seed": seed}, data, _ROUNDS)


@dataclass
class StepTimeFit:
    """The fitted step time.

    Attributes:
        roofline: seconds per unit of each term.
        correction: trees, or None where they did not help.
        spread: logarithm of p90 over p50, from families left out.
        left_out_mape_pct: with and without the correction, on training families that were left out in turn.
    """

    roofline: Array
    correction: Any
    spread: float
    left_out_mape_pct: tuple[float, float]

    def predict(self, works: Sequence[StepWork], card_flops: float = 1.0, card_bytes: float = 1.0) -> Array:
        """Seconds, one value per step, on a card whose peaks are these factors below the measured one's."""
        plain = roofline_times(works, self.roofline * np.array([card_flops, card_bytes, card_bytes]))
        if self.correction is None:
            return plain
        change = np.clip(self.correction.predict(shapes(works)), -LARGEST_CORRECTION, LARGEST_CORRECTION)
        result: Array = plain * np.exp(change)
        return result


def fit(rows: Sequence[Row], seed: int) -> StepTimeFit:
    """Fit; families are left out in five groups to decide on the correction and to calibrate p90."""
    families = sorted({row.family for row in rows})
    np.random.default_rng(seed).shuffle(families)
    group = {family: i % _FOLDS for i, family in enumerate(families)}
    y = times(rows)
    plain, corrected = np.zeros(len(rows)), np.zeros(len(rows))
    for fold in range(_FOLDS):
        kept = [row for row in rows if group[row.family] != fold]
        out = np.array([group[row.family] == fold for row in rows])
        asked = [row.work for row in rows if group[row.family] == fold]
        roofline = fit_roofline(kept)
        plain[out] = roofline_times(asked, roofline)
        corrected[out] = StepTimeFit(roofline, _correct(kept, roofline, seed), 0.0, (0.0, 0.0)).predict(asked)
    with_trees, without = (float(100 * np.abs(found / y - 1).mean()) for found in (corrected, plain))
    helps = with_trees < without
    roofline = fit_roofline(rows)
    residual = np.log(y / (corrected if helps else plain))
    return StepTimeFit(roofline, _correct(rows, roofline, seed) if helps else None,
                       max(0.0, group_quantile(residual, [row.family for row in rows], LEVEL)),
                       (with_trees, without))  # fmt: skip
