"""The state folder of a local centre: who runs it, and where it serves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from puhui.rpc.errors import Refusal

__all__ = [
    "CentreRecord",
    "ProcessId",
    "Record",
    "StateFolder",
    "default_state",
    "local_addresses",
    "local_command",
    "own_state",
]


def default_state(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns where the local centre of this user keeps its state."""
    if os.geteuid() == 0:
        return Path("/var/lib/puhui/local")
    base = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(base, "puhui", "local")


def own_state(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns where the state is of the centres that names stand for: PUHUI_LOCAL_STATE, then the default."""
    return Path(environment.get("PUHUI_LOCAL_STATE") or default_state(environment))


def local_addresses(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns where each centre serves that `puhui up` runs for this user, by its name.

    Raises:
        Refusal: FAILED_PRECONDITION with STATE_UNREADABLE.
    """
    record = StateFolder(own_state(environment)).read()
    if record is None or not record.runs():
        return {}
    return {centre.name: centre.address for centre in record.centres if centre.address}


def local_command(verb: str, folder: Path) -> str:
    """Returns the command that does something ("up", "down") to the centre with this state, and to no other."""
    return f"puhui {verb}" if folder == default_state() else shlex.join(["puhui", verb, "--state", str(folder)])


@dataclass(frozen=True)
class ProcessId:
    """A process, named so that another one with the same number is never taken for it."""

    pid: int
    """Its number."""
    start_ticks: int
    """Clock ticks between the boot and its start."""
    boot_id: str
    """The boot."""

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Returns the name of a process that runs.

        Raises:
            OSError: it does not run.
        """
        return cls(pid, _start_ticks(pid), Path("/proc/sys/kernel/random/boot_id").read_text().strip())

    def runs(self) -> bool:
        """Says whether it is running still."""
        try:
            return ProcessId.of(self.pid) == self
        except OSError:
            return False

    def stop(self, patience_s: float) -> bool:
        """Asks it to end, kills it when it does not within `patience_s`, and says whether it was running."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            # The descriptor holds the process that has the number now, so this order leaves no gap.
            if not self.runs():
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                if not select.select([descriptor], [], [], patience_s)[0]:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    select.select([descriptor], [], [], patience_s)
            return True
        finally:
            os.close(descriptor)


def _start_ticks(pid: int) -> int:
    # The name in parentheses may hold anything; field 22 of the whole is the 20th after it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return int(fields[19])


@dataclass(frozen=True)
class CentreRecord:
    """One centre of those that run."""

    name: str
    """Its name, which `--server` takes."""
    address: str
    """Where its control plane serves; "" while it has not begun to."""
    node_address: str
    """Where its node daemon serves; "" while it has not begun to."""
    federation_address: str
    """Where its control plane serves its peers; "" when it does not."""
    emulate: str
    """Its emulated cards."""
    state: str
    """The folder of its state."""


@dataclass(frozen=True)
class Record:
    """The local centres that run."""

    supervisor: ProcessId
    """The `puhui up` that looks after it."""
    daemons: dict[str, ProcessId]
    """Their daemons, by name."""
    centres: tuple[CentreRecord, ...]
    """The centres; there is at least one."""

    @property
    def address(self) -> str:
        """Where the first one's control plane serves; "" while it has not begun to."""
        return self.centres[0].address

    def runs(self) -> bool:
        """Says whether any of it is running still: daemons outlive a `puhui up` that was killed."""
        return any(process.runs() for process in (self.supervisor, *self.daemons.values()))


class StateFolder:
    """The folder in which a local centre keeps all that it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._record = path / "up.json"

    def prepare(self) -> None:
        """Makes the folder.

        Raises:
            OSError: it cannot be made.
        """
        # The user that owns the containers passes through; what is secret has modes of its own.
        self.path.mkdir(parents=True, exist_ok=True, mode=0o755)
        self.logs.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for one `puhui up`.

        Raises:
            Refusal: ALREADY_EXISTS with CENTRE_RUNNING.
        """
        with (self.path / "up.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self.running_already() from None
            yield

    def running_already(self) -> Refusal:
        """Returns the refusal of a second `puhui up` on the same state."""
        record = self.read()
        # The record of an `up` that was killed says nothing about the one that runs now.
        address = record.address if record is not None and record.supervisor.runs() else ""
        what = f"runs already at {address}" if address else "is being started by another `puhui up`"
        return Refusal(
            grpc.StatusCode.ALREADY_EXISTS,
            "CENTRE_RUNNING",
            f"a local centre {what}, with its state in {self.path}; "
            f"use it, stop it with `{local_command('down', self.path)}`, or start another one with --state and --port",
            state=str(self.path),
            address=address,
        )

    def read(self) -> Record | None:
        """Returns the record that the last `puhui up` left; None when it took it away, or left none."""
        try:
            document = json.loads(self._record.read_text())
            return Record(
                supervisor=ProcessId(**document["supervisor"]),
                daemons={name: ProcessId(**process) for name, process in document["daemons"].items()},
                centres=tuple(CentreRecord(**centre) for centre in self._centres_in(document)),
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "STATE_UNREADABLE",
                f"{self._record} is damaged, so it is not known which processes are ours; "
                "end them by hand (`pgrep -af 'controlplane|nodedaemon'`) and remove the file",
                file=str(self._record),
            ) from error

    def _centres_in(self, document: dict[str, Any]) -> list[dict[str, str]]:
        if centres := document.get("centres"):
            return list(centres)
        # A `puhui up` of before there could be several: its one centre.
        keys = ("address", "node_address", "emulate")
        rest = {"name": "local", "federation_address": "", "state": str(self.path)}
        return [{**rest, **{key: document[key] for key in keys}}]

    def write(self, record: Record) -> None:
        """Keeps a record."""
        new = self._record.with_suffix(".new")
        new.write_text(json.dumps(asdict(record), indent=1) + "\n")
        new.replace(self._record)

    def clear(self) -> None:
        """Takes the record away."""
        self._record.unlink(missing_ok=True)

    def stop_leftovers(self, patience_s: float = 20) -> list[str]:
        """Stops daemons whose `puhui up` was killed, and returns their names."""
        record = self.read()
        if record is None:
            return []
        stopped = [name for name, process in record.daemons.items() if process.stop(patience_s)]
        self.clear()
        return stopped

    def stop(self, patience_s: float = 60) -> Record | None:
        """Stops the centre of this folder, and returns what it was; None when none ran."""
        record = self.read()
        if record is None:
            return None
        ran = record.supervisor.stop(patience_s)
        deadline = time.monotonic() + patience_s
        for process in record.daemons.values():
            ran = process.stop(max(deadline - time.monotonic(), 1)) or ran
        self.clear()
        return record if ran else None
