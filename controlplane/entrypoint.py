"""The file that a command starts: is it in the bundle, and does it parse?"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import grpc

from puhui.rpc.errors import Refusal

__all__ = ["LARGEST_PARSED_BYTES", "Entrypoint", "find_entrypoint", "require_parsable"]

LARGEST_PARSED_BYTES = 384 * 2**10
"""A larger file is not parsed, as the predictor does not: parsing takes 700 times its size in memory."""

_PYTHON = re.compile(r"(.*/)?(python|pypy)[0-9.]*")
_SHELL = re.compile(r"(.*/)?(ba|da|z|k)?sh")
# Options of python that take the next word as their value.
_WITH_VALUE = frozenset({"-W", "-X", "--check-hash-based-pycs"})


@dataclass(frozen=True)
class Entrypoint:
    """A file of the bundle that the command starts."""

    path: str
    python: bool


def find_entrypoint(command: Sequence[str], paths: Collection[str]) -> Entrypoint | None:
    """Returns the file that a command starts; None when it starts none of the bundle (`nvidia-smi`, `sh -c ...`).

    Args:
        command: command and arguments, run in the bundle's top directory.
        paths: normalized path of every file of the bundle.

    Raises:
        Refusal: INVALID_ARGUMENT with ENTRYPOINT_NOT_FOUND.
    """
    program, arguments = command[0], command[1:]
    if _PYTHON.fullmatch(program):
        return _of_python(arguments, paths)
    if _SHELL.fullmatch(program):
        if arguments and not arguments[0].startswith("-") and not arguments[0].startswith("/"):
            return _required(arguments[0], paths, python=False)
        return None
    if program.startswith(("./", "../")):
        return _required(program, paths, python=program.endswith(".py"))
    return None


def _of_python(arguments: Sequence[str], paths: Collection[str]) -> Entrypoint | None:
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in _WITH_VALUE:
            del rest[:1]
        elif word == "-m":
            return _of_module(rest[0], paths) if rest else None
        elif word in {"-", "-c"} or word.startswith("-c"):
            return None
        elif not word.startswith("-"):
            return _of_script(word, paths)
    return None


def _of_script(word: str, paths: Collection[str]) -> Entrypoint | None:
    if word.startswith("/"):
        return None  # a file of the image
    inside = posixpath.join(posixpath.normpath(word), "__main__.py")
    if posixpath.normpath(inside) in paths:
        return Entrypoint(posixpath.normpath(inside), python=True)
    return _required(word, paths, python=True)


def _of_module(name: str, paths: Collection[str]) -> Entrypoint | None:
    base = name.replace(".", "/")
    for path in (f"{base}.py", f"{base}/__main__.py"):
        if path in paths:
            return Entrypoint(path, python=True)
    top = name.partition(".")[0]
    if f"{top}.py" in paths or any(path.startswith(f"{top}/") for path in paths):
        raise _missing(f"{base}.py", paths)
    return None  # a module of the image, such as torch.distributed.run


def _required(word: str, paths: Collection[str], *, python: bool) -> Entrypoint:
    path = posixpath.normpath(word)
    if path not in paths:
        raise _missing(path, paths)
    return Entrypoint(path, python)


def _missing(path: str, paths: Collection[str]) -> Refusal:
    near = sorted(one for one in paths if posixpath.basename(one) == posixpath.basename(path))
    runnable = near or sorted((one for one in paths if one.endswith((".py", ".sh"))), key=lambda one: one.count("/"))
    there = f"; it has {', '.join(runnable[:5])}" if runnable else ""
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "ENTRYPOINT_NOT_FOUND",
        f"the command starts {path}, which is not in the bundle{there}; paths count from the bundle's top",
        path=path[:200],
    )


def require_parsable(path: str, source: bytes) -> None:
    """Refuses Python code that does not parse. It takes a second and 250 MiB at worst.

    Args:
        path: its path in the bundle.
        source: its content, at most LARGEST_PARSED_BYTES long.

    Raises:
        Refusal: INVALID_ARGUMENT with CODE_UNPARSABLE.
    """
    line, problem = 0, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
            ast.parse(source, path)
    except SyntaxError as error:
        line, problem = error.lineno or 0, error.msg
    except (ValueError, RecursionError, MemoryError) as error:
        problem = str(error) or "it is nested too deeply"
    if problem:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        at = f", line {line}" if line else ""
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "CODE_UNPARSABLE",
            f"{path}{at}: {problem}; this is no Python {version} code, mend it and submit again",
            path=path[:200],
            line=str(line),
        )
