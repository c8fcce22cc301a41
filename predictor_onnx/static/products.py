"""Products of matrices: linear maps, attention, einsum."""

from __future__ import annotations

from typing import Final

from predictor_onnx.static.context import Context
from predictor_onnx.static.operands import Kwargs, Op
from predictor_onnx.static.shapes import Shape, broadcast, numel
from predictor_onnx.static.values import UNKNOWN, Tensor, Value


def matmul(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    """``a @ b``, batched; autograd keeps both."""
    operands = [arg for arg in args if isinstance(arg, Tensor)]
    if len(operands) < 2:
        return UNKNOWN
    a, b = operands[-2:]
    dtype = ctx.rec.compute_dtype(a, half=True)
    a, b = ctx.rec.cast(a, dtype), (b if b.storage.parameter else ctx.rec.cast(b, dtype))
    if len(a.shape) < 2 or len(b.shape) < 2:
        shape: Shape = a.shape[:-1] + b.shape[1:]
    else:
        shape = (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    macs = float((numel(shape) or 0) * (a.shape[-1] or 0)) if a.shape else 0.0
    return ctx.rec.op(shape, dtype, "matmul", [a, b], saved=[a, b], macs=macs)


def attention(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    """``scaled_dot_product_attention``: the fused kernel keeps q, k, v and its output."""
    q, k, v = args[:3]
    dtype = ctx.rec.compute_dtype(q, half=True)
    q, k, v = (ctx.rec.cast(t, dtype) for t in (q, k, v))
    shape = (*q.shape[:-1], v.shape[-1])
    macs = 2.0 * (numel(q.shape) or 0) * (k.shape[-2] or 0)
    rows = float(numel(q.shape[:-1]) or 0)
    return ctx.rec.op(shape, dtype, "matmul", [q, k, v], saved=[q, k, v], save_output=True,
                      extra_bytes=4 * rows, macs=macs)  # fmt: skip


def linear(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    """``F.linear(x, weight)``: keeps its input."""
    x, weight = args[0], args[1]
    if not isinstance(weight, Tensor) or not weight.shape:
        return UNKNOWN
    dtype = ctx.rec.compute_dtype(x, half=True)
    x = ctx.rec.cast(x, dtype)
    shape = (*x.shape[:-1], weight.shape[0])
    macs = float((numel(shape) or 0) * (weight.shape[-1] or 0))
    return ctx.rec.op(shape, dtype, "matmul", [x, weight], macs=macs,
                      saved=[x] if weight.grad else [])  # fmt: skip


def _einsum(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    tensors = [arg for arg in args[1:] if isinstance(arg, Tensor)]
    if not isinstance(args[0], str) or "->" not in args[0] or "." in args[0]:
        return UNKNOWN
    left, _, right = args[0].replace(" ", "").partition("->")
    known: dict[str, int | None] = {}
    for letters, tensor in zip(left.split(","), tensors, strict=False):
        known.update(zip(letters, tensor.shape, strict=False))
    shape = tuple(known.get(letter) for letter in right)
    dtype = ctx.rec.compute_dtype(tensors[0], half=True) if tensors else "float32"
    return ctx.rec.op(shape, dtype, "matmul", tensors, saved=tensors)


OPS: Final[dict[str, Op]] = {
    "matmul": matmul, "bmm": matmul, "mm": matmul, "baddbmm": matmul, "linear": linear, "einsum": _einsum,
    "scaled_dot_product_attention": attention,
}  # fmt: skip
