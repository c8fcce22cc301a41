"""Sessions on a simulated fleet, with and without reclaim: events in time order, decisions that are the servers' own.

Who gets which share, what is taken over warm, what is evicted and who moves to another node is decided by
`controlplane.schedule`; after how many samples a share counts as idle by `nodedaemon.idle`. Reclaiming, cutting and
moving take no time here, and every share can be taken back once its run is over: what a session does between its runs
holds no card open.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from bench.idle_day import Session
from bench.idle_fleet import Fleet
from controlplane.eviction import Promise
from controlplane.fleet import Geometry
from controlplane.placement import Decision
from controlplane.reservations import AttemptKey
from controlplane.schedule import QueuedJob, make_plan
from nodedaemon import idle
from nodedaemon.idle import Glance, IdlePolicy, IdleState
from puhui.v1.node_service_pb2 import UtilizationSample, UtilizationSource

__all__ = ["Outcome", "Rules", "samples_until_idle", "simulate"]

_T = TypeVar("_T")

PATIENCE_S = 60.0
"""As the control plane's own default."""


@dataclass(frozen=True)
class Rules:
    """How shares are taken back."""

    idle_after_s: float
    """A share that is unused for this long is taken back; infinite: never."""
    warm_s: float = 60.0
    """Its slice is kept for its tenant for this long."""


@dataclass
class Outcome:
    """What a fleet did for a day of sessions."""

    gpus: int = 0
    """How many there were at the end."""
    busy_slice_s: float = 0.0
    """Memory slices times the seconds in which a run used them."""
    held_slice_s: float = 0.0
    """Memory slices times the seconds in which a session had them."""
    held_gpu_s: float = 0.0
    """GPUs on which a session had something, times the seconds."""
    peak_gpus_held: int = 0
    waits_s: list[float] = field(default_factory=list)
    """From each run instruction to its run."""
    shares: Counter[str] = field(default_factory=Counter)
    """How run instructions got their share: "kept", "warm", "cut"; besides, "evicted" and "moved"."""
    ended_s: float = 0.0
    """When the last session ended."""


def samples_until_idle(idle_after_s: float) -> int:
    """Returns how many samples without use in a row make a share idle, as the node daemon decides it."""
    policy = IdlePolicy(idle_after_s, 1.0, 0.0)
    state, number = idle.hold(IdleState(), 0.0), 0
    used = _glance(0.0, 50.0)
    state = idle.step(policy, state, used, 0.0)
    while not state.idle:
        number += 1
        state = idle.step(policy, state, _glance(number * policy.interval_s, 0.0), 0.0)
    return number


def _glance(at_s: float, percent: float) -> Glance:
    source = UtilizationSource.UTILIZATION_SOURCE_GPM
    sample = UtilizationSample(uuid="MIG-1", source=source, multiprocessor_percent=percent, engine_percent=percent)
    return Glance(at_s, [sample])


def simulate(sessions: Iterable[Session], kind: Geometry, rules: Rules, gpus: int | None = None) -> Outcome:
    """Returns what happens to sessions.

    Args:
        sessions: who comes.
        kind: what each GPU can be cut into.
        rules: how shares are taken back.
        gpus: how many GPUs there are; None: as many as are needed so that nobody waits.

    Raises:
        ValueError: a session needs what no GPU of this kind has.
    """
    return _Simulation(kind, rules, gpus).run(sessions)


@dataclass(eq=False)
class _Guest:
    """A session while it lasts."""

    session: Session
    sequence: int
    next_run: int = 0
    asked_s: float = 0.0
    key: AttemptKey | None = None
    """Its share; None while it has none."""
    taken_s: float = 0.0
    turns: int = 0
    """How often it had a share; part of its key."""
    home: str = ""


