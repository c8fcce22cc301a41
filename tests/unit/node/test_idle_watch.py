"""What is sampled for whom, what is told, and what a look now finds."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nodedaemon.driver_facts import GpuFacts, Mig
from nodedaemon.events import EventLog
from nodedaemon.gpm import GpmSample, Means
from nodedaemon.idle_watch import Idling
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage, IdleRecord
from nodedaemon.telemetry import Telemetry
from nodedaemon.utilization import Card, Look, Reading
from nodedaemon.utilization_watcher import Watcher
from puhui.rpc.moment import moment
from puhui.v1.node_pb2 import NodeEvent, NodeEventKind, RuntimeKind

_OWNER = Owner("centre", "j-1", 1)
_IDLE = NodeEventKind.NODE_EVENT_KIND_CONTAINER_IDLE
_BUSY = NodeEventKind.NODE_EVENT_KIND_CONTAINER_BUSY
_KIND = RuntimeKind.RUNTIME_KIND_PROCESS


class _Cards:
    emulated = True

    def every(self) -> list[GpuFacts]:
        return [GpuFacts("GPU-0", 0, 0, "model", 80 * 1024, "", Mig.ENABLED)]


class _Meter:
    """One GPU with two slices, as busy as it is told to be."""

    def __init__(self) -> None:
        self.percent = 0.0
        self.looks = 0
        self.looked_s = 0.0

    def look(self, gpu: GpuFacts) -> Look:
        self.looks += 1
        self.looked_s = time.time()
        cards = [Card(gpu.uuid), Card("MIG-1", 1, 0), Card("MIG-2", 2, 0)]
        return Look(
            gpu.uuid,
            {
                card: Reading(card, time.monotonic(), time.time(), 1, memory_used_mib=5, gpm=GpmSample(object()))
                for card in cards
            },
        )

    def means(self, first: GpmSample, second: GpmSample) -> Means:
        return Means(self.percent, self.percent)

    def free(self, sample: GpmSample) -> None:
        pass


class _FullJournal(Journal):
    """A journal on a disk that may be full."""

    full = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.refused = asyncio.Event()

    def add_event(self, time: float, message: bytes) -> int:
        if self.full:
            self.refused.set()
            raise OSError(errno.ENOSPC, "the disk is full")
        return super().add_event(time, message)


class _Telemetry(Telemetry):
    """Notes when watchers come and go."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__(_Cards(), meter)
        self.served = asyncio.Event()

    @contextlib.contextmanager
    def serving(self, watcher: Watcher) -> Iterator[Watcher]:
        try:
            with super().serving(watcher):
                self.served.set()
                yield watcher
        finally:
            self.served.set()


@dataclass
class Bench:
    """What watches the containers of one daemon."""

    journal: _FullJournal
    events: EventLog
    telemetry: _Telemetry
    meter: _Meter
    idling: Idling

    def put(
        self, *slices: str, stage: ContainerStage = ContainerStage.RUNNING, idle_after_s: float | None = 0.5
    ) -> ContainerRecord:
        """Writes down what a container sees and does."""
        if idle_after_s is not None and self.journal.idle(_OWNER) is None:
            self.journal.put_idle(IdleRecord(_OWNER, idle_after_s, 1.0, 0.0))
        return self.journal.put_container(ContainerRecord(_OWNER, 1, stage, "image", "bundle", slices, 1, 1))

    async def told(self, kind: NodeEventKind.ValueType, after: int = 0) -> NodeEvent:
        async with asyncio.timeout(20):
            async for event in self.events.watch(after):
                if event.kind == kind:
                    return event
        raise AssertionError("the event stream ended")


