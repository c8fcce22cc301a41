"""Where the state is kept: one file, changed under a lock, replaced in one step.

The file is never fsynced, on purpose. What the emulation must survive is the death of any process,
kill -9 included, and a rename survives that; after a power loss the instances of real silicon are
gone as well.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nodedaemon.emulation.state import Node


class DamagedStateError(RuntimeError):
    """The state file cannot be read back."""


class Transaction:
    """One change of the node's state, under the lock.

    Attributes:
        node: To be changed in place.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self._afterwards: list[Callable[[], None]] = []

    def after_commit(self, action: Callable[[], None]) -> None:
        """Do this once the new state is in place, still under the lock."""
        self._afterwards.append(action)

    def committed(self) -> None:
        """Run what was asked for after the commit."""
        for action in self._afterwards:
            action()


class StateStore:
    """The state file of one node, shared by all its processes.

    Args:
        directory: Holds ``state.json`` and ``state.lock``.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "state.json"
        self._lock = directory / "state.lock"
        self._seen: tuple[_Version, Node] | None = None

    def exists(self) -> bool:
        """Say whether the node was ever started."""
        return self._file.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; it ends with the process that holds it, however that dies."""
        # Opened for reading so that another user of the node, who may read the state, can lock too.
        descriptor = os.open(self._lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self) -> Node:
        """Return the state as of some moment during the call; takes no lock.

        The same object is returned for as long as the file is the same, so it is only to look at.

        Raises:
            DamagedStateError: The file is missing or is not a state.
        """
        seen = self._seen
        if seen is not None:
            try:
                if seen[0] == _version(self._file.stat()):
                    return seen[1]
            except FileNotFoundError:
                self._seen = None
        return self._load_version()[1]

    def load(self) -> Node:
        """Return the state as a new object, to be changed; the caller holds the lock.

        Raises:
            DamagedStateError: The file is missing or is not a state.
        """
        return self._parse(self._contents()[1])

    def _load_version(self) -> tuple["_Version", Node]:
        version, contents = self._contents()
        self._seen = (version, self._parse(contents))
        return self._seen

    def _contents(self) -> tuple["_Version", bytes]:
        try:
            with self._file.open("rb") as file:
                return _version(os.fstat(file.fileno())), file.read()
        except OSError as error:
            raise self._damaged(error) from error

    def _parse(self, contents: bytes) -> Node:
        try:
            document: dict[str, Any] = json.loads(contents)
            return Node.from_json(document)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DamagedStateError:
        return DamagedStateError(
            f"The emulated driver's state {self._file} cannot be read ({error})."
            f" Remove {self._file.parent} to start with empty cards."
        )

    def write(self, node: Node) -> None:
        """Replace the state; the caller holds the lock, and changes the node no more."""
        temporary = self._file.with_suffix(".new")
        contents = node.to_json().encode()
        try:
            written = _write(temporary, contents)
        except PermissionError:
            # Left behind by another user of the node who was killed while writing.
            temporary.unlink()
            written = _write(temporary, contents)
        # Two versions may get one inode in turn, within one tick of the file system's clock. Times
        # that only grow tell them apart.
        stamp = max(written, self._stamp() + 1)
        os.utime(temporary, ns=(stamp, stamp))
        version = _version(temporary.stat())
        temporary.replace(self._file)
        self._seen = (version, node)

    def _stamp(self) -> int:
        try:
            return self._file.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change the state: all of it when the block ends, nothing of it when the block raises."""
        with self.locked():
            contents = self._contents()[1]
            transaction = Transaction(self._parse(contents))
            yield transaction
            self._keep_before(transaction.node, contents)
            self.write(transaction.node)
            transaction.committed()

    def _keep_before(self, node: Node, old: bytes) -> None:
        if not any(fault.stale for fault in node.faults):
            node.before = None
            return
        previous = self._parse(old).gpus
        if node.before is None or previous != node.gpus:
            node.before = previous


_Version = tuple[int, int, int]


def _version(status: os.stat_result) -> _Version:
    """Return what differs between any two versions of the state file."""
    return status.st_mtime_ns, status.st_ino, status.st_size


def _write(path: Path, contents: bytes) -> int:
    """Write a file and return its time, in ns."""
    with path.open("wb") as file:
        file.write(contents)
    return time.time_ns()
