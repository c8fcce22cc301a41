"""The user's terminal, lent to a command somewhere else."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator

__all__ = ["lent", "size_of"]

_USUAL_SIZE = (80, 24)


def size_of(descriptor: int) -> tuple[int, int]:
    """Returns columns and rows of a terminal; the usual ones where it does not say."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return _USUAL_SIZE
    return (size.columns, size.lines) if size.columns and size.lines else _USUAL_SIZE


@contextlib.contextmanager
def lent(descriptor: int) -> Iterator[None]:
    """Passes every key on as it is while the block runs; then the terminal is as it was before."""
    before = termios.tcgetattr(descriptor)
    try:
        # What was typed ahead is kept.
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(descriptor, termios.TCSANOW, before)
