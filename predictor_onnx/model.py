"""The trained model: one ONNX file, run by one shared onnxruntime session on one thread."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime

from predictor_onnx.errors import ModelUnavailableError
from predictor_onnx.features import FEATURES, PHYSICS, STRUCTURE
from predictor_onnx.traced_step import TRACED_FEATURES, TRACED_PHYSICS, TRACED_STRUCTURE

PATH: Final = Path(__file__).with_name("memory.onnx")


Quantiles = tuple[float, float, float]
"""p50, p90, p99 of peak device memory in MiB."""

#: The file has an input for each way of knowing a step; the one that is not asked is fed nothing.
_NOTHING_READ: Final = [0.0] * len(FEATURES)
_NO_TRACE: Final = [0.0] * len(TRACED_FEATURES)


@dataclass(frozen=True)
class Estimate:
    """The model's answer in MiB to what the static analysis read.

    Attributes:
        quantiles: p50, p90, p99 of peak device memory.
        parts: context, resident, backward pass, optimizer update, before the correction.
    """

    quantiles: Quantiles
    parts: tuple[float, float, float, float]


@dataclass(frozen=True)
class TracedEstimate:
    """The model's answer in MiB to what the tracer saw.

    Attributes:
        quantiles: p50, p90, p99 of peak device memory.
        context: CUDA context and loaded kernels, before the correction.
        reserved: what the caching allocator takes, before the correction.
    """

    quantiles: Quantiles
    context: float
    reserved: float


class MemoryModel:
    """An ONNX session from the features of a step to quantiles of peak memory."""

    def __init__(self, path: Path | None = None) -> None:
        """Load the model.

        Raises:
            ModelUnavailableError: the file is missing, is no ONNX model, or is for other features.
        """
        self.path = path if path is not None else PATH
        again = "rebuild it with 'python -m predictor_onnx.train --data DIR'"
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ModelUnavailableError(
                f"the model {self.path.name} cannot be read ({error.strerror}); {again}"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelUnavailableError(f"the model {self.path.name} is not a usable ONNX file; {again}") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        known = [metadata.get(name, "").split(",") for name in ("features", "traced_features")]
        if known != [list(FEATURES), list(TRACED_FEATURES)]:
            raise ModelUnavailableError(f"the model {self.path.name} was trained on other features; {again}")
        #: Hash of the file, first 12 hex digits.
        self.version = hashlib.sha256(content).hexdigest()[:12]
        population = [float(value) for value in metadata["population_mib"].split(",")]
        #: p50, p90, p99 of measured peak memory over the training configurations, in MiB.
        self.population = (population[0], population[1], population[2])

        self._reach = {
            prefix: [
                [float(value) for value in metadata[f"{prefix}{side}"].split(",")] for side in ("lowest", "highest")
            ]
            for prefix in ("", "traced_")
        }

    def outside(self, vector: list[float]) -> list[str]:
        """Structural features beyond anything in training, by name; a twentieth of range is forgiven."""
        return self._beyond("", STRUCTURE, vector[len(PHYSICS) :])

    def outside_traced(self, vector: list[float]) -> list[str]:
        """The same for the features of a traced step."""
        return self._beyond("traced_", TRACED_STRUCTURE, vector[len(TRACED_PHYSICS) :])

    def _beyond(self, prefix: str, names: tuple[str, ...], shape: list[float]) -> list[str]:
        found = []
        for name, value, low, high in zip(names, shape, *self._reach[prefix], strict=True):
            slack = 0.05 * (high - low)
            if not low - slack <= value <= high + slack:
                found.append(name)
        return found

    def estimate(self, vector: list[float]) -> Estimate:
        """Quantiles for one feature vector of the static analysis, in the order of ``FEATURES``."""
        quantiles, parts = self._run("", vector, _NO_TRACE)
        context, resident, backward, update = parts
        return Estimate(quantiles, (context, resident, backward, update))

    def estimate_traced(self, vector: list[float]) -> TracedEstimate:
        """Quantiles for one feature vector of a traced step, in the order of ``TRACED_FEATURES``."""
        quantiles, parts = self._run("traced_", _NOTHING_READ, vector)
        context, reserved = parts
        return TracedEstimate(quantiles, context, reserved)

    def _run(self, prefix: str, features: list[float], traced: list[float]) -> tuple[Quantiles, list[float]]:
        quantiles, parts = self._session.run(
            [f"{prefix}quantiles_mib", f"{prefix}parts_mib"],
            {"features": np.asarray([features], np.float32), "traced": np.asarray([traced], np.float32)},
        )
        p50, p90, p99 = (float(value) for value in quantiles[0])
        return (p50, p90, p99), [float(value) for value in parts[0]]
