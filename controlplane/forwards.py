"""Attempts that this centre has sent to peers, and what may be done about them. Pure.

The lease of a forward is written on its peer's lease clock. Every answer of the peer tells that clock; from the last
reading, and from the time that has passed here since, follows until when to ask. Since no message asks for more than
what is stored here before it is sent, the peer's lease ends at `lease_end` at the latest, however late a message
arrives, and from the readings follows when that has passed for certain. Only then, or when the peer has said that the
attempt is over and cannot start, may the job start elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = [
    "CLOCK_DRIFT",
    "LAST_MOMENT_S",
    "ForwardRecord",
    "ForwardStage",
    "count_at_peers",
    "is_surely_over",
    "lease_to_ask",
    "read_clock",
    "rebooted",
    "unheard_of",
]

LAST_MOMENT_S = 253402300799.0
"""No clock tells a later time than a message can hold."""

CLOCK_DRIFT = 0.001
"""The clocks of two hosts run at rates that differ by less than this: twice of what NTP slews at most."""


class ForwardStage(StrEnum):
    """Where a forward is in its life."""

    SENDING = "sending"
    """The peer was, or will be, asked to bind it; whether it has is not known."""
    BOUND = "bound"
    """The peer runs it, or lets it wait."""
    ENDING = "ending"
    """It is not wanted any longer: the peer is asked for its end until that is confirmed, or the lease is over."""
    ENDED = "ended"
    """The peer has said how it ended; its results are to be fetched."""
    LOST = "lost"
    """Its lease is over without a word, and the job has gone on without it. What it left is still asked for."""
    SETTLED = "settled"
    """Nothing more is to be asked of the peer."""


@dataclass(frozen=True)
class ForwardRecord:
    """One attempt at a peer, as this centre knows it. Stored together with the job's change that it belongs to."""

    job_id: str
    attempt: int
    peer: str
    """Name of the peer."""
    token: int
    """Fencing token under which it is commanded."""
    stage: ForwardStage = ForwardStage.SENDING
    paired: float = 0.0
    """`PeerRecord.create_time` of the peer then: another centre may be peer under its name later."""
    offer_id: str = ""
    lease_end: float = 0.0
    """Latest time that was ever asked for, on the peer's lease clock. Stored before it is asked for."""
    peer_time: float = 0.0
    """Last reading of the peer's lease clock."""
    read_at: float = 0.0
    """When that reading had arrived, on this centre's lease clock: the peer's clock is past it since then."""
    boot: str = ""
    """`LeaseClock.boot` at that time."""
    peer_job_id: str = ""
    """Its id at the peer, once that has bound it."""
    cursor: int = 0
    """Events of the peer up to here are taken over."""
    promised_wait_s: float = 0.0
    """What its offer promised."""
    sent_at: float = 0.0
    """Decided at, in seconds since the epoch."""
    bundle_there: bool = False
    """The peer has its code from before."""
    why: str = ""
    """Of one that is ENDING: the reason, UPPER_SNAKE; "CANCELLED" when somebody asked for the job's end."""
    keep_until: float = 0.0
    """The peer keeps its result until then, in seconds since the epoch; after that a LOST one is let go."""

    @property
    def key(self) -> tuple[str, int]:
        """(job id, attempt number)."""
        return self.job_id, self.attempt


def read_clock(forward: ForwardRecord, peer_time: float, at: float) -> ForwardRecord:
    """Returns a forward after an answer that told the peer's lease clock.

    Args:
        forward: before.
        peer_time: what it told, in seconds.
        at: when the answer had arrived, on this centre's lease clock.
    """
    if peer_time <= forward.peer_time:
        return forward  # an answer that was overtaken, or a peer whose clock does not do what it must
    return replace(forward, peer_time=peer_time, read_at=at)


def rebooted(forward: ForwardRecord, boot: str, at: float) -> ForwardRecord:
    """Returns a forward as it is to be taken up after a restart: how long a reboot took is not known for certain."""
    return forward if forward.boot == boot else replace(forward, boot=boot, read_at=at)


def lease_to_ask(forward: ForwardRecord, at: float, lease_s: float) -> float:
    """Returns until when to ask, on the peer's lease clock.

    However often this is asked for, a peer that is not heard of gets no more than a lease and a third from when it was
    last heard of. Otherwise what is stored before each request would grow for ever, and the job would never come back.

    Args:
        forward: the forward.
        at: now, on this centre's lease clock.
        lease_s: length of the lease, in seconds.
    """
    since_s = min(at - forward.read_at, lease_s / 3)
    return max(forward.lease_end, forward.peer_time + since_s + lease_s)


def is_surely_over(forward: ForwardRecord, at: float, margin_s: float) -> bool:
    """Returns whether the lease is over by the peer's own clock, however slowly that runs.

    Args:
        forward: the forward.
        at: now, on this centre's lease clock.
        margin_s: time in which the peer ends what its lease no longer covers.
    """
    return forward.peer_time + (at - forward.read_at) * (1 - CLOCK_DRIFT) > forward.lease_end + margin_s


_THERE = frozenset({ForwardStage.SENDING, ForwardStage.BOUND, ForwardStage.ENDING})


def count_at_peers(forwards: Iterable[ForwardRecord]) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Returns our attempts at each peer, by name, and those of them that are on their way."""
    there = [forward for forward in forwards if forward.stage in _THERE]
    return (
        Counter(forward.peer for forward in there),
        Counter(forward.peer for forward in there if forward.stage is ForwardStage.SENDING),
    )


def unheard_of(forwards: Iterable[ForwardRecord]) -> Mapping[str, Sequence[str]]:
    """Returns by job the peers at which it was when its lease there was over, and of whose end nothing is known yet."""
    found: dict[str, list[str]] = {}
    for forward in forwards:
        if forward.stage is ForwardStage.LOST:
            found.setdefault(forward.job_id, []).append(forward.peer)
    return found
