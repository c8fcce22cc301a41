"""The same code, asked to do the same: a name by which what earlier runs needed is found again.

What counts: every Python file of the bundle without comments, layout and docstrings (with them, where it reads its
``__doc__``); every other file up to 1 MiB as it is, but for the ends of its lines if it is a small text; the words of
the command; its environment; the size of its data, in powers of two; the image.

What does not: prose (``README.md``), paths that are plainly those of outputs (``--output-dir runs/7``; a number is no
path), how the
interpreter is called (``python3.11``, ``/usr/bin/python3``, ``-u``) and whether a value follows its option after a
space or ``=``. The order of options counts: which of them may change places only the program knows.

The name does not depend on the version of Python that makes it, as far as the syntax tree does not. Known exceptions:
an f-string beside a literal is one piece since 3.12, and code in newer syntax does not parse on an older version and
then counts byte by byte, as do files that the predictor does not read because they are too large.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final, Protocol

from predictor_onnx.errors import CodeDoesNotParseError
from predictor_onnx.source import LARGEST_CONFIGURATION_BYTES, CodeBundle, Source, clean_path

_VERSION: Final = "1"
_PROSE: Final = frozenset({".md", ".rst"})
_PYTHON: Final = re.compile(r"python(\d+(\.\d+)*)?")
#: Of the interpreter's own flags, those that change nothing in memory.
_QUIET_FLAGS: Final = frozenset({"-u", "-B", "-q", "-s", "-E", "-I"})
#: Options whose value is where something is written, and nothing else.
_OUTPUTS: Final = frozenset(
    f"--{what}-{where}"
    for what in ("output", "out", "save", "log", "logging", "result", "results", "tensorboard")
    for where in ("dir", "directory", "path", "folder")
) | frozenset(("--output", "--outdir", "--savedir", "--logdir", "--log-file", "--run-name", "--run-id"))
#: Where the tree says how it was written down, and not what it does.
_LAYOUT: Final = frozenset({"kind", "ctx", "type_comment", "type_ignores"})


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def fingerprint(
    code: CodeBundle, argv: Sequence[str], environment: Mapping[str, str], image: str, input_bytes: int = 0
) -> str:
    """Name code and what it is asked to do.

    Args:
        code: the bundle; of files that are neither in ``files`` nor in ``digests``, the size counts as data.
        argv: the command line.
        environment: what is set for the command.
        image: digest or name of the container image.
        input_bytes: size of the data that is read beside the bundle, in bytes.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    data_bytes = input_bytes + sum(
        size
        for path, size in code.sizes_bytes.items()
        if path not in code.files and path not in code.digests and not _is_about(path)
    )
    for part in (_VERSION, image, str(data_bytes.bit_length())):
        _add(digest, part)
    words = _words(argv)
    _add(digest, str(len(words)), *words)
    _add(digest, str(len(environment)))
    for name, value in sorted(environment.items()):
        _add(digest, name, value)
    source = Source(code)
    for path in sorted(code.files):
        if not _is_about(path):
            _add(digest, path)
            _add_file(digest, source, path)
    for path, content in sorted(code.digests.items()):
        if not _is_about(path):
            _add(digest, path, "digest", content)
    return digest.hexdigest()


def _is_about(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in _PROSE


def _add(digest: _Digest, *parts: str) -> None:
    """Adds texts, each with its length, so that no two lists of them add up to the same."""
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)


def _add_file(digest: _Digest, source: Source, path: str) -> None:
    tree = None
    if path.endswith(".py"):
        try:
            tree = source.tree(path)
        except CodeDoesNotParseError:
            tree = None
    if tree is not None:
        # No token holds the end of a line: texts are written with escapes.
        _add(digest, "python", "\n".join(_tokens(tree)))
        if _reads_its_docstring(tree):
            _add(digest, ast.get_docstring(tree, clean=False) or "")
        return
    content = source.bundle.files[path]
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(content) <= LARGEST_CONFIGURATION_BYTES:
        lines = content.replace(b"\r\n", b"\n").split(b"\n")
        content = b"\n".join(line.rstrip() for line in lines).strip(b"\n")
    _add(digest, "bytes", hashlib.sha256(content).hexdigest())


def _tokens(tree: ast.Module) -> Iterator[str]:
    """Yields a tree as text: what is absent or empty is left out, so that fields of newer versions change nothing.

    Without recursion: code may be nested deeper than Python's stack.
    """
    todo: list[object] = [tree]
    while todo:
        item = todo.pop()
        if isinstance(item, _End):
            yield ")"
        elif isinstance(item, ast.AST):
            yield f"({type(item).__name__}"
            todo.append(_End())
            fields = [(name, _without_prose(item, value)) for name, value in ast.iter_fields(item)]
            for name, value in reversed(fields):
                if name not in _LAYOUT and value is not None and value != []:
                    todo += [value, _Field(name)]
        elif isinstance(item, list):
            yield f"[{len(item)}"
            todo += reversed(item)
        elif isinstance(item, _Field):
            yield item.name
        else:
            # Decimal digits of a long integer may not be written.
            yield f"{type(item).__name__} {hex(item) if type(item) is int else repr(item)}"


def _reads_its_docstring(tree: ast.Module) -> bool:
    """Whether the module's docstring is more than prose: programs take their options out of it."""
    return any(
        (isinstance(node, ast.Name) and node.id == "__doc__")
        or (isinstance(node, ast.Attribute) and node.attr == "__doc__")
        for node in ast.walk(tree)
    )


class _End:
    """Where a node ends."""


class _Field:
    """Which field of a node comes next."""

    def __init__(self, name: str) -> None:
        self.name = name


def _without_prose(node: ast.AST, value: object) -> object:
    """Drops docstrings and other strings that stand alone, and the ``pass`` that may stand in their place."""
    if not isinstance(value, list) or not value or not isinstance(value[0], ast.stmt):
        return value
    kept = [one for one in value if not isinstance(one, ast.Pass) and not _is_prose(one)]
    return kept or ([ast.Pass()] if not isinstance(node, ast.Module) else None)


def _is_prose(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _words(argv: Sequence[str]) -> list[str]:
    """Returns the words of a command that say what is done."""
    if not argv:
        return []
    interpreter = _PYTHON.fullmatch(PurePosixPath(argv[0]).name) is not None
    kept = ["python" if interpreter else clean_path(argv[0])]
    rest = list(argv[1:])
    while interpreter and rest and rest[0] in _QUIET_FLAGS:
        del rest[0]
    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        word = words.pop(0)
        is_switch = not words or words[0].startswith("-")
        if word.lower().replace("_", "-") in _OUTPUTS and not is_switch and not _is_number(words[0]):
            del words[0]
        else:
            kept.append(clean_path(word))
    return kept
