"""Keeps daemons running: what ends is started again, until it cannot be had."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from puhui.cli.interrupts import Interrupts
from puhui.cli.local_daemon import LocalDaemon
from puhui.cli.restarts import MOST_FAILURES, Restarts
from puhui.cli.words import count

__all__ = ["Supervisor"]

_START_S = 60.0
_STOP_S = 20.0


class Supervisor:
    """Starts daemons, watches over them, and stops them.

    Args:
        keep: is called whenever a process was started or has ended, so that a successor knows of it.
        tell: is told, in a line, what ended and what is done about it.
        interrupts: what may interrupt this process, and must not between a start and its being kept.
        start_s: a daemon that is not ready after so many seconds is killed, and counts as ended.
    """

    def __init__(
        self,
        keep: Callable[[], None],
        tell: Callable[[str], None],
        interrupts: Interrupts,
        start_s: float = _START_S,
    ) -> None:
        self._keep = keep
        self._tell = tell
        self._interrupts = interrupts
        self._start_s = start_s
        self._restarts: dict[LocalDaemon, Restarts] = {}
        self._deadlines: dict[LocalDaemon, float] = {}
        """When one that is not ready yet is killed."""
        self._launches: dict[LocalDaemon, float] = {}
        """When one that has ended is started again."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Process of each daemon that runs, by the daemon's name."""
        return {daemon.name: daemon.pid for daemon in self._restarts if daemon.pid is not None}

    def bring_up(self, daemons: Sequence[LocalDaemon]) -> None:
        """Starts daemons, all at once, and waits until every one is ready.

        Raises:
            Refusal: UNAVAILABLE with DAEMON_FAILED, with the reason that its log gives.
            KeyboardInterrupt: this process was asked to stop.
        """
        for daemon in daemons:
            self._restarts[daemon] = Restarts()
            with self._interrupts.held():
                self._launch(daemon)
        while not self._well(daemons):
            self._step()

    def watch(self) -> NoReturn:
        """Keeps the daemons running until one cannot be had.

        Raises:
            Refusal: UNAVAILABLE with DAEMON_FAILED: it was started again and again, and did not become ready.
            KeyboardInterrupt: this process was asked to stop.
        """
        while True:
            self._step()

    def stop(self) -> None:
        """Stops all daemons, those first that give the orders. A further Ctrl-C kills what has not ended yet."""
        patience_s = _STOP_S
        while self.pids:
            try:
                self._stop(patience_s)
            except KeyboardInterrupt:
                patience_s = 0.0
        self._restarts, self._deadlines, self._launches = {}, {}, {}

    def _stop(self, patience_s: float) -> None:
        for module in dict.fromkeys(daemon.module for daemon in self._restarts):
            alike = [daemon for daemon in self._restarts if daemon.module == module]
            for daemon in alike:
                daemon.terminate()
            for daemon in alike:
                daemon.wait_or_kill(patience_s)

    def _well(self, daemons: Iterable[LocalDaemon]) -> bool:
        return not any(daemon in self._deadlines or daemon in self._launches for daemon in daemons)

    def _step(self) -> None:
        """Waits until something happens to any daemon, and does what is to be done then."""
        ready = {fd: daemon for daemon in self._restarts if (fd := daemon.ready_fd) is not None}
        ended = {fd: daemon for daemon in self._restarts if (fd := daemon.ended_fd) is not None}
        next_at = min((*self._deadlines.values(), *self._launches.values()), default=None)
        left_s = None if next_at is None else max(next_at - time.monotonic(), 0)
        readable = select.select([self._interrupts.fileno(), *ready, *ended], [], [], left_s)[0]
        with self._interrupts.held():
            # One that said that it is ready and ended then was ready: this order counts it so.
            for fd in readable:
                if fd in ready and ready[fd].became_ready():
                    self._ready(ready[fd])
            for fd in readable:
                if fd in ended:
                    self._ended(ended[fd], ended[fd].reap())
            at = time.monotonic()
            for daemon in [one for one, deadline in self._deadlines.items() if deadline <= at]:
                daemon.kill()
                daemon.reap()
                self._ended(daemon, f"was not ready within {self._start_s:g} s")
            for daemon in [one for one, launch_at in self._launches.items() if launch_at <= at]:
                self._launch(daemon)

    def _launch(self, daemon: LocalDaemon) -> None:
        self._launches.pop(daemon, None)
        daemon.launch()
        self._deadlines[daemon] = time.monotonic() + self._start_s
        self._keep()

    def _ready(self, daemon: LocalDaemon) -> None:
        self._deadlines.pop(daemon, None)
        again = self._restarts[daemon].was_ready
        self._restarts[daemon].ready(time.monotonic())
        self._keep()
        if again:
            self._tell(f"the {daemon.title} serves again at {daemon.address}")

    def _ended(self, daemon: LocalDaemon, how: str) -> None:
        self._deadlines.pop(daemon, None)
        self._keep()
        restarts = self._restarts[daemon]
        pause_s = restarts.ended(time.monotonic())
        if pause_s is None:
            times = f", {count(MOST_FAILURES, 'time')} in a row" if restarts.was_ready else ""
            raise daemon.failed(how + times)
        reason = daemon.reason()
        self._launches[daemon] = time.monotonic() + pause_s
        self._tell(
            f"the {daemon.title} {how}{': ' if reason else ''}{reason}; it is started again in {pause_s:g} s; "
            f"its log is {daemon.log}"
        )
