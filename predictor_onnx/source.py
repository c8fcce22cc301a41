"""The submitted source files, parsed within limits and never executed."""

from __future__ import annotations

import ast
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from predictor_onnx.errors import CodeDoesNotParseError

#: A larger file is not read: no hand-written program comes near, and parsing costs 100 times its size.
LARGEST_FILE_BYTES: Final = 1 << 20
LARGEST_TOTAL_BYTES: Final = 4 << 20
_MOST_NODES: Final = 200_000
_LAUNCHERS: Final = ("torchrun", "accelerate", "deepspeed", "uv", "poetry", "nohup", "time", "env",
                     "stdbuf", "launch", "run")  # fmt: skip


@dataclass(frozen=True)
class CodeBundle:
    """What a user submitted.

    Attributes:
        files: source text (or bytes) by path relative to the bundle's root.
        sizes_bytes: size of every file of the bundle, data files included.
    """

    files: Mapping[str, str | bytes]
    sizes_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of the files that are not source code."""
        return sum(size for path, size in self.sizes_bytes.items() if not path.endswith(".py"))


@dataclass(frozen=True)
class Entrypoint:
    """The Python file that a command line runs, and the arguments that file sees."""

    path: str
    arguments: tuple[str, ...]


@dataclass
class Source:
    """Parses the files of a bundle on demand, each once, and remembers what it would not read."""

    bundle: CodeBundle
    skipped: list[str] = field(default_factory=list)
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)
    _read_bytes: int = 0

    def tree(self, path: str) -> ast.Module | None:
        """Syntax tree of ``path``; None when it is absent or beyond the limits.

        Raises:
            CodeDoesNotParseError: the file is not valid Python.
        """
        if path not in self._trees:
            self._trees[path] = self._parse(path)
        return self._trees[path]

    def _parse(self, path: str) -> ast.Module | None:
        text = self.bundle.files.get(path)
        if text is None:
            return None
        size = len(text)
        if size > LARGEST_FILE_BYTES or self._read_bytes + size > LARGEST_TOTAL_BYTES:
            self.skipped.append(f"{path} is too large to analyse ({size} bytes)")
            return None
        self._read_bytes += size
        try:
            with warnings.catch_warnings():
                # An odd escape in somebody's string is not ours to report.
                warnings.simplefilter("ignore")
                tree = ast.parse(text, filename=path)
        except SyntaxError as error:
            raise CodeDoesNotParseError(path, error.lineno or 0, error.msg) from None
        except ValueError as error:
            raise CodeDoesNotParseError(path, 0, str(error)) from None
        except (RecursionError, MemoryError):
            self.skipped.append(f"{path} is nested too deeply to analyse")
            return None
        if sum(1 for _ in ast.walk(tree)) > _MOST_NODES:
            self.skipped.append(f"{path} has too many statements to analyse")
            return None
        return tree

    def module_path(self, dotted: str, package: str = "") -> str | None:
        """File of a module inside the bundle, seen from the folder ``package``."""
        inner = dotted.replace(".", "/")
        for root in dict.fromkeys((package, "", "src")):
            stem = str(PurePosixPath(root) / inner) if root else inner
            for candidate in (f"{stem}.py", f"{stem}/__init__.py"):
                if candidate in self.bundle.files:
                    return candidate
        return None


def find_entrypoint(argv: Sequence[str], bundle: CodeBundle) -> Entrypoint | None:
    """The Python file that ``argv`` runs; None when it runs none of the bundle's.

    Understands ``python [-m] …``, ``torchrun …``, ``sh -c '…'`` and a shell script of the bundle that
    starts Python.
    """
    words = list(argv)[:1000]
    for position, word in enumerate(words):
        found = _python_file(words, position, bundle)
        if found is not None:
            return found
        if word == "-c" and position + 1 < len(words) and _is_shell(words[0]):
            return _in_shell(words[position + 1], bundle)
        if word.endswith(".sh") and _clean(word) in bundle.files:
            text = bundle.files[_clean(word)]
            return _in_shell(text if isinstance(text, str) else text.decode("utf-8", "replace"),
                             bundle)  # fmt: skip
    return None


def _is_shell(word: str) -> bool:
    return PurePosixPath(word).name in {"sh", "bash", "dash", "zsh"}


def _clean(word: str) -> str:
    for prefix in ("/workspace/code/", "./"):
        word = word.removeprefix(prefix)
    return word


def _python_file(words: list[str], position: int, bundle: CodeBundle) -> Entrypoint | None:
    word = words[position]
    rest = tuple(words[position + 1 :])
    if _clean(word) in bundle.files and (word.endswith(".py") or position == 0):
        text = bundle.files[_clean(word)]
        first = (text if isinstance(text, str) else text[:200].decode("utf-8", "replace"))[:200]
        if word.endswith(".py") or "python" in first.partition("\n")[0]:
            return Entrypoint(_clean(word), rest)
    launched = position > 0 and words[position - 1] == "-m"
    if launched:
        stem = word.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__main__.py"):
            if path in bundle.files:
                return Entrypoint(path, rest)
    return None


def _in_shell(text: str, bundle: CodeBundle) -> Entrypoint | None:
    for line in text[:LARGEST_FILE_BYTES].replace("\\\n", " ").splitlines()[:1000]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        starts = [i for i, word in enumerate(words)
                  if "python" in word or PurePosixPath(word).name in _LAUNCHERS]  # fmt: skip
        for start in starts[:1]:
            for position in range(start, len(words)):
                found = _python_file(words, position, bundle)
                if found is not None:
                    return found
    return None
