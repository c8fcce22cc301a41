"""What peers promise. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Offer"]


@dataclass(frozen=True)
class Offer:
    """What a peer would do with a job."""

    peer: str
    """Name of the peer."""
    id: str
    expected_wait_s: float
    """Until the command starts there, without the transfer."""
    transfer_s: float
    """For bundle and inputs, at the bandwidth to that peer."""
    cost: float
    """1 is this centre's own."""
    peer_time: float
    """The peer's lease clock when it answered, in seconds."""
    read_at: float
    """When that had arrived, on this centre's lease clock."""
    expire_at: float
    """It holds until then, on this centre's lease clock."""
    longest_lease_s: float
    profile: str
    gpu_model: str
    bundle_present: bool
    """The peer has the bundle from before."""

    @property
    def total_s(self) -> float:
        """Until the command starts there, all in all."""
        return self.expected_wait_s + self.transfer_s
