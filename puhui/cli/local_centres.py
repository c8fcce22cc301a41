"""All centres that one `puhui up` runs on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import NoReturn

from puhui.cli.local_centre import LocalCentre, LocalOptions, centre_name
from puhui.cli.local_state import ProcessId, Record, StateFolder
from puhui.cli.supervisor import Supervisor

__all__ = ["LocalCentres"]


class LocalCentres:
    """The centres of this machine, whose daemons are children of this process.

    Args:
        folder: where their state is.
        options: what they are to be like.
        tell: is told, in a line, of a daemon that ended and is started again.
        whole: holds back what would interrupt this process.
    """

    def __init__(
        self,
        folder: StateFolder,
        options: LocalOptions,
        tell: Callable[[str], None],
        whole: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._folder = folder
        self._tell = tell
        self._supervisor = Supervisor(self._keep, self._told, whole)
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

    def _keep(self) -> None:
        daemons = {}
        for name, pid in self._supervisor.pids.items():
            with contextlib.suppress(OSError):  # it has ended, and is about to be started again
                daemons[name] = ProcessId.of(pid)
        record = Record(ProcessId.of(os.getpid()), daemons, tuple(centre.record() for centre in self.centres))
        self._folder.write(record)


def _ports(first: int, how_many: int) -> list[int]:
    """Returns the port of each centre's control plane: the one asked for, and the next free ones after it."""
    ports = [first]
    while len(ports) < how_many:
        ports.append(_free_port(ports) if first else 0)
    return ports


def _free_port(taken: Collection[int]) -> int:
    for port in range(max(taken) + 1, 2**16):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue  # somebody serves there
            return port
    raise OSError(f"no port after {max(taken)} is free; name a lower one with --port, or 0 for any free ones")
