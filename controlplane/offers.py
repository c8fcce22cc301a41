"""What peers promise, and which promise is the best. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Offer", "Standing", "best", "judged_s"]


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

    paired: float = 0.0
    """`PeerRecord.create_time` of the peer."""

    @property
    def total_s(self) -> float:
        """Until the command starts there, all in all."""
        return self.expected_wait_s + self.transfer_s


@dataclass(frozen=True)
class Standing:
    """How a peer stands with this centre."""

    weight: float = 1.0
    """Of peers that promise the same, the one with the greater weight gets the work."""
    broken_s: float = 0.0
    """How late its work began lately, in the mean; never below 0."""
    preferred: int | None = None
    """Place among the peers that the job prefers, from 0; None when it is not one of them."""


_ALIKE_S = 1.0
"""Promises that differ by less are the same."""


def judged_s(offer: Offer, standing: Standing) -> float:
    """Returns how long a job would wait for its start, in seconds: as promised, and as much later as is usual there."""
    return offer.total_s + max(0.0, standing.broken_s)


def best(offers: Iterable[tuple[Offer, Standing]]) -> Offer | None:
    """Returns the best offer: of a preferred peer, else the soonest; of those alike, the heavier, then the cheaper."""

    def rank(one: tuple[Offer, Standing]) -> tuple[float, int, float, float, float, str]:
        offer, standing = one
        judged = judged_s(offer, standing)
        place = float("inf") if standing.preferred is None else float(standing.preferred)
        return place, round(judged / _ALIKE_S), -standing.weight, offer.cost, judged, offer.peer

    found = min(offers, key=rank, default=None)
    return found[0] if found is not None else None
