from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from controlplane.durations import Durations
from controlplane.fleet import GpuView, Use
from controlplane.forwarder import Forwarder
from controlplane.forwarding import Rules
from controlplane.forwards import ForwardRecord, ForwardStage
from controlplane.outlook import Outlook
from controlplane.peer_client import PeerClient
from controlplane.queued_job import QueuedJob
from controlplane.reach import Reach
from controlplane.records import Change, JobRecord
from controlplane.sqlite_store import SqliteStore
from controlplane.store import Store
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, timestamp
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2
from tests.unit.controlplane.centres import eventually
from tests.unit.controlplane.neighbours import FakeNeighbour, neighbour, summary
from tests.unit.controlplane.samples import first_events, queued, view

Answer = Callable[[wire.GetOfferRequest], wire.GetOfferResponse]


def accepts(wait_s: float = 0.0, **fields: Any) -> Answer:
    def answer(request: wire.GetOfferRequest) -> wire.GetOfferResponse:
        given: dict[str, Any] = {
            "accepted": True,
            "offer_id": f"offer for {request.origin.job_id}",
            "expected_wait": duration(wait_s),
            "cost": 1.0,
            "time": timestamp(7000.0),
            "expire_time": timestamp(7010.0),
            "longest_lease": duration(600),
            "profile": "1g.10gb",
            "gpu_model": "H",
            **fields,
        }
        return wire.GetOfferResponse(**given)

    return answer


def refuses(reason: str, retry_s: float = 30.0) -> Answer:
    return lambda _: wire.GetOfferResponse(reason=reason, message="no", retry_after=duration(retry_s))


def raises(error: Exception) -> Answer:
    def answer(_: wire.GetOfferRequest) -> wire.GetOfferResponse:
        raise error

    return answer


class Peer(FakeNeighbour):
    """A peer that answers at once, or when it is let."""

    def __init__(self, near: FakeNeighbour, answer: Answer) -> None:
        super().__init__(**vars(near))
        self.answer = answer
        self.asked: list[wire.GetOfferRequest] = []
        self.counted: list[tuple[bool, str]] = []
        self.let = asyncio.Event()
        self.let.set()

    @property
    def client(self) -> PeerClient:
        return cast("PeerClient", self)

    async def get_offer(self, request: wire.GetOfferRequest) -> wire.GetOfferResponse:
        self.asked.append(request)
        await self.let.wait()
        return self.answer(request)

    def offered(self, accepted: bool, reason: str = "") -> None:
        self.counted.append((accepted, reason))


@dataclass
class Peers:
    there: list[Peer]

    def get(self, name: str) -> Peer | None:
        return next((one for one in self.there if one.record.name == name), None)

    def all(self) -> list[Peer]:
        return self.there


@dataclass
class Clock:
    boot: str = "boot"
    at: float = 500.0

    def now(self) -> float:
        return self.at


@dataclass
class Here:
    """A full centre with a queue."""

    store: SqliteStore
    peers: Peers
    queue: list[QueuedJob] = field(default_factory=list)
    driven: list[JobRecord] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    views: list[GpuView] = field(default_factory=lambda: [view(uses=(Use("7g.80gb", 0, 8, False, key=("h", 1)),))])

    settle_s: float = 0.0
    ahead_s: float = 0.0

    @property
    def passed(self) -> float:
        return time.monotonic() + self.ahead_s

    def __post_init__(self) -> None:
        self.forwarder = Forwarder(
            "here",
            self.store,
            self,
            self.peers,
            self,
            Outlook(self, self, Durations(self.store), 60.0),
            Reach(cast("Any", self.peers), self.clock, "c-here", 900.0, 30.0, 86400.0),
            rules=Rules(first_delay_s=(0.0, 0.0)),
            chance=random.Random(1),
            meter=lambda: self.passed,
            settle_s=self.settle_s,
        )

    def gpus(self) -> list[GpuView]:
        return self.views

    def remove(self, job_id: str) -> None:
        self.queue = [job for job in self.queue if job.id != job_id]

    def drive(self, record: JobRecord) -> None:
        self.driven.append(record)

    async def submit(
        self, job_id: str = "j-1", change: Callable[[JobRecord], JobRecord] | None = None, **spec: Any
    ) -> None:
        record, events = first_events(queued(job_id, **spec))
        stored = await self.store.add_job(change(record) if change is not None else record, events)
        self.queue.append(QueuedJob(stored.id, 0, stored.sequence, "1g.10gb", 0, 1000.0))
        self.forwarder.wake()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.forwarder.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "puhui.db", Feed())
    yield opened
    await opened.close()


def peer(name: str, answer: Answer, **fields: Any) -> Peer:
    return Peer(neighbour(name, **fields), answer)


