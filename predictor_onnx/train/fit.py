"""Fitting: non-negative robust physics, a boosted correction, and calibrated quantiles.

Peak = fixed + work x correction. The physics says what is fixed and what is work (`predictor_onnx.train.physics`); the
correction and the quantiles see only the architecture, never the batch, so the answer grows with the batch however far
it lies beyond the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import lightgbm
import numpy as np
import numpy.typing as npt

from predictor_onnx.train.conformal import group_quantile
from predictor_onnx.train.physics import Array, Fitter, Physics

LEVELS: Final = (0.5, 0.9, 0.99)
#: Of the correction: errors of the logarithm beyond this pull alike, and how many trees it has. Chosen among ten pairs
#: by fits that leave whole training families out: among them the median error is 1.6 to 1.8 %.
_HUBER: Final = 0.03
_ROUNDS: Final = 110
#: Bounds of the correction's logarithm. What autograd saves is really there, so it may add more than remove.
LEAST_CORRECTION: Final = -0.15
LARGEST_CORRECTION: Final = 0.5
#: The median head only trims: the correction has done the rest.
LARGEST_MEDIAN_SHIFT: Final = 0.05
_TREES: Final[dict[str, Any]] = {
    "num_leaves": 12, "learning_rate": 0.04, "min_child_samples": 40, "lambda_l2": 5.0,
    "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1, "max_depth": 5,
    "verbosity": -1, "deterministic": True, "force_row_wise": True, "num_threads": 1,
}  # fmt: skip


def fit_correction(physics: Physics, x: Array, y: Array, weight: Array, seed: int) -> Any:
    """Trees for the logarithm of (measured work / physical work), robust to outliers."""
    fixed, work = physics.terms(x)
    ratio = np.log(np.clip((y - fixed) / np.maximum(work, 1e-6), 0.4, 2.5))
    importance = weight * (work / (fixed + work)) ** 2
    data = lightgbm.Dataset(x[:, physics.width :], ratio, weight=importance)
    settings = {**_TREES, "objective": "huber", "alpha": _HUBER, "seed": seed}
    return lightgbm.train(settings, data, num_boost_round=_ROUNDS)


def corrected(physics: Physics, trees: Any, x: Array) -> Array:
    """Peak in MiB with the correction applied."""
    fixed, work = physics.terms(x)
    change = np.clip(trees.predict(x[:, physics.width :]), LEAST_CORRECTION, LARGEST_CORRECTION)
    result: Array = fixed + work * np.exp(change)
    return result


def folds_of(families: list[str], seed: int, count: int = 5) -> npt.NDArray[np.int64]:
    """A fold per row, whole families together."""
    names = sorted(set(families))
    np.random.default_rng(seed).shuffle(names)
    place = {name: i % count for i, name in enumerate(names)}
    return np.array([place[family] for family in families])


@dataclass
class Fitted:
    """Everything that the ONNX graph is made of."""

    physics: Physics
    correction: Any
    heads: list[Any]
    #: Conformal shift of each quantile, in logarithm of measured / predicted.
    shifts: tuple[float, float, float]

    def quantiles(self, x: Array) -> Array:
        """p50, p90 and p99 in MiB, one row per configuration."""
        base = np.log(corrected(self.physics, self.correction, x))
        shape = x[:, self.physics.width :]
        steps = [head.predict(shape) + shift for head, shift in zip(self.heads, self.shifts, strict=True)]
        p50 = np.clip(steps[0], -LARGEST_MEDIAN_SHIFT, LARGEST_MEDIAN_SHIFT)
        p90 = np.maximum(steps[1], p50 + 0.01)
        p99 = np.maximum(steps[2], p90 + 0.01)
        result: Array = np.exp(np.stack([base + p50, base + p90, base + p99], axis=1))
        return result


def _head(shape: Array, residual: Array, weight: Array, level: float, seed: int) -> Any:
    settings = {**_TREES, "objective": "quantile", "alpha": level, "num_leaves": 5, "max_depth": 3,
                "min_child_samples": 150, "seed": seed}  # fmt: skip
    return lightgbm.train(settings, lightgbm.Dataset(shape, residual, weight=weight), 60)


def _weighted_quantile(values: Array, weight: Array, level: float) -> float:
    order = np.argsort(values)
    share = np.cumsum(weight[order]) / weight.sum()
    return float(values[order][min(int(np.searchsorted(share, level)), len(values) - 1)])


@dataclass(frozen=True)
class Examples:
    """Features, MiB, weights and families of some rows; one entry per row."""

    x: Array
    y: Array
    weight: Array
    families: list[str]

    def without(self, families: set[str]) -> Examples:
        """Those of other families."""
        kept = np.array([family not in families for family in self.families], dtype=bool)
        names = [family for family in self.families if family not in families]
        return Examples(self.x[kept], self.y[kept], self.weight[kept], names)


def _base(
    fit_physics: Fitter, measured: Examples, taught: Examples | None, seed: int
) -> tuple[Physics, Any]:  # fmt: skip
    """Physics and correction; what was not measured helps with both, and with nothing else."""
    x, y, weight = measured.x, measured.y, measured.weight
    if taught is not None and len(taught.y):
        x, y, weight = np.r_[x, taught.x], np.r_[y, taught.y], np.r_[weight, taught.weight]
    physics = fit_physics(x, y, weight)
    return physics, fit_correction(physics, x, y, weight, seed)


def fit(
    fit_physics: Fitter,
    x: Array,
    y: Array,
    weight: Array,
    families: list[str],
    seed: int,
    taught: Examples | None = None,
) -> Fitted:
    """Fit all parts; quantiles are calibrated on measured families that their predictor had not seen.

    Args:
        fit_physics: fits the physics.
        x: features of what was measured, one row each.
        y: measured MiB.
        weight: what each row weighs.
        families: of each row.
        seed: of folds and trees.
        taught: further rows, whose MiB another model has said.
    """
    measured = Examples(x, y, weight, families)
    folds = folds_of(families, seed)
    residual = np.zeros(len(y))
    for fold in range(folds.max() + 1):
        outside = folds == fold
        unseen_families = {family for family, out in zip(families, outside, strict=True) if out}
        physics, trees = _base(
            fit_physics, measured.without(unseen_families), taught and taught.without(unseen_families), seed
        )
        residual[outside] = np.log(y[outside] / corrected(physics, trees, x[outside]))
    shape = x[:, physics.width :]
    heads, shifts = [], []
    for level in LEVELS:
        unseen = np.zeros(len(y))
        for fold in range(folds.max() + 1):
            inside, outside = folds != fold, folds == fold
            head = _head(shape[inside], residual[inside], weight[inside], level, seed)
            unseen[outside] = head.predict(shape[outside])
        left = residual - unseen
        # The median answers for rows like the training rows; the upper quantiles promise for new families.
        shifts.append(_weighted_quantile(left, weight, level) if level <= 0.5
                      else group_quantile(left, families, level))  # fmt: skip
        heads.append(_head(shape, residual, weight, level, seed))
    physics, trees = _base(fit_physics, measured, taught, seed)
    return Fitted(physics, trees, heads, (shifts[0], shifts[1], shifts[2]))
