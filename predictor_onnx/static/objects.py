"""Attributes, methods and items of tensors, modules, records and the submitted code's own objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from predictor_onnx.static import command_line, layers, module_methods, named_models, tensors, transformer_layers
from predictor_onnx.static.python_builtins import collate
from predictor_onnx.static.values import (
    UNKNOWN,
    Bound,
    Class,
    External,
    Function,
    Instance,
    Layer,
    Loader,
    Native,
    Optimizer,
    Record,
    Tensor,
    Value,
    is_module,
    parameters,
    tensor_of,
)

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator

Kwargs = dict[str, Value]
_CONTAINERS: Final = ("Sequential", "ModuleList", "ModuleDict")


# --- functions and classes


def decorate(function: Function, decorator: Value) -> None:
    """Apply what a decorator means for memory or for how the function is called."""
    if isinstance(decorator, Record) and decorator.kind == "no_grad":
        function.no_grad = True
    path = decorator.path if isinstance(decorator, External) else ""
    last = path.rpartition(".")[2]
    if last in {"no_grad", "inference_mode"}:
        function.no_grad = True
    elif last == "staticmethod":
        function.static = True
    elif last == "classmethod":
        function.class_method = True
    elif last in {"property", "cached_property"}:
        function.prop = True
    if isinstance(decorator, Record) and decorator.kind == "option":
        option = decorator.attrs["option"]
        function.options[option.dest] = option
    if isinstance(decorator, Record) and decorator.kind == "configured":
        function.configuration = decorator.attrs["main"]
    if isinstance(decorator, Record) and decorator.kind == "command":
        function.command = True
        if "app" in decorator.attrs:
            decorator.attrs["app"].attrs["main"] = function


def bind_arguments(function: Function, args: list[Value], kwargs: Kwargs) -> Kwargs:
    """Local names of a call, defaults filled in."""
    spec = function.node.args
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
    local: Kwargs = dict.fromkeys(names, UNKNOWN)
    local.update(zip(reversed(names), reversed(function.defaults), strict=False))
    for argument, default in zip(spec.kwonlyargs, function.kw_defaults, strict=False):
        local[argument.arg] = default
    local.update(zip(names, args, strict=False))
    known = set(local)
    local.update({name: value for name, value in kwargs.items() if name in known})
    if spec.vararg is not None:
        local[spec.vararg.arg] = tuple(args[len(names) :])
    if spec.kwarg is not None:
        local[spec.kwarg.arg] = {k: v for k, v in kwargs.items() if k not in known}
    return local


def class_member(cls: Class, name: str, after: Class | None = None) -> Value:
    """A name of a class or its bases; after ``after`` in that order when given."""
    order = cls.mro()
    if after is not None and after in order:
        order = order[order.index(after) + 1 :]
    for owner in order:
        if name in owner.names:
            return owner.names[name]
    return UNKNOWN


def field_values(cls: Class, args: list[Value], kwargs: Kwargs) -> Kwargs:
    """Fields of a dataclass or named tuple."""
    names: list[str] = []
    for owner in reversed(cls.mro()):
        names += [name for name in owner.fields if name not in names]
    values: Kwargs = {}
    for name in names:
        default = class_member(cls, name)
        if isinstance(default, Record) and default.kind == "field":
            default = default.attrs["default"]
        values[name] = default
    values.update(zip(names, args, strict=False))
    return {**values, **kwargs}


def prepare(instance: Instance) -> None:
    """Give an object that derives from a module container its container."""
    for kind in _CONTAINERS:
        if any(path.endswith(f"nn.{kind}") for path in instance.cls.externals()):
            instance.container = Layer(kind)


# --- attributes


def attribute(ev: Evaluator, owner: Value, name: str) -> Value:
    """``owner.name``; UNKNOWN when nothing is known about it."""
    if isinstance(owner, External):
        return ev.library.attribute(f"{owner.path}.{name}")
    if isinstance(owner, Tensor):
        return tensors.attribute(ev, owner, name)
    if isinstance(owner, Instance):
        return _instance_attribute(ev, owner, name)
    if isinstance(owner, Layer):
        return _layer_attribute(ev, owner, name)
    if isinstance(owner, Record):
        return _record_attribute(ev, owner, name)
    if isinstance(owner, Class):
        found = class_member(owner, name)
        if isinstance(found, Function) and found.class_method:
            return Bound(found, owner)
        return owner.name if name == "__name__" else found
    if isinstance(owner, command_line.Parser):
        return command_line.parser_method(owner, name, ev.argv)
    return _other_attribute(ev, owner, name)


def _other_attribute(ev: Evaluator, owner: Value, name: str) -> Value:
    if name == "backward":
        return Native(name, lambda args, kwargs: ev.rec.finish_step())
    if isinstance(owner, Optimizer):
        return _optimizer_attribute(ev, name)
    if isinstance(owner, Loader):
        known = {"batch_size": owner.batch_size, "dataset": owner.sample}
        return known.get(name, UNKNOWN)
    if isinstance(owner, (list, dict, str)):
        return _plain_method(ev, owner, name)
    return UNKNOWN


def _optimizer_attribute(ev: Evaluator, name: str) -> Value:
    if name == "step":

        def step(args: list[Value], kwargs: Kwargs) -> Value:
            ev.rec.optimizer_steps += 1
            if args:
                ev.call(args[0], [], {})
            return None

        return Native(name, step)
    return [] if name == "param_groups" else UNKNOWN


def _plain_method(ev: Evaluator, owner: Value, name: str) -> Value:
    """Methods of lists, dicts and strings that programs build models with."""

    def append(args: list[Value], kwargs: Kwargs) -> Value:
        if len(owner) < ev.longest_iteration:
            owner.append(args[0])
        return None

    def extend(args: list[Value], kwargs: Kwargs) -> Value:
        owner.extend((ev.iterate(args[0]) or [])[: ev.longest_iteration - len(owner)])
        return None

    def update(args: list[Value], kwargs: Kwargs) -> Value:
        owner.update(args[0] if args and isinstance(args[0], dict) else {})
        owner.update(kwargs)
        return None

    table: dict[tuple[type, str], Callable[[list[Value], Kwargs], Value]] = {
        (list, "append"): append, (list, "extend"): extend, (dict, "update"): update,
        (list, "insert"): lambda a, k: owner.insert(a[0], a[1]),
        (list, "pop"): lambda a, k: owner.pop(*a),
        (dict, "get"): lambda a, k: owner.get(a[0], a[1] if len(a) > 1 else None),
        (dict, "items"): lambda a, k: list(owner.items()),
        (dict, "keys"): lambda a, k: list(owner), (dict, "values"): lambda a, k: list(owner.values()),
        (str, "lower"): lambda a, k: owner.lower(), (str, "upper"): lambda a, k: owner.upper(),
        (str, "split"): lambda a, k: owner.split(*a), (str, "strip"): lambda a, k: owner.strip(*a),
        (str, "startswith"): lambda a, k: owner.startswith(*a),
        (str, "endswith"): lambda a, k: owner.endswith(*a),
    }  # fmt: skip
    call = table.get((type(owner), name))
    if call is None:
        return UNKNOWN
    return Native(name, lambda args, kwargs: ev.made(call(args, kwargs)))


def _instance_attribute(ev: Evaluator, owner: Instance, name: str) -> Value:
    if name in owner.attrs:
        return owner.attrs[name]
    if name == "__class__":
        return owner.cls
    found = class_member(owner.cls, name)
    if isinstance(found, Function):
        if found.prop:
            return ev.invoke(found, [owner], {}, owner)
        if found.static:
            return found
        return Bound(found, owner.cls if found.class_method else owner)
    if found is not UNKNOWN:
        return found
    return module_methods.method(ev, owner, name) if owner.is_module else UNKNOWN


def _layer_attribute(ev: Evaluator, owner: Layer, name: str) -> Value:
    for table in (owner.params, owner.children, owner.hyper):
        if name in table:
            return table[name]
    if name == "bias":
        return None
    return module_methods.method(ev, owner, name)


def _record_attribute(ev: Evaluator, owner: Record, name: str) -> Value:
    if owner.kind == "super":
        return _super_attribute(ev, owner, name)
    if name in owner.attrs:
        return owner.attrs[name]
    return ev.library.record_method(owner, name)


def _super_attribute(ev: Evaluator, owner: Record, name: str) -> Value:
    this, cls = owner.attrs["self"], owner.attrs["class"]
    if not isinstance(this, Instance) or not isinstance(cls, Class):
        return UNKNOWN
    found = class_member(this.cls, name, after=cls)
    if isinstance(found, Function):
        return Bound(found, this)
    if name == "__init__":
        return Native(name, lambda args, kwargs: _base_init(ev, this, args))
    if name == "forward" and this.container is not None:
        return this.container
    return module_methods.method(ev, this, name) if this.is_module else UNKNOWN


def _base_init(ev: Evaluator, this: Instance, args: list[Value]) -> Value:
    if this.container is not None:
        this.container.children.update(_children(ev, args))
    return None


# --- modules


def _children(ev: Evaluator, args: list[Value]) -> dict[str, Value]:
    """Modules given to a container's constructor, in order."""
    if len(args) == 1 and isinstance(args[0], dict):
        return {str(key): value for key, value in args[0].items()}
    if len(args) == 1 and not is_module(args[0]):
        args = ev.iterate(args[0]) or []
    return {str(i): value for i, value in enumerate(args) if is_module(value)}