class _Simulation:
    def __init__(self, kind: Geometry, rules: Rules, gpus: int | None) -> None:
        self._rules = rules
        self._grows = gpus is None
        self._fleet = Fleet(kind, gpus or 0)
        self._outcome = Outcome()
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._queue: dict[str, _Guest] = {}
        self._promised: dict[str, Promise] = {}
        self._reclaims = math.isfinite(rules.idle_after_s)
        if self._reclaims:
            self._interval_s = idle.sampling_interval_s(rules.idle_after_s)
            self._samples = samples_until_idle(rules.idle_after_s)

    def run(self, sessions: Iterable[Session]) -> Outcome:
        for number, session in enumerate(sessions):
            guest = _Guest(session, number)
            self._at(session.begins_s, lambda guest=guest: self._ask(guest))  # type: ignore[misc]
        outcome = self._outcome
        while self._events:
            at_s, _, happens = heapq.heappop(self._events)
            outcome.held_gpu_s += self._fleet.gpus_held * (at_s - self._now_s)
            self._now_s = at_s
            happens()
            self._plan()
            outcome.peak_gpus_held = max(outcome.peak_gpus_held, self._fleet.gpus_held)
        if self._queue:
            waiting = next(iter(self._queue.values())).session
            raise ValueError(f"{waiting.profile or waiting.required_mib} fits on no GPU of {len(self._fleet)}")
        outcome.gpus = len(self._fleet)
        return outcome

    def _at(self, at_s: float, happens: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, happens))

    # What sessions do

    def _ask(self, guest: _Guest) -> None:
        guest.asked_s = self._now_s
        if guest.key is not None:
            self._begin(guest, "kept")
        else:
            self._queue[guest.session.id] = guest

    def _begin(self, guest: _Guest, how: str) -> None:
        self._outcome.shares[how] += 1
        self._outcome.waits_s.append(self._now_s - guest.asked_s)
        length_s = guest.session.runs[guest.next_run].length_s
        guest.next_run += 1
        self._at(self._now_s + length_s, lambda: self._end_run(guest, length_s))

    def _end_run(self, guest: _Guest, length_s: float) -> None:
        key = _present(guest.key)
        use = _present(self._fleet.find(key))
        self._outcome.busy_slice_s += use.size * length_s
        session = guest.session
        if guest.next_run < len(session.runs):
            next_s = self._now_s + session.runs[guest.next_run].pause_s
            self._at(next_s, lambda: self._ask(guest))
        else:
            next_s = self._now_s + session.closing_s
            self._at(next_s, lambda: self._close(guest))
        if self._reclaims:
            # The sample that comes next has still seen the run.
            seen = math.ceil((self._now_s - guest.taken_s) / self._interval_s)
            idle_s = guest.taken_s + (seen + self._samples) * self._interval_s
            if idle_s < next_s:
                self._at(idle_s, lambda: self._reclaim(guest))

    def _close(self, guest: _Guest) -> None:
        self._outcome.ended_s = self._now_s
        if guest.key is not None:
            self._fleet.remove(self._give_back(guest))

    def _reclaim(self, guest: _Guest) -> None:
        key = self._give_back(guest)
        until_s = self._now_s + self._rules.warm_s
        if self._rules.warm_s <= 0:
            self._fleet.remove(key)
            return
        self._fleet.warm(key, until_s)
        self._at(until_s, lambda: self._drop(key))

    def _drop(self, key: AttemptKey) -> None:
        if self._fleet.find(key) is not None:
            self._fleet.remove(key)

    def _give_back(self, guest: _Guest) -> AttemptKey:
        key = _present(guest.key)
        use = _present(self._fleet.find(key))
        self._outcome.held_slice_s += use.size * (self._now_s - guest.taken_s)
        guest.key = None
        return key

    # What the control plane does

    def _plan(self) -> None:
        while self._queue:
            waiting = sorted((_queued(guest) for guest in self._queue.values()), key=lambda job: job.rank)
            plan = make_plan(
                waiting,
                self._fleet.views,
                self._now_s,
                PATIENCE_S,
                nodes_known=self._fleet.nodes,
                promised=self._promised,
            )
            self._promised = plan.promised
            for job, decision, _ in plan.placed:
                self._place(self._queue.pop(job.id), decision)
            for key in plan.evict:
                self._outcome.shares["evicted"] += 1
                self._fleet.remove(key)
            if plan.placed or plan.evict:
                continue
            if self._grows:
                self._grow()
                continue
            if plan.wake_at is not None and plan.wake_at > self._now_s:
                self._at(plan.wake_at, lambda: None)
            return

    def _grow(self) -> None:
        kind = self._fleet.kind
        for guest in self._queue.values():
            profile, mib = guest.session.profile, guest.session.required_mib
            if not any(shape.profile == profile if profile else shape.memory_mib >= mib for shape in kind.shapes):
                raise ValueError(f"{profile or mib} fits on no {kind.gpu_model}")
        self._fleet.grow()

    def _place(self, guest: _Guest, decision: Decision) -> None:
        guest.turns += 1
        guest.key = guest.session.id, guest.turns
        guest.taken_s = self._now_s
        self._outcome.shares["moved"] += decision.move
        guest.home = decision.gpu.node_id
        self._fleet.take(guest.key, guest.session.tenant, decision)
        self._begin(guest, "warm" if decision.take_over is not None else "cut")


def _queued(guest: _Guest) -> QueuedJob:
    session = guest.session
    return QueuedJob(
        session.id,
        0,
        guest.sequence,
        session.profile,
        session.required_mib,
        since=guest.asked_s,
        tenant=session.tenant,
        person=bool(guest.home),
        home=guest.home,
        may_move=True,
    )


def _present(found: _T | None) -> _T:
    if found is None:
        raise RuntimeError("a session has no share while it should")
    return found
