"""Methods that every ``nn.Module`` has, and what they mean for memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from predictor_onnx.static.operands import dtype_of
from predictor_onnx.static.values import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    UNKNOWN,
    External,
    Instance,
    Layer,
    Native,
    Tensor,
    Value,
    is_module,
    parameters,
)

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator

Kwargs = dict[str, Value]


def inside(module: Value) -> list[Value]:
    """``module`` and every module that it holds."""
    found: list[Value] = [module]
    seen = {id(module)}
    for item in found:
        members = list(item.children.values() if isinstance(item, Layer) else item.attrs.values())
        if isinstance(item, Instance) and item.container is not None:
            members += item.container.children.values()
        for member in members:
            if is_module(member) and id(member) not in seen:
                seen.add(id(member))
                found.append(member)
    return found


class _Methods:
    """One method per name; each takes the call's arguments."""

    def __init__(self, ev: Evaluator, module: Value, name: str) -> None:
        self.ev, self.module, self.name = ev, module, name

    def convert(self, dtype: str) -> Value:
        for weight in parameters(self.module):
            weight.storage.nbytes *= DTYPE_BYTES[dtype] / DTYPE_BYTES[weight.dtype]
            weight.dtype = dtype
        return self.module

    def cast(self, args: list[Value], kwargs: Kwargs) -> Value:
        return self.convert({"half": "float16", "float": "float32"}.get(self.name, self.name))

    def to(self, args: list[Value], kwargs: Kwargs) -> Value:
        for arg in (*args, *kwargs.values()):
            dtype = dtype_of(arg, "")
            if dtype in FLOAT_DTYPES and isinstance(arg, External):
                self.convert(dtype)
        return self.module

    def same(self, args: list[Value], kwargs: Kwargs) -> Value:
        return self.module

    def weights(self, args: list[Value], kwargs: Kwargs) -> Value:
        found = parameters(self.module)
        self.ev.budget.spend(len(found))
        if self.name == "parameters":
            return found
        return [(f"weight{i}", weight) for i, weight in enumerate(found)]

    def freeze(self, args: list[Value], kwargs: Kwargs) -> Value:
        wanted = (args[0] if args else kwargs.get("requires_grad", True)) is not False
        for weight in parameters(self.module):
            weight.grad = wanted
        return self.module

    def set_member(self, args: list[Value], kwargs: Kwargs) -> Value:
        from predictor_onnx.static import objects

        objects.set_attribute(self.ev, self.module, args[0], args[1])
        return None

    def members(self, args: list[Value], kwargs: Kwargs) -> Value:
        found = inside(self.module)
        self.ev.budget.spend(len(found))
        return found

    def extend(self, args: list[Value], kwargs: Kwargs) -> Value:
        target = self.module.container if isinstance(self.module, Instance) else self.module
        if target is None:
            return UNKNOWN
        for child in args if self.name == "append" else self.ev.iterate(args[0]) or []:
            target.children[str(len(target.children))] = child
        return self.module

    def checkpointing(self, args: list[Value], kwargs: Kwargs) -> Value:
        self.ev.rec.checkpointing = True
        self._set("checkpointing", value=True)
        return None

    def train(self, args: list[Value], kwargs: Kwargs) -> Value:
        self._set("training", value=self.name == "train" and (not args or args[0] is not False))
        return self.module

    def _set(self, name: str, *, value: bool) -> None:
        for member in inside(self.module):
            if isinstance(member, Layer):
                member.hyper[name] = value
            else:
                member.attrs[name] = value

    def forward(self, args: list[Value], kwargs: Kwargs) -> Value:
        return self.ev.call(self.module, args, kwargs)

    def generate(self, args: list[Value], kwargs: Kwargs) -> Value:
        with self.ev.rec.without_grad():
            given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            self.ev.call(self.module, args, given)
        return UNKNOWN


_TABLE: Final[dict[str, Callable[[_Methods, list[Value], Kwargs], Value]]] = {
    "parameters": _Methods.weights, "named_parameters": _Methods.weights, "to": _Methods.to,
    "cuda": _Methods.same, "cpu": _Methods.same, "apply": _Methods.same,
    "compile": _Methods.same, "train": _Methods.train, "eval": _Methods.train,
    "half": _Methods.cast, "bfloat16": _Methods.cast, "float": _Methods.cast,
    "requires_grad_": _Methods.freeze, "register_buffer": _Methods.set_member,
    "register_parameter": _Methods.set_member, "add_module": _Methods.set_member,
    "register_module": _Methods.set_member, "modules": _Methods.members,
    "children": _Methods.members, "append": _Methods.extend, "extend": _Methods.extend,
    "gradient_checkpointing_enable": _Methods.checkpointing,
    "set_grad_checkpointing": _Methods.checkpointing, "forward": _Methods.forward,
    "generate": _Methods.generate,
}  # fmt: skip


def method(ev: Evaluator, module: Value, name: str) -> Value:
    """``module.name``, bound; UNKNOWN for a method that is not described."""
    call = _TABLE.get(name)
    if call is None:
        return UNKNOWN
    methods = _Methods(ev, module, name)
    ev.budget.spend(len(module.children if isinstance(module, Layer) else module.attrs))
    return Native(name, lambda args, kwargs: call(methods, args, kwargs))
