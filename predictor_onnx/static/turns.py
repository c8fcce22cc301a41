"""How often a loop turns, where the code says so: the number of training steps rests on it.

Only forms that cannot mislead count: ``range``, a data loader over a dataset of known length, and those under
``enumerate`` or a progress bar. A loop that may be left early, or skips turns, has no known number of turns.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Final

from predictor_onnx.static.values import Loader, Scope

if TYPE_CHECKING:
    from predictor_onnx.static.statements import Statements

#: Calls that pass their first argument's items on, one by one.
_PASSES_ON: Final = frozenset(["enumerate", "tqdm", "track", "progress_bar"])
_RANGES: Final = frozenset(["range", "trange"])
_EXITS: Final = frozenset(["exit", "_exit", "quit", "abort"])
#: No program turns that often; such a loop is left in a way that is not read.
_ABSURD: Final = 10**9


def turns(ev: Statements, node: ast.For | ast.AsyncFor, scope: Scope) -> int | None:
    """Turns of a ``for`` loop; None where the code does not say, or may leave or skip."""
    if any(_leaves(inner) for one in node.body for inner in ast.walk(one)):
        return None
    return _length(ev, node.iter, scope)


def _leaves(node: ast.AST) -> bool:
    """Whether this may leave a loop early, or skip the rest of a turn."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in _EXITS
    return isinstance(node, (ast.Break, ast.Continue, ast.Return, ast.Raise))


def _length(ev: Statements, node: ast.expr, scope: Scope) -> int | None:
    if isinstance(node, ast.Call) and node.args:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _PASSES_ON:
            return _length(ev, node.args[0], scope)
        if name in _RANGES and all(_is_plain(argument) for argument in node.args):
            limits = [ev.expr(argument, scope) for argument in node.args]
            return _numbers([limit for limit in limits if isinstance(limit, int)], len(limits))
        return None
    if isinstance(node, (ast.Name, ast.Attribute)):
        value = ev.expr(node, scope)
        if isinstance(value, range):
            return _numbers([value.start, value.stop, value.step], 3)
        return value.length if isinstance(value, Loader) else None
    return None


def _numbers(limits: list[int], given: int) -> int | None:
    """How many numbers a ``range`` has."""
    if len(limits) != given or not 1 <= given <= 3:
        return None
    start, stop, step = (0, limits[0], 1) if given == 1 else (*limits, 1)[:3]
    if step == 0:
        return None
    count = max(0, -((start - stop) // step))
    return count if count < _ABSURD else None


def _is_plain(node: ast.expr) -> bool:
    """Whether to evaluate it again changes nothing."""
    safe = (ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)
    return all(isinstance(inner, safe) for inner in ast.walk(node))
