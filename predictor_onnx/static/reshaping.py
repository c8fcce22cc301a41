"""Ops that move elements about: views of the same storage, and the copies that some of them need."""

from __future__ import annotations

from typing import Final

from predictor_onnx.static.context import Context
from predictor_onnx.static.operands import Kwargs, Op, alias, argument
from predictor_onnx.static.shapes import axis, numel, reshape, size_or_none, sizes
from predictor_onnx.static.values import UNKNOWN, External, Tensor, Value


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
        ctx.rec.budget.spend(count)
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
    ctx.rec.budget.spend(count)
    one = (*x.shape[:dim], part, *x.shape[dim + 1 :])
    return tuple(alias(x, one, contiguous=False) for _ in range(count))


def _unbind(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    dim = axis(x.shape, argument(args, kwargs, 1, "dim", 0))
    count = x.shape[dim] if x.shape else None
    if count is None or count > 256:
        return UNKNOWN
    ctx.rec.budget.spend(count)
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


def _pad(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x, amounts = args[0], argument(args, kwargs, 1, "pad", ())
    shape = list(x.shape)
    values = list(amounts) if isinstance(amounts, (list, tuple)) else []
    for i in range(min(len(values) // 2, len(shape))):
        size, more = shape[-1 - i], values[2 * i : 2 * i + 2]
        known = size is not None and all(isinstance(m, int) for m in more)
        shape[-1 - i] = size + sum(more) if known and size is not None else None
    return ctx.rec.op(tuple(shape), x.dtype, "other", [x])


def _detach(ctx: Context, args: list[Value], kwargs: Kwargs) -> Value:
    x = args[0]
    return Tensor(x.shape, x.dtype, x.storage, False, x.contiguous, x.on_gpu)


OPS: Final[dict[str, Op]] = {
    "view": _view, "reshape": _view, "flatten": _flatten, "permute": _permute,
    "transpose": _transpose, "swapaxes": _transpose, "t": _transpose, "contiguous": _contiguous,
    "squeeze": _squeeze, "unsqueeze": _unsqueeze, "expand": _expand, "repeat": _repeat, "tile": _repeat,
    "split": _split, "chunk": _chunk, "unbind": _unbind, "cat": _join(new=False), "concat": _join(new=False),
    "concatenate": _join(new=False), "stack": _join(new=True), "pad": _pad, "detach": _detach,
}  # fmt: skip
