"""Where plaintext may go: nowhere that others could read it."""

from __future__ import annotations

import ipaddress

__all__ = ["require_private_address"]


def require_private_address(address: str) -> None:
    """Refuses an address at which plaintext could be read by others.

    Args:
        address: "host:port" or "unix:/path".

    Raises:
        ValueError: it is neither loopback nor a unix socket.
    """
    if address.startswith("unix:"):
        return
    host = address.rpartition(":")[0].strip("[]")
    try:
        private = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        private = False
    if not private:
        raise ValueError(
            f"{address}: this version speaks plaintext, and does so on loopback or a unix socket only; "
            "use 127.0.0.1:PORT, and an SSH tunnel to reach another machine"
        )
