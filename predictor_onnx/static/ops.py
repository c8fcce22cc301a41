"""Tensor operations: the shape that comes out, and what autograd keeps for the backward pass.

What each op keeps follows torch's ``derivatives.yaml`` (relu keeps its output, gelu its input, a product
both factors, a sum nothing).
"""

from __future__ import annotations

from typing import Final

from predictor_onnx.static import products, reshaping
from predictor_onnx.static.context import Context
from predictor_onnx.static.operands import Kwargs, Op, argument
from predictor_onnx.static.shapes import Shape, axis, broadcast, numel, size_or_none, sizes, windowed_all
from predictor_onnx.static.values import DTYPE_BYTES, FLOAT_DTYPES, Tensor, Value, tensor_of

_KEEP_OUTPUT: Final = frozenset([
    "relu", "relu_", "sigmoid", "tanh", "exp", "softmax", "log_softmax", "sqrt", "rsqrt", "selu", "elu",
    "reciprocal", "relu6", "hardtanh", "softmin",
])  # fmt: skip
_KEEP_INPUT: Final = frozenset([
    "gelu", "silu", "mish", "softplus", "leaky_relu", "hardswish", "hardsigmoid", "pow", "square", "abs", "log",
    "log2", "log1p", "sin", "cos", "logsigmoid", "clamp", "clip", "prelu", "erf", "celu", "swish", "hardshrink",
    "softsign", "tan", "atan", "glu", "rad2deg", "cumsum", "cumprod", "sort", "normalize", "norm", "logsumexp",
    "var", "std", "layer_norm_free",
])  # fmt: skip
_KEEP_NOTHING: Final = frozenset([
    "neg", "round", "floor", "ceil", "sign", "flip", "roll", "clone", "repeat_interleave", "zero_", "fill_",
    "masked_fill", "nan_to_num", "zeros_like", "ones_like", "randn_like", "rand_like", "empty_like", "full_like",
])  # fmt: skip
_REDUCTIONS: Final = frozenset(["mean", "sum", "max", "min", "amax", "amin", "argmax", "argmin", "any", "all", "prod"])
_LOSSES: Final = frozenset([
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "kl_div",
])  # fmt: skip


