"""What a tensor operation is, and how it reads its arguments."""

from __future__ import annotations

from collections.abc import Callable

from predictor_onnx.static.context import Context
from predictor_onnx.static.shapes import Shape
from predictor_onnx.static.values import DTYPE_BYTES, MOST_DIMENSIONS, External, Tensor, Value

Kwargs = dict[str, Value]
Op = Callable[[Context, list[Value], Kwargs], Value]


def argument(args: list[Value], kwargs: Kwargs, position: int, name: str, default: Value) -> Value:
    """The argument at ``position`` or called ``name``."""
    if len(args) > position:
        return args[position]
    return kwargs.get(name, default)


def dtype_of(value: Value, default: str = "float32") -> str:
    """``torch.float16`` as its plain name."""
    name = value.path.rpartition(".")[2] if isinstance(value, External) else value
    return name if isinstance(name, str) and name in DTYPE_BYTES else default


def alias(tensor: Tensor, shape: Shape, *, contiguous: bool = True) -> Tensor:
    """Another view of the same storage."""
    return Tensor(shape[:MOST_DIMENSIONS], tensor.dtype, tensor.storage, tensor.grad, contiguous, tensor.on_gpu)
