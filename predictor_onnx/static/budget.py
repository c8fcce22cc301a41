"""How much work one reading of a program may cost, whatever the program does."""

from __future__ import annotations

import time
from typing import Final

#: Steps that one reading may take; a real training program needs a few thousand.
MOST_STEPS: Final = 250_000
#: Seconds of processor time, for whatever the steps do not measure well.
MOST_SECONDS: Final = 1.0
_STEPS_BETWEEN_LOOKS: Final = 256


class BudgetExceeded(Exception):  # noqa: N818 - it ends the evaluation, it is no fault
    """The evaluation has taken as many steps, or as much time, as it may."""


class Budget:
    """Counts steps; everything whose cost depends on the program spends from it."""

    def __init__(self, steps: int = MOST_STEPS, seconds: float = MOST_SECONDS) -> None:
        self._left = steps
        self._seconds = seconds
        self._start = time.thread_time()
        self._next_look = steps - _STEPS_BETWEEN_LOOKS

    def spend(self, steps: int = 1) -> None:
        """Take ``steps``.

        Raises:
            BudgetExceeded: nothing is left.
        """
        self._left -= steps
        if self._left > self._next_look:
            return
        self._next_look = self._left - _STEPS_BETWEEN_LOOKS
        if self._left < 0 or time.thread_time() - self._start > self._seconds:
            raise BudgetExceeded

    def renew(self, share: float) -> None:
        """Give back ``share`` of a whole budget, for a second, shorter reading."""
        self._left = max(self._left, round(MOST_STEPS * share))
        self._next_look = self._left - _STEPS_BETWEEN_LOOKS
        self._seconds += MOST_SECONDS * share
