"""Holds one container to its lease: its file, its first process, and the keeper that stays with it."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nodedaemon import lease_keeper
from nodedaemon.lease_keeper import LeaseFile

__all__ = ["KeeperFailedError", "LeaseHold", "ran_out"]

_START_S = 20.0
_NOTHING = -1


class KeeperFailedError(Exception):
    """A container cannot be held to its lease; the text says why."""


def ran_out(path: Path) -> bool:
    """Says whether a lease file tells that the lease has run out."""
    try:
        text = path.read_bytes().split()
    except FileNotFoundError:
        return False
    return len(text) == 3 and text[2] == b"1"


class LeaseHold:
    """One container that is held to its lease.

    Args:
        path: its lease file, named after the container; made if it is missing.
        group: whether a process group is killed, rather than the init of a process-id namespace.
        python: what the keeper runs with.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, *, group: bool, python: str = sys.executable) -> None:
        self.path = path
        self._group = group
        self._python = python
        self._file = LeaseFile(str(path), make=True)
        self.deadline = self._file.read()[0]
        """Until when it may run, on CLOCK_BOOTTIME, in seconds."""
        self._pid = 0
        self._init = _NOTHING
        self._keeper = _NOTHING

    def extend(self, deadline: float) -> bool:
        """Moves the deadline; never to an earlier one. Returns False, and changes nothing, when the lease has run out.

        Raises:
            OSError: the disk is full.
        """
        extended = self._file.extend(deadline)
        self.deadline = self._file.read()[0]
        return extended

    def run_out(self) -> bool:
        """Says whether the lease has run out; it can no longer be renewed then."""
        return self._file.run_out(time.clock_gettime(time.CLOCK_BOOTTIME))

    def find(self, pid: int) -> bool:
        """Takes hold of the container's first process. Returns False when it has ended.

        Raises:
            KeeperFailedError: it cannot be told whether it is that process.
        """
        if self._init == _NOTHING:
            try:
                init = os.pidfd_open(pid)
            except ProcessLookupError:
                return False
            except OSError as error:
                raise KeeperFailedError(f"process {pid} of the container cannot be held: {error.strerror}") from error
            # The descriptor stays with whom it is, so this says whether it is whom we mean: conmon, and the keeper of a
            # plain process, have the container's id in their command lines.
            if self.path.name.encode() not in _command_line(_parent(pid)):
                ended = _has_ended(init)
                os.close(init)
                if ended:
                    return False
                raise KeeperFailedError(f"process {pid} is not a child of what stays with the container")
            self._pid, self._init = pid, init
        return not _has_ended(self._init)

    async def keep(self, lost: Callable[[], None]) -> None:
        """Has a keeper stay with the container: that of an earlier daemon if it lives, else a new one.

        Args:
            lost: called when the keeper ends.

        Raises:
            KeeperFailedError: there is none and none can be started.
        """
        self._drop_keeper()
        keeper = self._open_keeper()
        if keeper == _NOTHING:
            # A copy: the container may end, and its descriptor be closed, while the keeper is being started.
            said = await asyncio.to_thread(self._launch, os.dup(self._init))
            keeper = self._open_keeper()
            if keeper == _NOTHING:
                if _has_ended(self._init):
                    return
                raise KeeperFailedError(f"the keeper of its lease did not start: {said or 'no reason given'}")
        self._keeper = keeper
        asyncio.get_running_loop().add_reader(keeper, self._lose, lost)

    def _lose(self, lost: Callable[[], None]) -> None:
        self._drop_keeper()
        lost()

    def _launch(self, init: int) -> str:
        """Starts a keeper and waits until it keeps. Returns what it said if it does not."""
        group = self._pid if self._group else 0
        command = [self._python, "-I", "-S", lease_keeper.__file__, str(self.path), str(init), str(group)]
        try:
            done = subprocess.run(
                # In between, so that it is nobody's child and outlives the daemon without a word.
                ["sh", "-c", 'setsid -f "$@"', "sh", *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[init],
                cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath)},
                timeout=_START_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        finally:
            os.close(init)
        return done.stderr.decode(errors="replace").strip()[-300:]

    def _open_keeper(self) -> int:
        """Returns a descriptor of the keeper that the file names, while it lives."""
        _, keeper, _ = self._file.read()
        if not keeper:
            return _NOTHING
        try:
            descriptor = os.pidfd_open(keeper)
        except OSError:
            return _NOTHING
        if str(self.path).encode() in _command_line(keeper):
            return descriptor
        os.close(descriptor)
        return _NOTHING

    def kill(self) -> bool:
        """Kills the container. Returns whether there was hold of it."""
        if self._init == _NOTHING:
            return False
        lease_keeper.kill(self._init, self._pid if self._group else 0)
        return True

    def _drop_keeper(self) -> None:
        if self._keeper != _NOTHING:
            asyncio.get_running_loop().remove_reader(self._keeper)
            os.close(self._keeper)
            self._keeper = _NOTHING

    def close(self) -> None:
        """Lets go of it. The keeper stays with the container."""
        self._drop_keeper()
        if self._init != _NOTHING:
            os.close(self._init)
            self._init = _NOTHING
        self._file.close()

    def remove(self) -> None:
        """Lets go of a container that has ended, and removes the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def _has_ended(process: int) -> bool:
    look = select.poll()  # select() knows no descriptors above 1023
    look.register(process, select.POLLIN)
    return bool(look.poll(0))


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
