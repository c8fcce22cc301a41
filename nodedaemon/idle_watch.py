"""Watches whether containers use their cards (step S6), tells when that changes, and counts the seconds.

Nothing is sampled while no container that is to be watched has a card. Each one's samples come from the sampler that
serves all watchers, which looks at a GPU once for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from nodedaemon import idle
from nodedaemon.descriptions import describe_container
from nodedaemon.events import EventLog
from nodedaemon.idle import Glance, IdlePolicy, IdleState
from nodedaemon.journal import Journal
from nodedaemon.memory_peak import MemoryPeak
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage, IdleRecord
from nodedaemon.telemetry import Telemetry
from nodedaemon.utilization_watcher import Watcher
from puhui.rpc.moment import moment, now, timestamp
from puhui.v1.idle_pb2 import Idleness
from puhui.v1.node_pb2 import NodeEventKind, RuntimeKind
from puhui.v1.node_service_pb2 import UtilizationSample, UtilizationSource

__all__ = ["Idling"]

_log = structlog.get_logger(__name__)

_SAVE_S = 5.0
_LOOK_S = 5.0


@dataclass(eq=False)
class _Watched:
    """One container that is to be watched."""

    owner: Owner
    policy: IdlePolicy
    state: IdleState
    started_s: float | None
    slices: tuple[str, ...] = ()
    """What is being sampled; none while it has no card, or is frozen."""
    watcher: Watcher | None = None
    task: asyncio.Task[None] | None = None
    saved_s: float = 0.0
    looked: asyncio.Condition = field(default_factory=asyncio.Condition)
    sampled_time_s: float = 0.0
    """When the card that was sampled longest ago was, by the wall clock."""


class Idling:
    """What the containers of this node do with their cards.

    Usage::

        # what is to be watched is in the journal, by `Journal.put_idle`, before its container is
        task = asyncio.create_task(idling.run())

    Args:
        journal: where the containers are, and what was counted of them.
        events: where it is told that one became idle, or busy.
        telemetry: samples their cards.
        kind: what runs them.
        monotonic: seconds that never jump, the same for all processes of the host since it was started.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        journal: Journal,
        events: EventLog,
        telemetry: Telemetry,
        kind: RuntimeKind.ValueType,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = now,
    ) -> None:
        self._journal = journal
        self._events = events
        self._telemetry = telemetry
        self._kind = kind
        self._monotonic = monotonic
        self._wall = wall
        self._known: dict[Owner, _Watched] = {}
        self._changed: dict[Owner, None] = {}
        self._news = asyncio.Event()
        self.commands: Callable[[Owner], int] = lambda owner: 0
        """Returns how many commands beside its own run in a container."""
        journal.on_container = self._note

    # For those who describe and reclaim containers ---------------------------------------------------

    def latest(self, owner: Owner) -> IdleState | None:
        """Returns what was seen last of an attempt's container; None when it is not watched."""
        one = self._find(owner)
        record = self._journal.container(owner)
        if one is None or record is None:
            return None
        return self._settled(one, record, self._monotonic())

    async def look(self, owner: Owner) -> IdleState | None:
        """Looks at the cards of an attempt's container now; None when it is not watched.

        With GPM it takes up to 105 ms: two samples of a card are further apart than 100 ms. The state's `idle` says
        whether the cards were left unused from when the container became idle until now. Where they cannot be looked
        at within 5 s it is not idle, and its signal is "unavailable".
        """
        one = self._find(owner)
        if one is None or one.watcher is None:
            return self.latest(owner)
        asked_time_s = self._wall()
        watcher = one.watcher
        try:
            async with asyncio.timeout(_LOOK_S), one.looked:
                while one.watcher is watcher and one.sampled_time_s < asked_time_s:
                    # Again after each: what was sampled before this was asked may have come first.
                    self._telemetry.hasten(watcher)
                    await one.looked.wait()
        except TimeoutError:
            reading = f"its cards did not answer within {_LOOK_S:g} s"
            return replace(one.state, idle=False, unused_since_s=None, signal="unavailable", reading=reading)
        return self.latest(owner)

    def began(self, owner: Owner) -> None:
        """A command began in an attempt's container: what was found before that says nothing of it."""
        one = self._find(owner)
        record = self._journal.container(owner)
        if one is None or record is None or not one.slices:
            return
        was_idle = one.state.idle
        one.state = idle.begin(one.state)
        if was_idle:
            self._tell(record, one.state, self._monotonic())

    def describe(self, record: ContainerRecord) -> Idleness | None:
        """Returns whether a container uses its cards, for the wire; None when it is not watched."""
        one = self._find(record.owner)
        if one is None:
            return None
        at_s = self._monotonic()
        return idle.describe(self._settled(one, record, at_s), at_s, self._wall())

    # Which containers there are to be watched --------------------------------------------------------------

    async def run(self) -> None:
        """Watches until cancelled."""
        for record in self._journal.containers():
            self._note(record.owner)
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._news.wait()
                    self._news.clear()
                    while self._changed:
                        owner = next(iter(self._changed))
                        del self._changed[owner]
                        await self._follow(owner, group)
        finally:
            for one in self._known.values():
                self._save(one)

    def _note(self, owner: Owner) -> None:
        self._changed[owner] = None
        self._news.set()

    def _find(self, owner: Owner) -> _Watched | None:
        if owner not in self._known:
            kept = self._journal.idle(owner)
            if kept is None:
                return None
            # What passed since it was written was not seen, and counts as busy.
            state = IdleState(
                used=kept.used,
                held_to_s=kept.held_to_s if kept.held_to_s is None else min(kept.held_to_s, self._monotonic()),
                counting=True,
                busy_seconds=kept.busy_seconds,
                held_seconds=kept.held_seconds,
                memory=MemoryPeak(kept.peak_memory_mib, kept.memory_samples),
            )
            policy = IdlePolicy(kept.idle_after_s, kept.idle_below_percent, kept.start_grace_s)
            self._known[owner] = _Watched(owner, policy, state, kept.started_s)
        return self._known[owner]

    async def _follow(self, owner: Owner, group: asyncio.TaskGroup) -> None:
        """Begins, ends or changes the watch of a container to what the journal says of it now."""
        one = self._find(owner)
        if one is None:
            return
        record = self._journal.container(owner)
        if record is None or self._journal.idle(owner) is None:
            await self._end(one)
            self._known.pop(owner, None)
            return
        at_s = self._monotonic()
        if record.stage.is_alive and one.started_s is None:
            one.started_s = at_s
        wanted = record.slice_uuids if record.stage is ContainerStage.RUNNING else ()
        state = self._settled(one, record, at_s)
        if wanted != one.slices:
            await self._end(one)
            one.state = state
            one.slices = wanted
        elif state.held_to_s != one.state.held_to_s:
            one.state = state
        self._save(one)
        if wanted and one.task is None:
            one.watcher = Watcher(one.policy.interval_s, frozenset(wanted))
            one.task = group.create_task(self._sample(one, one.watcher))

    def _settled(self, one: _Watched, record: ContainerRecord, at_s: float) -> IdleState:
        """Returns a container's state as of now, where it no longer has what it was seen to have."""
        has_cards = record.stage.is_alive and bool(record.slice_uuids)
        if not has_cards:
            return idle.release(one.state, at_s) if one.state.held_to_s is not None else one.state
        if record.stage is ContainerStage.SUSPENDED:
            return idle.pause(one.state, at_s)
        if record.slice_uuids != one.slices:
            return idle.hold(one.state, at_s)
        return one.state

    async def _end(self, one: _Watched) -> None:
        if one.task is not None:
            one.task.cancel()
            await asyncio.wait([one.task])
        one.task = one.watcher = None
        one.slices = ()
        async with one.looked:
            one.looked.notify_all()

    def _save(self, one: _Watched) -> None:
        """Keeps what was counted. When the disk is full what is counted since is lost if the daemon dies."""
        policy, state = one.policy, one.state
        if self._journal.idle(one.owner) is None:
            return
        with contextlib.suppress(OSError):
            self._journal.put_idle(
                IdleRecord(
                    one.owner,
                    policy.idle_after_s,
                    policy.idle_below_percent,
                    policy.start_grace_s,
                    one.started_s,
                    state.used,
                    state.held_to_s,
                    state.busy_seconds,
                    state.held_seconds,
                    state.memory.mib,
                    state.memory.samples,
                )
            )
            one.saved_s = self._monotonic()

    # Sampling one ------------------------------------------------------------------------------------------

    async def _sample(self, one: _Watched, watcher: Watcher) -> None:
        """Looks at a container's cards until cancelled."""
        with self._telemetry.serving(watcher):
            while True:
                samples = await self._gather(one, watcher)
                if samples is None:
                    return
                await self._judge(one, samples)

    async def _gather(self, one: _Watched, watcher: Watcher) -> list[UtilizationSample] | None:
        """Returns samples of all cards, with one that says so for each that none came of in time; None at the end."""
        samples: list[UtilizationSample] = []
        missing = set(one.slices)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(one.policy.gap_s):
                while missing:
                    response = await watcher.take()
                    if response is None:
                        return None
                    samples += response.samples
                    missing -= {sample.uuid for sample in response.samples}
        for uuid in missing:
            samples.append(
                UtilizationSample(
                    uuid=uuid,
                    time=timestamp(self._wall()),
                    source=UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE,
                    notice=f"no sample of it has come for {one.policy.gap_s:g} s",
                )
            )
        return samples

    async def _judge(self, one: _Watched, samples: list[UtilizationSample]) -> None:
        """Takes in what was seen, and tells what has changed by it."""
        record = self._journal.container(one.owner)
        if record is None or record.stage is not ContainerStage.RUNNING or record.slice_uuids != one.slices:
            return  # it has just changed, and what follows that is under way
        at_s = self._monotonic()
        before = one.state
        one.state = idle.step(
            one.policy, before, Glance(at_s, samples, self.commands(one.owner)), one.started_s or at_s
        )
        if one.state.idle != before.idle:
            try:
                self._tell(record, one.state, at_s)
            except OSError as error:
                # It is found again, and told then.
                _log.error("what a container does cannot be written down yet", error=str(error))
                one.state = replace(one.state, idle=before.idle)
        if one.state.idle != before.idle or at_s - one.saved_s >= _SAVE_S:
            self._save(one)
        newest: dict[str, float] = {}
        for sample in samples:
            newest[sample.uuid] = max(moment(sample.time), newest.get(sample.uuid, 0.0))
        one.sampled_time_s = min(newest.values())
        async with one.looked:
            one.looked.notify_all()

    def _tell(self, record: ContainerRecord, state: IdleState, at_s: float) -> None:
        idleness = idle.describe(state, at_s, self._wall())
        kind = (
            NodeEventKind.NODE_EVENT_KIND_CONTAINER_IDLE if state.idle else NodeEventKind.NODE_EVENT_KIND_CONTAINER_BUSY
        )
        reason = "CARDS_UNUSED" if state.idle else "CARDS_USED"
        if not state.idle and (state.signal == "unavailable" or state.unused_since_s is not None):
            reason = "CARDS_NOT_SEEN"
        self._events.add(
            kind,
            reason,
            f"container {record.container_id[:12]} {idleness.message}",
            owner=record.owner.ref(record.token),
            container=describe_container(record, self._kind, idleness),
        )
