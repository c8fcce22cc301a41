"""Attributes, methods and indexing of tensors, and the functions that make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from predictor_onnx.static import ops
from predictor_onnx.static.operands import alias, argument, dtype_of
from predictor_onnx.static.shapes import Shape, size_or_none, sizes
from predictor_onnx.static.values import (
    FLOAT_DTYPES,
    UNKNOWN,
    External,
    Native,
    Record,
    Tensor,
    Unknown,
    Value,
    tensor_of,
)

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator

Kwargs = dict[str, Value]

#: Dimensions of the deepest nested list that is read as a tensor; torch itself allows 64.
_DEEPEST_NESTING: Final = 64
_SIZED: Final = frozenset(["randn", "rand", "zeros", "ones", "empty", "normal", "full", "standard_normal", "random"])
_LIKE: Final = frozenset(["randn_like", "rand_like", "zeros_like", "ones_like", "empty_like", "full_like"])
CREATORS: Final = _SIZED | frozenset(
    ["randint", "arange", "linspace", "eye", "tensor", "as_tensor", "from_numpy", "array", "asarray", "randperm"]
)
_SAME: Final = frozenset(
    ("requires_grad_", "retain_grad", "share_memory_", "pin_memory", "numpy", "copy_", "astype", "normal_",
     "uniform_", "cpu")
)  # fmt: skip
_CASTS: Final = {"float": "float32", "half": "float16", "bfloat16": "bfloat16", "long": "int64",
                 "int": "int32", "double": "float64", "bool": "bool", "byte": "uint8"}  # fmt: skip
_ALIASES: Final = {"__add__": "add", "softmax_": "softmax", "dot": "matmul", "size_": "size"}


def is_accelerator(value: Value) -> bool:
    """Whether a device argument means the accelerator; an unknown device does."""
    if isinstance(value, Record) and value.kind == "device":
        value = value.attrs.get("type")
    if isinstance(value, str):
        return value.startswith("cuda")
    return value is UNKNOWN or isinstance(value, int)


def create(ev: Evaluator, name: str, args: list[Value], kwargs: Kwargs) -> Value:
    """``torch.randn(…)`` and its relatives, ``numpy``'s too."""
    shape = _created_shape(name, args, kwargs)
    if shape is None:
        return UNKNOWN
    default = "int64" if name in {"randint", "randperm"} or (
        name == "arange" and all(isinstance(a, int) for a in args)) else "float32"  # fmt: skip
    given = args[0] if name in {"tensor", "as_tensor", "from_numpy", "array", "asarray"} else None
    if isinstance(given, Tensor):
        default = given.dtype
    elif given is not None and _first(given):
        default = "int64"
    out = tensor_of(shape, dtype_of(kwargs.get("dtype"), default))
    out.grad = kwargs.get("requires_grad") is True
    if "device" in kwargs and is_accelerator(kwargs["device"]):
        out.on_gpu = True
        ev.rec.move(ev.place(), out)
    return out


def _first(value: Value) -> bool:
    for _ in range(_DEEPEST_NESTING):
        if not isinstance(value, (list, tuple)) or not value:
            break
        value = value[0]
    return isinstance(value, int)


def _created_shape(name: str, args: list[Value], kwargs: Kwargs) -> Shape | None:
    size = kwargs.get("size")
    if name == "randint":
        given = size if size is not None else next(
            (a for a in args if isinstance(a, (list, tuple))), None)  # fmt: skip
        if isinstance(given, int):
            return (given,)
        return None if given is None else sizes([given])
    if name in {"arange", "randperm"}:
        numbers = [a for a in args if isinstance(a, int)]
        if len(numbers) != len(args) or not numbers:
            return (None,)
        return (len(range(*numbers)),)
    if name == "linspace":
        return (size_or_none(argument(args, kwargs, 2, "steps", None)),)
    if name == "eye":
        return (size_or_none(args[0]),) * 2
    if name in {"tensor", "as_tensor", "from_numpy", "array", "asarray"}:
        return _nested_shape(args[0]) if args else None
    if name == "full":
        return sizes([args[0]])
    if size is not None:
        return sizes([size]) if isinstance(size, (list, tuple)) else sizes([[size]])
    return sizes(args)


def _nested_shape(value: Value) -> Shape | None:
    if isinstance(value, Tensor):
        return value.shape
    shape: list[int | None] = []
    while isinstance(value, (list, tuple)):
        if len(shape) == _DEEPEST_NESTING:
            return None
        shape.append(len(value))
        value = value[0] if value else None
    return None if value is UNKNOWN and not shape else tuple(shape)


