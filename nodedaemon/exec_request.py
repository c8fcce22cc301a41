"""What a request to run a command in a living container says, checked. Pure."""

from __future__ import annotations

import posixpath
import signal

import grpc

from nodedaemon.commands import command_problem, env_problem
from puhui.rpc.errors import Refusal
from puhui.v1.node_service_pb2 import ExecRequest, ExecStart, ExecTerminalSize

__all__ = ["MOST_INPUT_BYTES", "first_start", "identity", "require_sound_input", "require_sound_start"]

MOST_INPUT_BYTES = 2**20
"""Most bytes of standard input in one message."""

_MOST_CHARACTERS = 1000


def first_start(request: ExecRequest | None) -> ExecStart:
    """Returns the start, which must come first.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID.
    """
    if request is None or request.WhichOneof("part") != "start":
        raise _invalid("start", "must be the first message, and say what to run")
    return request.start


def identity(start: ExecStart) -> ExecStart:
    """Returns what must be the same when a start is repeated: the rest says how the caller wants to be served."""
    same = ExecStart()
    same.CopyFrom(start)
    same.ClearField("output_offset")
    same.ClearField("terminal_size")
    return same


def require_sound_start(start: ExecStart) -> None:
    """Refuses a start that no container could carry out.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID, naming the field.
    """
    for field, problem in (("command", command_problem(start.command)), ("env", env_problem(start.env))):
        if problem:
            raise _invalid(field, problem)
    directory = start.working_directory
    if directory and (not posixpath.isabs(directory) or "\0" in directory):
        raise _invalid("working_directory", "must be an absolute path in the container, without a NUL character")
    if start.HasField("terminal_size"):
        _require_terminal(start.terminal_size, tty=start.tty)


def require_sound_input(request: ExecRequest, *, tty: bool) -> str:
    """Refuses what cannot follow a start.

    Returns:
        Which part the request has.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID, naming the field.
    """
    part = request.WhichOneof("part")
    if part is None:
        raise _invalid("part", "must be set: each message after the start has one part")
    if part == "start":
        raise _invalid("start", "came twice; another command needs another call")
    if part == "stdin" and len(request.stdin) > MOST_INPUT_BYTES:
        raise _invalid("stdin", f"has {len(request.stdin)} bytes; send at most {MOST_INPUT_BYTES} in one message")
    if part == "signal" and request.signal not in set(signal.Signals):
        raise _invalid("signal", f"{request.signal} is none; send a number such as {int(signal.SIGINT)} (SIGINT)")
    if part == "terminal_size":
        _require_terminal(request.terminal_size, tty=tty)
    return part


def _require_terminal(size: ExecTerminalSize, *, tty: bool) -> None:
    if not tty:
        raise _invalid("terminal_size", "is given, but the command has no terminal; ask for one with tty")
    if not (0 < size.columns <= _MOST_CHARACTERS and 0 < size.rows <= _MOST_CHARACTERS):
        raise _invalid("terminal_size", f"must be 1 to {_MOST_CHARACTERS} characters wide and high")


def _invalid(field: str, problem: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"{field} {problem}", field=field)
