"""An allowance that is used up, and grows again with time. Pure but for the clock that it is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

__all__ = ["Allowance", "DailyAllowance"]

_SLOT_S = 3600.0
_SLOTS = 24


class Allowance:
    """So much at once, and so much a second (a token bucket).

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._used = 0.0
        self._at = clock()

    def take(self, rate: float, most: float) -> float:
        """Takes one away; returns 0, or for how many seconds there is none.

        Args:
            rate: how many come back a second. It may be another one each time.
            most: how many may be taken at once.
        """
        at = self._clock()
        self._used = max(0.0, self._used - (at - self._at) * rate)
        self._at = at
        if self._used + 1 > most:
            return (self._used + 1 - most) / rate
        self._used += 1
        return 0.0


class DailyAllowance:
    """So much within any 24 h, counted by hours: what was taken comes back at most an hour late, and never early.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slots: deque[tuple[int, int]] = deque()
        """(hour, count), the newest last."""
        self._sum = 0

    def take(self, count: int, most: int) -> float:
        """Takes something away; returns 0, or for how many seconds there is not enough.

        Args:
            count: how much.
            most: how much there is in 24 h. It may be another one each time.
        """
        at = self._clock()
        hour = int(at // _SLOT_S)
        while self._slots and self._slots[0][0] < hour - _SLOTS:
            self._sum -= self._slots.popleft()[1]
        if self._sum + count > most:
            return self._wait_s(at, self._sum + count - most)
        if self._slots and self._slots[-1][0] == hour:
            count_before = self._slots.pop()[1]
            self._slots.append((hour, count_before + count))
        else:
            self._slots.append((hour, count))
        self._sum += count
        return 0.0

    def _wait_s(self, at: float, missing: int) -> float:
        for hour, count in self._slots:
            missing -= count
            if missing <= 0:
                return (hour + _SLOTS + 1) * _SLOT_S - at
        return _SLOTS * _SLOT_S  # more than there ever is
