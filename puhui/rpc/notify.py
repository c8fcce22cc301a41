"""Readiness, in systemd's own protocol.

A daemon tells whoever started it that it is ready by one datagram to the unix socket that
$NOTIFY_SOCKET names (sd_notify(3)). systemd is one such starter; `puhui up` and the tests are others,
and wait for the datagram instead of asking again and again. The address at which the daemon really
listens travels with it, so that port 0 works.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
import time
from pathlib import Path
from typing import Self

__all__ = ["ReadySocket", "notify_ready", "notify_stopping"]

_ADDRESS = "X_PUHUI_ADDRESS"
# A starter that has gone, or listens no more, need not be told.
_GONE = (FileNotFoundError, ConnectionRefusedError)


def notify_ready(address: str) -> None:
    """Tells the starter, if there is one, that this daemon serves at `address`."""
    _send(f"READY=1\nSTATUS=serving at {address}\n{_ADDRESS}={address}")


def notify_stopping() -> None:
    """Tells the starter, if there is one, that this daemon is stopping on purpose."""
    _send("STOPPING=1")


def _send(message: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A leading "@" names a socket in Linux's abstract namespace.
    target = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(*_GONE):
        sock.sendto(message.encode(), target)


class ReadySocket:
    """The starter's end: a socket for one daemon's $NOTIFY_SOCKET.

    Usage::

        with ReadySocket() as ready:
            process = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": ready.path})
            address = ready.wait(process.pid, timeout_s=20)
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="puhui-ready-")
        self.path = str(Path(self._folder.name, "notify"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listens no more. The daemon need not know."""
        self._socket.close()
        self._folder.cleanup()

    def fileno(self) -> int:
        """Returns a descriptor that becomes readable when there is something to `receive`."""
        return self._socket.fileno()

    def receive(self) -> str | None:
        """Waits for one word of the daemon: the address at which it serves, or None when it says something else."""
        lines = self._socket.recv(4096).decode().splitlines()
        fields = dict(line.split("=", 1) for line in lines if "=" in line)
        return fields.get(_ADDRESS, "") if fields.get("READY") == "1" else None

    def wait(self, pid: int, timeout_s: float) -> str:
        """Waits until the daemon says that it is ready, and returns the address at which it serves.

        Args:
            pid: process id of the daemon, a child of this process that has not been waited for.
            timeout_s: longest wait, in seconds.

        Raises:
            ChildProcessError: the daemon ended before it was ready.
            TimeoutError: it took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        child = os.pidfd_open(pid)
        try:
            while (left := deadline - time.monotonic()) > 0:
                readable, _, _ = select.select([self._socket.fileno(), child], [], [], left)
                if self._socket.fileno() in readable:
                    address = self.receive()
                    if address is not None:
                        return address
                elif child in readable:
                    raise ChildProcessError(f"process {pid} ended before it was ready")
        finally:
            os.close(child)
        raise TimeoutError(f"process {pid} was not ready within {timeout_s:g} s")
