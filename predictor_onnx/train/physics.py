"""The physics of device memory: what is fixed, and what grows with the work. Fitted robustly, never negative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from predictor_onnx.features import PHYSICS
from predictor_onnx.traced_step import TRACED_PHYSICS

Array = npt.NDArray[np.float64]

#: Share of the saved activations that is at least alive at the peak; in-place ops reuse the rest.
LEAST_ACTIVATION: Final = 0.9
_BACKWARD: Final = slice(3, len(PHYSICS))
_BACKWARD_TERMS: Final = len(PHYSICS) - 3
_UPDATE: Final = 2
#: Relative errors below this pull alike.
_LEAST_ERROR: Final = 0.01


class Physics(Protocol):
    """Coefficients, fitted. Rows of features in, MiB out."""

    @property
    def width(self) -> int:
        """How many features come before the structural ones."""

    def terms(self, x: Array) -> tuple[Array, Array]:
        """Fixed part and work in MiB, one value per row; the boosted correction is for the work."""


#: Fits physics to rows of features, measured MiB, and what each row weighs.
Fitter = Callable[[Array, Array, Array], Physics]


def predicted(physics: Physics, x: Array) -> Array:
    """Peak in MiB without a correction."""
    fixed, work = physics.terms(x)
    return fixed + work


@dataclass
class StaticPhysics:
    """Coefficients: context and cuDNN in MiB, the others are MiB per MiB."""

    context: float
    convolutions: float
    resident: float
    update: float
    backward: Array

    def parts(self, x: Array) -> tuple[Array, Array, Array]:
        """Fixed part, backward work and update work in MiB, one value per row."""
        fixed = self.context + self.convolutions * x[:, 0] + self.resident * x[:, 1]
        return fixed, x[:, _BACKWARD] @ self.backward, self.update * x[:, _UPDATE]

    @property
    def width(self) -> int:
        """How many features come before the structural ones."""
        return len(PHYSICS)

    def terms(self, x: Array) -> tuple[Array, Array]:
        """Fixed part and work in MiB, one value per row."""
        fixed, backward, update = self.parts(x)
        return fixed, np.maximum(backward, update)


def fit_static(x: Array, y: Array, weight: Array, turns: int = 40) -> StaticPhysics:
    """Robust non-negative least squares on relative errors.

    Which phase peaks depends on the coefficients, so both are found in turns. Weights and gradients take at
    least their own size. Activation coefficients are drawn gently towards one, their physical value, so that
    a kind with little data does not vanish.
    """
    physics = StaticPhysics(1500.0, 200.0, 1.0, 1.0, np.r_[0.5, 0.1, np.ones(_BACKWARD_TERMS - 2)])
    robust = np.ones(len(y))
    least = np.zeros(4 + _BACKWARD_TERMS)
    least[2:4] = 1.0
    least[6:] = LEAST_ACTIVATION
    for _ in range(turns):
        _, backward, update = physics.parts(x)
        peaks_late = update > backward
        design = np.c_[np.ones(len(y)), x[:, 0], x[:, 1],
                       np.where(peaks_late, x[:, _UPDATE], 0.0),
                       np.where(peaks_late[:, None], 0.0, x[:, _BACKWARD])]  # fmt: skip
        # What must be there is taken as given; only what exceeds it is fitted.
        target = y - design @ least
        scale = robust * np.sqrt(weight) / y
        prior = np.zeros((design.shape[1] - 6, design.shape[1]))
        prior[:, 6:] = np.eye(design.shape[1] - 6)
        pull = 0.02 * np.sqrt(weight.sum())
        solution, _ = nnls(
            np.r_[design * scale[:, None], pull * prior],
            np.r_[target * scale, pull * (1 - LEAST_ACTIVATION) * np.ones(len(prior))],
        )
        solution = solution + least
        physics = StaticPhysics(float(solution[0]), float(solution[1]), float(solution[2]),
                                float(solution[3]), solution[4:])  # fmt: skip
        error = np.abs(predicted(physics, x) / y - 1)
        robust = 1 / np.sqrt(np.maximum(error, 0.02) / 0.02)
    return physics


@dataclass
class TracedPhysics:
    """Coefficients for traced steps: context and cuDNN in MiB, and MiB per MiB that the allocator reserves."""

    context: float
    convolutions: float
    reserved: float

    @property
    def width(self) -> int:
        """How many features come before the structural ones."""
        return len(TRACED_PHYSICS)

    def terms(self, x: Array) -> tuple[Array, Array]:
        """Fixed part and work in MiB, one value per row."""
        return self.context + self.convolutions * x[:, 0], self.reserved * x[:, 1]


def fit_traced(x: Array, y: Array, weight: Array, turns: int = 40) -> TracedPhysics:
    """Robust non-negative least squares on relative errors: half of what is left must not pull more than its sign."""
    design = np.c_[np.ones(len(y)), x[:, : len(TRACED_PHYSICS)]]
    robust = np.ones(len(y))
    solution = np.zeros(3)
    for _ in range(turns):
        scale = robust * np.sqrt(weight) / y
        solution, _ = nnls(design * scale[:, None], y * scale)
        error = np.abs(design @ solution / y - 1)
        robust = 1 / np.sqrt(np.maximum(error, _LEAST_ERROR) / _LEAST_ERROR)
    return TracedPhysics(*(float(value) for value in solution))