def build_layer(ev: Evaluator, kind: str, args: list[Value], kwargs: Kwargs) -> Value:
    """``nn.<kind>(…)``; UNKNOWN for a class that is not described."""
    if kind in _CONTAINERS:
        layer: Value = Layer(kind, children=_children(ev, args))
    elif kind in layers.KINDS:
        layer = layers.build(kind, args, kwargs)
        ev.budget.spend(8 * len(layer.params))
    else:
        layer = transformer_layers.build(kind, args, kwargs)
        ev.budget.spend(8 * len(parameters(layer)))
    if layer is None:
        return UNKNOWN
    ev.models.append(layer)
    return layer


def run_layer(ev: Evaluator, layer: Layer, args: list[Value], kwargs: Kwargs) -> Value:
    """Forward pass of a built-in layer or a named model."""
    if layer.kind == named_models.NAMED:
        return named_models.run(ev, layer, args, kwargs)
    if layer.kind in transformer_layers.KINDS:
        return transformer_layers.forward(ev, layer, args)
    if layer.kind == "MultiheadAttention":
        args = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
        weights = layer.hyper.get("need_weights")
        layer.hyper["need_weights"] = kwargs.get("need_weights", weights)
    return layers.forward(ev, layer, args)


def set_attribute(ev: Evaluator, owner: Value, name: Value, value: Value) -> None:
    """``owner.name = value``."""
    if not isinstance(name, str):
        return
    if isinstance(owner, (Instance, Record)):
        owner.attrs[name] = value
    elif isinstance(owner, Layer):
        if isinstance(value, Tensor) and name in owner.params:
            owner.params[name] = value  # weights tied to another layer's
        elif is_module(value):
            owner.children[name] = value
        else:
            owner.hyper[name] = value
    elif isinstance(owner, Tensor) and name == "requires_grad":
        owner.grad = value is not False
    elif isinstance(owner, Class):
        owner.names[name] = value


