"""Who holds a cap node open: a real, live process, and nothing else, makes a slice busy."""

import errno
import fcntl
import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

# F_SETSIG of fcntl.h, which the fcntl module does not name.
_F_SETSIG = 10


class Holders(Protocol):
    """Looks for processes that hold files open."""

    def is_held(self, node: Path) -> bool:
        """Say whether any process has the file open, even one that may not be looked into."""

    def processes(self, nodes: Collection[Path]) -> dict[Path, list[int]]:
        """Return the pids, ascending, of the processes seen to have each file open."""


class ProcHolders:
    """Asks the kernel.

    A write lease on the file, which the kernel grants only where nobody else has it open, answers
    in microseconds and counts every holder: those in other containers and those whose
    ``/proc/PID/fd`` is closed to this user. Naming the holders takes a walk over ``/proc``, which
    compares inodes, so a bind mount of the node in a container counts. Where leases do not work
    (some file systems, a file of another user) the walk alone decides.

    Call it under the state lock: another process of the node would take the open descriptor of the
    lease for a holder.
    """

    def is_held(self, node: Path) -> bool:  # noqa: D102 - see Holders
        free = _nobody_else_has_open(node)
        if free is None:
            return bool(self.processes([node])[node])
        return not free

    def processes(self, nodes: Collection[Path]) -> dict[Path, list[int]]:  # noqa: D102
        found: dict[Path, list[int]] = {node: [] for node in nodes}
        by_inode: dict[tuple[int, int], Path] = {}
        for node in nodes:
            try:
                status = node.stat()
            except FileNotFoundError:
                continue
            by_inode[status.st_dev, status.st_ino] = node
        if by_inode:
            pids = sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal())
            for pid in pids:
                for inode in _open_inodes(pid) & by_inode.keys():
                    found[by_inode[inode]].append(pid)
        return found


def _open_inodes(pid: int) -> set[tuple[int, int]]:
    """Return device and inode of every file the process has open; nothing if it may not be seen."""
    inodes = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                try:
                    status = descriptor.stat()
                except OSError:
                    continue  # closed meanwhile
                inodes.add((status.st_dev, status.st_ino))
    except OSError:
        return set()  # gone meanwhile, or another user's
    return inodes


def _nobody_else_has_open(node: Path) -> bool | None:
    """Return whether a write lease on the file is granted; None where leases tell nothing."""
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return None
    try:
        # Whoever opens the file during the lease waits for its end, and the kernel signals it to
        # us: by SIGIO, which kills, unless told otherwise. SIGURG is ignored by default.
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None
    else:
        # Not left to close(): a child that was forked just now shares the descriptor.
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return _leases_see_readers(node)
    finally:
        os.close(descriptor)


def _leases_see_readers(node: Path) -> bool | None:
    """Return True where a second reader stops a lease, else None: an old kernel may not count."""
    device = node.stat().st_dev
    if device not in _trusted:
        first = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        second = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.fcntl(first, _F_SETSIG, signal.SIGURG)
            fcntl.fcntl(first, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(first, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            _trusted[device] = False
        except OSError:
            _trusted[device] = True
        finally:
            os.close(first)
            os.close(second)
    return True if _trusted[device] else None


# Device number of a file system, to whether its leases count readers.
_trusted: dict[int, bool] = {}
