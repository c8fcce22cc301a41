"""Arithmetic on the plain values of the submitted code, with limits that keep every value small."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any, Final

from predictor_onnx.static.values import UNKNOWN, External, Tensor, Value

_LARGEST_BITS: Final = 256
#: Items of the longest list, characters of the longest text.
LONGEST: Final = 1 << 14

_BINARY: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.BitOr: operator.or_, ast.BitAnd: operator.and_, ast.BitXor: operator.xor,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip
#: Types that stand for themselves.
PLAIN: Final = (int, float, str, bool, list, tuple, dict, set, type(None), bytes)


def truth(value: Value) -> bool | None:
    """Truth of a value; None when it is not known."""
    if isinstance(value, PLAIN):
        return bool(value)
    if value is UNKNOWN or isinstance(value, (Tensor, External)):
        return None
    return True


def power(base: Value, exponent: Value) -> Value:
    """``base ** exponent`` where the result stays small."""
    if not isinstance(base, (int, float)) or not isinstance(exponent, (int, float)):
        return UNKNOWN
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0:
        if abs(base).bit_length() * exponent > _LARGEST_BITS:
            return UNKNOWN
        return base**exponent
    try:
        return float(base) ** float(exponent)
    except (OverflowError, ZeroDivisionError, ValueError):
        return UNKNOWN


def small(value: Value) -> bool:
    """Whether a plain value is within the limits."""
    if isinstance(value, int):
        return value.bit_length() <= _LARGEST_BITS
    return not isinstance(value, (str, bytes, list, tuple)) or len(value) <= LONGEST


def arithmetic(op: type[ast.operator], left: Value, right: Value) -> Value:
    """One binary operation on plain values, bounded in size."""
    if op is ast.Pow:
        return power(left, right)
    if not isinstance(left, PLAIN) or not isinstance(right, PLAIN) or op not in _BINARY:
        return UNKNOWN
    if not (small(left) and small(right)):
        return UNKNOWN
    if op is ast.LShift and (not isinstance(right, int) or right > _LARGEST_BITS):
        return UNKNOWN
    if op is ast.Mod and isinstance(left, (str, bytes)):
        return UNKNOWN
    if op is ast.Mult:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, (str, bytes, list, tuple)):
                count = other if isinstance(other, int) else 0
                if len(one) * count > LONGEST:
                    return UNKNOWN
    try:
        return _BINARY[op](left, right)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return UNKNOWN


def walkable(*values: Value) -> bool:
    """Whether these values can be walked in little time: a list that holds lists twice doubles with each level."""
    budget = LONGEST
    todo = list(values)
    while todo:
        value = todo.pop()
        budget -= 1
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple, set)):
            budget -= len(value)
            if budget >= 0:
                todo += value
        if budget < 0:
            return False
    return True
