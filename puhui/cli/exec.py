"""`puhui exec`: the run instruction."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Annotated

import typer

from puhui.cli.attached import ChunkJson
from puhui.cli.connection import connect
from puhui.cli.find_job import find_job
from puhui.cli.job_options import json_lines_flag, server_option
from puhui.cli.message_json import json_of
from puhui.cli.raw_terminal import lent, size_of
from puhui.cli.spec_options import pair
from puhui.cli.split_command import SplitCommand, command_of
from puhui.cli.terminal import Mistake, UnreadError, terminal
from puhui.cli.words import readable
from puhui.client import Refusal, RunCall
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import RunJobResponse
from puhui.v1.stream_pb2 import LOG_STREAM_STDERR

__all__ = ["add_commands"]

_NOT_STARTED = 125
_NO_COMMAND = 127
_BY_SIGNAL = 128
_QUICKLY_S = 1.0
_READ_BYTES = 64 * 2**10
_CTRL_C = b"\x03"
_STDIN = 0
_EXAMPLE = "puhui exec SESSION -- python3 train.py"
_TOLD = {
    "WAITING_FOR_SLICE": "waiting",
    "RESUME_RETRIED": "waiting",
    "REQUEUED": "waiting",
    "SESSION_MOVES": "moving",
    "RESTARTS": "restarting",
    "FORWARDING": "forwarding",
    "BROUGHT_BACK": "back",
    "PEER_OUT_OF_CONTACT": "no contact",
}


def add_commands(app: typer.Typer) -> None:
    """Adds `exec`."""
    app.command("exec", cls=SplitCommand)(_exec)


def _exec(
    context: typer.Context,
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Id of a session, its beginning, or its name.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND [ARGS]", show_default=False, help="What to run.")
    ] = None,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the command this terminal.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Pass on input that is typed here, even without -t.")
    ] = False,
    env: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Environment; may be repeated.")] = None,
    workdir: Annotated[str, typer.Option("--workdir", "-w", metavar="DIR", help="Directory in the container.")] = "",
    json: Annotated[bool, json_lines_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Run a command in a session, or in a batch job's container, on a share of a GPU that is scheduled for it.

    Its input and output are this program's own, and so is its exit code; 125 when it never started, 127 when there is
    no such command. Ctrl-C goes to the command; twice within a second hangs up.
    """
    command = command_of(context, words, _EXAMPLE)
    if not session.strip():
        raise Mistake("USAGE", "give a session, as `puhui session ls` shows it")
    if not command:
        raise Mistake("USAGE", f"say what to run: {_EXAMPLE}")
    if tty and terminal().as_json:
        raise Mistake("USAGE", "--json is for scripts and -t for people; leave one of them out")
    if tty and not os.isatty(_STDIN):
        raise Mistake("USAGE", "-t needs a terminal, and the input is none; leave it out when input is piped")
    chosen = dict(pair("--env", text) for text in env or ())
    with connect(server) as centre:
        try:
            job = find_job(centre, session)
            call = centre.run(
                job.id, command, env=chosen, working_directory=workdir, terminal_size=size_of(_STDIN) if tty else None
            )
            code = _Conversation(call, tty=tty, interactive=interactive).go()
        except KeyboardInterrupt:
            terminal().note("given up; `puhui runs` shows what became of the run, if it had begun", "stopped")
            raise typer.Exit(_BY_SIGNAL + signal.SIGINT) from None
        except Mistake:
            raise
        except Refusal as refusal:
            terminal().fail(refusal)
            # As a shell says it.
            raise typer.Exit(_NO_COMMAND if refusal.reason == "COMMAND_NOT_FOUND" else _NOT_STARTED) from None
    raise typer.Exit(code)


