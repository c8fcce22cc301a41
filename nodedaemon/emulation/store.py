"""Where the state is kept: one file, changed under a lock, replaced in one step.

The file is never fsynced, on purpose. What the emulation must survive is the death of any process,
kill -9 included, and a rename survives that; after a power loss the instances of real silicon are
gone as well.
"""

import fcntl
import json
import os
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

        Raises:
            DamagedStateError: The file is missing or is not a state.
        """
        try:
            document: dict[str, Any] = json.loads(self._file.read_bytes())
            return Node.from_json(document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedStateError(
                f"The emulated driver's state {self._file} cannot be read ({error})."
                f" Remove {self._file.parent} to start with empty cards."
            ) from error

    def write(self, node: Node) -> None:
        """Replace the state; the caller holds the lock."""
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(node.to_json(), separators=(",", ":")), encoding="utf-8")
        temporary.replace(self._file)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change the state: all of it when the block ends, nothing of it when the block raises."""
        with self.locked():
            transaction = Transaction(self.read())
            yield transaction
            self.write(transaction.node)
            transaction.committed()
