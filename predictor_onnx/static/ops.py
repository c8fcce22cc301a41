"""Tensor operations: the shape that comes out, and what autograd keeps for the backward pass.

What each op keeps follows torch's ``derivatives.yaml`` (relu keeps its output, gelu its input, a product
both factors, a sum nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from predictor_onnx.static.context import Context
from predictor_onnx.static.shapes import (
    Shape,
    axis,
    broadcast,
    numel,
    reshape,
    size_or_none,
    sizes,
    windowed_all,
)
from predictor_onnx.static.values import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    UNKNOWN,
    External,
    Tensor,
    Value,
    tensor_of,
)

Kwargs = dict[str, Value]
Op = Callable[[Context, list[Value], Kwargs], Value]

_KEEP_OUTPUT: Final = frozenset(
    [
        "relu",
        "relu_",
        "sigmoid",
        "tanh",
        "exp",
        "softmax",
        "log_softmax",
        "sqrt",
        "rsqrt",
        "selu",
        "elu",
        "reciprocal",
        "relu6",
        "hardtanh",
        "softmin",
    ]
)
_KEEP_INPUT: Final = frozenset(
    [
        "gelu",
        "silu",
        "mish",
        "softplus",
        "leaky_relu",
        "hardswish",
        "hardsigmoid",
        "pow",
        "square",
        "abs",
        "log",
        "log2",
        "log1p",
        "sin",
        "cos",
        "logsigmoid",
        "clamp",
        "clip",
        "prelu",
        "erf",
        "celu",
        "swish",
        "hardshrink",
        "softsign",
        "tan",
        "atan",
        "glu",
        "rad2deg",
        "cumsum",
        "cumprod",
        "sort",
        "normalize",
        "norm",
        "logsumexp",
        "var",
        "std",
        "layer_norm_free",
    ]
)
_KEEP_NOTHING: Final = frozenset(
    [
        "neg",
        "round",
        "floor",
        "ceil",
        "sign",
        "flip",
        "roll",
        "clone",
        "repeat_interleave",
        "zero_",
        "fill_",
        "masked_fill",
        "nan_to_num",
        "zeros_like",
        "ones_like",
        "randn_like",
        "rand_like",
        "empty_like",
        "full_like",
    ]
)
_REDUCTIONS: Final = frozenset(["mean", "sum", "max", "min", "amax", "amin", "argmax", "argmin", "any", "all", "prod"])
_LOSSES: Final = frozenset(
    [
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "kl_div",
    ]
)


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
    return Tensor(shape, tensor.dtype, tensor.storage, tensor.grad, contiguous, tensor.on_gpu)


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


def _view(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    if len(args) == 2 and isinstance(args[1], External):
        return alias(x, x.shape)
    shape = reshape(x.shape, sizes(args[1:]))
    if x.contiguous:
        return alias(x, shape)
    return ctx.rec.op(shape, x.dtype, x.storage.kind, [x])


def _flatten(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    start = axis(x.shape, argument(args, kwargs, 1, "start_dim", 0))
    end = axis(x.shape, argument(args, kwargs, 2, "end_dim", -1))
    shape = (*x.shape[:start], numel(x.shape[start : end + 1]), *x.shape[end + 1 :])
    return _view(ctx, [x, shape], {})


def _permute(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    order = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    if len(order) != len(x.shape):
        return UNKNOWN
    return alias(x, tuple(x.shape[axis(x.shape, dim)] for dim in order), contiguous=False)


def _transpose(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    a = axis(x.shape, argument(args, kwargs, 1, "dim0", -2))
    b = axis(x.shape, argument(args, kwargs, 2, "dim1", -1))
    shape = list(x.shape)
    if shape:
        shape[a], shape[b] = shape[b], shape[a]
    return alias(x, tuple(shape), contiguous=False)


def _contiguous(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    return x if x.contiguous else ctx.rec.op(x.shape, x.dtype, x.storage.kind, [x])


def _squeeze(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", None)
    if dim is None:
        return alias(x, tuple(s for s in x.shape if s != 1))
    at = axis(x.shape, dim)
    return alias(x, tuple(s for i, s in enumerate(x.shape) if i != at or s != 1))


def _unsqueeze(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", 0)
    at = dim + len(x.shape) + 1 if isinstance(dim, int) and dim < 0 else dim
    at = at if isinstance(at, int) else 0
    return alias(x, (*x.shape[:at], 1, *x.shape[at:]), contiguous=x.contiguous)


def _expand(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    wanted = sizes(args[1:])
    own = (1,) * (len(wanted) - len(x.shape)) + x.shape
    shape = tuple(o if w == -1 else w for w, o in zip(wanted, own, strict=False))
    return alias(x, shape, contiguous=False)


def _repeat(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    times = sizes(args[1:])
    own = (1,) * (len(times) - len(x.shape)) + x.shape
    shape = tuple(None if t is None or o is None else t * o
                  for t, o in zip(times, own, strict=False))  # fmt: skip
    return ctx.rec.op(shape, x.dtype, "other", [x])


def _split(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x, each = args[0], argument(args, kwargs, 1, "split_size", 1)
    dim = axis(x.shape, argument(args, kwargs, 2, "dim", 0))
    if isinstance(each, (list, tuple)):
        parts = [size_or_none(size) for size in each]
    elif isinstance(each, int) and each > 0 and x.shape and x.shape[dim] is not None:
        count = min(-(-int(x.shape[dim] or 0) // each), 256)
        parts = [each] * count
    else:
        return UNKNOWN
    return tuple(alias(x, (*x.shape[:dim], part, *x.shape[dim + 1 :]), contiguous=False)
                 for part in parts)  # fmt: skip


def _chunk(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x, count = args[0], argument(args, kwargs, 1, "chunks", 1)
    dim = axis(x.shape, argument(args, kwargs, 2, "dim", 0))
    if not isinstance(count, int) or not 0 < count <= 256 or not x.shape:
        return UNKNOWN
    size = x.shape[dim]
    part = None if size is None else -(-size // count)
    one = (*x.shape[:dim], part, *x.shape[dim + 1 :])
    return tuple(alias(x, one, contiguous=False) for _ in range(count))


def _unbind(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    dim = axis(x.shape, argument(args, kwargs, 1, "dim", 0))
    count = x.shape[dim] if x.shape else None
    if count is None or count > 256:
        return UNKNOWN
    rest = (*x.shape[:dim], *x.shape[dim + 1 :])
    return tuple(alias(x, rest, contiguous=False) for _ in range(count))


def _join(*, new: bool) -> Op:
    def run(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
        parts = args[0] if isinstance(args[0], (list, tuple)) else []
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not tensors:
            return UNKNOWN
        shape = list(tensors[0].shape)
        dim = argument(args, kwargs, 1, "dim", 0)
        if new:
            at = dim if isinstance(dim, int) and dim >= 0 else len(shape)
            shape.insert(at, len(tensors))
        elif shape:
            at = axis(tuple(shape), dim)
            along = [t.shape[at] if at < len(t.shape) else None for t in tensors]
            shape[at] = None if None in along else sum(size or 0 for size in along)
        return ctx.rec.op(tuple(shape), tensors[0].dtype, "other", tensors)

    return run


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


def _one_hot(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    return tensor_of((*x.shape, size_or_none(argument(args, kwargs, 1, "num_classes", None))),
                     "int64")  # fmt: skip


def _pad(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x, amounts = args[0], argument(args, kwargs, 1, "pad", ())
    shape = list(x.shape)
    values = list(amounts) if isinstance(amounts, (list, tuple)) else []
    for i in range(min(len(values) // 2, len(shape))):
        size, more = shape[-1 - i], values[2 * i : 2 * i + 2]
        known = size is not None and all(isinstance(m, int) for m in more)
        shape[-1 - i] = size + sum(more) if known and size is not None else None
    return ctx.rec.op(tuple(shape), x.dtype, "other", [x])


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


def _detach(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    return Tensor(x.shape, x.dtype, x.storage, False, x.contiguous, x.on_gpu)


def _mean_all(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    return _reduce(ctx, args, kwargs)


OPS: Final[dict[str, Op]] = {
    **{name: unary(name) for name in _KEEP_OUTPUT | _KEEP_INPUT | _KEEP_NOTHING},
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **{name: binary(name) for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "gt", "le",
                                       "ge", "maximum", "minimum", "add_", "mul_")},
    **dict.fromkeys(_LOSSES, _loss),
    "max": _extreme, "min": _extreme,
    "matmul": matmul, "bmm": matmul, "mm": matmul, "baddbmm": matmul,
    "scaled_dot_product_attention": attention,
    "view": _view, "reshape": _view, "flatten": _flatten, "permute": _permute,
    "transpose": _transpose, "swapaxes": _transpose, "t": _transpose,
    "contiguous": _contiguous, "squeeze": _squeeze, "unsqueeze": _unsqueeze, "expand": _expand,
    "repeat": _repeat, "tile": _repeat, "split": _split, "chunk": _chunk, "unbind": _unbind,
    "cat": _join(new=False), "concat": _join(new=False), "concatenate": _join(new=False),
    "stack": _join(new=True), "masked_fill": _masked_fill, "masked_fill_": _masked_fill,
    "dropout": dropout, "cross_entropy": cross_entropy, "nll_loss": _loss,
    "max_pool1d": _pool(indices=True), "max_pool2d": _pool(indices=True),
    "max_pool3d": _pool(indices=True), "avg_pool2d": _pool(indices=False),
    "adaptive_avg_pool1d": _adaptive_pool, "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool, "interpolate": _interpolate, "upsample": _interpolate,
    "layer_norm": _norm, "batch_norm": _norm, "group_norm": _norm, "rms_norm": _norm,
    "linear": linear, "one_hot": _one_hot, "pad": _pad, "einsum": _einsum, "detach": _detach,
}  # fmt: skip
