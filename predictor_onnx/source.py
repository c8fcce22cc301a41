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

#: A larger file is not read: no hand-written program comes near, and parsing costs 400 times its size.
LARGEST_FILE_BYTES: Final = 384 << 10
LARGEST_TOTAL_BYTES: Final = 2 << 20
#: A configuration file that is larger is data.
LARGEST_CONFIGURATION_BYTES: Final = 64 << 10
#: Nodes of all syntax trees together; a thousand lines have about ten thousand.
_MOST_NODES: Final = 150_000
_LAUNCHERS: Final = ("torchrun", "accelerate", "deepspeed", "uv", "poetry", "nohup", "time", "env",
                     "stdbuf", "launch", "run")  # fmt: skip


@dataclass(frozen=True)
class CodeBundle:
    """What a user submitted.

    Attributes:
        files: source text (or bytes) by path relative to the bundle's root.
        sizes_bytes: size of every file of the bundle, data files included.
        digests: of the content of files that are not in ``files``, where it is known.
    """

    files: Mapping[str, str | bytes]
    sizes_bytes: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

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
    _nodes: int = 0

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
        if self._nodes > _MOST_NODES:
            self.skipped.append(f"{path} is not analysed, the program is too large")
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
        self._nodes += sum(1 for _ in ast.walk(tree))
        if self._nodes > _MOST_NODES:
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

    def imports(self, path: str) -> set[str]:
        """Top-level names of all modules that ``path`` imports, wherever in it, and its own modules in turn.

        A file that does not parse, or is beyond the limits, ends its branch.
        """
        found: set[str] = set()
        todo, seen = [path], {path}
        while todo:
            current = todo.pop()
            try:
                tree = self.tree(current)
            except CodeDoesNotParseError:
                continue
            folder = current.rpartition("/")[0]
            for name in imported(tree) if tree is not None else ():
                if not name.startswith("."):
                    found.add(name.partition(".")[0])
                inner = self.module_path(name.lstrip("."), folder)
                if inner is not None and inner not in seen:
                    seen.add(inner)
                    todo.append(inner)
        return found

    def package_path(self, folder: str) -> str | None:
        """The ``__init__.py`` of a folder of the bundle."""
        path = f"{folder}/__init__.py" if folder else "__init__.py"
        return path if path in self.bundle.files else None

    def text(self, path: str) -> str | None:
        """Text of a small file of the bundle, such as a configuration; None when it is absent or large."""
        path = str(PurePosixPath(clean_path(path)))
        content = self.bundle.files.get(path)
        if content is None or len(content) > LARGEST_CONFIGURATION_BYTES:
            return None
        return content if isinstance(content, str) else content.decode("utf-8", "replace")


def imported(tree: ast.Module) -> set[str]:
    """Every module that a file names in an import, with the dots of a relative one."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots, module = "." * node.level, node.module or ""
            found |= {f"{dots}{module}", *(f"{dots}{module}.{name.name}" for name in node.names)}
    return found


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
        if word.endswith(".sh") and clean_path(word) in bundle.files:
            text = bundle.files[clean_path(word)]
            return _in_shell(text if isinstance(text, str) else text.decode("utf-8", "replace"),
                             bundle)  # fmt: skip
    return None


def _is_shell(word: str) -> bool:
    return PurePosixPath(word).name in {"sh", "bash", "dash", "zsh"}


def clean_path(word: str) -> str:
    """A path as the bundle names it."""
    for prefix in ("/workspace/code/", "./"):
        word = word.removeprefix(prefix)
    return word


def _python_file(words: list[str], position: int, bundle: CodeBundle) -> Entrypoint | None:
    word = words[position]
    rest = tuple(words[position + 1 :])
    if clean_path(word) in bundle.files and (word.endswith(".py") or position == 0):
        text = bundle.files[clean_path(word)]
        first = (text if isinstance(text, str) else text[:200].decode("utf-8", "replace"))[:200]
        if word.endswith(".py") or "python" in first.partition("\n")[0]:
            return Entrypoint(clean_path(word), rest)
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
