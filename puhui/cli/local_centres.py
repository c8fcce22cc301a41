"""All centres that one `puhui up` runs on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NoReturn

from puhui.cli.interrupts import Interrupts
from puhui.cli.local_centre import MOST_CENTRES, LocalCentre, LocalOptions, centre_name
from puhui.cli.local_peers import pair
from puhui.cli.local_state import ProcessId, Record, StateFolder
from puhui.cli.ports import next_free_port
from puhui.cli.supervisor import Supervisor
from puhui.rpc.errors import Refusal

__all__ = ["LocalCentres"]


class LocalCentres:
    """The centres of this machine, whose daemons are children of this process.

    Args:
        folder: where their state is.
        options: what they are to be like.
        tell: is told, in a line, of a daemon that ended and is started again.
        interrupts: what may interrupt this process.
    """

    def __init__(
        self,
        folder: StateFolder,
        options: LocalOptions,
        tell: Callable[[str], None],
        interrupts: Interrupts,
    ) -> None:
        self._folder = folder
        self._tell = tell
        self._supervisor = Supervisor(self._keep, self._told, interrupts)
        ports = _ports(options.port, len(options.emulate))
        self.centres = [
            LocalCentre(number, folder.path if number == 1 else folder.path / centre_name(number), options, port)
            for number, port in enumerate(ports, 1)
        ]

    @property
    def address(self) -> str:
        """Where the first one's control plane serves; "" before it first did."""
        return self.centres[0].address

    def start(self) -> None:
        """Starts the daemons: every control plane, then every node daemon, and waits until each is ready.

        Raises:
            Refusal: UNAVAILABLE with DAEMON_FAILED, with the reason that its log gives.
            OSError: the state cannot be written.
        """
        for centre in self.centres:
            centre.prepare()
        self._supervisor.bring_up([centre.controlplane for centre in self.centres])
        self._supervisor.bring_up([centre.node for centre in self.centres])

    def pair(self) -> list[str]:
        """Makes them peers of each other, and returns what of that did not succeed, a sentence each."""
        if len(self.centres) == 1:
            return []
        try:
            return pair([centre.record() for centre in self.centres])
        except Refusal as refusal:
            # They serve their own users all the same.
            return [f"the centres are not all peers of each other: {refusal.message} ({refusal.reason})"]

    def watch(self) -> NoReturn:
        """Starts every daemon again that ends, until one cannot be had.

        Raises:
            Refusal: UNAVAILABLE with DAEMON_FAILED.
        """
        self._supervisor.watch()

    def stop(self) -> None:
        """Stops the daemons; those that give the orders go first."""
        self._supervisor.stop()
        self._folder.clear()

    def _told(self, line: str) -> None:
        with (self._folder.logs / "supervisor.log").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}\n")
        self._tell(line)

    def left_out(self) -> list[str]:
        """Returns the names of centres that have state in the folder and are none of these."""
        numbers = range(len(self.centres) + 1, MOST_CENTRES + 1)
        return [centre_name(number) for number in numbers if (self._folder.path / centre_name(number)).is_dir()]

    def record(self) -> Record:
        """Returns what runs."""
        daemons = {}
        for name, pid in self._supervisor.pids.items():
            with contextlib.suppress(OSError):  # it has ended, and is about to be started again
                daemons[name] = ProcessId.of(pid)
        return Record(ProcessId.of(os.getpid()), daemons, tuple(centre.record() for centre in self.centres))

    def _keep(self) -> None:
        self._folder.write(self.record())


def _ports(first: int, how_many: int) -> list[int]:
    """Returns the port of each centre's control plane: the one asked for, and the next free ones after it."""
    ports = [first]
    while len(ports) < how_many:
        ports.append(next_free_port(ports[-1]) if first else 0)
    return ports
