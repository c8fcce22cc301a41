"""A connection to a centre's control plane, which the calls of all its services share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from puhui.client.patience import Contact, Patience, Trouble
from puhui.rpc.channel import open_blocking_channel

__all__ = ["CALL_S", "Connection"]

CALL_S = 30.0
"""Longest time that one try of a call that answers at once may take."""


class Connection:
    """A connection to a control plane. `Centre` is what users make.

    Args:
        address: "host:port" or "unix:/path" of the control plane.
        patience: how long a centre that cannot be reached is waited for.
        on_trouble: is told before each further try.
    """

    def __init__(
        self, address: str, patience: Patience | None = None, on_trouble: Callable[[Trouble], None] | None = None
    ) -> None:
        self.address = address
        self._contact = Contact(address, patience or Patience(), on_trouble)
        self._channel = open_blocking_channel(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Whatever still waits on it is refused with CANCELLED."""
        self._contact.close()
        self._channel.close()
