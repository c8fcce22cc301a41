"""An attempt at a peer, over a real store, with a peer that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from controlplane import happenings
from controlplane.attempts import Attempts
from controlplane.bundles import Bundles
from controlplane.forwards import ForwardRecord, ForwardStage, read_clock
from controlplane.jobs import transition
from controlplane.lasting import Lasting
from controlplane.offers import Offer
from controlplane.reach import Reach
from controlplane.records import Change, JobRecord
from controlplane.results import Results
from controlplane.sending import send
from controlplane.sqlite_store import SqliteStore
from controlplane.surroundings import Surroundings
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, timestamp
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2, peer_service_pb2, stream_pb2
from puhui.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_STARTING,
    JOB_STATE_STOPPING,
    JOB_STATE_SUCCEEDED,
)
from tests.unit.controlplane.centres import eventually
from tests.unit.controlplane.fake_peer import Book, FakePeer, TestClock
from tests.unit.controlplane.samples import GEOMETRY

LEASE_S, MARGIN_S = 90.0, 30.0
KEY = ("j-1", 1)


@dataclass
class Origin:
    """A centre that has sent one job to a peer."""

    store: SqliteStore
    feed: Feed
    results: Results
    attempts: Attempts
    clock: TestClock
    peers: Book
    lease_s: float
    queued: list[str] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)

    async def job(self) -> JobRecord:
        record = await self.store.job("j-1")
        assert record is not None
        return record

    async def forward(self, attempt: int = 1) -> ForwardRecord:
        forward = await self.store.forward("j-1", attempt)
        assert forward is not None
        return forward

    async def until(self, reason: str, times: int = 1) -> job_pb2.JobEvent:
        with self.feed.watching("j-1") as news:
            async with asyncio.timeout(20):
                while True:
                    news.clear()
                    found = [one for one in await self.store.events("j-1", 0) if one.reason == reason]
                    if len(found) >= times:
                        return found[times - 1]
                    await news.wait()

    async def settled(self, attempt: int = 1) -> ForwardRecord:
        with self.feed.watching("j-1") as news:
            async with asyncio.timeout(20):
                while (forward := await self.forward(attempt)).stage is not ForwardStage.SETTLED:
                    news.clear()
                    await news.wait()
        return forward

    async def reasons(self) -> list[str]:
        return [event.reason for event in await self.store.events("j-1", 0)]

    async def send(self, peer: str = "b") -> None:
        offer = Offer(
            peer=peer,
            id="o-1",
            expected_wait_s=1.0,
            transfer_s=0.5,
            cost=1.0,
            peer_time=self.peers[peer].clock.now(),
            read_at=self.clock.now(),
            expire_at=self.clock.now() + 10,
            longest_lease_s=3600.0,
            profile="1g.10gb",
            gpu_model="H100",
            bundle_present=False,
        )

        def decide(record: JobRecord, token: int) -> Change | None:
            return send(record, token, offer, at=now(), clock_s=self.clock.now(), boot="boot-1", lease_s=self.lease_s)

        record = await self.store.change_job("j-1", decide)
        self.attempts.drive(record)

    async def cancel(self) -> None:
        def decide(record: JobRecord, _: int) -> Change:
            after, event = transition(record, happenings.CancelRequested("enough"), now())
            return Change(after, (event,))

        await self.store.change_job("j-1", decide)
        self.attempts.cancel("j-1")

    async def crash(self) -> None:
        """The control plane is killed where it is, and started again."""
        await self.attempts.stop()
        for forward in await self.store.forwards():
            self.attempts.drive(await self.job(), forward.attempt, adopt=True)


@contextlib.asynccontextmanager
async def origin(folder: Path, *peers: FakePeer, lease_s: float = LEASE_S, **spec: Any) -> AsyncIterator[Origin]:
    feed = Feed()
    store = await SqliteStore.open(folder / "puhui.db", feed)
    results = Results(folder / "results")
    clock, book = TestClock(), Book({peer.record.name: peer for peer in peers})
    site = Origin(store, feed, results, cast("Attempts", None), clock, book, lease_s)
    around = Surroundings(
        centre="a",
        store=store,
        nodes=cast("Any", SimpleNamespace(geometries=lambda: [GEOMETRY])),
        reservations=cast("Any", None),
        bundles=Bundles(folder / "bundles", store, Lasting()),
        results=results,
        feed=feed,
        wants=cast("Any", None),
        queue=lambda record: site.queued.append(record.id),
        withdraw=site.withdrawn.append,
        warm_s=lambda _: 0.0,
        release_patience_s=1.0,
        collect_patience_s=1.0,
        reach=Reach(cast("Any", book), clock, "id-of-a", lease_s, MARGIN_S, 600.0),
    )
    site.attempts = Attempts(around, lambda record: None)
    job = job_pb2.Job(
        id="j-1", centre="a", state=JOB_STATE_QUEUED, create_time=timestamp(now()), spec=job_pb2.JobSpec(**spec)
    )
    job.spec.tenant = "astro"
    record, event = transition(JobRecord(job), happenings.Submitted(), now())
    await store.add_job(record, (event,))
    try:
        yield site
    finally:
        await site.attempts.stop()
        await store.close()


def refusal(reason: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION) -> Refusal:
    return Refusal(code, reason, f"the peer says {reason}")


def leave(peer: FakePeer, log: bytes = b"hello from there\n", archive: bytes = b"archive of artifacts") -> None:
    """What the guest's command leaves."""
    manifest = stream_pb2.ArtifactManifest(
        digest="sha256:" + hashlib.sha256(archive).hexdigest(), size_bytes=len(archive)
    )
    manifest.files.add(path="model.bin", size_bytes=5)
    peer.logs[KEY], peer.artifacts[KEY] = log, (manifest, archive)
    peer.jobs[KEY].log_size_bytes = len(log)
    peer.jobs[KEY].artifacts.CopyFrom(
        job_pb2.JobArtifacts(digest=manifest.digest, file_count=1, size_bytes=manifest.size_bytes)
    )