@contextlib.asynccontextmanager
async def living(journal: _FullJournal) -> AsyncIterator[Bench]:
    events = EventLog(journal)
    meter = _Meter()
    telemetry = _Telemetry(meter)
    idling = Idling(journal, events, telemetry, _KIND)
    tasks = [asyncio.create_task(telemetry.run()), asyncio.create_task(idling.run())]
    try:
        yield Bench(journal, events, telemetry, meter, idling)
        assert not any(task.done() for task in tasks)
    finally:
        for task in reversed(tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[_FullJournal]:
    with contextlib.closing(_FullJournal(tmp_path / "node.db")) as opened:
        yield opened


@pytest.fixture
async def bench(journal: _FullJournal) -> AsyncIterator[Bench]:
    async with living(journal) as one:
        yield one


async def settled(bench: Bench, watchers: int) -> None:
    async with asyncio.timeout(5):
        while bench.telemetry.watchers != watchers:
            bench.telemetry.served.clear()
            await bench.telemetry.served.wait()


async def test_nothing_is_sampled_for_nobody(bench: Bench) -> None:
    record = bench.put("MIG-1", idle_after_s=None)
    await settled(bench, 0)
    assert bench.idling.describe(record) is None
    assert bench.idling.latest(_OWNER) is None
    assert await bench.idling.look(_OWNER) is None
    bench.put()
    await settled(bench, 0)
    assert bench.meter.looks == 0
    bench.put("MIG-1")
    await settled(bench, 1)
    bench.put("MIG-1", stage=ContainerStage.SUSPENDED)
    await settled(bench, 0)
    bench.put("MIG-1")
    await settled(bench, 1)
    bench.put("MIG-1", stage=ContainerStage.EXITED)
    await settled(bench, 0)
    assert bench.idling.latest(_OWNER) is not None
    bench.journal.delete_container(_OWNER)
    await settled(bench, 0)
    assert bench.idling.latest(_OWNER) is None


async def test_it_is_told_within_milliseconds_of_the_sample(bench: Bench) -> None:
    bench.put("MIG-1", "MIG-2")
    told = await bench.told(_IDLE)
    assert moment(told.time) - bench.meter.looked_s < 0.1
    bench.meter.percent = 50
    told = await bench.told(_BUSY, told.cursor)
    assert told.container.idleness.message.startswith("uses its card: multiprocessors 50 %")


async def test_a_look_now_finds_what_the_last_sample_did_not(bench: Bench) -> None:
    bench.put("MIG-1", idle_after_s=20.0)  # a sample every 4 s
    await settled(bench, 1)
    looks = bench.meter.looks
    begun = time.monotonic()
    first = await bench.idling.look(_OWNER)
    assert first is not None
    second = await bench.idling.look(_OWNER)
    assert second is not None
    assert second.signal == "multiprocessors"
    bench.meter.percent = 50
    third = await bench.idling.look(_OWNER)
    assert third is not None
    assert (third.idle, third.used) == (False, True)
    assert bench.meter.looks > looks
    assert time.monotonic() - begun < 3


async def test_who_is_taken_its_cards_while_it_is_looked_at_is_not_waited_for(bench: Bench) -> None:
    bench.put("MIG-1", "MIG-3", idle_after_s=20.0)  # one of them is nowhere, so no look is whole
    await settled(bench, 1)
    looking = asyncio.create_task(bench.idling.look(_OWNER))
    await asyncio.sleep(0)
    bench.put()
    state = await asyncio.wait_for(looking, 2)
    assert state is not None
    assert state.held_to_s is None


async def test_what_could_not_be_written_is_told_once_it_can_be(bench: Bench) -> None:
    bench.put("MIG-1")
    bench.journal.full = True
    await asyncio.wait_for(bench.journal.refused.wait(), 10)
    state = bench.idling.latest(_OWNER)
    assert state is not None
    assert not state.idle
    bench.journal.full = False
    assert (await bench.told(_IDLE)).container.idleness.idle


async def test_seconds_are_kept_over_a_kill_and_what_was_not_seen_counts_as_busy(tmp_path: Path) -> None:
    with contextlib.closing(_FullJournal(tmp_path / "node.db")) as journal:
        at_s = time.monotonic()
        journal.put_idle(IdleRecord(_OWNER, 60, 1, 0, at_s - 100, True, at_s - 10, 20, 90, 9000, 4))
        journal.put_container(ContainerRecord(_OWNER, 1, ContainerStage.RUNNING, "image", "bundle", ("MIG-1",), 1, 1))
        async with living(journal) as bench:
            await settled(bench, 1)
            record = journal.container(_OWNER)
            assert record is not None
            idleness = bench.idling.describe(record)
            assert idleness is not None
            assert idleness.busy_seconds == pytest.approx(30, abs=1)
            assert idleness.held_seconds == pytest.approx(100, abs=1)
            assert (idleness.peak_memory_mib, idleness.memory_samples) == (9000, 4)
            ended = journal.put_container(replace(record, stage=ContainerStage.EXITED))
            last = bench.idling.describe(ended)
            assert last is not None
            assert last.held_seconds >= idleness.held_seconds
            assert last.peak_memory_mib == 9000
        kept = journal.idle(_OWNER)
        assert kept is not None
        assert kept.held_seconds >= 100
        assert (kept.peak_memory_mib, kept.memory_samples) == (9000, 4)