def unary(name: str) -> Op:
    """An element-wise op of one tensor."""

    def run(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
        x = args[0]
        half = name not in {"softmax", "log_softmax", "exp", "log", "pow", "norm"}
        dtype = x.dtype if half else ctx.rec.compute_dtype(x, half=False)
        x = ctx.rec.cast(x, dtype)
        kind = "act" if name in _KEEP_OUTPUT or name in _KEEP_INPUT else "other"
        return ctx.rec.op(
            x.shape, x.dtype, kind, [x],
            saved=[x] if name in _KEEP_INPUT else [], save_output=name in _KEEP_OUTPUT,
            inplace=kwargs.get("inplace") is True or name.endswith("_"),
        )  # fmt: skip

    return run


def binary(name: str) -> Op:
    """An element-wise op of two tensors, or of a tensor and a number."""
    keeps = name in {"mul", "div", "pow", "where"}

    def run(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
        operands = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        shape: Shape = ()
        for tensor in operands:
            shape = broadcast(shape, tensor.shape)
        dtype = max((t.dtype for t in operands),
                    key=lambda d: (d in FLOAT_DTYPES, DTYPE_BYTES.get(d, 4)))  # fmt: skip
        saved: list[Tensor] = []
        if keeps and len(operands) == 2:
            # The gradient of one factor needs the other.
            saved = [o for o, other in zip(operands, operands[::-1], strict=True) if other.grad]
        if name in {"eq", "ne", "lt", "gt", "le", "ge"}:
            dtype = "bool"
        return ctx.rec.op(shape, dtype, "other", operands, saved=saved)

    return run


def _reduce(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    dims = argument(args, kwargs, 1, "dim", None)
    keep = argument(args, kwargs, 2, "keepdim", False) is True
    if dims is None or isinstance(dims, Tensor):
        return ctx.rec.op((), x.dtype, "other", [x])
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {axis(x.shape, dim) for dim in listed}
    shape = tuple(1 if i in gone else s for i, s in enumerate(x.shape) if keep or i not in gone)
    return ctx.rec.op(shape, x.dtype, "other", [x])


def _extreme(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    """``max`` and ``min`` along a dimension give values and indices."""
    values = _reduce(ctx, args, kwargs)
    if len(args) > 1 or "dim" in kwargs:
        return (values, tensor_of(values.shape, "int64"))
    return values


def _masked_fill(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    masks = [arg for arg in args[1:2] if isinstance(arg, Tensor)]
    return ctx.rec.op(x.shape, x.dtype, "other", [x], saved=masks)


def dropout(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    """Dropout keeps one byte per element: which were dropped."""
    x = args[0]
    p = argument(args, kwargs, 1, "p", 0.5)
    if p == 0 or not ctx.rec.grad or argument(args, kwargs, 2, "training", True) is False:
        return x
    return ctx.rec.op(x.shape, x.dtype, "other", [x], extra_bytes=float(numel(x.shape) or 0),
                      inplace=kwargs.get("inplace") is True)  # fmt: skip


def cross_entropy(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    """Keeps the log-softmax of the logits; its gradient is as large again."""
    x = args[0]
    x = ctx.rec.cast(x, ctx.rec.compute_dtype(x, half=False))
    probabilities = ctx.rec.op(x.shape, x.dtype, "act", [x], save_output=True)
    return ctx.rec.op((), x.dtype, "other", [probabilities])


def _loss(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
    return ctx.rec.op((), "float32", "other", tensors, saved=tensors)


def pool(ctx: Context, x: Tensor, spatial: Shape, *, indices: bool) -> Tensor:
    """Pooling keeps its input, and max pooling an eight-byte index per output besides."""
    width = len(spatial)
    shape = (*x.shape[: len(x.shape) - width], *spatial)
    extra = 8.0 * (numel(shape) or 0) if indices else 0.0
    return ctx.rec.op(shape, x.dtype, "other", [x], saved=[x], extra_bytes=extra)


def _pool(*, indices: bool) -> Op:
    def run(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
        x = args[0]
        kernel = argument(args, kwargs, 1, "kernel_size", 2)
        stride = argument(args, kwargs, 2, "stride", None)
        padding = argument(args, kwargs, 3, "padding", 0)
        spatial = windowed_all(x.shape[2:], kernel, stride, padding)
        return pool(ctx, x, spatial, indices=indices)

    return run


def _adaptive_pool(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x, wanted = args[0], argument(args, kwargs, 1, "output_size", 1)
    width = max(0, len(x.shape) - 2)
    spatial = sizes([wanted] * width) if isinstance(wanted, int) else sizes([wanted])
    return pool(ctx, x, spatial[:width], indices=False)


def _interpolate(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x, size = args[0], argument(args, kwargs, 1, "size", None)
    scale = argument(args, kwargs, 2, "scale_factor", None)
    spatial = x.shape[2:]
    if size is not None:
        spatial = sizes([size] * len(spatial)) if isinstance(size, int) else sizes([size])
    elif isinstance(scale, (int, float)):
        spatial = tuple(None if s is None else int(s * scale) for s in spatial)
    return ctx.rec.op((*x.shape[:2], *spatial), x.dtype, "other", [x])


def _norm(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    x = ctx.rec.cast(x, ctx.rec.compute_dtype(x, half=False))
    return ctx.rec.op(x.shape, x.dtype, "norm", [x], saved=[x])


def _one_hot(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    return tensor_of((*x.shape, size_or_none(argument(args, kwargs, 1, "num_classes", None))),
                     "int64")  # fmt: skip


OPS: Final[dict[str, Op]] = {
    **reshaping.OPS, **products.OPS,
    **{name: unary(name) for name in _KEEP_OUTPUT | _KEEP_INPUT | _KEEP_NOTHING},
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **{name: binary(name) for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "gt", "le",
                                       "ge", "maximum", "minimum", "add_", "mul_")},
    **dict.fromkeys(_LOSSES, _loss),
    "max": _extreme, "min": _extreme,
    "masked_fill": _masked_fill, "masked_fill_": _masked_fill,
    "dropout": dropout, "cross_entropy": cross_entropy, "nll_loss": _loss,
    "max_pool1d": _pool(indices=True), "max_pool2d": _pool(indices=True),
    "max_pool3d": _pool(indices=True), "avg_pool2d": _pool(indices=False),
    "adaptive_avg_pool1d": _adaptive_pool, "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool, "interpolate": _interpolate, "upsample": _interpolate,
    "layer_norm": _norm, "batch_norm": _norm, "group_norm": _norm, "rms_norm": _norm,
    "one_hot": _one_hot,
}  # fmt: skip
