"""The values that evaluated code works with: what is known about each object, without the object.

Plain Python numbers, strings and containers stand for themselves. Everything else that matters to
memory has a class here; anything else is ``UNKNOWN``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

#: Any value of the evaluated program: a plain Python object or one of the classes below.
Value: TypeAlias = Any

#: Bytes per element.
DTYPE_BYTES: Final[dict[str, int]] = {
    "float64": 8, "double": 8, "int64": 8, "long": 8, "float32": 4, "float": 4, "int32": 4,
    "int": 4, "float16": 2, "half": 2, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 8,
}  # fmt: skip
FLOAT_DTYPES: Final = frozenset({"float64", "double", "float32", "float", "float16", "half",
                                 "bfloat16"})  # fmt: skip


#: Torch refuses tensors of more dimensions.
MOST_DIMENSIONS: Final = 64


class Unknown:
    """A value that the static evaluation could not determine."""

    _instance: Unknown | None = None

    def __new__(cls) -> Unknown:  # noqa: PYI034 - there is one, of this very class
        """There is one unknown."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "UNKNOWN"

    def __bool__(self) -> bool:
        raise TypeError("an unknown value has no truth; test it with 'is UNKNOWN'")


UNKNOWN: Final = Unknown()


@dataclass(frozen=True)
class External:
    """A name of a library outside the bundle, such as ``torch.nn.Linear``."""

    path: str


@dataclass(eq=False)
class Storage:
    """Memory behind one or several tensors; a storage is counted once."""

    nbytes: float
    kind: str = "other"
    saved: bool = False
    parameter: bool = False


@dataclass(eq=False)
class Tensor:
    """Shape and type of a tensor; ``None`` in the shape is a size that is not known."""

    shape: tuple[int | None, ...]
    dtype: str = "float32"
    storage: Storage = field(default_factory=lambda: Storage(0.0))
    grad: bool = False
    contiguous: bool = True
    on_gpu: bool = False

    @property
    def numel(self) -> int | None:
        """Number of elements, or None when a size is not known."""
        total = 1
        for size in self.shape:
            if size is None:
                return None
            total *= size
        return total


def tensor_of(
    shape: tuple[int | None, ...], dtype: str = "float32", *, kind: str = "other",
    grad: bool = False, parameter: bool = False,
) -> Tensor:  # fmt: skip
    """A tensor with a storage of its own; unknown sizes count as one."""
    shape = shape[:MOST_DIMENSIONS]
    total = 1.0
    for size in shape:
        total *= max(0, 1 if size is None else size)
    nbytes = total * DTYPE_BYTES.get(dtype, 4)
    return Tensor(shape, dtype, Storage(nbytes, kind, parameter=parameter), grad=grad)


@dataclass(eq=False)
class Layer:
    """A built-in ``torch.nn`` module, or a named model from the catalog.

    ``kind`` is the class name (``Linear``), ``params`` its own weights, ``children`` the modules it
    holds in order, ``hyper`` its attributes.
    """

    kind: str
    params: dict[str, Tensor] = field(default_factory=dict)
    children: dict[str, Value] = field(default_factory=dict)
    hyper: dict[str, Value] = field(default_factory=dict)


@dataclass(eq=False)
class Scope:
    """Names of a module, function or class body; looked up outwards through ``parent``."""

    names: dict[str, Value]
    parent: Scope | None = None

    def find(self, name: str) -> Value:
        """The value of ``name``; raises KeyError when no scope has it."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        raise KeyError(name)


@dataclass(eq=False)
class Function:
    """A function of the submitted code."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    scope: Scope
    defaults: list[Value]
    kw_defaults: list[Value]
    owner: Class | None = None
    no_grad: bool = False
    static: bool = False
    class_method: bool = False
    prop: bool = False
    generator: bool = False
    #: Options that a typer or click decorator declared: parameter name -> default.
    options: dict[str, Value] = field(default_factory=dict)
    command: bool = False
    #: What hydra hands to the function when it is called without arguments.
    configuration: Value = None


@dataclass(eq=False)
class Class:
    """A class of the submitted code."""

    name: str
    bases: list[Value]
    names: dict[str, Value]
    #: Annotated fields in order, for dataclasses and named tuples.
    fields: list[str] = field(default_factory=list)

    def mro(self) -> list[Class]:
        """This class and the bundle's own base classes, nearest first, each once."""
        found: dict[int, Class] = {}
        todo: list[Class] = [self]
        while todo:
            cls = todo.pop()
            if id(cls) not in found:
                found[id(cls)] = cls
                todo += [base for base in reversed(cls.bases) if isinstance(base, Class)]
        return list(found.values())

    def externals(self) -> set[str]:
        """Library classes that this class derives from, as dotted paths."""
        return {base.path for cls in self.mro() for base in cls.bases
                if isinstance(base, External)}  # fmt: skip


#: Base classes that make a class a network.
MODULE_BASES: Final = ("nn.Module", "LightningModule", "nn.Sequential", "PreTrainedModel")


@dataclass(eq=False)
class Instance:
    """An object of a class of the submitted code."""

    cls: Class
    attrs: dict[str, Value] = field(default_factory=dict)
    #: Set where the class derives from nn.Sequential or nn.ModuleList.
    container: Layer | None = None

    @property
    def is_module(self) -> bool:
        """Whether it is an ``nn.Module``."""
        return any(path.endswith(MODULE_BASES) for path in self.cls.externals())


@dataclass(eq=False)
class Bound:
    """A function of the submitted code together with the object it belongs to."""

    function: Function
    owner: Value


@dataclass(eq=False)
class Native:
    """A call that the evaluator answers itself: ``x.view``, ``parser.add_argument``."""

    name: str
    call: Callable[[list[Value], dict[str, Value]], Value]


@dataclass(eq=False)
class Record:
    """A library object with attributes and no behaviour of its own (``TrainingArguments``)."""

    kind: str
    attrs: dict[str, Value] = field(default_factory=dict)


@dataclass(eq=False)
class Loader:
    """What a ``DataLoader`` yields: one batch, collated from one sample of its dataset."""

    sample: Value
    batch_size: int | None
    #: True where the sample already has its batch dimension.
    batched: bool = False
    length: int | None = None


@dataclass(eq=False)
class Optimizer:
    """An optimizer; ``states`` is how many values it keeps per trained parameter."""

    kind: str
    states: float


def is_module(value: Value) -> bool:
    """Whether ``value`` is a network or a layer."""
    return isinstance(value, Layer) or (isinstance(value, Instance) and value.is_module)


def parameters(value: Value) -> list[Tensor]:
    """Weights of a network, each storage once, children included."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    todo: list[Value] = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Layer):
            for tensor in item.params.values():
                found.setdefault(id(tensor.storage), tensor)
            todo += item.children.values()
        elif isinstance(item, Instance):
            todo += [item.container] if item.container is not None else []
            for attr in item.attrs.values():
                if isinstance(attr, Tensor) and attr.storage.parameter:
                    found.setdefault(id(attr.storage), attr)
                elif is_module(attr):
                    todo.append(attr)
    return list(found.values())