async def test_a_job_that_would_wait_goes_to_the_peer_that_begins_sooner(store: SqliteStore) -> None:
    here = Here(store, Peers([peer("b", accepts(90.0)), peer("c", accepts(3.0), cost=2.0)]))
    await here.submit(labels={"a": "b"}, peers=job_pb2.PeerPolicy(required_labels={}))
    async with here.running():
        await eventually(lambda: bool(here.driven))
    record = here.driven[0]
    assert (record.state, record.attempt.peer) == (job_pb2.JOB_STATE_STARTING, "c")
    assert not here.queue
    forward = await store.forward("j-1", 1)
    assert forward is not None
    assert (forward.stage, forward.peer, forward.offer_id) == (ForwardStage.SENDING, "c", "offer for j-1")
    assert forward.lease_end == 7000 + 600  # no longer than the peer gives
    assert forward.promised_wait_s == pytest.approx(3.02)
    assert [one.counted for one in here.peers.there] == [[(True, "")], [(True, "")]]


async def test_what_a_peer_is_asked(store: SqliteStore) -> None:
    there = peer("b", accepts(), tenants_out={"default": "guests"})
    here = Here(store, Peers([there]))
    await here.submit(
        resources=job_pb2.Resources(profile="1g.10gb", cpus=2),
        max_duration=duration(50),
        image="x",
        peers=job_pb2.PeerPolicy(forbidden_labels={"region": "us"}),
    )
    async with here.running():
        await eventually(lambda: bool(here.driven))
    (request,) = there.asked
    assert (request.origin.centre, request.origin.job_id, request.origin.attempt) == ("here", "j-1", 1)
    assert list(request.visited_centres) == ["c-here"]
    assert (request.tenant, request.hops_left, request.image) == ("guests", 1, "x")
    assert request.resources.cpus == 2
    assert request.expected_duration.seconds == 50
    assert request.sizing.required_mib == 9000


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (refuses("FULL"), "peers: b has no room for it within a day, or does not know when (FULL)"),
        (
            refuses("no such\x00reason"),
            "peers: b makes no offer, for a reason that this version does not know (UNKNOWN)",
        ),
        (accepts(1e6), "peers: b promises a start in 1000000 s, which is not worth it"),
        (
            raises(Refusal(grpc.StatusCode.UNAVAILABLE, "PEER_NOT_CALLED", "x")),
            "b only sends work, and cannot be asked",
        ),
        (raises(Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "x")), "b could not be reached, or was too slow"),
        (raises(RuntimeError("a bug")), "peers: b did not answer: its answer made no sense"),
        (accepts(offer_id=""), "peers: b did not answer: its offer made no sense"),
        (accepts(offer_id="x" * 1000), "its offer made no sense"),
        (accepts(longest_lease=duration(0)), "its offer made no sense"),
        (accepts(expire_time=timestamp(6999.0)), "its offer made no sense"),
        (accepts(cost=float("nan")), "its offer made no sense"),
        (accepts(cost=-1.0), "its offer made no sense"),
        (accepts(wait_s=-5.0), "its offer made no sense"),
    ],
)
async def test_whatever_a_peer_says_the_job_waits_on_and_it_is_told_why(
    store: SqliteStore, answer: Answer, why: str
) -> None:
    here = Here(store, Peers([peer("b", answer)]))
    here.views = [view(uses=(Use("7g.80gb", 0, 8, False, key=("h", 1)),))]
    await store.add_job(*first_events(queued("h")))  # what is in the way is known, and ends in ten minutes
    await here.submit()
    async with here.running():
        await eventually(lambda: why in here.forwarder.why_here("j-1"))
    assert not here.driven
    assert [job.id for job in here.queue] == ["j-1"]
    assert await store.forwards() == []


async def test_a_job_that_was_placed_here_meanwhile_is_not_sent(store: SqliteStore) -> None:
    there = peer("b", accepts())
    there.let.clear()
    here = Here(store, Peers([there]))
    await here.submit()

    def place(record: JobRecord, _: int) -> Change:
        job = job_pb2.Job()
        job.CopyFrom(record.job)
        job.state = job_pb2.JOB_STATE_STARTING
        job.attempts.add(number=1)
        return Change(replace(record, job=job))

    async with here.running():
        await eventually(lambda: bool(there.asked))
        await store.change_job("j-1", place)
        there.let.set()
        await eventually(lambda: bool(there.counted))
        await eventually(lambda: here.forwarder.why_here("j-1") == "")
    assert not here.driven
    assert await store.forwards() == []


async def test_right_after_the_start_nothing_is_sent_because_no_node_is_in_contact_yet(store: SqliteStore) -> None:
    there = peer("b", accepts())
    here = Here(store, Peers([there]), settle_s=10.0)
    here.views = []
    await here.submit()
    for _ in range(5):
        await here.forwarder.look()
    assert not there.asked
    here.ahead_s = 11.0
    async with here.running():
        await eventually(lambda: bool(here.driven))