async def ends(peer: FakePeer, code: int = 0) -> None:
    state = JOB_STATE_FAILED if code else JOB_STATE_SUCCEEDED
    await peer.tell(KEY, state, "EXIT_CODE" if code else "SUCCEEDED", exit_code=code)


async def run_there(site: Origin, peer: FakePeer) -> None:
    """The job is sent, and runs at the peer."""
    await site.send()
    await site.until("FORWARDED")
    await peer.tell(KEY, JOB_STATE_RUNNING, "CONTAINER_STARTED")
    await site.until("CONTAINER_STARTED")


async def test_it_goes_all_the_way_and_comes_home(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        job = (await site.job()).job
        assert (job.state, job.executing_centre, job.attempts[0].peer_job_id) == (JOB_STATE_RUNNING, "b", "there-1")
        assert (job.attempts[0].slice_uuid, job.attempts[0].container_id) == ("MIG-there", "c-there")
        assert job.attempts[0].node_id == "", "a node there is none here"
        leave(peer)
        await ends(peer, 3)
        await site.settled()
        job = (await site.job()).job
        assert (job.state, job.reason, job.exit_code, job.log_size_bytes) == (JOB_STATE_FAILED, "EXIT_CODE", 3, 17)
        assert b"".join(chunk.data for chunk in site.results.log("j-1", 1)) == b"hello from there\n"
        assert site.results.archive("j-1", 1).read_bytes() == b"archive of artifacts"
        assert await site.reasons() == [
            "SUBMITTED",
            "FORWARDING",
            "FORWARDED",
            "CONTAINER_STARTED",
            "PEER_ENDED",
            "RESULTS_COLLECTED",
            "EXIT_CODE",
        ]
        assert peer.calls.count("forward") == 1
        assert len(peer.promises) == 1
        header = peer.headers[0]
        assert (list(header.visited_centres), header.hops_left, header.spec.tenant) == (["id-of-a"], 1, "astro")


async def test_usage_there_is_the_tenants_usage_here(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        await ends(peer)
        last = peer.events[KEY][-1]
        last.usage.add(kind="hold", number=1, profile="1g.10gb", compute_slices=1, gpu_slices=7, busy_seconds=3.0)
        last.usage[0].start_time.CopyFrom(timestamp(100.0))
        last.usage[0].end_time.CopyFrom(timestamp(105.0))
        last.usage.add(kind="nonsense", number=2)
        await site.settled()
        (stretch,) = await site.store.usage(0, 1e12)
        assert (stretch.tenant, stretch.start, stretch.end, stretch.busy_s) == ("astro", 100.0, 105.0, 3.0)
        assert await site.store.attempts_at_peers(0, 1e12) == {("j-1", 1)}
        assert await site.store.attempts_at_peers(105.0, 1e12) == set()


async def test_what_it_used_there_is_learnt_here(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await site.store.change_job("j-1", lambda record, _: Change(replace(record, fingerprint="f")))
        await run_there(site, peer)
        peer.jobs[KEY].attempts[0].peak_memory_mib = 7000
        peer.jobs[KEY].attempts[0].end_time.CopyFrom(timestamp(61.0))
        await ends(peer)
        await site.settled()
        (seen,) = await site.store.observations("astro", "f")
        assert (seen.peak_mib, seen.duration_s, seen.peer, seen.profile) == (7000, 60.0, "b", "1g.10gb")


FULL = b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


@pytest.mark.parametrize(("told", "least_mib"), [(0, 10240), (9984, 9984), (2**24 - 1, 10240)])
async def test_one_that_ran_out_of_memory_there_waits_here_for_a_larger_slice(
    tmp_path: Path, told: int, least_mib: int
) -> None:
    """Whatever the peer says that its slice had, when that can be."""
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:

        def sized(record: JobRecord, _: int) -> Change:
            job = job_pb2.Job()
            job.CopyFrom(record.job)
            job.sizing.required_mib = 9000
            return Change(replace(record, job=job, fingerprint="f"))

        await site.store.change_job("j-1", sized)
        await run_there(site, peer)
        leave(peer, FULL)
        if told:
            peer.jobs[KEY].sizing.choices.add(profile="1g.10gb", memory_mib=told)
        peer.jobs[KEY].attempts[0].end_time.CopyFrom(timestamp(61.0))
        await ends(peer, 1)
        await site.settled()
        record = await site.job()
        assert (record.state, record.ran_out_of_mib, record.ending) == (JOB_STATE_QUEUED, least_mib, None)
        assert record.job.sizing.choices[0].profile == "1g.20gb"
        assert record.job.executing_centre == "a"
        assert (await site.reasons())[-4:] == ["PEER_ENDED", "RESULTS_COLLECTED", "DEVICE_OUT_OF_MEMORY", "GROWN"]
        (seen,) = await site.store.observations("astro", "f")
        assert (seen.peak_mib, seen.at_least_mib, seen.peer) == (None, least_mib, "b")
        assert b"".join(chunk.data for chunk in site.results.log("j-1", 1)) == FULL


async def test_one_that_keeps_its_size_ends_with_what_to_ask_for(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer, resources=job_pb2.Resources(memory_mib=9000)) as site:
        await run_there(site, peer)
        leave(peer, FULL)
        peer.jobs[KEY].sizing.choices.add(profile="1g.10gb", memory_mib=9984)
        await ends(peer, 1)
        await site.settled()
        job = (await site.job()).job
        assert (job.state, job.reason) == (JOB_STATE_FAILED, "DEVICE_OUT_OF_MEMORY")
        assert "the 9000 MiB that were asked for, which is kept; ask for 1g.20gb" in job.message


@pytest.mark.parametrize(
    ("reason", "shunned"), [("OFFER_EXPIRED", ()), ("SPEC_INVALID", ("b",)), ("TOO_LARGE", ("b",))]
)
async def test_what_the_peer_refuses_waits_again(tmp_path: Path, reason: str, shunned: tuple[str, ...]) -> None:
    peer = FakePeer()
    peer.refuses = [refusal(reason)]
    async with origin(tmp_path, peer) as site:
        await site.send()
        await site.settled()
        record = await site.job()
        assert (record.state, record.not_at, peer.calls) == (JOB_STATE_QUEUED, shunned, ["forward"])
        assert record.job.attempts[0].HasField("release_time")
        assert f"peer b does not run it ({reason}: " in record.job.attempts[0].message


async def test_a_refusal_that_may_have_come_after_the_binding_proves_nothing(tmp_path: Path) -> None:
    peer = FakePeer()
    peer.late_refuses = [refusal("DISK_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED)]
    async with origin(tmp_path, peer) as site:
        await site.send()
        await site.settled()
        assert peer.calls == ["forward", "cancel"]
        assert peer.jobs[KEY].state == JOB_STATE_CANCELLED
        record = await site.job()
        assert (record.state, record.not_at) == (JOB_STATE_QUEUED, ("b",))


async def test_an_answer_that_was_lost_is_asked_for_again_and_nothing_is_bound_twice(tmp_path: Path) -> None:
    peer = FakePeer()
    peer.answers = False
    async with origin(tmp_path, peer) as site:
        await site.send()
        await eventually(lambda: peer.calls.count("forward") == 2)
        peer.answers = True
        await site.until("FORWARDED")
        assert len(peer.guests) == 1
        tokens = {header.origin.fencing_token for header in peer.headers}
        assert len(tokens) == 1


async def test_a_peer_that_never_answers_is_asked_for_the_end_before_the_job_waits_again(tmp_path: Path) -> None:
    peer = FakePeer()
    unclear = Refusal(grpc.StatusCode.INTERNAL, "INTERNAL", "failed unforeseen")
    peer.refuses = [unclear]
    async with origin(tmp_path, peer) as site:
        await site.send()
        await site.settled()
        assert (await site.job()).state == JOB_STATE_QUEUED
        assert peer.calls == ["forward", "cancel"]
        # What was late cannot be bound any longer.
        with pytest.raises(Refusal, match="a retry is a new attempt"):
            await peer.forward(peer.headers[-1], None)


async def test_a_cancel_ends_it_there_and_brings_its_log_home(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        await site.cancel()
        await site.settled()
        record = await site.job()
        assert (record.state, record.job.reason, record.job.log_size_bytes) == (JOB_STATE_CANCELLED, "CANCELLED", 17)
        assert "enough" in record.job.message


async def test_a_job_that_ended_before_its_cancel_arrived_keeps_its_result(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        await peer.set_contact(False)
        await site.cancel()
        await ends(peer)
        await peer.set_contact(True)
        await site.settled()
        assert (await site.job()).state == JOB_STATE_SUCCEEDED


async def test_nothing_is_brought_back_before_the_lease_is_over_for_certain(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        await peer.set_contact(False)
        await site.until("PEER_OUT_OF_CONTACT")
        site.clock.at += LEASE_S + MARGIN_S - 1
        await asyncio.sleep(0)
        assert (await site.job()).state == JOB_STATE_RUNNING
        # Past the margin, and past the drift that two clocks may have.
        site.clock.at += 2
        await site.until("BROUGHT_BACK")
        assert (await site.job()).state == JOB_STATE_QUEUED
        await eventually(lambda: site.queued == ["j-1"])
        assert (await site.forward()).stage is ForwardStage.LOST


async def lost(site: Origin, peer: FakePeer) -> None:
    """It runs at the peer, which is out of contact until the lease is over."""
    await run_there(site, peer)
    await peer.set_contact(False)
    await site.until("PEER_OUT_OF_CONTACT")
    site.clock.at += LEASE_S + MARGIN_S + 1
    await site.until("BROUGHT_BACK")


async def test_a_result_that_comes_late_is_the_jobs_when_it_still_waits(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await lost(site, peer)
        leave(peer)
        await ends(peer)
        await peer.set_contact(True)
        await site.settled()
        job = (await site.job()).job
        assert (job.state, job.exit_code, len(job.attempts)) == (JOB_STATE_SUCCEEDED, 0, 1)
        assert site.results.archive("j-1", 1).read_bytes() == b"archive of artifacts"
        await eventually(lambda: site.withdrawn == ["j-1"])


async def test_a_result_that_comes_later_still_is_kept_beside_the_newer_attempt(tmp_path: Path) -> None:
    peer, other = FakePeer(), FakePeer("c")
    async with origin(tmp_path, peer, other) as site:
        await lost(site, peer)
        leave(peer)
        await ends(peer)
        await site.send("c")
        await site.until("FORWARDED", 2)
        await peer.set_contact(True)
        kept = await site.until("LATE_RESULT_KEPT")
        assert (kept.attempt, kept.details["exit_code"]) == (1, "0")
        assert site.results.archive("j-1", 1).read_bytes() == b"archive of artifacts"
        record = await site.job()
        assert (record.state, len(record.job.attempts)) == (JOB_STATE_STARTING, 2)


async def test_what_was_ended_there_with_its_lease_leaves_nothing(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await lost(site, peer)
        await peer.tell(KEY, JOB_STATE_CANCELLED, "LEASE_EXPIRED")
        await peer.set_contact(True)
        await site.settled()
        assert (await site.job()).state == JOB_STATE_QUEUED


async def test_a_session_that_was_lost_ends_and_says_why(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer, kind=job_pb2.JOB_KIND_SESSION) as site:
        await run_there(site, peer)
        await peer.set_contact(False)
        await site.until("PEER_OUT_OF_CONTACT")
        site.clock.at += LEASE_S + MARGIN_S + 1
        await site.settled()
        record = await site.job()
        assert (record.state, record.job.reason) == (JOB_STATE_FAILED, "PEER_LOST")


async def test_what_an_operator_there_ended_waits_again_and_shuns_that_peer(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        await peer.tell(KEY, JOB_STATE_CANCELLED, "CANCELLED")
        await site.settled()
        record = await site.job()
        assert (record.state, record.not_at) == (JOB_STATE_QUEUED, ("b",))


async def test_results_that_break_off_are_taken_up_where_they_broke(tmp_path: Path) -> None:
    peer = FakePeer()
    peer.breaks_after = 2
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        await ends(peer)
        await site.settled()
        assert (await site.job()).state == JOB_STATE_SUCCEEDED
        assert site.results.archive("j-1", 1).read_bytes() == b"archive of artifacts"
        assert peer.calls.count("read_artifacts") > 1


async def test_a_peer_that_sends_more_output_than_it_told_of_is_cut_off(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        peer.jobs[KEY].log_size_bytes = 5
        await ends(peer)
        await site.settled()
        record = await site.job()
        assert record.state == JOB_STATE_SUCCEEDED
        assert "more output than it told of" in record.results_lost


async def test_a_log_that_is_cut_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        peer.logs[KEY] = b"hello from"
        await ends(peer)
        await eventually(lambda: peer.calls.count("read_logs") > 2)
        peer.logs[KEY] = b"hello from there\n"
        await site.settled()
        record = await site.job()
        assert (record.results_lost, record.job.log_size_bytes) == ("", 17)


async def test_a_refusal_that_may_pass_loses_no_result(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        peer.denies = [refusal("DISK_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED)] * 5
        await ends(peer)
        await site.settled()
        record = await site.job()
        assert (record.results_lost, record.job.log_size_bytes) == ("", 17)


async def test_more_results_than_the_terms_allow_are_not_fetched(tmp_path: Path) -> None:
    peer = FakePeer()
    peer.record = replace(peer.record, terms=peer_service_pb2.PeerTerms(most_result_bytes=20))
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        await ends(peer)
        await site.settled()
        assert "20 are taken of one job" in (await site.job()).results_lost
        assert "read_logs" not in peer.calls


async def test_the_word_of_a_peer_that_has_forgotten_is_worth_nothing(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        for kept in (peer.guests, peer.jobs, peer.events):
            kept.clear()
        await peer.set_contact(False)
        await peer.set_contact(True)
        await eventually(lambda: "cancel" in peer.calls)
        await site.until("PEER_OUT_OF_CONTACT")
        assert (await site.job()).state == JOB_STATE_RUNNING
        site.clock.at += LEASE_S + MARGIN_S + 1
        await site.until("BROUGHT_BACK")


async def test_another_centre_under_the_name_of_a_peer_is_not_asked(tmp_path: Path) -> None:
    peer, other = FakePeer(), FakePeer()
    other.record = replace(other.record, create_time=5.0)
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        site.peers["b"] = other
        await peer.set_contact(False)
        await site.until("PEER_OUT_OF_CONTACT")
        site.clock.at += LEASE_S + MARGIN_S + 1
        await site.until("BROUGHT_BACK")
        await site.settled()  # the job may go there again: that one has nothing of this attempt
        assert other.calls == []


async def test_what_a_peer_tells_is_taken_over_within_bounds(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        peer.jobs[KEY].runs.add(id="r-aaaaaaaaaaaa", command=["x" * 4_000_000])
        peer.jobs[KEY].attempts[0].gpu_model = "evil\x1b[31m" * 1000
        await peer.tell(KEY, JOB_STATE_RUNNING, "AGAIN\x1b[31m")
        told = await site.until("AGAIN?[31m")
        assert told.peer == "b"
        assert (await site.job()).job.ByteSize() < 10_000


async def test_a_peer_that_tells_what_cannot_be_is_not_believed(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        await peer.tell(KEY, cast("job_pb2.JobState.ValueType", 77), "NONSENSE")
        await peer.tell(KEY, JOB_STATE_STOPPING, "COMMAND_ENDED")
        await peer.tell(KEY, JOB_STATE_RUNNING, "CONTAINER_STARTED")
        again = wire.WatchForwardedJobResponse()
        again.CopyFrom(peer.events[KEY][0])
        peer.events[KEY].append(again)
        await ends(peer)
        await site.settled()
        assert (await site.job()).state == JOB_STATE_SUCCEEDED
        assert "NONSENSE" not in await site.reasons()


_MOMENTS = ["FORWARDING", "FORWARDED", "CONTAINER_STARTED", "PEER_ENDED"]


@pytest.mark.parametrize("moment", _MOMENTS)
async def test_a_crash_of_the_control_plane_loses_and_doubles_nothing(tmp_path: Path, moment: str) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        if moment == "FORWARDING":
            await peer.set_contact(False)
        await site.send()
        if moment == "FORWARDING":
            await site.crash()
            await peer.set_contact(True)
        await site.until("FORWARDED")
        if moment == "FORWARDED":
            await site.crash()
        await peer.tell(KEY, JOB_STATE_RUNNING, "CONTAINER_STARTED")
        await site.until("CONTAINER_STARTED")
        if moment == "CONTAINER_STARTED":
            await site.crash()
        leave(peer)
        if moment == "PEER_ENDED":
            site.results.folder("j-1", 1).parent.mkdir(parents=True, exist_ok=True)
            peer.breaks_after = 1
        await ends(peer)
        if moment == "PEER_ENDED":
            await site.until("PEER_ENDED")
            await site.crash()
            peer.breaks_after = 0
        await site.settled()
        job = (await site.job()).job
        assert (job.state, len(job.attempts), len(peer.guests)) == (JOB_STATE_SUCCEEDED, 1, 1)
        assert site.results.archive("j-1", 1).read_bytes() == b"archive of artifacts"
        # Who comes after commands under a higher token.
        assert (await site.forward()).token > 1


async def test_a_reboot_here_is_no_proof_that_time_has_passed(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        await peer.set_contact(False)
        await site.attempts.stop()
        # The wall clock jumped while the host was down.
        site.clock.boot, site.clock.at = "boot-2", site.clock.at + 1e6
        site.attempts.drive(await site.job(), 1, adopt=True)
        await site.until("PEER_OUT_OF_CONTACT")
        assert (await site.job()).state == JOB_STATE_RUNNING
        site.clock.at += LEASE_S + MARGIN_S + 1
        await site.until("BROUGHT_BACK")


async def test_a_lease_is_written_down_before_it_is_asked_for(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer, lease_s=3.0) as site:
        await run_there(site, peer)
        before = await site.forward()
        site.clock.at += 2
        peer.clock.at += 2
        peer.answers = False
        await eventually(lambda: "renew" in peer.calls)
        forward = await site.forward()
        assert forward.lease_end == pytest.approx(before.lease_end + 1, abs=0.01)  # a third of it
        assert peer.guests[KEY].lease_end == pytest.approx(forward.lease_end, abs=0.01)


def test_an_older_reading_of_a_clock_is_no_reading() -> None:
    forward = ForwardRecord("j-1", 1, "b", 1, peer_time=10.0, read_at=5.0)
    assert read_clock(forward, 9.0, 100.0) is forward
    assert read_clock(forward, 11.0, 100.0) == replace(forward, peer_time=11.0, read_at=100.0)
