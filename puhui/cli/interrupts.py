"""SIGINT, SIGTERM and SIGHUP, of which none strikes in the midst of what must be done wholly, and none is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """The signals that ask this process to stop. As soon as they are `caught`, each raises KeyboardInterrupt.

    Only the main thread raises, and the kernel may give a signal to any other, gRPC's say: then the main thread sleeps
    on. And Python ignores what is raised while it takes an object down. So a signal is remembered, too, and whoever
    waits for something waits for `fileno()` as well.
    """

    def __init__(self) -> None:
        self._held = False
        self._come, self._tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def catch(self) -> None:
        """Begins to catch them, in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._strike)
        signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Returns a descriptor that becomes readable when a signal has come; `check` raises then."""
        return self._come

    def check(self) -> None:
        """Raises for a signal that has come, if that has not been done.

        Raises:
            KeyboardInterrupt: one has.
        """
        with contextlib.suppress(BlockingIOError):
            os.read(self._come, 4096)
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
        self.check()

    def _strike(self, number: int, frame: Any) -> None:
        if not self._held:
            raise KeyboardInterrupt
