"""SIGINT, SIGTERM and SIGHUP, of which none strikes in the midst of what must be done wholly."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Turns the signals that ask this process to stop into KeyboardInterrupt, from its making on."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._strike)

    def _strike(self, number: int, frame: Any) -> None:
        if self._held:
            self._waiting = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lets a signal wait until the block has ended.

        Raises:
            KeyboardInterrupt: at the end of the block, when a signal came meanwhile.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt
