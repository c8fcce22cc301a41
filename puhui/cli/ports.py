"""Which TCP ports of this machine's loopback are free."""

from __future__ import annotations

import socket

__all__ = ["free_port", "is_free", "next_free_port"]

_LOOPBACK = "127.0.0.1"


def is_free(port: int) -> bool:
    """Says whether a server could listen at a port now."""
    with socket.socket() as probe:
        # As servers do: what is left of their predecessors' connections is in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Returns a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def next_free_port(after: int) -> int:
    """Returns the first free port that is greater than `after`.

    Raises:
        OSError: there is none.
    """
    for port in range(after + 1, 2**16):
        if is_free(port):
            return port
    raise OSError(f"no port after {after} is free; name a lower one with --port, or 0 for any free ones")
