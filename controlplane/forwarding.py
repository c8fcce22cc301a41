"""Whether a waiting job may go to a peer, whom to ask first, and whether what is promised there is worth it. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from controlplane.offers import Offer, Standing, judged_s
from controlplane.peer_terms import labels_allow, tenant_out
from controlplane.records import PeerRecord
from puhui.rpc.moment import seconds
from puhui.v1 import federation_service_pb2, job_pb2

__all__ = [
    "Candidate",
    "Neighbour",
    "Rules",
    "beats",
    "distance",
    "has_room",
    "in_order",
    "is_worth",
    "room_at",
    "standing",
    "transfer_s",
    "why_none",
    "why_not",
]

_MOST_SENT = 100
_GB = re.compile(r"\d+g\.(\d+)gb")
_MIB_PER_GB = 1024
_UNSURE = 1.05
"""A profile's name tells its memory up to this factor."""


@dataclass(frozen=True)
class Rules:
    """How eagerly work is sent away."""

    margin_s: float = 5.0
    """A peer must promise to begin so much sooner than this centre would."""
    doubt: float = 4.0
    """A promised wait is taken to be so many times as long: what can begin at once is certain, and where a job would
    have to wait there too, it had better wait here, from where it can still go wherever there is room first."""
    first_round: int = 2
    """Peers that are asked at first for a job; each round after that is twice as large."""
    round_s: float = 1.0
    """Once there is a promise that is worth it, the slower ones of its round are waited for no longer than this."""
    long_wait_s: float = 15.0
    """A promise to begin later than this is taken only when it is made again after `hesitates_s`: offers that nobody
    takes hold for ten seconds, and until then others are promised what comes after them."""
    hesitates_s: float = 12.0
    asks_again_s: float = 10.5
    first_delay_s: tuple[float, float] = (0.0, 0.1)
    """A job waits for a random time between these before its first round: it may be placed here meanwhile."""
    offers_in_flight: int = 16
    """Offers that are asked for at once, of all peers."""
    offers_in_flight_of_peer: int = 8
    offers_a_second: float = 32.0
    """Offers that are asked for, in the mean of any time."""
    offers_at_once: float = 32.0
    """Offers that may be asked for in one moment, when none was for a while."""
    forwards_in_flight: int = 16
    """Attempts that are on their way at once: sent, and not bound yet."""
    forwards_in_flight_of_peer: int = 8
    back_off_s: float = 1.0
    """After the first refusal; doubles with each."""
    most_back_off_s: float = 300.0
    promise_holds_s: float = 5.0
    """For so long at least, a promise that was not worth it is taken to be what the peer would say again."""
    promise_holds_share: float = 0.1
    """And for this share of the promised wait."""


