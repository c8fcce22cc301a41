"""When a daemon that ended is started again."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_FAILURES", "Restarts"]

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
WELL_AFTER_S = 60.0
"""A daemon that was ready for so long is well; what came before counts no more."""
MOST_FAILURES = 5


@dataclass
class Restarts:
    """How often one daemon has ended, and how long it is left alone before the next start.

    Times are of one clock that only grows, in seconds.
    """

    failures: int = 0
    """Starts since it was ready last, none of which made it ready."""
    was_ready: bool = False
    _pause_s: float = 0.0
    _ready_at: float | None = None

    def ready(self, at: float) -> None:
        """It is ready."""
        self._ready_at, self.was_ready, self.failures = at, True, 0

    def ended(self, at: float) -> float | None:
        """It ended. Returns after how many seconds it is started again; None when it is given up.

        What has never been ready is given up at once: it was started in a way in which it cannot run.
        """
        ready_at, self._ready_at = self._ready_at, None
        if ready_at is None:
            self.failures += 1
            if not self.was_ready or self.failures >= MOST_FAILURES:
                return None
        elif at - ready_at >= WELL_AFTER_S:
            self._pause_s = 0.0
        self._pause_s = min(self._pause_s * 2 or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        return self._pause_s
