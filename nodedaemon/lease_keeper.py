"""Stays with one leased container and kills it when its lease has run out, whatever has become of the daemon.

    python -I -S lease_keeper.py FILE INIT GROUP

FILE is the container's `LeaseFile`, INIT a descriptor (pidfd) of its first process, GROUP the process group that is
killed, or 0 where the kernel kills all the others when that process dies (it is the init of a process-id namespace).
There is one of these for each leased container, so it imports as little as it can: 10 MB resident, 4 MB of it private.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import sys
import time

_SIZE = 64
_LIMIT = 2.0**62
_KILL_AGAIN_MS = 1000
_ABSOLUTE = 1
_CLOSE_ON_EXEC = 0o2000000


class LeaseFile:
    """Until when a container may run, on CLOCK_BOOTTIME in seconds, for the daemon and the keeper to agree on.

    Whoever finds that the lease has run out notes so under the lock under which it is renewed: a lease is renewed, or
    it has run out, and never both.

    Args:
        path: the file.
        make: whether it is made when it is missing.

    Raises:
        OSError: it cannot be opened or made.
    """

    def __init__(self, path: str, *, make: bool = False) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o600)

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._file)

    def read(self) -> tuple[float, int, bool]:
        """Returns the deadline, the keeper's process id (0: none yet), and whether the lease has run out."""
        fields = os.pread(self._file, _SIZE, 0).split()
        if len(fields) != 3:
            return 0.0, 0, False
        return float(fields[0]), int(fields[1]), fields[2] == b"1"

    def extend(self, deadline: float) -> bool:
        """Moves the deadline; never to an earlier one. Returns False, and changes nothing, when the lease has run out.

        Raises:
            OSError: the disk is full.
        """
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            known, keeper, over = self.read()
            if over:
                return False
            if deadline > known:
                self._write(min(deadline, _LIMIT), keeper, False)
            return True
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def note_keeper(self, process: int) -> None:
        """Notes who keeps the container."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            deadline, _, over = self.read()
            self._write(deadline, process, over)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def run_out(self, at: float) -> bool:
        """Says whether the lease has run out by `at`, and notes it: from then on nobody can renew it."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            deadline, keeper, over = self.read()
            if not over and at >= deadline:
                over = True
                try:
                    self._write(deadline, keeper, True)
                except OSError:
                    return True  # the disk is full; the container dies all the same
            return over
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _write(self, deadline: float, keeper: int, over: bool) -> None:
        # In place and always of one size: who reads without the lock sees the whole of the old or of the new.
        os.pwrite(self._file, (f"{deadline:.6f} {keeper} {over:d}".ljust(_SIZE - 1) + "\n").encode(), 0)


def kill(init: int, group: int) -> None:
    """Kills a container. Nothing happens when it has ended.

    Args:
        init: descriptor (pidfd) of its first process.
        group: process group to kill; 0 where the death of the first process is that of all.
    """
    try:
        if group:
            # Says whether the id is still that process's: its group may outlive it, but then there is no telling.
            signal.pidfd_send_signal(init, 0)
            os.killpg(group, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(init, signal.SIGKILL)
    except ProcessLookupError:
        return


class _Alarm:
    """A timer on CLOCK_BOOTTIME: it goes on while the host sleeps, unlike poll()'s own. Python has one from 3.13 on."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._libc.timerfd_create(time.CLOCK_BOOTTIME, _CLOSE_ON_EXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "no timer")

    def set(self, at: float) -> None:
        # Zero would turn it off.
        nanos = max(1, int(at * 1e9))
        spec = (ctypes.c_long * 4)(0, 0, nanos // 10**9, nanos % 10**9)
        if self._libc.timerfd_settime(self.descriptor, _ABSOLUTE, spec, None) != 0:
            raise OSError(ctypes.get_errno(), "the timer cannot be set")


def main(path: str, init: int, group: int) -> int:
    """Stays until the container has ended. Returns 0."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lease = LeaseFile(path)
    alarm = _Alarm()
    either = select.poll()
    either.register(init, select.POLLIN)
    either.register(alarm.descriptor, select.POLLIN)
    lease.note_keeper(os.getpid())
    os.write(1, b"kept\n")
    for said in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), said)
    while True:
        deadline, _, over = lease.read()
        alarm.set(deadline)
        if not over and any(found == init for found, _ in either.poll()):
            return 0
        if lease.run_out(time.clock_gettime(time.CLOCK_BOOTTIME)):
            break
    ended = select.poll()
    ended.register(init, select.POLLIN)
    while not ended.poll(0):
        kill(init, group)
        ended.poll(_KILL_AGAIN_MS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