async def test_what_lives_here_stays(store: SqliteStore) -> None:
    there = peer("b", accepts())
    here = Here(store, Peers([there]))
    await here.submit("j-home")
    await here.submit("j-carried", lambda record: replace(record, carry_from=1))
    await here.submit("j-restarted", lambda record: replace(record, restart=True))
    await here.submit("j-not-there", lambda record: replace(record, not_at=("b",)))
    here.queue[0] = replace(here.queue[0], home="n-1")
    await here.submit("j-last")
    async with here.running():
        await eventually(lambda: bool(here.driven))
    assert [record.id for record in here.driven] == ["j-last"]
    assert [request.origin.job_id for request in there.asked] == ["j-last"]


async def test_where_it_may_have_ended_it_goes_again_only_once_that_is_known(store: SqliteStore) -> None:
    there = peer("b", accepts())
    here = Here(store, Peers([there]))
    await here.submit()

    async def note(stage: ForwardStage) -> None:
        await store.change_job(
            "j-1", lambda record, _: Change(record, forward=ForwardRecord("j-1", 1, "b", 1, stage=stage))
        )

    await note(ForwardStage.LOST)
    for _ in range(5):
        await here.forwarder.look()
    assert not there.asked
    assert "may have ended there" in here.forwarder.why_here("j-1")
    await note(ForwardStage.SETTLED)
    async with here.running():
        await eventually(lambda: bool(here.driven))


async def test_a_guest_goes_on_only_when_both_peers_let_it(store: SqliteStore) -> None:
    def guest(sender: str) -> Callable[[JobRecord], JobRecord]:
        def change(record: JobRecord) -> JobRecord:
            job = job_pb2.Job()
            job.CopyFrom(record.job)
            job.guest.CopyFrom(
                job_pb2.Guest(peer=sender, job_id="x", attempt=1, visited_centres=[f"c-{sender}"], hops_left=1)
            )
            return replace(record, job=job)

        return change

    open_in = peer("in", accepts(), transit=True)
    open_in.in_contact = False
    closed_in, out, closed_out = peer("shut", accepts()), peer("out", accepts(), transit=True), peer("b", accepts())
    here = Here(store, Peers([open_in, closed_in, out, closed_out]))
    await here.submit("j-shut", guest("shut"))
    await here.submit("j-gone", guest("nobody"))
    await here.submit("j-open", guest("in"))
    async with here.running():
        await eventually(lambda: len(here.forwarder.why_here("j-shut")) > 0)
        await eventually(lambda: bool(out.asked))
    assert {request.origin.job_id for request in out.asked} == {"j-open"}
    assert list(out.asked[0].visited_centres) == ["c-in", "c-here"]
    assert not closed_out.asked
    assert "does not let it" in here.forwarder.why_here("j-shut")


class Broken:
    """A store that fails for a while."""

    def __init__(self, store: SqliteStore, fails: int) -> None:
        self._store = store
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def change_job(self, *arguments: Any) -> JobRecord:
        if self.fails:
            self.fails -= 1
            raise OSError(28, "No space left on device")
        return await self._store.change_job(*arguments)

    async def forwards(self) -> Any:
        if self.fails:
            self.fails -= 1
            raise OSError(5, "Input/output error")
        return await self._store.forwards()


async def test_a_disk_that_is_full_for_a_while_stops_nothing_for_ever(store: SqliteStore) -> None:
    broken = Broken(store, fails=2)
    here = Here(cast("SqliteStore", cast("Store", broken)), Peers([peer("b", accepts())]))
    await here.submit()
    async with here.running():
        await eventually(lambda: bool(here.driven))
    assert broken.fails == 0


async def test_a_new_word_of_a_peer_is_heard(store: SqliteStore) -> None:
    there = peer("b", refuses("FULL", 3600.0))
    here = Here(store, Peers([there]))
    await here.submit()
    async with here.running():
        await eventually(lambda: bool(there.counted))
        there.answer = accepts()
        there.profiles = [summary(free=1)]
        here.forwarder.wake()
        await eventually(lambda: bool(here.driven))
    assert len(there.asked) == 2


async def test_what_many_jobs_cause_stays_in_the_budget(store: SqliteStore) -> None:
    there = peer("b", refuses("FULL"))
    here = Here(store, Peers([there]))
    for number in range(300):
        await here.submit(f"j-{number}")
    async with here.running():
        await eventually(lambda: bool(there.counted))
        for _ in range(20):
            await here.forwarder.look()
    assert len(there.asked) < 4


async def test_stopping_while_a_peer_is_silent_ends_at_once(store: SqliteStore) -> None:
    there = peer("b", accepts())
    there.let.clear()
    here = Here(store, Peers([there]))
    await here.submit()
    async with asyncio.timeout(5), here.running():
        await eventually(lambda: bool(there.asked))