class _Conversation:
    """A run, and the terminal or the pipes that it talks to."""

    def __init__(self, call: RunCall, *, tty: bool, interactive: bool) -> None:
        self._call = call
        self._tty = tty
        # A program may be started without any standard input.
        self._reads = sys.stdin is not None and (tty or interactive or not os.isatty(_STDIN))
        self._lent = contextlib.ExitStack()
        self._begun = False
        self._ends_with = 0
        self._interrupted_at: float | None = None
        self._as_json = ChunkJson()
        self._said = ""

    def go(self) -> int:
        """Carries the run through and returns the exit code for this program.

        Raises:
            KeyboardInterrupt: it was given up before the command had started, or while the centre could not be reached.
            Refusal: the run was refused, or the centre could not be reached for too long.
            UnreadError: nobody reads the output.
        """
        unread: UnreadError | None = None
        with self._lent, self._signals():
            for response in self._call:
                if unread is not None:
                    continue
                try:
                    self._show(response)
                except UnreadError as error:
                    unread = error
                    self._call.hang_up()
        if unread is not None:
            raise unread
        code = self._call.exit_code
        if code is None:
            return _BY_SIGNAL + (self._ends_with or signal.SIGHUP)
        # A code that no program can end with never reads as success.
        return code if 0 <= code <= 255 else max(1, min(255, _BY_SIGNAL - code)) if code < 0 else 255

    def _show(self, response: RunJobResponse) -> None:
        if self._call.started and not self._begun:
            self._begin()
        screen, part = terminal(), response.WhichOneof("part")
        if screen.as_json:
            if part == "output":
                screen.json({"log": self._as_json.of(response.output)})
            elif part == "exit_code":
                screen.json({"exit_code": response.exit_code})
            elif part is not None:
                screen.json({part: json_of(getattr(response, part))})
        elif part == "output":
            screen.write(response.output.data, to_stderr=response.output.stream == LOG_STREAM_STDERR)
        elif part == "event":
            self._tell(response.event)

    def _tell(self, event: job_pb2.JobEvent) -> None:
        label = _TOLD.get(event.reason)
        said = readable(event.message)
        if label is None or said == self._said:
            return
        self._said = said
        if self._begun and self._tty:
            # A terminal that is lent does not go back to the first column by itself.
            said = f"\r{said}\r"
        terminal().note(said, label)

    def _begin(self) -> None:
        """The command runs: it gets the terminal, and what is typed or piped."""
        self._begun = True
        if self._tty:
            self._lent.enter_context(lent(_STDIN))
            # It may have been given another size while the run waited.
            self._call.resize(*size_of(_STDIN))
        if self._reads:
            threading.Thread(target=self._read, daemon=True).start()
        else:
            self._call.end_input()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(_STDIN, _READ_BYTES)
            except BlockingIOError:
                select.select([_STDIN], [], [])  # somebody else made it so; it is not ours to change
                continue
            except OSError:
                data = b""
            if not data:
                self._call.end_input()
                return
            if self._tty and _CTRL_C in data and not self._call.connected:
                # Nobody is there who could make an interrupt of it.
                os.kill(os.getpid(), signal.SIGINT)
            if not self._call.write(data):
                return

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        handlers = {
            signal.SIGINT: self._on_interrupt,
            signal.SIGTERM: self._on_end,
            signal.SIGHUP: self._on_end,
        }
        if self._tty:
            handlers[signal.SIGWINCH] = self._on_resize
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if not (self._call.started and self._call.connected):
            self._call.hang_up()
            raise KeyboardInterrupt
        now = time.monotonic()
        if self._interrupted_at is not None and now - self._interrupted_at < _QUICKLY_S:
            self._ends_with = number
            self._call.hang_up()
        else:
            self._call.send_signal(number)
        self._interrupted_at = now

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        # Asked once, the command is asked; asked again, or with nobody left to see it, the line is cut.
        if number == signal.SIGHUP or self._ends_with or not (self._call.started and self._call.connected):
            self._ends_with = number
            self._call.hang_up()
            if not (self._call.started and self._call.connected):
                raise typer.Exit(_BY_SIGNAL + number)
        else:
            self._ends_with = number
            self._call.send_signal(number)

    def _on_resize(self, number: int, frame: FrameType | None) -> None:
        self._call.resize(*size_of(_STDIN))
