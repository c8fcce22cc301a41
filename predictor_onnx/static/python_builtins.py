"""Python's builtin functions, for values of the evaluated program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from predictor_onnx.static.arithmetic import walkable
from predictor_onnx.static.values import (
    UNKNOWN,
    Class,
    External,
    Instance,
    Layer,
    Loader,
    Record,
    Tensor,
    Value,
    tensor_of,
)

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator

Function = Callable[["Evaluator", list[Value], dict[str, Value]], Value]
_PLAIN: Final = (int, float, str, bool, type(None))


def _plain(function: Callable[..., Any]) -> Function:
    """A function of plain values; anything else makes its result unknown."""

    def run(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
        if all(isinstance(arg, _PLAIN) for arg in args):
            return function(*args)
        return UNKNOWN

    return run


def _number(kind: Callable[..., Any]) -> Function:
    def run(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
        if not args:
            return kind()
        if isinstance(args[0], str) and len(args[0]) > 64:
            return UNKNOWN
        return kind(args[0]) if isinstance(args[0], _PLAIN) else UNKNOWN

    return run


def _len(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    value = args[0]
    if isinstance(value, (list, tuple, dict, str, range)):
        return len(value)
    if isinstance(value, Tensor) and value.shape:
        return value.shape[0] if value.shape[0] is not None else UNKNOWN
    if isinstance(value, Layer):
        return len(value.children)
    if isinstance(value, Loader):
        return value.length if value.length is not None else UNKNOWN
    if isinstance(value, Instance):
        method = ev.attribute(value, "__len__")
        return ev.call(method, [], {})
    return UNKNOWN


def _range(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return range(*args) if all(isinstance(arg, int) for arg in args) else UNKNOWN


def _sequence(kind: Callable[..., Any]) -> Function:
    def run(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
        if not args:
            return kind()
        items = ev.iterate(args[0])
        return UNKNOWN if items is None else kind(items)

    return run


def _set(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = ev.iterate(args[0]) if args else []
    if items is None or not all(isinstance(item, _PLAIN) for item in items):
        return UNKNOWN
    return sorted(set(items), key=repr)


def _sorted(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = ev.iterate(args[0])
    if items is None or "key" in kwargs or not all(isinstance(item, _PLAIN) for item in items):
        return items if items is not None else UNKNOWN
    return sorted(items)


def _dict(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    base = args[0] if args and isinstance(args[0], dict) else {}
    for name, value in kwargs.items():
        ev.hints.note(name, value)
    return {**base, **kwargs}


def _zip(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = [ev.iterate(arg) for arg in args]
    known = [item for item in items if item is not None]
    length = min((len(item) for item in known), default=0)
    return [tuple(UNKNOWN if item is None else item[i] for item in items) for i in range(length)]


def _enumerate(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    start = args[1] if len(args) > 1 else kwargs.get("start", 0)
    items = ev.iterate(args[0])
    if items is None:
        return [(0, UNKNOWN)]
    return list(enumerate(items, start if isinstance(start, int) else 0))


def _fold(function: Callable[[list[Any]], Any]) -> Function:
    def run(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
        items = args if len(args) > 1 else ev.iterate(args[0])
        if items and all(isinstance(item, (int, float)) for item in items):
            return function(list(items))
        return UNKNOWN

    return run


def _sum(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = ev.iterate(args[0])
    if items is None:
        return UNKNOWN
    if any(isinstance(item, Tensor) for item in items):
        return next(item for item in items if isinstance(item, Tensor))
    return sum(items) if all(isinstance(item, (int, float)) for item in items) else UNKNOWN


def _isinstance(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    value, wanted = args[0], args[1]
    kinds = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    return _any_known([_is_one(value, kind) for kind in kinds])


def _any_known(answers: list[bool | None]) -> Value:
    if True in answers:
        return True
    return UNKNOWN if None in answers else False


def _is_one(value: Value, kind: Value) -> bool | None:
    if value is UNKNOWN:
        return None
    if isinstance(kind, Class):
        return isinstance(value, Instance) and kind in value.cls.mro()
    if not isinstance(kind, External):
        return None
    name = kind.path.rpartition(".")[2]
    if isinstance(value, Layer):
        return name in {value.kind, "Module"}
    if isinstance(value, Instance):
        return name == "Module" and value.is_module
    if isinstance(value, Tensor):
        return name in {"Tensor", "Parameter"}
    return type(value).__name__ == name or (name == "int" and isinstance(value, bool))


def _hasattr(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if isinstance(args[0], Record) and isinstance(args[1], str):
        return args[1] in args[0].attrs
    return UNKNOWN


def _getattr(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if not isinstance(args[1], str):
        return UNKNOWN
    value = ev.attribute(args[0], args[1])
    if value is UNKNOWN and len(args) > 2:
        return args[2]
    return value


def _setattr(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    from predictor_onnx.static import objects

    if isinstance(args[1], str):
        objects.set_attribute(ev, args[0], args[1], args[2])
    return None


def _next(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = ev.iterate(args[0])
    return items[0] if items else UNKNOWN


def _iter(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return args[0]


def _reversed(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = ev.iterate(args[0])
    return UNKNOWN if items is None else items[::-1]


def _map(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = ev.iterate(args[1])
    return UNKNOWN if items is None else [ev.call(args[0], [item], {}) for item in items]


def _none(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return None


def _super(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return Record("super", {"self": args[1] if len(args) > 1 else None, "class": args[0]})


def _vars(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    value = args[0]
    return dict(value.attrs) if isinstance(value, (Record, Instance)) else UNKNOWN


def _type(ev: Evaluator, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return args[0].cls if isinstance(args[0], Instance) else UNKNOWN


def _math(name: str) -> Function:
    return _plain(getattr(math, name))


FUNCTIONS: Final[dict[str, Function]] = {
    "len": _len, "range": _range, "int": _number(int), "float": _number(float),
    "str": _number(str), "bool": _plain(bool), "abs": _plain(abs), "round": _plain(round),
    "divmod": _plain(divmod), "list": _sequence(list), "tuple": _sequence(tuple), "set": _set,
    "frozenset": _set, "sorted": _sorted, "dict": _dict, "zip": _zip, "enumerate": _enumerate,
    "min": _fold(min), "max": _fold(max), "sum": _sum, "isinstance": _isinstance,
    "hasattr": _hasattr, "getattr": _getattr, "setattr": _setattr, "next": _next, "iter": _iter,
    "reversed": _reversed, "map": _map, "print": _none, "super": _super, "vars": _vars,
    "type": _type,
    **{f"math.{name}": _math(name) for name in ("sqrt", "ceil", "floor", "log", "log2", "log10",
                                                "exp", "cos", "sin")},
    "math.prod": _fold(lambda items: math.prod(float(item) for item in items)),
}  # fmt: skip


def collate(value: Value, batch: int | None) -> Value:
    """What the default collate function makes of ``batch`` samples like ``value``."""
    return _collate(value, batch) if walkable(value) else UNKNOWN


def _collate(value: Value, batch: int | None) -> Value:
    if isinstance(value, Tensor):
        return tensor_of((batch, *value.shape), value.dtype)
    if isinstance(value, (bool, int)):
        return tensor_of((batch,), "int64")
    if isinstance(value, float):
        return tensor_of((batch,), "float64")
    if isinstance(value, (list, tuple)):
        return [_collate(item, batch) for item in value]
    if isinstance(value, dict):
        return {key: _collate(item, batch) for key, item in value.items()}
    return UNKNOWN
