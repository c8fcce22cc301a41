"""Configuration files of the bundle, as the submitted code reads them: JSON, YAML and TOML, by path or open file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import yaml

from predictor_onnx.static.arithmetic import small, walkable
from predictor_onnx.static.values import UNKNOWN, Native, Record, Value

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator


def _yaml(text: str) -> Any:
    if "<<" in text:
        raise ValueError("merge keys can grow without bound")
    return yaml.safe_load(text)


_PARSERS: Final[dict[str, Callable[[str], Any]]] = {
    "json.load": json.loads, "json.loads": json.loads, "tomllib.load": tomllib.loads, "tomllib.loads": tomllib.loads,
    "toml.load": tomllib.loads, "toml.loads": tomllib.loads,
    **{f"yaml.{name}": _yaml for name in ("safe_load", "load", "full_load", "unsafe_load")},
}  # fmt: skip
CALLS: Final = frozenset([*_PARSERS, "open", "pathlib.Path", "OmegaConf.load", "omegaconf.OmegaConf.load",
                          "os.path.join", "os.path.dirname", "os.path.abspath"])  # fmt: skip


def path_of(value: Value) -> str | None:
    """The path that a string, a ``Path`` or an open file stands for."""
    if isinstance(value, Record) and value.kind in {"path", "file"}:
        value = value.attrs["path"]
    return value if isinstance(value, str) else None


def _text(ev: Evaluator, value: Value) -> str | None:
    path = path_of(value)
    if path is None or len(path) > 1000:
        return None
    return ev.source.text(path)


def _known(value: Any) -> Value:
    """What a parser gave, anything but plain values made unknown."""
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items() if isinstance(key, (str, int))}
    if isinstance(value, list):
        return [_known(item) for item in value]
    plain = value is None or isinstance(value, (str, int, float))
    return value if plain and small(value) else UNKNOWN


def parse(ev: Evaluator, parser: str, text: str | None) -> Value:
    """The values in ``text``; UNKNOWN when it is absent, damaged or too deeply nested."""
    if text is None:
        return UNKNOWN
    ev.budget.spend(len(text))
    try:
        found = _PARSERS[parser](text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return UNKNOWN
    return _noted(ev, _known(found)) if walkable(found) else UNKNOWN


def _noted(ev: Evaluator, value: Value) -> Value:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                ev.hints.note(str(key), inner)
            todo += item.values()
    return value


def namespace(value: Value) -> Value:
    """A configuration whose items are attributes as well, as OmegaConf and hydra give it."""
    if isinstance(value, dict):
        return Record("namespace", {str(key): namespace(item) for key, item in value.items()})
    return [namespace(item) for item in value] if isinstance(value, list) else value


def configuration(ev: Evaluator, path: str) -> Value:
    """A YAML file as a namespace."""
    return namespace(parse(ev, "yaml.safe_load", _text(ev, path)))


def call(ev: Evaluator, path: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """One of ``CALLS``."""
    first = args[0] if args else kwargs.get("file", UNKNOWN)
    if path in _PARSERS:
        given = first if path.endswith("loads") or isinstance(first, str) else _text(ev, first)
        return parse(ev, path, given if isinstance(given, str) else None)
    if path == "open":
        return Record("file", {"path": path_of(first)})
    if path.endswith("OmegaConf.load"):
        name = path_of(first)
        return UNKNOWN if name is None else configuration(ev, name)
    if path == "os.path.abspath":
        return first
    if path == "os.path.dirname":
        return first.rpartition("/")[0] if isinstance(first, str) else UNKNOWN
    parts = [path_of(arg) for arg in args]
    joined = "/".join(part for part in parts if part) if None not in parts else UNKNOWN
    return Record("path", {"path": joined}) if path == "pathlib.Path" else joined


def attribute(ev: Evaluator, owner: Record, name: str) -> Value:
    """An attribute or method of an open file or a ``Path``."""
    methods: dict[str, Callable[[list[Value], dict[str, Value]], Value]] = {
        "read": lambda args, kwargs: _or_unknown(_text(ev, owner)),
        "read_text": lambda args, kwargs: _or_unknown(_text(ev, owner)),
        "open": lambda args, kwargs: Record("file", dict(owner.attrs)),
        "resolve": lambda args, kwargs: owner, "absolute": lambda args, kwargs: owner,
        "joinpath": lambda args, kwargs: join(owner, *args),
    }  # fmt: skip
    if name == "parent":
        return Record("path", {"path": str(owner.attrs["path"]).rpartition("/")[0]})
    return Native(name, methods[name]) if name in methods else UNKNOWN


def join(*parts: Value) -> Value:
    """``Path(a) / b``."""
    names = [path_of(part) for part in parts]
    if None in names:
        return UNKNOWN
    return Record("path", {"path": "/".join(name for name in names if name)})


def _or_unknown(text: str | None) -> Value:
    return UNKNOWN if text is None else text