class Neighbour(Protocol):
    """A peer, as far as it matters whether to ask it; `peers.Peer` is one."""

    @property
    def record(self) -> PeerRecord:
        """What is stored of it."""

    @property
    def in_contact(self) -> bool:
        """Whether it was heard of lately."""

    @property
    def profiles(self) -> Sequence[federation_service_pb2.CapacitySummary]:
        """Its capacity, as of its last word; empty when it has said nothing yet."""

    @property
    def round_trip_s(self) -> float:
        """Round-trip time to it."""

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth to it."""

    @property
    def broken_s(self) -> float:
        """How late its work began lately, in the mean."""


@dataclass(frozen=True)
class Candidate:
    """A waiting job, as far as it matters where else it could run."""

    id: str
    profile: str
    """The profile that is wanted by name; "" for any with enough memory."""
    required_mib: int
    tenant: str
    policy: job_pb2.PeerPolicy
    wait_s: float | None
    """It will wait here so long from now on; None when nobody knows."""
    waited_s: float = 0.0
    """It has waited for so long."""
    bundle_bytes: int = 0
    visited: tuple[str, ...] = ()
    """Ids of the centres that it has been at, this one among them."""
    hops_left: int = 1
    """How often it may be forwarded once it has left; below 0, it may not leave."""
    transit: bool = True
    """False for one that came from a peer whose work may not be forwarded on."""
    is_guest: bool = False
    not_at: tuple[str, ...] = ()
    """Peers that could not run it."""
    unheard_of_at: tuple[str, ...] = ()
    """Peers at which it may have ended: its lease there was over before they could be asked."""

    @property
    def need(self) -> Hashable:
        """Peers have the same answer for jobs with the same need."""
        return self.profile, self.required_mib


def why_none(job: Candidate) -> str:
    """Returns why a job is offered to no peer at all, in a few words; "" when it may be."""
    policy = job.policy
    if policy.here_only:
        return "it is to run here only"
    if job.hops_left < 0:
        return "it was forwarded as often as it may be"
    if not job.transit:
        return "the peer that sent it does not let it be forwarded on"
    if policy.HasField("max_wait") and job.wait_s is not None:
        most_s = seconds(policy.max_wait)
        if job.waited_s + job.wait_s <= most_s:
            return f"it is expected to wait here for no longer than the {most_s:.0f} s that it allows"
    return ""


def why_not(job: Candidate, peer: Neighbour, sent: int = 0) -> str:
    """Returns why a peer is not asked for a job, in a few words; "" when it is.

    Args:
        job: the job.
        peer: the peer.
        sent: our attempts that are there.
    """
    record, terms = peer.record, peer.record.terms
    checks: tuple[tuple[bool, str], ...] = (
        (terms.send_off, "nothing is sent there"),
        (not record.address, "it is never called"),
        (not peer.in_contact, "out of contact"),
        (record.centre_id in job.visited, "it has been there"),
        (record.name in job.not_at, "it could not run it before; `puhui get` says why"),
        (record.name in job.unheard_of_at, "it may have ended there, which is asked first"),
        (job.is_guest and not terms.transit, "what came from other peers is not sent there"),
        (tenant_out(terms, job.tenant) is None, f"jobs of tenant {job.tenant} are not sent there"),
        (not labels_allow(terms.labels, job.policy), "its labels are not those that the job asks for"),
        (sent >= (terms.most_sent or _MOST_SENT), f"{sent} of our jobs are there, as many as may be"),
        (not _could(job, peer), "it has no slice of this size"),
    )
    return next((why for holds, why in checks if holds), "")


def _could(job: Candidate, peer: Neighbour) -> bool:
    """Returns whether a peer may have what a job needs; one that has said nothing yet may."""
    return not peer.profiles or any(_suits(job, one) for one in peer.profiles)


def _suits(job: Candidate, summary: federation_service_pb2.CapacitySummary) -> bool:
    if job.profile:
        return summary.profile == job.profile
    size = _GB.match(summary.profile)
    return size is None or int(size[1]) * _MIB_PER_GB * _UNSURE >= job.required_mib


def has_room(job: Candidate, peer: Neighbour) -> bool:
    """Returns whether a peer, by its last word, has room for a job now."""
    return bool(room_at(job, peer))


def room_at(job: Candidate, peer: Neighbour) -> list[federation_service_pb2.CapacitySummary]:
    """Returns what a peer, by its last word, has free or idle for a job now, the smallest slices first."""
    return sorted((one for one in peer.profiles if (one.free or one.idle) and _suits(job, one)), key=_gigabytes)


def _gigabytes(summary: federation_service_pb2.CapacitySummary) -> float:
    size = _GB.match(summary.profile)
    return int(size[1]) if size is not None else float("inf")


def distance(peer: Neighbour) -> float:
    """Returns how far a peer is: as its operator says, else the round trip in milliseconds."""
    return peer.record.terms.distance or peer.round_trip_s * 1000


def in_order(job: Candidate, peers: Sequence[Neighbour], chance: Callable[[], float]) -> list[Neighbour]:
    """Returns peers in the order in which they are asked.

    First those that the job prefers, in its order; then those that have room by their last word; among these the
    nearest first, and by chance where they are equally near, so that not everybody asks the same one.
    """
    preferred = {name: place for place, name in reversed(list(enumerate(job.policy.preferred_peers)))}
    last = len(preferred)

    def rank(peer: Neighbour) -> tuple[int, bool, float, float]:
        return preferred.get(peer.record.name, last), not has_room(job, peer), distance(peer), chance()

    return sorted(peers, key=rank)


def standing(job: Candidate, peer: Neighbour) -> Standing:
    """Returns how a peer stands for a job."""
    preferred = {name: place for place, name in reversed(list(enumerate(job.policy.preferred_peers)))}
    return Standing(peer.record.terms.weight or 1.0, peer.broken_s, preferred.get(peer.record.name))


def transfer_s(peer: Neighbour, size_bytes: int) -> float:
    """Returns how long a transfer takes, with the round trips of a forward."""
    return size_bytes / max(1.0, peer.bytes_per_second) + 2 * peer.round_trip_s


def is_worth(job: Candidate, offer: Offer, stands: Standing, rules: Rules) -> bool:
    """Returns whether a job should go: the promise, with what is usually added to it, beats the wait here by a margin.

    An unknown wait is beaten by every promise.
    """
    return beats(job, judged_s(offer, stands), rules)


def beats(job: Candidate, promised_s: float, rules: Rules) -> bool:
    """Returns whether to begin in `promised_s` elsewhere beats the wait here by the margin."""
    return job.wait_s is None or promised_s * rules.doubt + rules.margin_s < job.wait_s