def set_item(owner: Value, key: Value, value: Value) -> None:
    """``owner[key] = value``."""
    if isinstance(owner, dict):
        if isinstance(key, (str, int, float, bool)):
            owner[key] = value
    elif isinstance(owner, list):
        if isinstance(key, int) and -len(owner) <= key < len(owner):
            owner[key] = value
    elif isinstance(owner, Layer) and is_module(value):
        keys = list(owner.children)
        known = isinstance(key, int) and -len(keys) <= key < len(keys)
        owner.children[keys[key] if known else str(key)] = value


# --- items


def item(ev: Evaluator, owner: Value, key: Value) -> Value:
    """``owner[key]``."""
    if isinstance(owner, Tensor):
        return tensors.index(ev, owner, key)
    if owner is UNKNOWN and isinstance(key, slice) and isinstance(key.stop, int) and key.step == 1:
        return tensor_of((key.stop,), "int64")  # a window ``data[i : i + n]`` of unknown data
    if isinstance(owner, Loader):
        batch = owner.batch_size
        sample = item(ev, owner.sample, 0)
        return sample if owner.batched else collate(sample, batch)
    if isinstance(owner, (list, tuple, str, range)):
        known = (isinstance(key, slice) and key.stop is not UNKNOWN) or (
            isinstance(key, int) and -len(owner) <= key < len(owner)
        )
        return owner[key] if known else UNKNOWN
    if isinstance(owner, dict):
        return owner.get(key, UNKNOWN) if isinstance(key, (str, int, float, External)) else UNKNOWN
    if isinstance(owner, Instance):
        method = class_member(owner.cls, "__getitem__")
        if isinstance(method, Function):
            return ev.invoke(method, [owner, key], {}, owner)
        owner = owner.container
    if isinstance(owner, Layer):
        return _child(owner, key)
    if isinstance(owner, Record) and owner.kind in {"namespace", "Namespace"}:
        return owner.attrs.get(key, UNKNOWN) if isinstance(key, str) else UNKNOWN
    return _dataset_item(ev, owner) if isinstance(owner, Record) else UNKNOWN


def _child(owner: Layer, key: Value) -> Value:
    children = list(owner.children.values())
    if isinstance(key, slice) and key.stop is not UNKNOWN:
        return Layer(owner.kind, children={str(i): c for i, c in enumerate(children[key])})
    if isinstance(key, int):
        return children[key] if -len(children) <= key < len(children) else UNKNOWN
    return owner.children.get(key, UNKNOWN) if isinstance(key, str) else UNKNOWN


def _dataset_item(ev: Evaluator, owner: Record) -> Value:
    if owner.kind == "TensorDataset":
        return tuple(tensors.index(ev, t, 0) if isinstance(t, Tensor) else UNKNOWN
                     for t in owner.attrs["tensors"])  # fmt: skip
    if owner.kind == "Subset":
        return item(ev, owner.attrs["dataset"], 0)
    if owner.kind == "ImageDataset":
        shape = owner.attrs["shape"]
        return (tensor_of(shape), 0)
    return owner.attrs.get("0", UNKNOWN)


def iterate(ev: Evaluator, value: Value) -> list[Value] | None:
    """Items of a container of modules, or of an object of the submitted code."""
    if isinstance(value, Layer) and value.kind in _CONTAINERS:
        if value.kind == "ModuleDict":
            return list(value.children)
        return list(value.children.values())
    if isinstance(value, Instance):
        method = class_member(value.cls, "__iter__")
        if isinstance(method, Function):
            found = ev.invoke(method, [value], {}, value)
            return ev.iterate(found) if found is not value else None
        if value.container is not None:
            return list(value.container.children.values())
        return [item(ev, value, 0)] if "__getitem__" in value.cls.names else None
    if isinstance(value, Record) and value.kind in {"TensorDataset", "Subset", "ImageDataset"}:
        return [item(ev, value, 0)]
    return None
