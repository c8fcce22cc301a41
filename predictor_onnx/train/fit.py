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

from predictor_onnx.train.physics import Array, Fitter, Physics

LEVELS: Final = (0.5, 0.9, 0.99)
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
    settings = {**_TREES, "objective": "huber", "alpha": 0.1, "seed": seed}
    return lightgbm.train(settings, data, num_boost_round=220)


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


def family_quantile(values: Array, families: list[str], level: float) -> float:
    """The quantile of a family never seen: every family weighs the same, however many rows it has.

    With K families the level is raised by (K + 1) / K, because the next family is one of K + 1 that could be the
    worst (Dunn, Wasserman and Ramdas, "Distribution-free prediction sets for two-layer hierarchical models", JASA
    2023, their pooled estimate). Where that would pass 1 no finite answer has the guarantee, and the plain
    quantile is given.
    """
    counts: dict[str, int] = {}
    for family in families:
        counts[family] = counts.get(family, 0) + 1
    weight = np.array([1.0 / counts[family] for family in families])
    raised = level * (len(counts) + 1) / len(counts)
    return _weighted_quantile(values, weight, raised if raised < 1 else level)


def fit(fit_physics: Fitter, x: Array, y: Array, weight: Array, families: list[str], seed: int) -> Fitted:
    """Fit all parts; quantiles are calibrated on families that their predictor had not seen."""
    folds = folds_of(families, seed)
    residual = np.zeros(len(y))
    for fold in range(folds.max() + 1):
        inside, outside = folds != fold, folds == fold
        physics = fit_physics(x[inside], y[inside], weight[inside])
        trees = fit_correction(physics, x[inside], y[inside], weight[inside], seed)
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
                      else family_quantile(left, families, level))  # fmt: skip
        heads.append(_head(shape, residual, weight, level, seed))
    physics = fit_physics(x, y, weight)
    trees = fit_correction(physics, x, y, weight, seed)
    return Fitted(physics, trees, heads, (shifts[0], shifts[1], shifts[2]))
