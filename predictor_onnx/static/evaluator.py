"""Whole programs: imports, functions, classes and calls of the submitted code, in one abstract run.

Nothing is executed; call depth is bounded here, steps and loops in the classes that this one builds on.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import ClassVar, Final

from predictor_onnx.source import Entrypoint, Source, find_entrypoint
from predictor_onnx.static import command_line, library, objects, python_builtins
from predictor_onnx.static.arithmetic import walkable
from predictor_onnx.static.budget import BudgetExceeded
from predictor_onnx.static.statements import Leave, Return, Statements
from predictor_onnx.static.values import (
    UNKNOWN,
    Bound,
    Class,
    External,
    Function,
    Instance,
    Layer,
    Native,
    Optimizer,
    Record,
    Scope,
    Tensor,
    Value,
    is_module,
)

_DEEPEST_CALL: Final = 28
#: Commands that never use an accelerator.
_HARMLESS: Final = frozenset([
    "cat", "cp", "curl", "date", "df", "echo", "git", "hostname", "ls", "mkdir", "mv", "nproc", "nvidia-smi", "pip",
    "rm", "sleep", "tar", "true", "uname", "unzip", "wget",
])  # fmt: skip
_MOST_NAMES: Final = 16
_LONGEST_NAME: Final = 80


class Evaluator(Statements):
    """Walks a program from its entrypoint and records the memory of one step."""

    def __init__(self, source: Source, arguments_: Sequence[str] = ()) -> None:
        super().__init__()
        self.source = source
        self.argv: list[str] = list(arguments_)[:4096]
        self.imports: set[str] = set()
        self.models: list[Value] = []
        self.modules: dict[str, Scope] = {}
        self.optimizers: list[Optimizer] = []
        self.unknown_models: list[str] = []
        self.library = library.Library(self)
        self.stopped_early = False
        #: Whether a program was started, or code made, that could not be read.
        self.starts_unknown = False
        self._calls = 0
        self._self: list[Value] = []
        self._package = ""

    # --- whole programs

    def run(self, entry: Entrypoint) -> None:
        """Evaluate the program; what was learnt stands even where the budget ran out.

        Raises:
            CodeDoesNotParseError: the entrypoint, or a module that it imports, is not valid Python.
        """
        self._package = entry.path.rpartition("/")[0]
        try:
            self._run_module(entry.path, "__main__")
        except (BudgetExceeded, RecursionError):
            self.stopped_early = True
        except Leave:
            pass

    def complete(self, model: Value) -> None:
        """Run ``model`` once on inputs that its layers guess; for code whose own pass is hidden."""
        try:
            self.call(model, [], {})
        except (BudgetExceeded, RecursionError, Leave):
            self.stopped_early = True

    def start_program(self, command: Value) -> Value:
        """The program starts another: a Python file of the bundle is read in its turn, others are noted."""
        words = command.split() if isinstance(command, str) else command
        known = isinstance(words, list) and all(isinstance(word, str) for word in words)
        entry = find_entrypoint(words, self.source.bundle) if known else None
        if entry is None or entry.path in self.modules:
            quiet = known and words and words[0].rpartition("/")[2] in _HARMLESS
            self.starts_unknown = self.starts_unknown or not quiet
            return UNKNOWN
        before, self.argv = self.argv, list(entry.arguments)
        try:
            self._run_module(entry.path, "__main__")
        finally:
            self.argv = before
        self.imports |= self.source.imports(entry.path)
        return UNKNOWN

    def note_unknown_model(self, library: str, name: Value) -> None:
        """A model is asked for by a name that the catalog does not have."""
        known = name[:_LONGEST_NAME] if isinstance(name, str) else "?"
        if len(self.unknown_models) < _MOST_NAMES:
            self.unknown_models.append(f"{library}/{known}")

    def _run_module(self, path: str, name: str) -> Scope:
        if path in self.modules:
            return self.modules[path]
        scope = self.modules[path] = Scope({"__name__": name, "__file__": path})
        tree = self.source.tree(path)
        if tree is None:
            return scope
        before, self.path = self.path, path
        try:
            self.block(tree.body, scope)
        finally:
            self.path = before
        return scope

    # --- imports

    def _import(self, node: ast.Import, scope: Scope) -> None:
        for name in node.names:
            self.imports.add(name.name.partition(".")[0])
            whole = name.name if name.asname else name.name.partition(".")[0]
            bound = name.asname or whole
            path = self.source.module_path(name.name, self._package)
            if path is None:
                scope.names[bound] = External(whole)
            elif name.asname or "." not in name.name:
                scope.names[bound] = Record("module", self._run_module(path, name.name).names)
            else:
                scope.names[bound] = self._nested(name.name, path)

    def _nested(self, dotted: str, path: str) -> Value:
        inner: Value = Record("module", self._run_module(path, dotted).names)
        for part in reversed(dotted.split(".")[1:]):
            inner = Record("module", {part: inner})
        return inner

    def _import_from(self, node: ast.ImportFrom, scope: Scope) -> None:
        module = node.module or ""
        package = self._package
        if node.level:
            package = str(_found(scope, "__file__", self.path)).rpartition("/")[0]
            for _ in range(node.level - 1):
                package = package.rpartition("/")[0]
        path = self.source.module_path(module, package) if module else None
        if node.level and not module:
            path = self.source.package_path(package)
        if path is None and not node.level:
            self.imports.add(module.partition(".")[0])
        found = self._run_module(path, module).names if path is not None else None
        for name in node.names:
            if name.name == "*":
                scope.names.update(found or self.library.star(module))
                continue
            bound = name.asname or name.name
            inner = f"{module}.{name.name}" if module else name.name
            nested = self.source.module_path(inner, package) if found is None or (
                name.name not in found) else None  # fmt: skip
            if nested is not None:
                scope.names[bound] = Record("module", self._run_module(nested, inner).names)
            elif found is not None or node.level:
                scope.names[bound] = (found or {}).get(name.name, UNKNOWN)
            else:
                scope.names[bound] = External(inner)

    # --- functions and classes

    def _function_def(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope) -> None:
        function = Function(
            node.name, node, scope,
            [self.expr(default, scope) for default in node.args.defaults],
            [self.expr(default, scope) for default in node.args.kw_defaults],
        )  # fmt: skip
        function.generator = _has_yield(node)
        for decorator in node.decorator_list:
            objects.decorate(function, self.expr(decorator, scope))
        scope.names[node.name] = function
        arguments_ = [*node.args.posonlyargs, *node.args.args]
        for argument, default in zip(reversed(arguments_), reversed(function.defaults), strict=False):
            self.hints.note(argument.arg, default)

    def _class_def(self, node: ast.ClassDef, scope: Scope) -> None:
        bases = [self.expr(base, scope) for base in node.bases]
        inner = Scope({}, scope)
        self.block(node.body, inner)
        annotations = inner.names.pop("__annotations__", {})
        cls = Class(node.name, bases, inner.names, list(annotations))
        for member in inner.names.values():
            if isinstance(member, Function) and member.owner is None:
                member.owner = cls
                member.scope = scope
        scope.names[node.name] = cls

    def parent(self, scope: Scope) -> Value:
        """``super()``: the next class of the bundle, or the library's own."""
        owner = scope.names.get("__class__")
        return Record("super", {"self": scope.names.get("__self__"), "class": owner})

    def invoke(self, function: Function, args: list[Value], kwargs: dict[str, Value], owner: Value = None) -> Value:
        """Call a function of the submitted code."""
        if self._calls >= _DEEPEST_CALL:
            return UNKNOWN
        names = objects.bind_arguments(function, args, kwargs)
        scope = Scope(names, function.scope)
        if function.owner is not None:
            names["__class__"], names["__self__"] = function.owner, owner
        self._calls += 1
        depth, self._depth = self._depth, 0
        try:
            if isinstance(function.node, ast.Lambda):
                return self.expr(function.node.body, scope)
            with ExitStack() as stack:
                if function.no_grad:
                    stack.enter_context(self.rec.without_grad())
                return self._run_body(function, function.node.body, scope)
        finally:
            self._calls -= 1
            self._depth = depth

    def _run_body(self, function: Function, body: list[ast.stmt], scope: Scope) -> Value:
        if function.generator:
            self.yields.append([])
        try:
            self.block(body, scope)
        except Return as leave:
            if not function.generator:
                return leave.value
        finally:
            items = self.yields.pop() if function.generator else None
        return items

    def run_command(self, function: Function) -> Value:
        """Call a function whose arguments come from the command line (typer, click)."""
        node = function.node
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = objects.bind_arguments(function, [], {})
        annotations = {a.arg: self.expr(a.annotation, function.scope) for a in args}
        values = {a.arg: names.get(a.arg, UNKNOWN) for a in args}
        options = command_line.command_options(function, annotations, values)
        given = {option.dest: option.default for option in options}
        given.update(command_line.read(options, self.argv))
        for name, value in given.items():
            self.hints.note(name, value)
        return self.invoke(function, [], given)

    # --- calls and objects

    def call(self, target: Value, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Call any value of the evaluated program."""
        if isinstance(target, Function):
            if target.command and not args and not kwargs:
                return self.run_command(target)
            if target.configuration is not None and not args:
                args = [target.configuration]
            return self.invoke(target, args, kwargs)
        if isinstance(target, Record) and isinstance(target.attrs.get("main"), Function):
            return self.run_command(target.attrs["main"])
        if isinstance(target, Bound):
            return self.invoke(target.function, [target.owner, *args], kwargs, target.owner)
        if isinstance(target, Native):
            return self._guarded(target.call, args, kwargs)
        if isinstance(target, Class):
            return self._instantiate(target, args, kwargs)
        if isinstance(target, (Instance, Layer)):
            return self._run_model(target, args, kwargs)
        if isinstance(target, External):
            if target.path in python_builtins.FUNCTIONS:
                return self._guarded(lambda a, k: python_builtins.FUNCTIONS[target.path](self, a, k), args, kwargs)
            return self._guarded(lambda a, k: self.library.call(target.path, a, k), args, kwargs)
        return self._hand_out(args)

    def _hand_out(self, args: list[Value]) -> Value:
        """Something unknown is called: ``data.map(tokenize)`` will call the functions that it is given."""
        for given in args:
            if isinstance(given, Function) and not isinstance(given.node, ast.Lambda):
                self.invoke(given, [], {})
        return UNKNOWN

    def _guarded(
        self, function: Callable[[list[Value], dict[str, Value]], Value], args: list[Value],
        kwargs: dict[str, Value],
    ) -> Value:  # fmt: skip
        """A wrong or unforeseen argument makes the result unknown, never the prediction fail."""
        try:
            return function(args, kwargs)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError,
                ZeroDivisionError):  # fmt: skip
            return UNKNOWN

    def _instantiate(self, cls: Class, args: list[Value], kwargs: dict[str, Value]) -> Value:
        instance = Instance(cls)
        objects.prepare(instance)
        init = objects.class_member(cls, "__init__")
        if isinstance(init, Function):
            self.invoke(init, [instance, *args], kwargs, instance)
        else:
            instance.attrs.update(objects.field_values(cls, args, kwargs))
            for name, value in instance.attrs.items():
                self.hints.note(name, value)
        if instance.is_module:
            self.models.append(instance)
        return instance

    def _run_model(self, model: Value, args: list[Value], kwargs: dict[str, Value]) -> Value:
        if not is_module(model):
            method = objects.class_member(model.cls, "__call__")
            if isinstance(method, Function):
                return self.invoke(method, [model, *args], kwargs, model)
            return UNKNOWN
        if self.rec.forward_depth == 0 and not _is_loss(model):
            given = [*args, *kwargs.values()]
            first = tensor_sample(given) if walkable(given) else None
            if first is not None and first.shape and first.shape[0]:
                self.rec.note_batch(first.shape[0])
        self.rec.forward_depth += 1
        try:
            if isinstance(model, Layer):
                return self._guarded(lambda a, k: objects.run_layer(self, model, a, k), args, kwargs)
            forward = objects.class_member(model.cls, "forward")
            if isinstance(forward, Function):
                return self.invoke(forward, [model, *args], kwargs, model)
            if model.container is not None:
                return self._run_model(model.container, args, kwargs)
            return UNKNOWN
        finally:
            self.rec.forward_depth -= 1
            if self.rec.forward_depth == 0 and not _is_loss(model):
                self.rec.forward_passes += 1

    def attribute(self, owner: Value, name: str) -> Value:
        """``owner.name``."""
        return objects.attribute(self, owner, name)

    def item(self, owner: Value, key: Value) -> Value:
        """``owner[key]``."""
        return objects.item(self, owner, key)

    def iterate_object(self, value: Value) -> list[Value] | None:
        """Items of a module container, or of an object with ``__iter__`` or ``__getitem__``."""
        return objects.iterate(self, value)

    def enter(self, manager: Value, stack: ExitStack) -> Value:
        """Enter a ``with`` item; the stack leaves it again."""
        return self.library.enter(manager, stack)

    def set_attribute(self, owner: Value, name: str, value: Value) -> None:
        """``owner.name = value``."""
        objects.set_attribute(self, owner, name, value)

    def set_item(self, owner: Value, key: Value, value: Value) -> None:
        """``owner[key] = value``."""
        objects.set_item(owner, key, value)

    statements: ClassVar = {
        **Statements.statements, ast.Import: _import, ast.ImportFrom: _import_from,
        ast.FunctionDef: _function_def, ast.AsyncFunctionDef: _function_def, ast.ClassDef: _class_def,
    }  # fmt: skip


def _found(scope: Scope, name: str, default: Value) -> Value:
    try:
        return scope.find(name)
    except KeyError:
        return default


def _is_loss(model: Value) -> bool:
    return isinstance(model, Layer) and model.kind.endswith("Loss")


def _has_yield(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(inner, (ast.Yield, ast.YieldFrom)) for inner in ast.walk(node))


def tensor_sample(value: Value) -> Tensor | None:
    """The first tensor inside a value."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return next((t for v in value if (t := tensor_sample(v)) is not None), None)
    if isinstance(value, dict):
        return tensor_sample(list(value.values()))
    return None
