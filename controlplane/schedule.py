"""Who goes next: queue and fleet in, plan out.

Persons who wait come first, then the queue by priority and age, and at last the reclaimed batch jobs that would go on
by themselves. A job gets, in this order: a warm slice of its tenant, free room, room that idle shares are evicted from.
A job whose container lives on a node looks there only; where that node has nothing even so, a job that a person waits
for may move.

Room that is being vacated is promised to the job that waits for it: the next plan is told of it, and gives it to
another only if that one comes first in the queue and finds no other. A job that does not fit lets later ones overtake
it, so that room is not wasted, but not for ever: once it has waited for `patience_s`, the placement at which it will
fit soonest is kept for it, and nobody behind it in the queue is placed there. Since every job ahead of it ends or waits
like it, that placement becomes free and is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from controlplane.eviction import Eviction, Promise
from controlplane.fleet import GpuView
from controlplane.placement import Decision
from controlplane.queued_job import QueuedJob
from controlplane.reasons import Reasons, ordinal, suffix
from controlplane.reservations import AttemptKey
from controlplane.room import Room
from controlplane.sizing import choices_for
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["Plan", "QueuedJob", "make_plan"]

_Found = TypeVar("_Found")
_NOTHING_PROMISED: Mapping[str, Promise] = {}


@dataclass
class Plan:
    """What to do now."""

    placed: list[tuple[QueuedJob, Decision, list[ProfileChoice]]] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """Why each other job waits, in a sentence, by job id; in the order of the queue."""
    evict: dict[AttemptKey, str] = field(default_factory=dict)
    """Idle shares, warm ones among them, that are to be taken back now, each with the job that waits for it."""
    promised: dict[str, Promise] = field(default_factory=dict)
    """Room that shares leave for waiting jobs, by job id; the next plan is to be told of it."""
    wake_at: float | None = None
    """The plan may change at this time without anything having happened."""


def make_plan(
    queue: Iterable[QueuedJob],
    gpus: Sequence[GpuView],
    at: float,
    patience_s: float,
    *,
    nodes_known: int,
    promised: Mapping[str, Promise] = _NOTHING_PROMISED,
) -> Plan:
    """Decides which waiting jobs start now, and where.

    Args:
        queue: every job that waits, in the order of `QueuedJob.rank`.
        gpus: every GPU that can be cut, with what is held of it.
        at: now, in seconds since the epoch.
        patience_s: how long a job lets itself be overtaken, in seconds.
        nodes_known: number of nodes that ever joined, for the messages.
        promised: what the plan before promised.
    """
    waiting = list(queue)
    maker = _Maker(gpus, at, patience_s, nodes_known)
    if promised:
        maker.reserve(waiting, promised)
    for job in waiting:
        maker.look_at(job)
    return maker.plan


class _Maker:
    """A plan that is being made, one job after the other in the order of the queue."""

    def __init__(self, gpus: Sequence[GpuView], at: float, patience_s: float, nodes_known: int) -> None:
        self.plan = Plan()
        self._at = at
        self._patience_s = patience_s
        self._room = Room(gpus)
        self._geometries = list(dict.fromkeys(gpu.geometry for gpu in gpus))
        self._reasons = Reasons(gpus, self._geometries, nodes_known)
        self._choices: dict[Hashable, list[ProfileChoice]] = {}
        # Room only shrinks while a plan is made: what was not found once is not looked for again.
        self._misses: set[Hashable] = set()
        self._promised: dict[str, Promise] = {}

    def reserve(self, queue: Iterable[QueuedJob], promised: Mapping[str, Promise]) -> None:
        for job in queue:
            promise = promised.get(job.id)
            if promise is not None and self._room.reserve(job.id, promise):
                self._promised[job.id] = promise

    def look_at(self, job: QueuedJob) -> None:
        wanted = self._wanted(job)
        own = self._redeem(job, wanted)
        if job.not_before > self._at:
            why = "it was not using its share, and rests" if job.rest else "its node could not start it"
            self._wait(job, wanted, f"{why}; tries again in {job.not_before - self._at:.0f} s")
            self._wake_at(job.not_before)
            return
        if job.home and not self._room.usable(job.home):
            self._wait(job, wanted, self._reasons.away(job.home))
            return
        for node in job.nodes if wanted else ():
            found = self._look_on(job, wanted, node, own)
            if found is not None and found is not own and job.id in self._promised:
                self._misses.clear()
            if isinstance(found, Decision):
                self._place(job, wanted, found)
                return
            if found is not None:
                self._wait(job, wanted, self._why(job, wanted), during=found)
                self._room.promise(found)
                self.plan.promised[job.id] = found.promise
                self.plan.evict.update({use.key: job.id for use in found.shares if use.key is not None})
                return
        self._wait(job, wanted, self._why(job, wanted), kept=self._keep(job, wanted))

    def _redeem(self, job: QueuedJob, wanted: list[ProfileChoice]) -> Decision | Eviction | None:
        promise = self._promised.get(job.id)
        own = self._room.redeem(job.id, promise) if promise is not None else None
        if own is None:
            return None
        decision = own if isinstance(own, Decision) else own.decision
        kind = decision.gpu.geometry.gpu_model, decision.shape.profile
        return own if any(kind == (one.gpu_model, one.profile) for one in wanted) else None

    def _look_on(
        self, job: QueuedJob, wanted: list[ProfileChoice], node: str, own: Decision | Eviction | None
    ) -> Decision | Eviction | None:
        room, need = self._room, job.need
        elsewhere = own is not None and node not in {"", _where(own)}
        here = None if elsewhere else own
        warm = self._once(
            ("warm", need, node, job.tenant, job.rest),
            lambda: room.warm(wanted, job.tenant, job.id, node, rest=job.rest),
        )
        if warm is not None:
            return warm
        if job.rest:
            return self._once(("rest", need, node), lambda: room.at_rest(wanted, node))
        at_once = (
            (here if isinstance(here, Decision) else None)
            or self._once(("free", need, node), lambda: room.best(wanted, node))
            or here
            or self._press(("press", need, node), lambda: room.best(wanted, node, press=True))
        )
        # For whom shares leave another node already, nothing more is evicted on this one.
        if at_once is not None or elsewhere:
            return at_once
        return self._once(("evict", need, node), lambda: room.eviction(wanted, node)) or self._press(
            ("press out", need, node), lambda: room.eviction(wanted, node, press=True)
        )

    def _place(self, job: QueuedJob, wanted: list[ProfileChoice], decision: Decision) -> None:
        self._room.take(decision)
        moves = bool(job.home) and decision.gpu.node_id != job.home
        self.plan.placed.append((job, replace(decision, move=True) if moves else decision, wanted))

    def _wanted(self, job: QueuedJob) -> list[ProfileChoice]:
        if job.need not in self._choices:
            found = choices_for(job.profile, job.required_mib, self._geometries)
            self._choices[job.need] = [one for one in found if job.gpu_model in {"", one.gpu_model}]
        return self._choices[job.need]

    def _keep(self, job: QueuedJob, wanted: list[ProfileChoice]) -> bool:
        """Keeps room for a job whose patience is over; returns whether there is any to keep."""
        if job.rest or not wanted:
            return False
        if self._at - job.since < self._patience_s:
            self._wake_at(job.since + self._patience_s)
            return False
        node = job.nodes[-1]
        kept = self._once(("keep", job.need, node), lambda: self._room.nearest(wanted, node))
        if kept is None:
            return False
        self._room.keep(*kept)
        return True

    def _wait(
        self,
        job: QueuedJob,
        wanted: list[ProfileChoice],
        why: str,
        *,
        during: Eviction | None = None,
        kept: bool = False,
    ) -> None:
        if not job.rest:
            self._room.wish(wanted, job.nodes[-1])
        place = ordinal(len(self.plan.waiting) + 1)
        self.plan.waiting[job.id] = f"{place} in the queue; {why}{suffix(during, kept=kept, rest=job.rest)}"

    def _why(self, job: QueuedJob, wanted: list[ProfileChoice]) -> str:
        return self._reasons.of(job, wanted, self._room)

    def _once(self, what: Hashable, search: Callable[[], _Found | None]) -> _Found | None:
        if what in self._misses:
            return None
        found = search()
        if found is None:
            self._misses.add(what)
        return found

    def _press(self, what: Hashable, search: Callable[[], _Found | None]) -> _Found | None:
        found = self._once(what, search)
        if found is not None:
            # What is left of the reserve is there for the others again.
            self._misses.clear()
        return found

    def _wake_at(self, at: float) -> None:
        self.plan.wake_at = at if self.plan.wake_at is None else min(self.plan.wake_at, at)


def _where(own: Decision | Eviction) -> str:
    return (own if isinstance(own, Decision) else own.decision).gpu.node_id
