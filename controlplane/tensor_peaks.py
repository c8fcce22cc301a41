"""How much a whole GPU can compute, by its data sheet."""

from __future__ import annotations

import functools
import json
from importlib import resources

__all__ = ["slice_tflops", "tensor_tflops"]


@functools.cache
def _models() -> dict[str, float]:
    text = resources.files("controlplane").joinpath("tensor_peaks.json").read_text()
    return {model["name"]: float(model["tflops"]) for model in json.loads(text)["models"]}


def tensor_tflops(gpu_model: str) -> float:
    """Returns the dense FP16 tensor TFLOPS of a GPU model; 0 when the model is not known.

    The longest name counts that the model begins with and that ends where a word of it ends.
    """
    names = [name for name in _models() if f"{gpu_model} ".startswith((f"{name} ", f"{name}-"))]
    return _models()[max(names, key=len)] if names else 0.0


def slice_tflops(gpu_model: str, compute_slices: int, gpu_slices: int) -> float:
    """Returns what a slice of a GPU can compute, in TFLOPS: the GPU's times its share of the compute slices."""
    return tensor_tflops(gpu_model) * compute_slices / gpu_slices if gpu_slices > 0 else 0.0
