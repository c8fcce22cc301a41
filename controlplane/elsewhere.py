"""Which peers would have room for a job now, as far as is known, in a clause for people. Pure.

Nobody is asked: peers tell their capacity anyhow, and what they told last may be over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from controlplane.forwarding import Candidate, Neighbour, room_at, why_none, why_not

__all__ = ["Telling", "elsewhere"]

_MOST_TOLD = 5


class Telling(Neighbour, Protocol):
    """A peer that has told what it has; `peers.Peer` is one."""

    @property
    def emulated(self) -> bool:
        """Whether emulated cards are among what it has."""


def elsewhere(job: Candidate, peers: Iterable[Telling]) -> str:
    """Returns where a job for which there is no room here would find some, such as "peer b has it free".

    Args:
        job: the job.
        peers: every peer.

    Returns:
        A clause; "" where there is no peer, or the job is not for peers.
    """
    known = sorted(peers, key=lambda peer: peer.record.name)
    if not known or why_none(job):
        return ""
    refused = {peer.record.name: why_not(job, peer) for peer in known}
    able = [peer for peer in known if not refused[peer.record.name]]
    if not able:
        why = [f"{name}: {text}" for name, text in refused.items()]
        return f"no peer would be asked ({_listed(why)})"
    free = [_free(job, peer) for peer in able if room_at(job, peer)]
    if free:
        return f"as far as is known, {_listed(free)}"
    silent = [peer.record.name for peer in able if not peer.profiles]
    said = "as far as is known, no peer that may be asked has room for it now"
    return f"{said}; nothing is known of what there is at {_listed(silent, ', ')}" if silent else said


def _free(job: Candidate, peer: Telling) -> str:
    best = room_at(job, peer)[0]
    counts = [f"{number} {word}" for number, word in ((best.free, "free"), (best.idle, "idle")) if number]
    label = " (emulated)" if peer.emulated else ""
    return f"peer {peer.record.name} has {best.profile}{label} for it now: {' and '.join(counts)}"


def _listed(said: list[str], between: str = "; ") -> str:
    more = [f"{len(said) - _MOST_TOLD} more"] if len(said) > _MOST_TOLD else []
    return between.join([*said[:_MOST_TOLD], *more])
