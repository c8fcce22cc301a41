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

PATH: Final = Path(__file__).with_name("memory.onnx")


@dataclass(frozen=True)
class Estimate:
    """The model's answer in MiB.

    Attributes:
        quantiles: p50, p90, p99 of peak device memory.
        parts: context, resident, backward pass, optimizer update, before the correction.
    """

    quantiles: tuple[float, float, float]
    parts: tuple[float, float, float, float]


class MemoryModel:
    """An ONNX session from the feature vector to quantiles of peak memory."""

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
        if metadata.get("features", "").split(",") != list(FEATURES):
            raise ModelUnavailableError(f"the model {self.path.name} was trained on other features; {again}")
        #: Hash of the file, first 12 hex digits.
        self.version = hashlib.sha256(content).hexdigest()[:12]
        population = [float(value) for value in metadata["population_mib"].split(",")]
        #: p50, p90, p99 of measured peak memory over the training configurations, in MiB.
        self.population = (population[0], population[1], population[2])

        self._lowest = [float(value) for value in metadata["lowest"].split(",")]
        self._highest = [float(value) for value in metadata["highest"].split(",")]

    def outside(self, vector: list[float]) -> list[str]:
        """Structural features beyond anything in training, by name; a twentieth of range is forgiven."""
        found = []
        shape = vector[len(PHYSICS) :]
        for name, value, low, high in zip(STRUCTURE, shape, self._lowest, self._highest, strict=True):
            slack = 0.05 * (high - low)
            if not low - slack <= value <= high + slack:
                found.append(name)
        return found

    def estimate(self, vector: list[float]) -> Estimate:
        """Quantiles for one feature vector, in the order of ``FEATURES``."""
        features = np.asarray([vector], dtype=np.float32)
        quantiles, parts = self._session.run(["quantiles_mib", "parts_mib"], {"features": features})
        p50, p90, p99 = (float(value) for value in quantiles[0])
        context, resident, backward, update = (float(value) for value in parts[0])
        return Estimate((p50, p90, p99), (context, resident, backward, update))
