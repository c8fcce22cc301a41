"""The hosting side of a centre in this process: real store, scheduler and drivers, a fake node, a clock that is set."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controlplane.attempts import Attempts
from controlplane.bundles import Bundles
from controlplane.cancelling import Cancelling
from controlplane.guest_leases import GuestLeases
from controlplane.hosting import Hosting
from controlplane.idle_policy import CentrePolicy
from controlplane.jobs import FINAL_STATES, PLACED_STATES
from controlplane.lasting import Lasting
from controlplane.log_reader import LogReader
from controlplane.nodes import Nodes
from controlplane.peers import Peer
from controlplane.reach import Reach
from controlplane.records import JobRecord, PeerRecord
from controlplane.reservations import Reservations
from controlplane.results import Results
from controlplane.scheduler import Scheduler
from controlplane.sqlite_store import SqliteStore
from controlplane.surroundings import Surroundings
from controlplane.wants import Wants
from controlplane.warm import WarmShares
from controlplane.watch import Feed
from puhui.rpc.bundle import pack_files
from puhui.rpc.moment import now as wall
from puhui.rpc.moment import timestamp
from puhui.v1 import card_pb2, job_pb2, peer_service_pb2, prediction_pb2, stream_pb2
from puhui.v1 import federation_service_pb2 as wire
from tests.unit.controlplane.centres import eventually
from tests.unit.controlplane.fake_node import FakeNode
from tests.unit.controlplane.fake_peer import TestClock

LONGEST_S = 900.0
KEEP_S = 7 * 86400.0
CODE = pack_files({"x.py": b"print(1)\n"})


def bundle_of(code: bytes) -> stream_pb2.BundleHeader:
    return stream_pb2.BundleHeader(bundle_id="sha256:" + hashlib.sha256(code).hexdigest(), size_bytes=len(code))


def peer(name: str = "b", **terms: Any) -> Peer:
    certificate = name.encode()
    return Peer(PeerRecord(name, f"id-of-{name}", "", certificate, peer_service_pb2.PeerTerms(**terms), 0.0))


@dataclass
class FakeDesk:
    """Takes every offer but those that it is told not to take."""

    taken: list[str] = field(default_factory=list)
    settled: list[tuple[str, str]] = field(default_factory=list)
    bundles: set[tuple[str, str]] = field(default_factory=set)
    refuses: list[Exception] = field(default_factory=list)

    def take(self, offer_id: str, peer: str, origin: card_pb2.AttemptRef) -> None:
        if self.refuses:
            raise self.refuses.pop(0)
        self.taken.append(offer_id)

    def settle(self, peer: str, origin: card_pb2.AttemptRef) -> None:
        self.settled.append((peer, origin.job_id))

    def note_bundle(self, peer: str, bundle_id: str) -> None:
        self.bundles.add((peer, bundle_id))

    def has_sent(self, peer: str, bundle_id: str) -> bool:
        return (peer, bundle_id) in self.bundles


class _NoPeers:
    is_open = True

    def get(self, name: str) -> None:
        return None


@dataclass
class Host:
    """A centre that has guests."""

    store: SqliteStore
    hosting: Hosting
    leases: GuestLeases
    clock: TestClock
    desk: FakeDesk
    node: FakeNode
    nodes: Nodes
    bundles: Bundles
    results: Results
    feed: Feed
    lasting: Lasting
    passed: list[float]
    """How far the wall clock is ahead, in seconds."""
    counted: list[int] = field(default_factory=list)

    def origin(self, job_id: str = "j-there", attempt: int = 1, token: int = 1) -> card_pb2.AttemptRef:
        return card_pb2.AttemptRef(centre="b", job_id=job_id, attempt=attempt, fencing_token=token)

    def header(self, *, lease_s: float = 600.0, code: bytes | None = CODE, **fields: Any) -> wire.ForwardHeader:
        spec = job_pb2.JobSpec(tenant="astro", command=["python3", "x.py"], **fields.pop("spec", {}))
        given: dict[str, Any] = {
            "origin": self.origin(),
            "sizing": prediction_pb2.Sizing(required_mib=9000),
            "offer_id": "o-1",
            "visited_centres": ["id-of-b"],
            "lease_expire_time": timestamp(self.clock.now() + lease_s),
            "hops_left": 1,
            **fields,
        }
        header = wire.ForwardHeader(spec=spec, **given)
        if code is not None and "bundle" not in fields:
            header.bundle.CopyFrom(bundle_of(code))
        return header

    async def bind(
        self, header: wire.ForwardHeader, code: bytes | None = CODE, who: Peer | None = None
    ) -> wire.ForwardJobResponse:
        return await self.send(parts_of(header, code), who)

    async def send(self, parts: Iterator[wire.ForwardJobRequest], who: Peer | None = None) -> wire.ForwardJobResponse:
        async def stream() -> AsyncIterator[wire.ForwardJobRequest]:
            for part in parts:
                yield part

        return await self.hosting.bind(who or peer(), stream(), self.counted.append, lambda: None)

    async def job(self, job_id: str) -> JobRecord:
        record = await self.store.job(job_id)
        assert record is not None
        return record

    async def until(self, job_id: str, *states: job_pb2.JobState.ValueType) -> JobRecord:
        with self.feed.watching(job_id) as news:
            async with asyncio.timeout(20):
                while True:
                    news.clear()
                    record = await self.job(job_id)
                    if record.state in states:
                        return record
                    assert record.state not in FINAL_STATES, record.job
                    await news.wait()

    async def until_gone(self) -> None:
        """Waits until the node has nothing left of anybody."""
        await eventually(lambda: self.node.empty)

    async def expire(self) -> None:
        """Looks at the leases once."""
        await self.leases._end_expired()

    async def forget(self, after_s: float) -> None:
        """Looks once at what is old, so many seconds from now."""
        self.passed[0] = after_s
        await self.leases._forget_old()

    async def reasons(self, job_id: str) -> list[str]:
        return [event.reason for event in await self.store.events(job_id, 0)]


def parts_of(
    header: wire.ForwardHeader, code: bytes | None = CODE, chunk: int = 64
) -> Iterator[wire.ForwardJobRequest]:
    yield wire.ForwardJobRequest(header=header)
    for at in range(0, len(code or b""), chunk):
        yield wire.ForwardJobRequest(chunk=(code or b"")[at : at + chunk])


@contextlib.asynccontextmanager
async def host(
    folder: Path,
    node: FakeNode | None = None,
    clock: TestClock | None = None,
    policy: CentrePolicy | None = None,
    silent_s: float = 30.0,
    upload_s: float = 600.0,
) -> AsyncIterator[Host]:
    """Runs the hosting side of a centre until the block ends. A second time on the same folder goes on from there."""
    folder.mkdir(exist_ok=True)
    passed = [0.0]
    fake, time = node or FakeNode(), clock or TestClock()
    if node is None:
        fake.exits_at_once = None
    feed, lasting, desk = Feed(), Lasting(), FakeDesk()
    store = await SqliteStore.open(folder / "store.db", feed)
    bundles, results = Bundles(folder / "bundles", store, lasting), Results(folder / "results")
    scheduler: Scheduler
    reservations = Reservations(lambda: scheduler.wake())
    nodes = Nodes(store, "here", "token", fake.connect, reservations, lambda: scheduler.wake())
    warm = WarmShares("here", store, nodes, reservations)
    scheduler = Scheduler(store, nodes, reservations, warm, feed, 60.0)
    idle = policy or CentrePolicy()
    centre_id = await store.centre_id()
    reach = Reach(_NoPeers(), time, centre_id, LONGEST_S, 30.0, KEEP_S)
    around = Surroundings(
        "here",
        store,
        nodes,
        reservations,
        bundles,
        results,
        feed,
        Wants(feed),
        scheduler.add,
        scheduler.remove,
        idle.warm_for,
        0.2,
        5.0,
        reach,
    )
    attempts = Attempts(around, scheduler.put_back)
    cancelling = Cancelling(store, scheduler, attempts)
    leases = GuestLeases(store, results, cancelling, time, lasting, KEEP_S, lambda: wall() + passed[0])
    hosting = Hosting(
        "here",
        centre_id,
        store,
        feed,
        bundles,
        results,
        LogReader("here", store, feed, nodes, results),
        desk,
        cancelling,
        scheduler.add,
        nodes.geometries,
        idle,
        time,
        lasting,
        LONGEST_S,
        leases,
        silent_s,
        upload_s,
    )
    held = await store.reservations()
    reservations.load(held)
    await nodes.start()
    for record in await store.unfinished_jobs():
        if record.state in PLACED_STATES:
            attempts.drive(record, adopt=True)
        else:
            scheduler.add(record)
    planning = asyncio.create_task(scheduler.run(attempts))
    try:
        node_id, _ = await nodes.register("token", "127.0.0.1:1", await fake.inventory())
        link = nodes.link(node_id)
        assert link is not None
        await asyncio.wait_for(link.contact(), 10)
        yield Host(store, hosting, leases, time, desk, fake, nodes, bundles, results, feed, lasting, passed)
    finally:
        await lasting.finish()
        planning.cancel()
        await asyncio.gather(planning, return_exceptions=True)
        await attempts.stop()
        await nodes.stop()
        await store.close()
