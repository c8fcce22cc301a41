"""Where output goes: answers to stdout, everything else to stderr; colour on terminals only."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import grpc
from google.protobuf.message import Message
from rich.console import Console, ConsoleDimensions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from puhui.cli.message_json import json_of
from puhui.rpc.errors import Refusal

__all__ = ["LABEL_WIDTH", "Mistake", "Terminal", "UnreadError", "table", "terminal"]

_PLAIN_WIDTH = 80
_MOST_WIDTH = 10_000
_FOLDED_WIDTH = 8
"""Columns whose cells may be folded are not narrower, if they hold as much."""
LABEL_WIDTH = 10
"""Width of the column of labels, in characters."""


class Mistake(Refusal):
    """What the user wrote cannot be meant. Ends the program with code 2."""

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
        self.metadata = metadata


class UnreadError(Exception):
    """Whoever read our stdout has gone, `head` say."""


class Terminal:
    """The standard streams of this program.

    Attributes:
        as_json: answers and errors are JSON.
        out: console on stdout.
        err: console on stderr.
    """

    def __init__(self) -> None:
        self.as_json = False
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self._lock = threading.Lock()

    @property
    def cuts(self) -> bool:
        """Whether lines have to fit into a width: a terminal's, or the one that COLUMNS names."""
        return self.out.is_terminal or bool(_named_width())

    def show(self, answer: RenderableType, least_width: int = 0) -> None:
        """Writes an answer for people.

        Tables are written whole where nobody has said how wide they may be, into a file or a pipe. Elsewhere too they
        get wider than that rather than lose a part of a cell that has to stay in its line: half a number is another.

        Args:
            answer: what is written.
            least_width: columns that it takes at least, also where the terminal has fewer and folds its lines.
        """
        if not self.cuts and not (isinstance(answer, Table) and not answer.show_header):
            least_width = max(least_width, _whole_width(answer))
        if isinstance(answer, Table):
            least_width = max(least_width, _least_width(answer))
        size = self.out.size
        if least_width > size.width:
            # A width alone does not count where TERM is dumb.
            self.out.size = ConsoleDimensions(least_width, size.height)
        try:
            self._show(answer)
        finally:
            if least_width > size.width:
                self.out.size = size

    def _show(self, answer: RenderableType) -> None:
        if self.out.is_terminal:
            self.out.print(answer)
            return
        # rich fills every line of a table with blanks, which nobody wants in a file.
        with self.out.capture() as captured:
            self.out.print(answer)
        self.text("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))

    def text(self, text: str) -> None:
        """Writes an answer as it is."""
        with self._lock, _unread():
            sys.stdout.write(text)
            sys.stdout.flush()

    def json(self, answer: Message | Mapping[str, Any] | list[Any]) -> None:
        """Writes an answer for scripts: one JSON document in one line."""
        document = json_of(answer) if isinstance(answer, Message) else answer
        self.text(json.dumps(document, ensure_ascii=False) + "\n")

    def note(self, text: str, label: str = "") -> None:
        """Writes a remark that is not part of the answer, to stderr."""
        with self._lock:
            if label:
                self.err.print(f"{label:<{LABEL_WIDTH}} ", style="bold cyan", end="")
            self.err.print(text, soft_wrap=True)

    def write(self, data: bytes, *, to_stderr: bool) -> None:
        """Writes output of a job, byte for byte."""
        stream = sys.stderr if to_stderr else sys.stdout
        with self._lock, _unread():
            stream.flush()
            stream.buffer.write(data)
            stream.buffer.flush()

    def fail(self, refusal: Refusal) -> None:
        """Writes why the program ends, to stderr."""
        if self.as_json:
            error = {
                "code": refusal.code.name,
                "reason": refusal.reason,
                "message": refusal.message,
                "metadata": dict(refusal.metadata),
            }
            sys.stderr.write(json.dumps({"error": error}, ensure_ascii=False) + "\n")
            return
        message = " ".join(refusal.message.split())
        self.err.print("error: ", style="bold red", end="")
        self.err.print(f"{message} ({refusal.reason})", soft_wrap=True)


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        # Python must not find out again when it ends and flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UnreadError from error


def _console(stream: TextIO) -> Console:
    # rich alone would colour a pipe when CI variables ask for it, and keep bold under NO_COLOR.
    on_terminal = stream.isatty()
    coloured = on_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")
    return Console(
        file=stream,
        force_terminal=on_terminal,
        color_system="auto" if coloured else None,
        no_color=not coloured,
        width=_named_width() or (None if on_terminal else _PLAIN_WIDTH),
        highlight=False,
        markup=False,
        emoji=False,
    )


def _named_width() -> int | None:
    named = os.environ.get("COLUMNS", "")
    plain = named.isascii() and named.isdigit() and len(named) <= len(str(_MOST_WIDTH))
    return int(named) or None if plain else None


def _whole_width(answer: RenderableType) -> int:
    """Returns how wide a table is of which nothing is cut; 0 of prose, which is folded everywhere."""
    if isinstance(answer, str | Text):
        return 0
    return Measurement.get(Console(width=_MOST_WIDTH), Console(width=_MOST_WIDTH).options, answer).maximum


def _least_width(shown: Table) -> int:
    """Returns how wide a table is at least when of what stays in its line nothing is cut but what may be."""
    console = Console(width=_MOST_WIDTH)
    total = 2 * (len(shown.columns) - 1)
    for column in shown.columns:
        cells = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
        longest = max(cell.maximum for cell in cells)
        total += min(longest, (column.max_width or longest) if column.no_wrap else _FOLDED_WIDTH)
    return total


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Returns an empty table in the style of all of them.

    Args:
        columns: their headings.
        right: those of them that hold numbers.
    """
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


@functools.cache
def terminal() -> Terminal:
    """Returns the terminal of this program."""
    return Terminal()
