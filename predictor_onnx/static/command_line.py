"""Command-line arguments as argparse, click and typer would see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from predictor_onnx.static.values import UNKNOWN, External, Function, Native, Record, Value

#: More options than any program declares.
_MOST_OPTIONS = 500
_KINDS = {"int": int, "float": float, "str": str}


def convert(text: str, kind: Value) -> Value:
    """``text`` as the type ``kind`` (a builtin, its name, or anything else: unknown)."""
    name = getattr(kind, "path", kind)
    if name is None or name == "str":
        return text
    target = _KINDS.get(name) if isinstance(name, str) else None
    if target is None:
        return _guess(text)
    try:
        return target(text)
    except ValueError:
        return UNKNOWN


def _guess(text: str) -> Value:
    """A value given as text whose type is not known."""
    if text.lower() in {"true", "yes", "on"}:
        return True
    if text.lower() in {"false", "no", "off"}:
        return False
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass
class Option:
    """One declared argument."""

    flags: tuple[str, ...]
    dest: str
    default: Value = None
    kind: Value = None
    #: Value stored by a flag without argument; UNKNOWN when the flag takes one.
    constant: Value = UNKNOWN
    many: bool = False

    def matches(self, flag: str) -> bool:
        """Whether ``flag`` (or an unambiguous beginning of it) is this option."""
        return flag in self.flags


@dataclass(eq=False)
class Parser:
    """An ``argparse.ArgumentParser``."""

    options: list[Option] = field(default_factory=list)
    defaults: dict[str, Value] = field(default_factory=dict)

    def add_argument(self, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Declare one argument, with argparse's own rules for its name and default."""
        flags = tuple(arg for arg in args if isinstance(arg, str))
        if not flags:
            return UNKNOWN
        named = [flag for flag in flags if flag.startswith("-")]
        longest = next((flag for flag in flags if flag.startswith("--")), flags[0])
        dest = kwargs.get("dest")
        if not isinstance(dest, str):
            dest = longest.lstrip("-").replace("-", "_")
        action = kwargs.get("action", "store")
        if isinstance(action, External) and action.path.endswith("BooleanOptionalAction"):
            action = "store_true"
            named += [f"--no-{longest.lstrip('-')}"]
        default = kwargs.get("default")
        constant: Value = UNKNOWN
        if action in {"store_true", "store_false"}:
            constant = action == "store_true"
            default = kwargs.get("default", not constant)
        many = kwargs.get("nargs") in {"+", "*"} or isinstance(kwargs.get("nargs"), int)
        kind = kwargs.get("type")
        kind = kind if kind is None or isinstance(kind, External) else UNKNOWN
        if isinstance(default, str) and kind is not None:
            default = convert(default, kind)
        if len(self.options) >= _MOST_OPTIONS:
            return UNKNOWN
        self.options.append(Option(tuple(named), dest, default, kind, constant, many))
        return UNKNOWN

    def parse(self, words: Sequence[str]) -> Record:
        """The namespace that ``parse_args`` gives for these words."""
        values = {option.dest: option.default for option in self.options} | self.defaults
        values.update(read(self.options, words))
        return Record("Namespace", values)


def read(options: Sequence[Option], words: Sequence[str]) -> dict[str, Value]:
    """Values that the command line gives to declared options; unknown words are left alone."""
    values: dict[str, Value] = {}
    positional = [option for option in options if not option.flags]
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        flag, equals, inline = word.partition("=")
        option = next((o for o in options if o.matches(flag)), None)
        if option is None and flag.startswith("--") and len(flag) > 3:
            close = [o for o in options if any(f.startswith(flag) for f in o.flags)]
            option = close[0] if len(close) == 1 else None
        if option is None:
            if not word.startswith("-") and positional:
                target = positional.pop(0)
                values[target.dest] = convert(word, target.kind)
            continue
        if option.constant is not UNKNOWN and not equals:
            values[option.dest] = not option.constant if flag.startswith("--no-") else option.constant
        elif equals:
            values[option.dest] = convert(inline, option.kind)
        elif option.many:
            taken = []
            while at < len(words) and not words[at].startswith("--"):
                taken.append(convert(words[at], option.kind))
                at += 1
            values[option.dest] = taken
        elif at < len(words):
            values[option.dest] = convert(words[at], option.kind)
            at += 1
    return values


def command_options(function: Function, annotations: dict[str, Value],
                    defaults: dict[str, Value]) -> list[Option]:  # fmt: skip
    """Options that click or typer derives from a command's decorators and parameters."""
    options = []
    for name, default in defaults.items():
        declared = function.options.get(name)
        flags: tuple[str, ...] = (f"--{name.replace('_', '-')}", f"--{name}")
        if isinstance(declared, Option):
            options.append(declared)
            continue
        if isinstance(default, Option):
            flags = default.flags or flags
            default = default.default
        kind = annotations.get(name)
        kind = kind if isinstance(kind, External) else UNKNOWN
        constant = True if isinstance(default, bool) else UNKNOWN
        if isinstance(default, bool):
            flags += (f"--no-{name.replace('_', '-')}",)
        options.append(Option(flags, name, default, kind, constant))
    return options


def parser_method(parser: Parser, name: str, words: Sequence[str]) -> Value:
    """A method of ``ArgumentParser``."""

    def parse(args: list[Value], kwargs: dict[str, Value]) -> Value:
        given = args[0] if args else kwargs.get("args")
        if isinstance(given, list) and all(isinstance(word, str) for word in given):
            return parser.parse(given)
        return parser.parse(words)

    def set_defaults(args: list[Value], kwargs: dict[str, Value]) -> Value:
        parser.defaults.update(kwargs)
        return None

    methods = {
        "add_argument": parser.add_argument,
        "parse_args": parse,
        "parse_known_args": lambda args, kwargs: (parse(args, kwargs), []),
        "set_defaults": set_defaults,
        "add_argument_group": lambda args, kwargs: parser,
        "add_mutually_exclusive_group": lambda args, kwargs: parser,
    }
    return Native(name, methods[name]) if name in methods else UNKNOWN


def typer_option(args: list[Value], kwargs: dict[str, Value]) -> Value:
    """``typer.Option`` and ``typer.Argument``."""
    flags = tuple(arg for arg in args if isinstance(arg, str) and arg.startswith("-"))
    first = args[0] if args and not flags else None
    default = kwargs.get("default", first if first is not None else (args[0] if args else None))
    default = UNKNOWN if default is Ellipsis else default
    dest = flags[0].lstrip("-").replace("-", "_") if flags else ""
    return Option(flags, dest, default)


def click_option(args: list[Value], kwargs: dict[str, Value]) -> Value:
    """``click.option`` and ``click.argument``."""
    parser = Parser()
    kind = kwargs.get("type")
    if kind is None and isinstance(kwargs.get("default"), (int, float)):
        kind = External(type(kwargs["default"]).__name__)
    if kwargs.get("is_flag") is True:
        kwargs = {**kwargs, "action": "store_true"}
    parser.add_argument(args, {**kwargs, "type": kind})
    option = parser.options[0]
    plain = [a for a in args if isinstance(a, str) and not a.startswith("-")]
    option.dest = plain[0] if plain and option.flags else option.dest
    return Record("option", {"option": option})
