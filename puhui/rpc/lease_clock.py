"""The clock on which leases are written: it only grows, over restarts too, whatever is done to the wall clock."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import structlog

__all__ = ["Host", "LeaseClock", "ThisHost"]

_log = structlog.get_logger(__name__)

_AHEAD_S = 60.0


class Host(Protocol):
    """The clocks of a host."""

    def boot_id(self) -> str:
        """Returns what differs after every reboot."""

    def uptime_s(self) -> float:
        """Returns seconds since the host was booted, those in which it was suspended too."""

    def wall_s(self) -> float:
        """Returns what it takes for the time, in seconds since the epoch."""


class ThisHost:
    """The host on which this runs."""

    def boot_id(self) -> str:
        """Returns the kernel's id of this boot."""
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def uptime_s(self) -> float:
        """Returns CLOCK_BOOTTIME."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall_s(self) -> float:
        """Returns the system's time."""
        return time.time()


@dataclass(frozen=True)
class _Kept:
    boot_id: str
    era: str
    offset: float
    ceiling: float


class LeaseClock:
    """Seconds that only grow.

    While the host is up it runs with CLOCK_BOOTTIME, so neither a step of the wall clock nor a restart of the process
    moves it. After a reboot it goes on at the wall clock, but never before what it may have said earlier. When its file
    is gone or damaged, it begins anew at the wall clock.

    Args:
        path: file in which it keeps where it is; its folder exists.
        host: whose clock it is.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, host: Host | None = None) -> None:
        self._path = path
        self._host = host or ThisHost()
        boot_id = self._host.boot_id()
        kept = self._read()
        if kept is not None and kept.boot_id == boot_id:
            self._kept = kept
        else:
            start = max(self._host.wall_s(), kept.ceiling if kept is not None else 0.0)
            self._kept = _Kept(boot_id, uuid.uuid4().hex, start - self._host.uptime_s(), start)
            self._keep()

    @property
    def boot(self) -> str:
        """Differs after a reboot, and when the clock began anew.

        Across a change of it two readings say nothing about how much time has passed: a host does not know for certain
        how long it was down, because its wall clock may have been set wrong.
        """
        return self._kept.era

    def now(self) -> float:
        """Returns the clock, in seconds; at first these are seconds since the epoch."""
        at = self._host.uptime_s() + self._kept.offset
        if at > self._kept.ceiling:
            self._keep()
        elif at > self._kept.ceiling - _AHEAD_S / 2:
            # In good time: a disk that is full for a moment need not stop anybody.
            with contextlib.suppress(OSError):
                self._keep()
        return at

    def _read(self) -> _Kept | None:
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            fields = json.loads(text)
            kept = _Kept(str(fields["boot_id"]), str(fields["era"]), float(fields["offset"]), float(fields["ceiling"]))
            if not (kept.era and math.isfinite(kept.offset) and math.isfinite(kept.ceiling)):
                raise ValueError("a field is empty or not finite")
        except (ValueError, KeyError, TypeError) as error:
            _log.error("the file of the lease clock is damaged; it begins anew", path=str(self._path), why=repr(error))
            return None
        return kept

    def _keep(self) -> None:
        """Writes a time that is not reached soon: after a crash or a reboot the clock goes on from there at least."""
        kept = replace(self._kept, ceiling=self._host.uptime_s() + self._kept.offset + _AHEAD_S)
        temporary = self._path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write(json.dumps(asdict(kept)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # else a loss of power may bring the former file back
        finally:
            os.close(folder)
        self._kept = kept
