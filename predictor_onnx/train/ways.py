"""The ways of knowing a step: from reading its code, or from a trace. Each is fitted and asked by its own features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from predictor_onnx.model import MemoryModel, Quantiles
from predictor_onnx.train.dataset import Row
from predictor_onnx.train.fit import Examples, Fitted, fit
from predictor_onnx.train.physics import Array, Fitter, fit_static, fit_traced


@dataclass(frozen=True)
class Way:
    """A way of knowing a step: what it is fitted and asked by.

    Attributes:
        name: for people.
        vector: the features of a row; None for a row that it knows nothing of.
        physics: fits its physics.
        ask: quantiles of the exported model.
    """

    name: str
    vector: Callable[[Row], tuple[float, ...] | None]
    physics: Fitter
    ask: Callable[[MemoryModel, list[float]], Quantiles]

    def matrix(self, rows: list[Row]) -> Array:
        """Features, a row each."""
        return np.array([self.vector(row) for row in rows])

    def known(self, rows: list[Row]) -> list[Row]:
        """Those that it knows something of."""
        return [row for row in rows if self.vector(row) is not None]

    def fit(self, rows: list[Row], seed: int, taught: Examples | None = None) -> Fitted:
        """Fit on these rows, all of which it knows."""
        families = [row.family for row in rows]
        return fit(self.physics, self.matrix(rows), measured(rows), weights(families), families, seed, taught)

    def answers(self, model: MemoryModel, rows: list[Row]) -> Array:
        """p50, p90 and p99 that the exported model gives, in MiB; a row each, all of which it knows."""
        return np.array([self.ask(model, list(self.vector(row) or ())) for row in rows])


STATIC: Final = Way(
    "read from the code", lambda row: row.vector, fit_static, lambda model, vector: model.estimate(vector).quantiles
)
TRACED: Final = Way(
    "traced", lambda row: row.traced, fit_traced, lambda model, vector: model.estimate_traced(vector).quantiles
)


def measured(rows: list[Row]) -> Array:
    """Measured MiB of each row."""
    return np.array([row.measured_mib for row in rows])


def weights(families: list[str]) -> Array:
    """A family weighs as the root of its rows; the thousands of MLPs must not drown the rest."""
    counts = Counter(families)
    weight = np.array([counts[family] ** -0.5 for family in families])
    result: Array = weight / weight.mean()
    return result
