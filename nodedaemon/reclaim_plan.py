"""Which rungs of the ladder may be taken to reclaim a container's cards (step S7). State in, plan out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nodedaemon.checkpoint import Ability
from nodedaemon.holders import Holder
from nodedaemon.records import CardRecord
from puhui.v1.job_pb2 import ReclaimMode

__all__ = ["MismatchError", "RungPlan", "belongs_to_command", "pair_cards", "plan_rungs"]

_DETACH = ReclaimMode.RECLAIM_MODE_DETACH
_CHECKPOINT = ReclaimMode.RECLAIM_MODE_CHECKPOINT
_STOP = ReclaimMode.RECLAIM_MODE_STOP
_MOST_NAMED = 8


class MismatchError(Exception):
    """Processes cannot be restored on the slices that are there; the text says which it takes."""


@dataclass(frozen=True)
class RungPlan:
    """What is to be tried, the mildest first."""

    rungs: tuple[ReclaimMode.ValueType, ...]
    why_not: str = ""
    """What keeps the cards from being taken when `rungs` is empty or fails, and what would help."""


def plan_rungs(holders: Sequence[Holder], hardest: ReclaimMode.ValueType, ability: Ability) -> RungPlan:
    """Plans how to take cards.

    Args:
        holders: processes of the container that hold them.
        hardest: DETACH, CHECKPOINT or STOP.
        ability: what can checkpoint processes here.
    """
    if not holders:
        return RungPlan((_DETACH,))
    rungs = []
    reasons = [f"its cards are held by process {', '.join(map(str, holders[:_MOST_NAMED]))}"]
    if hardest >= _CHECKPOINT:
        if ability.name:
            rungs.append(_CHECKPOINT)
        else:
            reasons.append(ability.notice)
    else:
        reasons.append("checkpointing is not allowed")
    if hardest >= _STOP:
        rungs.append(_STOP)
    else:
        reasons.append("ending them takes reclaim mode `stop`, which the job must allow")
    return RungPlan(tuple(rungs), "; ".join(reasons))


def belongs_to_command(
    pid: int, init: int, parents: Mapping[int, int], begun: Mapping[int, int], *, has_init: bool
) -> bool:
    """Returns whether a process is of a container's own command, and not of what Exec started in it.

    Where there is an init process it has the command as its first child; what outlives its own parent becomes a child
    of it later. Where there is none the first process is the command.

    Args:
        pid: the process.
        init: the container's first process.
        parents: the parent of each process.
        begun: when each process began, in clock ticks since the host was started.
        has_init: whether the first process is an init process.
    """
    children = [child for child, parent in parents.items() if parent == init]
    top = min(children, key=lambda child: (begun.get(child, 0), child), default=init) if has_init else init
    seen = {init} if pid != init else set()
    while pid not in seen:
        if pid in (init, top):
            return True
        seen.add(pid)
        pid = parents.get(pid, pid)
    return pid == top


def pair_cards(old: Collection[CardRecord], new: Collection[CardRecord]) -> list[tuple[CardRecord, CardRecord]]:
    """Returns which new card each old one is restored on. A slice that is there again is itself.

    Raises:
        MismatchError: there is none of the same profile of the same model for one of them.
    """
    left = list(new)
    pairs = []
    for one in sorted(old, key=lambda card: all(card.uuid != other.uuid for other in new)):
        fitting = [other for other in left if (other.model, other.profile) == (one.model, one.profile)]
        if not fitting:
            have = ", ".join(f"{other.profile} of an {other.model}" for other in new) or "no slice"
            raise MismatchError(
                f"its processes were checkpointed on a {one.profile} of an {one.model}, and can go on only on another "
                f"such; it sees {have}"
            )
        chosen = next((other for other in fitting if other.uuid == one.uuid), fitting[0])
        left.remove(chosen)
        pairs.append((one, chosen))
    return pairs
