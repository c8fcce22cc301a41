"""The clock on which leases are written: it only grows, over restarts too, whatever is done to the wall clock."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

__all__ = ["LeaseClock"]

_AHEAD_S = 60.0


class LeaseClock:
    """Seconds that only grow.

    While the host is up it runs with CLOCK_BOOTTIME, so neither a step of the wall clock nor a restart of the process
    moves it. After a reboot it goes on at the wall clock, but never before what it may have said earlier.

    Args:
        path: file in which it keeps where it is; its folder exists.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        """Differs after a reboot. Across a change of it a reading says nothing about how much time has passed."""
        try:
            kept = json.loads(path.read_text())
        except FileNotFoundError:
            kept = {"boot": "", "offset": 0.0, "ceiling": 0.0}
        self._ceiling = float(kept["ceiling"])
        if kept["boot"] == self.boot:
            self._offset = float(kept["offset"])
        else:
            self._offset = max(time.time(), self._ceiling) - _uptime_s()
            self._keep()

    def now(self) -> float:
        """Returns the clock, in seconds; at first these are seconds since the epoch."""
        at = _uptime_s() + self._offset
        if at > self._ceiling:
            self._keep()
        return at

    def _keep(self) -> None:
        ceiling = _uptime_s() + self._offset + _AHEAD_S
        text = json.dumps({"boot": self.boot, "offset": self._offset, "ceiling": ceiling})
        temporary = self._path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._ceiling = ceiling


def _uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
