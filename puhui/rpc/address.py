"""Where servers are: where plaintext may go, which is nowhere that others could read it, and where others may come."""

from __future__ import annotations

import ipaddress

__all__ = ["require_address", "require_private_address", "require_reachable_address"]

_HIGHEST_PORT = 65535
_LONGEST = 300


def require_address(address: str) -> tuple[str, int]:
    """Returns host and port of "host:port"; an IPv6 host without its brackets.

    Raises:
        ValueError: it is no such address; the text is a sentence.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > _HIGHEST_PORT:
        raise ValueError(
            f"{address!r} is no address; write HOST:PORT, such as 127.0.0.1:7071, with a port up to {_HIGHEST_PORT}, "
            "or unix:/PATH"
        )
    return host, int(port)


def require_private_address(address: str) -> None:
    """Refuses an address at which plaintext could be read by others.

    Args:
        address: "host:port" or "unix:/path".

    Raises:
        ValueError: it is no address, or neither loopback nor a unix socket; the text is a sentence.
    """
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise ValueError(f"{address}: the path of a unix socket must be absolute; write unix:/PATH")
        return
    host, _ = require_address(address)
    try:
        private = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        private = False
    if not private:
        raise ValueError(
            f"{address}: this version speaks plaintext, and does so on loopback or a unix socket only; "
            "use 127.0.0.1:PORT, and an SSH tunnel to reach another machine"
        )


def require_reachable_address(address: str) -> None:
    """Refuses an address at which nobody on another machine could ask for anything.

    Args:
        address: "host:port"; whether anybody is there is not looked at.

    Raises:
        ValueError: it is no address, or one to listen at only; the text is a sentence.
    """
    if address.startswith("unix:") or len(address) > _LONGEST or not address.isascii() or not address.isprintable():
        raise ValueError(f"{address[:80]!r} is no address that others could come to; write HOST:PORT")
    host, port = require_address(address)
    try:
        somewhere = not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        somewhere = not any(character in host for character in " /@,")  # a name
    if port == 0 or not somewhere:
        raise ValueError(f"{address} is no address that others could come to; write HOST:PORT")
