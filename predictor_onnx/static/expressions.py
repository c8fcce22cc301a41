"""Expressions of the submitted code, evaluated within a budget and without running anything.

Plain arithmetic is done, with limits that keep every value small; tensors and modules go through the
recorder; whatever else comes up is ``UNKNOWN``.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final

from predictor_onnx.static import files, ops, products
from predictor_onnx.static.arithmetic import LONGEST, PLAIN, arithmetic, small, truth, walkable
from predictor_onnx.static.budget import Budget
from predictor_onnx.static.context import Hints
from predictor_onnx.static.recorder import Recorder
from predictor_onnx.static.values import (
    UNKNOWN,
    External,
    Function,
    Loader,
    Record,
    Scope,
    Tensor,
    Value,
    is_module,
)

#: Items of a new list, and characters of a new text, that cost as much as one node.
_ITEMS_PER_STEP: Final = 8
_CHARACTERS_PER_STEP: Final = 64
_TENSOR_BINARY: Final[dict[type[ast.operator], str]] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow",
    ast.FloorDiv: "div", ast.Mod: "div", ast.BitAnd: "mul", ast.BitOr: "add",
}  # fmt: skip
_COMPARE: Final[dict[type[ast.cmpop], Callable[[Any, Any], Any]]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def _terms(node: ast.expr) -> list[ast.expr]:
    """Terms of a sum, at most sixteen deep."""
    found: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and len(found) < 16:
        found.append(node.right)
        node = node.left
    return [*found, node]


class Expressions:
    """Evaluates expression nodes; ``Evaluator`` adds statements and calls."""

    #: Items that one comprehension or iteration may yield.
    longest_iteration: int = 1024
    _deepest: int = 60

    def __init__(self) -> None:
        self.budget = Budget()
        self.rec = Recorder(self.budget)
        self.hints = Hints()
        self.path = ""
        self.node: ast.AST | None = None
        self._depth = 0

    def place(self) -> tuple[str, int, int]:
        """File, line and column that are being evaluated."""
        node = self.node
        return (self.path, getattr(node, "lineno", 0), getattr(node, "col_offset", 0))

    def call(self, target: Value, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Call ``target``; overridden where calls are understood."""
        raise NotImplementedError

    def attribute(self, owner: Value, name: str) -> Value:
        """``owner.name``; overridden where objects are understood."""
        raise NotImplementedError

    def expr(self, node: ast.expr | None, scope: Scope) -> Value:
        """Value of an expression; UNKNOWN when it cannot be determined."""
        if node is None:
            return None
        self.budget.spend()
        method = self._methods.get(type(node))
        if method is None or self._depth > self._deepest:
            return UNKNOWN
        self._depth += 1
        try:
            return method(self, node, scope)
        finally:
            self._depth -= 1

    def _constant(self, node: ast.Constant, scope: Scope) -> Value:
        value = node.value
        return value if isinstance(value, PLAIN) and small(value) else UNKNOWN

    def _name(self, node: ast.Name, scope: Scope) -> Value:
        try:
            return scope.find(node.id)
        except KeyError:
            return External(node.id)

    def _attribute(self, node: ast.Attribute, scope: Scope) -> Value:
        return self.attribute(self.expr(node.value, scope), node.attr)

    def _items(self, nodes: list[ast.expr], scope: Scope) -> list[Value]:
        items: list[Value] = []
        for node in nodes[:LONGEST]:
            if isinstance(node, ast.Starred):
                items += self.iterate(self.expr(node.value, scope)) or []
            else:
                items.append(self.expr(node, scope))
        return items

    def _list(self, node: ast.List, scope: Scope) -> Value:
        return self._items(node.elts, scope)

    def _tuple(self, node: ast.Tuple, scope: Scope) -> Value:
        return tuple(self._items(node.elts, scope))

    def _set(self, node: ast.Set, scope: Scope) -> Value:
        return self._items(node.elts, scope)

    def _dict(self, node: ast.Dict, scope: Scope) -> Value:
        result: dict[Value, Value] = {}
        for key_node, value_node in zip(node.keys, node.values, strict=True):
            value = self.expr(value_node, scope)
            if key_node is None:
                result.update(value if isinstance(value, dict) else {})
                continue
            key = self.expr(key_node, scope)
            if isinstance(key, (str, int, float, bool, External, type(None))):
                result[key] = value
                if isinstance(key, str):
                    self.hints.note(key, value)
        return result

    def _binop(self, node: ast.BinOp, scope: Scope) -> Value:
        left, right = self.expr(node.left, scope), self.expr(node.right, scope)
        return self.binary(type(node.op), left, right)

    def binary(self, op: type[ast.operator], left: Value, right: Value) -> Value:
        """One binary operation, on tensors or plain values."""
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            if op is ast.MatMult:
                return products.matmul(self, [left, right], {})
            name = _TENSOR_BINARY.get(op)
            if name == "pow" and not isinstance(left, Tensor):
                name = "add"  # a number to the power of a tensor: a new tensor of the same shape
            return ops.OPS[name](self, [left, right], {}) if name else UNKNOWN
        if op is ast.Div and isinstance(left, Record) and left.kind == "path":
            return files.join(left, right)
        return self.made(arithmetic(op, left, right))

    def made(self, value: Value) -> Value:
        """``value``, its size paid for."""
        if isinstance(value, (str, bytes)):
            self.budget.spend(len(value) // _CHARACTERS_PER_STEP)
        elif isinstance(value, (list, tuple, dict)):
            self.budget.spend(len(value) // _ITEMS_PER_STEP)
        return value

    def _unary(self, node: ast.UnaryOp, scope: Scope) -> Value:
        value = self.expr(node.operand, scope)
        if isinstance(node.op, ast.Not):
            known = truth(value)
            return UNKNOWN if known is None else not known
        if isinstance(value, Tensor):
            return ops.OPS["neg"](self, [value], {})
        if not isinstance(value, (int, float)):
            return UNKNOWN
        if isinstance(node.op, ast.USub):
            return -value
        if isinstance(node.op, ast.Invert):
            return ~value if isinstance(value, int) else UNKNOWN
        return value

    def _boolop(self, node: ast.BoolOp, scope: Scope) -> Value:
        wanted = isinstance(node.op, ast.Or)
        value: Value = UNKNOWN
        unknown = False
        for part in node.values:
            value = self.expr(part, scope)
            known = truth(value)
            if known is wanted:
                return value
            unknown = unknown or known is None
        return UNKNOWN if unknown else value

    def _compare(self, node: ast.Compare, scope: Scope) -> Value:
        left = self.expr(node.left, scope)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.expr(right_node, scope)
            result = self._compare_one(type(op), left, right)
            if result is not True:
                return result
            left = right
        return True

    def _compare_one(self, op: type[ast.cmpop], left: Value, right: Value) -> Value:
        if left is UNKNOWN or right is UNKNOWN or not walkable(left, right):
            return UNKNOWN
        if op in {ast.Is, ast.IsNot}:
            same = left is right or (isinstance(left, External) and left == right)
            return same == (op is ast.Is)
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            return ops.OPS["eq"](self, [left, right], {})
        if op in {ast.In, ast.NotIn}:
            if not isinstance(right, (list, tuple, dict, str)) or (
                isinstance(right, str) and not isinstance(left, str)
            ):
                return UNKNOWN
            if isinstance(right, dict) and not isinstance(left, (str, int)):
                return UNKNOWN
            return (left in right) == (op is ast.In)
        if op in {ast.Eq, ast.NotEq} and not (
            isinstance(left, (*PLAIN, External)) and isinstance(right, (*PLAIN, External))
        ):
            return UNKNOWN
        try:
            return bool(_COMPARE[op](left, right))
        except TypeError:
            return UNKNOWN

    def _ifexp(self, node: ast.IfExp, scope: Scope) -> Value:
        known = truth(self.expr(node.test, scope))
        return self.expr(node.orelse if known is False else node.body, scope)

    def _subscript(self, node: ast.Subscript, scope: Scope) -> Value:
        owner = self.expr(node.value, scope)
        if isinstance(owner, External):
            return owner  # typing: list[int], Optional[str]
        return self.item(owner, self.expr(node.slice, scope))

    def item(self, owner: Value, key: Value) -> Value:
        """``owner[key]``; overridden where objects are understood."""
        raise NotImplementedError

    def _slice(self, node: ast.Slice, scope: Scope) -> Value:
        parts = [self.expr(part, scope) for part in (node.lower, node.upper, node.step)]
        if all(part is None or isinstance(part, int) for part in parts):
            return slice(*parts)
        return slice(0, self._slice_length(node, scope), 1)

    def _slice_length(self, node: ast.Slice, scope: Scope) -> Value:
        """Length of ``i : i + n`` for an ``i`` that is not known; UNKNOWN for any other form."""
        if node.lower is None or node.upper is None:
            return UNKNOWN
        rest = _terms(node.upper)
        for term in _terms(node.lower):
            match = next((r for r in rest if ast.dump(r) == ast.dump(term)), None)
            if match is None:
                return UNKNOWN
            rest.remove(match)
        values = [self.expr(term, scope) for term in rest]
        return sum(values) if all(isinstance(v, int) for v in values) else UNKNOWN

    def _joined(self, node: ast.JoinedStr, scope: Scope) -> Value:
        text = ""
        for part in node.values:
            value = self.expr(part.value if isinstance(part, ast.FormattedValue) else part, scope)
            if isinstance(part, ast.FormattedValue) and part.format_spec is not None:
                return UNKNOWN
            if not isinstance(value, (str, int, float)) or len(text) > LONGEST:
                return UNKNOWN
            text += str(value) if small(value) else ""
        return self.made(text)

    def _lambda(self, node: ast.Lambda, scope: Scope) -> Value:
        defaults = [self.expr(default, scope) for default in node.args.defaults]
        kw_defaults = [self.expr(default, scope) for default in node.args.kw_defaults]
        return Function("<lambda>", node, scope, defaults, kw_defaults)

    def _named(self, node: ast.NamedExpr, scope: Scope) -> Value:
        value = self.expr(node.value, scope)
        scope.names[node.target.id] = value
        return value

    def _call(self, node: ast.Call, scope: Scope) -> Value:
        target = self.expr(node.func, scope)
        if isinstance(target, External) and target.path == "super" and not node.args:
            return self.parent(scope)
        args = self._items(node.args, scope)
        kwargs: dict[str, Value] = {}
        for keyword in node.keywords:
            value = self.expr(keyword.value, scope)
            if keyword.arg is None:
                if isinstance(value, dict):
                    kwargs.update({k: v for k, v in value.items() if isinstance(k, str)})
            else:
                kwargs[keyword.arg] = value
                self.hints.note(keyword.arg, value)
        before, self.node = self.node, node
        try:
            return self.call(target, args, kwargs)
        finally:
            self.node = before

    def parent(self, scope: Scope) -> Value:
        """``super()`` in a method; overridden where classes are understood."""
        raise NotImplementedError

    def bind(self, target: ast.expr, value: Value, scope: Scope) -> None:
        """Assign ``value`` to a target; overridden where attributes can be set."""
        raise NotImplementedError

    def _comprehension(
        self, generators: list[ast.comprehension], scope: Scope, items: list[Value] | None = None
    ) -> Iterator[Scope]:
        if not generators:
            yield scope
            return
        first, *rest = generators
        if items is None:
            items = self.iterate(self.expr(first.iter, scope))
        for item in items if items is not None else []:
            inner = Scope({}, scope)
            self.bind(first.target, item, inner)
            if all(truth(self.expr(test, inner)) is not False for test in first.ifs):
                yield from self._comprehension(rest, inner)

    def _listcomp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, scope: Scope) -> Value:
        first = node.generators[0]
        items = self.iterate(self.expr(first.iter, scope))
        if items is None:
            return self._listcomp_of_unknown(node, scope)
        return [self.expr(node.elt, s) for s in self._comprehension(node.generators, scope, items)]

    def _listcomp_of_unknown(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, scope: Scope) -> Value:
        """Over unknown items: one module stands for the unknown number; other values are unknown."""
        inner = Scope({}, scope)
        self.bind(node.generators[0].target, UNKNOWN, inner)
        value = self.expr(node.elt, inner)
        if is_module(value):
            self.rec.guesses += 1
            return [value]
        return [value] if isinstance(value, Tensor) else UNKNOWN

    def _dictcomp(self, node: ast.DictComp, scope: Scope) -> Value:
        result: dict[Value, Value] = {}
        for inner in self._comprehension(node.generators, scope):
            key = self.expr(node.key, inner)
            if isinstance(key, (str, int, float, bool)):
                result[key] = self.expr(node.value, inner)
        return result

    def _value(self, node: ast.Await | ast.Starred, scope: Scope) -> Value:
        return self.expr(node.value, scope)

    def iterate(self, value: Value) -> list[Value] | None:
        """Items of an iterable, at most ``longest_iteration``; None when it is not known."""
        limit = self.longest_iteration
        if isinstance(value, (list, tuple, range, str)):
            self.made(value[:limit])
            return list(value[:limit])
        if isinstance(value, dict):
            self.made(value)
            return list(value)[:limit]
        if isinstance(value, Loader):
            return [self.item(value, 0)]
        if isinstance(value, Tensor):
            found = ops.OPS["unbind"](self, [value], {})
            return list(found) if isinstance(found, tuple) else None
        return self.iterate_object(value)

    def iterate_object(self, value: Value) -> list[Value] | None:
        """Items of a module container or instance; overridden where those are understood."""
        return None

    _methods: Final[dict[type[ast.expr], Callable[[Any, Any, Scope], Value]]] = {
        ast.Constant: _constant, ast.Name: _name, ast.Attribute: _attribute, ast.List: _list,
        ast.Tuple: _tuple, ast.Set: _set, ast.Dict: _dict, ast.BinOp: _binop, ast.UnaryOp: _unary,
        ast.BoolOp: _boolop, ast.Compare: _compare, ast.IfExp: _ifexp, ast.Subscript: _subscript,
        ast.Slice: _slice, ast.JoinedStr: _joined, ast.Lambda: _lambda, ast.NamedExpr: _named,
        ast.Call: _call, ast.ListComp: _listcomp, ast.GeneratorExp: _listcomp,
        ast.SetComp: _listcomp, ast.DictComp: _dictcomp, ast.Await: _value, ast.Starred: _value,
    }  # fmt: skip
