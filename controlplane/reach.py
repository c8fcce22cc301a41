"""What is needed to work with peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from controlplane.peer_client import PeerClient
from controlplane.records import PeerRecord

__all__ = ["Clock", "KnownPeer", "PeerBook", "Reach"]


class Clock(Protocol):
    """A lease clock, see `puhui.rpc.lease_clock.LeaseClock`."""

    @property
    def boot(self) -> str:
        """Differs after a reboot."""

    def now(self) -> float:
        """Returns the clock, in seconds."""


class KnownPeer(Protocol):
    """A peer, as far as a forward needs it."""

    @property
    def record(self) -> PeerRecord:
        """What is stored of it."""

    @property
    def client(self) -> PeerClient:
        """The connection to it. Raises a Refusal, UNAVAILABLE with PEER_NOT_CALLED, when it is never called."""

    @property
    def in_contact(self) -> bool:
        """Whether it was heard of lately."""

    def carried(self, size_bytes: int, elapsed_s: float) -> None:
        """So many bytes have gone there in so many seconds."""

    def began(self, promised_s: float, actual_s: float) -> None:
        """Work there began so many seconds after it was sent."""

    async def contact(self) -> None:
        """Returns when it is in contact."""


class PeerBook(Protocol):
    """The peers there are."""

    @property
    def is_open(self) -> bool:
        """Whether who is not in it is no peer. Before the start, and after the end, nobody is in it."""

    def get(self, name: str) -> KnownPeer | None:
        """Returns a peer by its name."""


@dataclass(frozen=True)
class Reach:
    """What every driver of an attempt at a peer works with."""

    peers: PeerBook
    clock: Clock
    centre_id: str
    """Of this centre."""
    lease_s: float
    """Length of the leases that are asked for."""
    margin_s: float
    """Time in which a peer ends what its lease no longer covers."""
    keep_s: float
    """For so long after its end a peer keeps a result."""
