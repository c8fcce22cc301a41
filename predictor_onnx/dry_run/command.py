"""Which Python program a command line runs, and with which arguments."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

#: Options of ``python`` that take a value of their own.
_WITH_VALUE: Final = ("-X", "-W")
_SHELLS: Final = ("sh", "bash")
_LAUNCHERS: Final = ("torchrun", "accelerate")
#: A launcher's options that stand alone; all others have a value, after "=" or in the next word.
_ALONE: Final = frozenset({"--standalone", "--no-python", "--no_python", "--multi_gpu", "--multi-gpu", "--cpu"})


class NotPythonError(ValueError):
    """The command runs no Python program that can be told from it."""


@dataclass(frozen=True)
class Program:
    """A Python program.

    Attributes:
        path: the script; empty for a module.
        module: its dotted name; empty for a script.
        arguments: what follows.
    """

    path: str = ""
    module: str = ""
    arguments: tuple[str, ...] = ()


def program_of(command: Sequence[str]) -> Program:
    """The program that a command runs.

    Raises:
        NotPythonError: there is none, or which one is decided by a shell.
    """
    words = list(command)
    while words:
        name = PurePosixPath(words[0]).name
        if name in _SHELLS and len(words) == 3 and words[1] in ("-c", "-lc"):
            words = _of_shell(words[2])
        elif name == "env" or ("=" in words[0] and "/" not in words[0].partition("=")[0]):
            words = words[1:]
        elif name.startswith("python"):
            return _of_python(words[1:])
        elif name in _LAUNCHERS:
            return _of_launcher(words[1:])
        elif name.endswith(".py"):
            return Program(path=words[0], arguments=tuple(words[1:]))
        else:
            break
    raise NotPythonError("the command runs no Python program")


def _of_shell(line: str) -> list[str]:
    words = shlex.split(line)
    if any(sign in line for sign in (";", "|", "&", "$", "`", "<", ">", "\n")):
        raise NotPythonError("a shell decides what the command runs")
    return words[1:] if words[:1] == ["exec"] else words


def _of_python(words: list[str]) -> Program:
    while words and words[0].startswith("-") and words[0] != "-":
        if words[0] == "-m" and len(words) > 1:
            if words[1] in ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"):
                return _of_launcher(words[2:])
            return Program(module=words[1], arguments=tuple(words[2:]))
        if words[0] == "-c":
            break
        words = words[2:] if words[0] in _WITH_VALUE else words[1:]
    if not words or words[0].startswith("-"):
        raise NotPythonError("the command runs no Python file and no module")
    return Program(path=words[0], arguments=tuple(words[1:]))


def _of_launcher(words: list[str]) -> Program:
    words = words[1:] if words[:1] == ["launch"] else words
    while words and words[0].startswith("-"):
        if words[0] in ("-m", "--module") and len(words) > 1:
            return Program(module=words[1], arguments=tuple(words[2:]))
        words = words[1:] if "=" in words[0] or words[0] in _ALONE else words[2:]
    if not words:
        raise NotPythonError("the command starts nothing")
    return Program(path=words[0], arguments=tuple(words[1:]))
