"""Statements of the submitted code.

A branch whose condition is unknown is taken unless it only leaves; a training loop is walked once; every loop is
bounded.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar, Final

from predictor_onnx.static.arithmetic import truth
from predictor_onnx.static.expressions import Expressions
from predictor_onnx.static.turns import turns
from predictor_onnx.static.values import UNKNOWN, Scope, Value

_MOST_WHILE: Final = 64


class Leave(Exception):  # noqa: N818 - control flow of the evaluated program
    """The evaluated program leaves a block."""


class Return(Leave):
    """It returns a value."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value = value


class LoopEnd(Leave):
    """It breaks out of a loop."""


class LoopNext(Leave):
    """It goes on to the next turn."""


class Raised(Leave):
    """It raises."""


class Statements(Expressions):
    """Walks statements; ``Evaluator`` adds imports, functions, classes and calls."""

    def __init__(self) -> None:
        super().__init__()
        #: One list per generator function being walked: what it has yielded.
        self.yields: list[list[Value]] = []

    # --- statements

    def block(self, body: list[ast.stmt], scope: Scope) -> None:
        """Evaluate statements in order."""
        for statement in body:
            self.budget.spend()
            method = self.statements.get(type(statement))
            if method is not None:
                method(self, statement, scope)

    def _expression(self, node: ast.Expr, scope: Scope) -> None:
        if isinstance(node.value, (ast.Yield, ast.YieldFrom)):
            value = self.expr(node.value.value, scope) if node.value.value else None
            if self.yields:
                self.yields[-1].append(value)
            return
        self.expr(node.value, scope)

    def _assign(self, node: ast.Assign, scope: Scope) -> None:
        value = self.expr(node.value, scope)
        for target in node.targets:
            self.bind(target, value, scope)

    def _ann_assign(self, node: ast.AnnAssign, scope: Scope) -> None:
        if node.value is not None:
            self.bind(node.target, self.expr(node.value, scope), scope)
        if isinstance(node.target, ast.Name):
            scope.names.setdefault("__annotations__", {})[node.target.id] = self.expr(node.annotation, scope)

    def _aug_assign(self, node: ast.AugAssign, scope: Scope) -> None:
        current = self.expr(node.target, scope)
        value = self.binary(type(node.op), current, self.expr(node.value, scope))
        self.bind(node.target, value, scope)

    def bind(self, target: ast.expr, value: Value, scope: Scope) -> None:
        """Assign ``value`` to a name, attribute, item or pattern."""
        if isinstance(target, ast.Name):
            scope.names[target.id] = value
            self.hints.note(target.id, value)
        elif isinstance(target, ast.Attribute):
            self.hints.note(target.attr, value)
            self.set_attribute(self.expr(target.value, scope), target.attr, value)
        elif isinstance(target, ast.Subscript):
            owner, key = self.expr(target.value, scope), self.expr(target.slice, scope)
            self.set_item(owner, key, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target.elts, value, scope)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value, scope)

    def _unpack(self, targets: list[ast.expr], value: Value, scope: Scope) -> None:
        items = self.iterate(value) if value is not UNKNOWN else None
        star = next((i for i, t in enumerate(targets) if isinstance(t, ast.Starred)), None)
        if items is None or (star is None and len(items) != len(targets)):
            items = [UNKNOWN] * len(targets)
        elif star is not None:
            after = len(targets) - star - 1
            end = len(items) - after
            items = [*items[:star], items[star:end], *items[end:]]
        for target, item in zip(targets, items, strict=False):
            self.bind(target, item, scope)

    def _if(self, node: ast.If, scope: Scope) -> None:
        known = truth(self.expr(node.test, scope))
        if known is None:
            # Unknown: the branch is taken, unless all it does is leave or it only guards a failure.
            leaves = isinstance(node.body[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break))
            known = not (leaves or _exits(node.body[-1]))
        self.block(node.body if known else node.orelse, scope)

    def _for(self, node: ast.For | ast.AsyncFor, scope: Scope) -> None:
        items = self.iterate(self.expr(node.iter, scope))
        before = self.rec.steps
        for item in items if items is not None else [UNKNOWN]:
            self.bind(node.target, item, scope)
            if not self._loop_body(node.body, scope):
                if self.rec.steps != before:
                    self.rec.repeat(before, turns(self, node, scope))
                return
        self.block(node.orelse, scope)

    def _while(self, node: ast.While, scope: Scope) -> None:
        before = self.rec.steps
        for _ in range(_MOST_WHILE):
            known = truth(self.expr(node.test, scope))
            if known is False:
                break
            if not self._loop_body(node.body, scope) or known is None:
                break
        if self.rec.steps != before:
            self.rec.repeat(before, None)

    def _loop_body(self, body: list[ast.stmt], scope: Scope) -> bool:
        """One turn of a loop; False when the loop need not turn again.

        A loop that trains or runs a whole model does the same every turn, so one turn tells all.
        """
        rec = self.rec
        work = rec.optimizer_steps + rec.backward_passes
        passes = rec.forward_passes
        try:
            self.block(body, scope)
        except LoopEnd:
            return False
        except LoopNext:
            pass
        if rec.optimizer_steps + rec.backward_passes > work:
            return False
        return rec.forward_depth > 0 or rec.forward_passes == passes

    def _with(self, node: ast.With | ast.AsyncWith, scope: Scope) -> None:
        with ExitStack() as stack:
            for item in node.items:
                manager = self.expr(item.context_expr, scope)
                value = self.enter(manager, stack)
                if item.optional_vars is not None:
                    self.bind(item.optional_vars, value, scope)
            self.block(node.body, scope)

    def _try(self, node: ast.Try, scope: Scope) -> None:
        try:
            self.block(node.body, scope)
        except Raised:
            for handler in node.handlers[:1]:
                self.block(handler.body, scope)
        else:
            self.block(node.orelse, scope)
        self.block(node.finalbody, scope)

    def _return(self, node: ast.Return, scope: Scope) -> None:
        raise Return(self.expr(node.value, scope))

    def _raise(self, node: ast.Raise, scope: Scope) -> None:
        raise Raised

    def _break(self, node: ast.Break, scope: Scope) -> None:
        raise LoopEnd

    def _continue(self, node: ast.Continue, scope: Scope) -> None:
        raise LoopNext

    def _nothing(self, node: ast.stmt, scope: Scope) -> None:
        return None

    def _assert(self, node: ast.Assert, scope: Scope) -> None:
        self.expr(node.test, scope)

    def enter(self, manager: Value, stack: ExitStack) -> Value:
        """Enter a ``with`` item; overridden where libraries are understood."""
        raise NotImplementedError

    def set_attribute(self, owner: Value, name: str, value: Value) -> None:
        """``owner.name = value``; overridden where objects are understood."""
        raise NotImplementedError

    def set_item(self, owner: Value, key: Value, value: Value) -> None:
        """``owner[key] = value``; overridden where objects are understood."""
        raise NotImplementedError

    statements: ClassVar[dict[type[ast.stmt], Callable[[Any, Any, Scope], None]]] = {
        ast.Expr: _expression, ast.Assign: _assign, ast.AnnAssign: _ann_assign,
        ast.AugAssign: _aug_assign, ast.If: _if, ast.For: _for, ast.AsyncFor: _for,
        ast.While: _while, ast.With: _with, ast.AsyncWith: _with, ast.Try: _try,
        ast.Return: _return, ast.Raise: _raise, ast.Break: _break, ast.Continue: _continue, ast.Assert: _assert,
        ast.Pass: _nothing,
    }  # fmt: skip


def _exits(node: ast.stmt) -> bool:
    """Whether a statement is a call of ``exit``."""
    call = node.value if isinstance(node, ast.Expr) else None
    function = call.func if isinstance(call, ast.Call) else None
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in {"exit", "_exit", "quit", "skip", "error"}
