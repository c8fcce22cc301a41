"""Arithmetic on tensor shapes; a size of ``None`` is not known and stays so."""

from __future__ import annotations

from collections.abc import Sequence

from predictor_onnx.static.values import Value

Shape = tuple[int | None, ...]


def broadcast(left: Shape, right: Shape) -> Shape:
    """Shape of an element-wise result, by numpy's rules."""
    width = max(len(left), len(right))
    padded = ((1,) * (width - len(left)) + left, (1,) * (width - len(right)) + right)
    out: list[int | None] = []
    for a, b in zip(*padded, strict=True):
        if a == 1:
            out.append(b)
        elif b == 1 or b is None:
            out.append(a)
        else:
            out.append(b if a is None else a)
    return tuple(out)


def numel(shape: Sequence[int | None]) -> int | None:
    """Product of the sizes, None when one is not known."""
    total = 1
    for size in shape:
        if size is None:
            return None
        total *= size
    return total


def size_or_none(value: Value) -> int | None:
    """``value`` as one size of a shape."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value


def sizes(args: Sequence[Value]) -> Shape:
    """Shape given as ``f(2, 3)`` or ``f((2, 3))``."""
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        args = args[0]
    return tuple(size_or_none(arg) for arg in args)


def reshape(shape: Shape, wanted: Shape) -> Shape:
    """Shape after ``view(*wanted)``, its ``-1`` resolved where the rest is known."""
    if -1 not in wanted:
        return wanted
    total = numel(shape)
    rest = numel(tuple(size for size in wanted if size != -1))
    missing = total // rest if total is not None and rest else None
    return tuple(missing if size == -1 else size for size in wanted)


def axis(shape: Shape, dim: Value) -> int:
    """Index of dimension ``dim``, negative ones counted from the end; the last if unknown."""
    if not isinstance(dim, int) or not shape:
        return max(0, len(shape) - 1)
    return min(max(dim + len(shape) if dim < 0 else dim, 0), len(shape) - 1)


def pair(value: Value, width: int = 2) -> tuple[int, ...] | None:
    """A kernel size or stride as one number per spatial dimension."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return (value,) * width
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return tuple(value) if len(value) == width else (tuple(value) * width)[:width]
    return None


def windowed(size: int | None, kernel: int, stride: int, padding: int, dilation: int = 1) -> int | None:
    """Output size of a convolution or pooling along one dimension."""
    if size is None:
        return None
    return max(1, (size + 2 * padding - dilation * (kernel - 1) - 1) // max(1, stride) + 1)


def windowed_all(
    spatial: Sequence[int | None], kernel: Value, stride: Value, padding: Value,
    dilation: Value = 1,
) -> Shape:  # fmt: skip
    """Output sizes of a convolution or pooling along all spatial dimensions."""
    width = len(spatial)
    kernels = pair(kernel, width) or (1,) * width
    strides = pair(stride, width) or kernels
    dilations = pair(dilation, width) or (1,) * width
    if padding == "same":
        return tuple(None if s is None else -(-s // max(1, t))
                     for s, t in zip(spatial, strides, strict=True))  # fmt: skip
    paddings = pair(padding, width) or (0,) * width
    return tuple(
        windowed(s, k, t, p, d) for s, k, t, p, d in zip(spatial, kernels, strides, paddings, dilations, strict=True)
    )
