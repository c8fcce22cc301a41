"""Who goes next: queue and fleet in, plan out.

Higher priority first, then who has waited longest. A job that does not fit lets later ones overtake it, so
that room is not wasted, but not for ever: once it has waited for `patience_s`, the placement at which it
will fit soonest is kept for it, and nobody behind it in the queue is placed there. Since every job ahead of
it ends or waits like it, that placement becomes free and is its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from controlplane.fleet import Geometry, GpuView
from controlplane.placement import Decision, Room, most_slices
from controlplane.reservations import AttemptKey
from controlplane.sizing import choices_for, largest
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["Plan", "QueuedJob", "make_plan"]


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits, as far as the plan needs to know it."""

    id: str
    priority: int
    sequence: int
    profile: str
    """The profile that is wanted by name; "" for any with enough memory."""
    required_mib: int
    since: float
    """Waits since, in seconds since the epoch."""
    not_before: float = 0.0
    """Not to be placed before this time: the last try failed at its node."""
    tenant: str = ""
    """Whose it is; a warm slice goes only to a job of its own tenant."""
    person: bool = False
    """A person waits: for a run instruction, or for a resume that was asked for."""
    home: str = ""
    """Id of the node where its container lives; "" when it has none yet."""
    may_move: bool = False
    """It may go to another node when a person waits and its home has no room for it."""
    gpu_model: str = ""
    """Only on GPUs of this model, because what it had on one is restored from host memory; "" for any."""
    rest: bool = False
    """A reclaimed batch job that would go on by itself: takes only room that nobody else waits for, evicts nothing."""

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        """Position in the queue; the smallest is first: persons first, rest last."""
        return not self.person, self.rest, -self.priority, self.sequence

    @property
    def need(self) -> Hashable:
        """Jobs with the same need fit, or do not fit, together."""
        return self.profile, self.required_mib


@dataclass
class Plan:
    """What to do now."""

    placed: list[tuple[QueuedJob, Decision, list[ProfileChoice]]] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """Why each other job waits, in a sentence, by job id; in the order of the queue."""
    evict: dict[AttemptKey, str] = field(default_factory=dict)
    """Idle shares, warm ones among them, that are to be taken back now, each with the job that waits for it."""
    wake_at: float | None = None
    """The plan may change at this time without anything having happened."""


def make_plan(
    queue: Iterable[QueuedJob],
    gpus: Sequence[GpuView],
    at: float,
    patience_s: float,
    *,
    nodes_known: int,
) -> Plan:
    """Decides which waiting jobs start now, and where.

    Args:
        queue: every job that waits, in the order of `QueuedJob.rank`.
        gpus: every GPU that can be cut, with what is held of it.
        at: now, in seconds since the epoch.
        patience_s: how long a job lets itself be overtaken, in seconds.
        nodes_known: number of nodes that ever joined, for the messages.
    """
    plan = Plan()
    room = Room(gpus)
    geometries = list(dict.fromkeys(gpu.geometry for gpu in gpus))
    why = _Reasons(gpus, geometries, nodes_known)
    choices: dict[Hashable, list[ProfileChoice]] = {}
    # Room only shrinks while a plan is made: what did not fit once is not tried again.
    misses: set[Hashable] = set()
    ahead = ""
    for job in queue:
        if job.not_before > at:
            plan.waiting[job.id] = f"its node could not start it; tries again in {job.not_before - at:.0f} s"
            plan.wake_at = _earlier(plan.wake_at, job.not_before)
            continue
        if job.need not in choices:
            choices[job.need] = choices_for(job.profile, job.required_mib, geometries)
        wanted = choices[job.need]
        decision = None if job.need in misses else room.best(wanted)
        if decision is not None:
            room.take(decision)
            plan.placed.append((job, decision, wanted))
            continue
        misses.add(job.need)
        plan.waiting[job.id] = why.of(job, wanted, ahead, room)
        ahead = ahead or job.id
        if not wanted:
            continue
        if at - job.since >= patience_s:
            kept = room.nearest(wanted)
            if kept is not None:
                room.block(*kept)
        else:
            plan.wake_at = _earlier(plan.wake_at, job.since + patience_s)
    return plan


def _earlier(one: float | None, other: float) -> float:
    return other if one is None else min(one, other)


class _Reasons:
    """Sentences that say why a job waits. Jobs with the same need wait for the same reason."""

    def __init__(self, gpus: Sequence[GpuView], geometries: Sequence[Geometry], nodes_known: int) -> None:
        self._gpus = gpus
        self._geometries = geometries
        self._nodes_known = nodes_known
        self._made: dict[Hashable, str] = {}

    def of(self, job: QueuedJob, wanted: Sequence[ProfileChoice], ahead: str, room: Room) -> str:
        if job.need not in self._made:
            self._made[job.need] = self._make(job, wanted, room)
        return self._made[job.need] + (f"; next ahead: {ahead}" if ahead else "")

    def _make(self, job: QueuedJob, wanted: Sequence[ProfileChoice], room: Room) -> str:
        if not self._nodes_known:
            return "waits for a node: none has joined this centre yet"
        if not self._gpus:
            return "waits for a GPU: no node of this centre has one that can be cut; see `puhui nodes`"
        if not wanted:
            if job.profile:
                return f"waits for {job.profile}: no GPU of this centre offers it now"
            top = largest(self._geometries)
            most = f"{top.profile} with {top.memory_mib} MiB" if top is not None else "none"
            return f"waits for {job.required_mib} MiB: no card here is that large (the largest slice is {most})"
        return "waits for " + " or ".join(self._one(choice, room) for choice in wanted)

    def _one(self, choice: ProfileChoice, room: Room) -> str:
        gpus = [gpu for gpu in self._gpus if gpu.geometry.gpu_model == choice.gpu_model]
        usable = [gpu for gpu in gpus if gpu.usable]
        shape = next(shape for gpu in gpus if (shape := gpu.geometry.by_profile.get(choice.profile)) is not None)
        total = sum(most_slices(shape, 0) for _ in usable)
        free = sum(
            min(most_slices(shape, room.held(gpu)), shape.max_instances - room.count(gpu, shape)) for gpu in usable
        )
        away = f" ({len(gpus) - len(usable)} more out of contact)" if len(usable) < len(gpus) else ""
        return f"{choice.profile}: {free} of {total} placements free on {len(usable)} {choice.gpu_model}{away}"
