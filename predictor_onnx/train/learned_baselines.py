"""Baselines that are fitted: the physics without its correction, and boosted trees without the physics."""

from __future__ import annotations

from typing import Any, Final

import lightgbm
import numpy as np

from predictor_onnx.train.baselines import Method
from predictor_onnx.train.physics import Array, Physics, predicted

_TREES: Final[dict[str, Any]] = {
    "num_leaves": 31, "learning_rate": 0.05, "min_child_samples": 20, "verbosity": -1, "deterministic": True,
    "force_row_wise": True, "num_threads": 1,
}  # fmt: skip
_ROUNDS: Final = 400
_LEVEL: Final = 0.9


def physics_alone(physics: Physics, x: Array, y: Array, test: Array) -> Method:
    """The linear part; it asks for the 90 % quantile of its own training residuals more."""
    wide = np.quantile(np.log(y / predicted(physics, x)), _LEVEL)
    point = predicted(physics, test)
    return Method("physics alone", point, point * np.exp(wide))


class PlainTrees:
    """Boosted trees from the features to the logarithm of memory."""

    def __init__(self, x: Array, y: Array, weight: Array, seed: int) -> None:
        data = lightgbm.Dataset(x, np.log(y), weight=weight, free_raw_data=False)
        self._point = lightgbm.train({**_TREES, "objective": "l1", "seed": seed}, data, _ROUNDS)
        quantile = {**_TREES, "objective": "quantile", "alpha": _LEVEL, "seed": seed}
        self._ask = lightgbm.train(quantile, data, _ROUNDS)

    def method(self, test: Array) -> Method:
        """Its predictions for these rows."""
        point, ask = (np.exp(model.predict(test)) for model in (self._point, self._ask))
        return Method("plain boosted trees", point, np.maximum(point, ask))
