"""What the model is compared with: methods that learn less, or nothing, from the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from predictor_onnx.train.dataset import Row

Array = npt.NDArray[np.float64]

#: Usable MiB of each slice size, as recorded from the boards' drivers.
PROFILES_MIB: Final[dict[str, tuple[float, ...]]] = {
    "A100-SXM4-80GB": (9728, 19968, 40192, 80896),
    "H100-SXM5-80GB": (9984, 20096, 40448, 81152),
}


@dataclass(frozen=True)
class Method:
    """Predictions of one method: a point estimate, and what it would ask for, in MiB."""

    name: str
    point: Array
    ask: Array


def slice_index(mib: Array, sizes: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Index of the smallest slice that holds each value; the largest where none does."""
    return np.minimum(np.searchsorted(np.array(sizes), mib), len(sizes) - 1)


def unlearned(train: list[Row], test: list[Row]) -> list[Method]:
    """Always the largest slice, the most frequent slice, and four times the weights."""
    sizes = PROFILES_MIB["A100-SXM4-80GB"]
    usual = slice_index(np.array([row.measured_mib for row in train]), sizes)
    majority = sizes[int(np.bincount(usual).argmax())]
    full = np.full(len(test), sizes[-1])
    weights = np.array([4 * row.parameter_mib for row in test]) * 1.2
    return [
        Method("always the biggest", full, full),
        Method("majority slice", np.full(len(test), majority), np.full(len(test), majority)),
        Method("weights x 4 x 1.2 (accelerate-style)", weights, weights),
    ]


def traced(test: list[Row]) -> list[Method]:
    """What GPUMemNet calls the FakeTensor method: all tensors that live at once, and nothing else."""
    alive = np.array([row.alive_mib for row in test])
    return [Method("FakeTensor sum", alive, alive)]