def attribute(ev: Evaluator, tensor: Tensor, name: str) -> Value:
    """``tensor.name``: a property, or a method bound to it."""
    if name == "shape":
        return tuple(UNKNOWN if size is None else size for size in tensor.shape)
    if name in {"T", "mT", "H"}:
        return ops.OPS["transpose"](ev, [tensor], {})
    if name == "device":
        return Record("device", {"type": "cuda"})
    if name == "dtype":
        return External(f"torch.{tensor.dtype}")
    if name in {"data", "grad"}:
        return tensor
    if name == "ndim":
        return len(tensor.shape)
    if name == "requires_grad":
        return tensor.grad
    return Native(name, lambda args, kwargs: method(ev, tensor, name, args, kwargs))


def method(ev: Evaluator, tensor: Tensor, name: str, args: list[Value], kwargs: Kwargs) -> Value:
    """``tensor.name(*args)``."""
    name = _ALIASES.get(name, name)
    if name == "backward":
        return ev.rec.finish_step()
    if name in {"to", "cuda", "type_as", "type"}:
        return _to(ev, tensor, name, args, kwargs)
    if name in _CASTS:
        return tensor if tensor.dtype == _CASTS[name] else _cast(ev, tensor, _CASTS[name])
    if name in _SAME:
        return tensor
    if name in {"size", "dim", "numel", "nelement"}:
        return _measure(ev, tensor, name, args)
    if name.startswith("new_"):
        return create(ev, name[4:], args, kwargs)
    if name in ops.OPS:
        return ops.OPS[name](ev, [tensor, *args], kwargs)
    return UNKNOWN


def _measure(ev: Evaluator, tensor: Tensor, name: str, args: list[Value]) -> Value:
    if name == "dim":
        return len(tensor.shape)
    if name == "size":
        shape = attribute(ev, tensor, "shape")
        return ev.item(shape, args[0]) if args else shape
    return UNKNOWN if tensor.numel is None else tensor.numel


def _cast(ev: Evaluator, tensor: Tensor, dtype: str) -> Tensor:
    if tensor.dtype in FLOAT_DTYPES and dtype in FLOAT_DTYPES:
        return ev.rec.cast(tensor, dtype)
    return tensor_of(tensor.shape, dtype)


def _to(ev: Evaluator, tensor: Tensor, name: str, args: list[Value], kwargs: Kwargs) -> Value:
    given = [*args, *(v for k, v in kwargs.items() if k in {"device", "dtype"})]
    dtypes = [dtype_of(arg, "") for arg in given if isinstance(arg, External)]
    dtype = next((d for d in dtypes if d), tensor.dtype)
    out = tensor if dtype == tensor.dtype else _cast(ev, tensor, dtype)
    devices = [arg for arg in given if not isinstance(arg, (External, Tensor, bool))]
    moves = name == "cuda" or any(is_accelerator(device) for device in devices)
    if moves and not tensor.on_gpu and not tensor.grad:
        out = Tensor(out.shape, out.dtype, tensor_of(out.shape, out.dtype).storage, on_gpu=True)
        ev.rec.move(ev.place(), out)
    return out


def _sliced(part: slice, size: int | None) -> int | None:
    if isinstance(part.stop, Unknown):
        return None
    if size is not None:
        return len(range(*part.indices(size)))
    known = isinstance(part.stop, int) and part.stop >= 0 and part.start in {None, 0}
    return part.stop if known else None


def index(ev: Evaluator, tensor: Tensor, key: Value) -> Value:
    """``tensor[key]`` by numpy's rules; a mask gives an unknown length."""
    keys = list(key) if isinstance(key, tuple) else [key]
    shape: list[int | None] = []
    at = 0
    explicit = sum(1 for k in keys if k is not None and k is not Ellipsis)
    copied = False
    for part in keys:
        if part is None:
            shape.append(1)
            continue
        if part is Ellipsis:
            skip = max(0, len(tensor.shape) - explicit)
            shape += tensor.shape[at : at + skip]
            at += skip
            continue
        size = tensor.shape[at] if at < len(tensor.shape) else None
        at += 1
        if isinstance(part, slice):
            shape.append(_sliced(part, size))
        elif isinstance(part, Tensor):
            copied = True
            shape += part.shape if part.dtype != "bool" else (size,)
        elif isinstance(part, (list, range)):
            copied = True
            shape.append(len(part))
        elif part is UNKNOWN:
            # An index that is not known is most often one position or a slice of the batch.
            continue
    full = (*shape, *tensor.shape[at:])
    if copied:
        return ev.rec.op(full, tensor.dtype, tensor.storage.kind, [tensor])
    return alias(tensor, full, contiguous=False)
