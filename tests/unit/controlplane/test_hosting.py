"""What peers have run here: bound once, commanded by their origin alone, and over when their lease is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from controlplane.guests import GuestStage
from controlplane.hosting import Hosting
from controlplane.idle_policy import CentrePolicy
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, moment, seconds, timestamp
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2, prediction_pb2, stream_pb2
from tests.unit.controlplane.centres import eventually
from tests.unit.controlplane.fake_node import FakeNode
from tests.unit.controlplane.fake_peer import TestClock
from tests.unit.controlplane.hosts import CODE, KEEP_S, LONGEST_S, Host, bundle_of, host, parts_of, peer

RUNNING, FINAL = (
    job_pb2.JOB_STATE_RUNNING,
    (
        job_pb2.JOB_STATE_SUCCEEDED,
        job_pb2.JOB_STATE_FAILED,
        job_pb2.JOB_STATE_CANCELLED,
    ),
)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, reason: str) -> Iterator[None]:
    with pytest.raises(Refusal) as error:
        yield
    assert (error.value.code, error.value.reason) == (code, reason), error.value
    assert error.value.message


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Host]:
    async with host(tmp_path / "here") as running:
        yield running


# -- binding


async def test_it_becomes_a_job_of_this_centre(here: Host) -> None:
    answer = await here.bind(here.header(spec={"name": "train", "labels": {"a": "b"}, "priority": 50}))
    record = await here.until(answer.remote_job_id, RUNNING)
    job = record.job
    assert (job.centre, job.spec.tenant, job.spec.name, dict(job.spec.labels)) == (
        "here",
        "b.astro",
        "train",
        {"a": "b"},
    )
    assert job.spec.priority == 0, "capped by the terms"
    assert (job.guest.peer, job.guest.job_id, job.guest.attempt) == ("b", "j-there", 1)
    assert list(job.guest.visited_centres) == ["id-of-b"]
    assert job.guest.hops_left == 0, "nothing is forwarded on without transit"
    assert job.sizing.choices[0].profile == "1g.10gb"
    assert job.bundle_id == bundle_of(CODE).bundle_id
    assert moment(answer.lease_expire_time) == here.clock.now() + 600
    assert moment(answer.time) == here.clock.now()
    assert here.desk.taken == ["o-1"]
    assert here.desk.settled == [("b", "j-there")]
    assert sum(here.counted) == len(CODE)
    assert here.leases.received("b") == 1


async def test_terms_map_tenants_and_cap_priorities(here: Host) -> None:
    who = peer(tenants_in={"astro": "stars"}, highest_priority=7, transit=True)
    answer = await here.bind(here.header(spec={"priority": 50}), who=who)
    job = (await here.job(answer.remote_job_id)).job
    assert (job.spec.tenant, job.spec.priority, job.guest.hops_left) == ("stars", 7, 1)


async def test_the_same_again_is_answered_as_before(here: Host) -> None:
    header = here.header()
    first = await here.bind(header)
    header.offer_id, header.origin.fencing_token = "another", 5
    header.lease_expire_time.CopyFrom(timestamp(here.clock.now() + 800))
    again = await here.bind(header, code=None)
    assert again.remote_job_id == first.remote_job_id
    assert again.lease_expire_time == first.lease_expire_time
    assert len(await here.store.unfinished_jobs()) == 1
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
        await here.bind(here.header())  # with the token of before


async def test_many_at_once_are_one_job(here: Host) -> None:
    answers = await asyncio.gather(*(here.bind(here.header()) for _ in range(6)))
    assert len({answer.remote_job_id for answer in answers}) == 1
    assert len(await here.store.unfinished_jobs()) == 1
    assert here.leases.received("b") == 1


async def test_something_else_under_the_same_name_is_refused(here: Host) -> None:
    await here.bind(here.header())
    with refused(grpc.StatusCode.ALREADY_EXISTS, "GUEST_DIFFERS"):
        await here.bind(here.header(spec={"name": "other"}))


async def test_two_peers_may_use_the_same_job_id(here: Host) -> None:
    one = await here.bind(here.header())
    other = await here.bind(here.header(), who=peer("c"))
    assert one.remote_job_id != other.remote_job_id


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"spec": {"env": {"PUHUI_X": "1"}}}, grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
        ({"spec": {"priority": -999}}, grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
        ({"spec": {"kind": 77}}, grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
        ({"spec": {"max_duration": duration(-1.0)}}, grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
        (
            {"spec": {"resources": job_pb2.Resources(cpus=float("nan"))}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
        ),
        (
            {"spec": {"resources": job_pb2.Resources(profile="9g.999gb")}},
            grpc.StatusCode.FAILED_PRECONDITION,
            "PROFILE_NOT_AVAILABLE",
        ),
        (
            {"idle_policy": job_pb2.IdlePolicy(idle_after=duration(-5.0))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "IDLE_AFTER_TOO_SHORT",
        ),
        (
            {"idle_policy": job_pb2.IdlePolicy(idle_below_percent=float("nan"))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
        ),
        ({"idle_policy": {"reclaim_mode": 99}}, grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"),
        (
            {"sizing": prediction_pb2.Sizing(required_mib=10**6)},
            grpc.StatusCode.FAILED_PRECONDITION,
            "TOO_LARGE",
        ),
        (
            {"sizing": prediction_pb2.Sizing(required_mib=2**63)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "HEADER_INVALID",
        ),
        (
            {"prediction": prediction_pb2.Prediction(reason="x" * 70000)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "HEADER_INVALID",
        ),
        ({"visited_centres": []}, grpc.StatusCode.INVALID_ARGUMENT, "HEADER_INVALID"),
        ({"visited_centres": ["x"] * 17}, grpc.StatusCode.INVALID_ARGUMENT, "HEADER_INVALID"),
        ({"visited_centres": ["x" * 65]}, grpc.StatusCode.INVALID_ARGUMENT, "HEADER_INVALID"),
        ({"hops_left": 9}, grpc.StatusCode.INVALID_ARGUMENT, "HEADER_INVALID"),
        ({"lease_s": 0.0}, grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"),
        ({"lease_s": -1e9}, grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"),
        (
            {"bundle": stream_pb2.BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=len(CODE))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "UPLOAD_DIGEST",
        ),
        (
            {"bundle": stream_pb2.BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=len(CODE) - 1)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "UPLOAD_MALFORMED",
        ),
        (
            {"bundle": stream_pb2.BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=len(CODE) + 1)},
            grpc.StatusCode.INVALID_ARGUMENT,
            "UPLOAD_INCOMPLETE",
        ),
        (
            {"bundle": stream_pb2.BundleHeader(bundle_id="../../etc/passwd", size_bytes=len(CODE))},
            grpc.StatusCode.INVALID_ARGUMENT,
            "UPLOAD_MALFORMED",
        ),
        (
            {"bundle": stream_pb2.BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=2**63)},
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "BUNDLE_TOO_LARGE",
        ),
    ],
)
async def test_what_cannot_be_is_refused_and_leaves_nothing(
    here: Host, fields: dict[str, Any], code: grpc.StatusCode, reason: str
) -> None:
    with refused(code, reason):
        await here.bind(here.header(**fields))
    assert await here.store.unfinished_jobs() == []
    assert await here.store.guests() == []
    assert await here.store.guest(("b", "j-there", 1)) is None


async def test_who_names_no_attempt_is_refused(here: Host) -> None:
    for origin in (here.origin(""), here.origin("../j"), here.origin("j" * 65), here.origin(attempt=0)):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "ORIGIN_INVALID"):
            await here.bind(here.header(origin=origin))


async def test_what_has_been_here_before_does_not_come_again(here: Host) -> None:
    loop = ["id-of-b", await here.store.centre_id()]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "FORWARDING_LOOP"):
        await here.bind(here.header(visited_centres=loop))


async def test_terms_may_say_that_nothing_is_taken(here: Host) -> None:
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_RECEIVING"):
        await here.bind(here.header(), who=peer(receive_off=True))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "BUNDLE_TOO_LARGE"):
        await here.bind(here.header(), who=peer(most_bundle_bytes=10))


async def test_without_an_offer_nothing_comes(here: Host) -> None:
    here.desk.refuses.append(Refusal(grpc.StatusCode.FAILED_PRECONDITION, "OFFER_EXPIRED", "ask again"))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "OFFER_EXPIRED"):
        await here.bind(here.header())
    assert here.counted == [], "not a byte of the bundle was taken"


async def test_a_tenant_must_be_named_so_that_it_can_be_told_from_ours(here: Host) -> None:
    for tenant in ("", "x" * 63, "Astro", "a/b"):
        header = here.header()
        header.spec.tenant = tenant
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "TENANT_INVALID"):
            await here.bind(header)


async def test_the_first_message_is_the_header_and_no_other(here: Host) -> None:
    invalid = (grpc.StatusCode.INVALID_ARGUMENT, "HEADER_MISSING")
    header = here.header()
    with refused(*invalid):
        await here.send(iter([]))
    with refused(*invalid):
        await here.send(iter([wire.ForwardJobRequest(chunk=b"x")]))
    with refused(*invalid):
        await here.send(iter([wire.ForwardJobRequest(header=header)] * 2))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "UPLOAD_MALFORMED"):
        await here.send(iter([wire.ForwardJobRequest(header=header), wire.ForwardJobRequest(chunk=b"")]))
    assert not list((here.bundles.path("x").parent).glob("upload-*"))


async def test_a_bundle_comes_once_from_each_peer(here: Host) -> None:
    await here.bind(here.header())
    await here.bind(here.header(origin=here.origin("j-second")), code=None)
    # To know the name of what somebody else has sent is not to have it.
    with refused(grpc.StatusCode.NOT_FOUND, "BUNDLE_NOT_FOUND"):
        await here.bind(here.header(), code=None, who=peer("c"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "UPLOAD_DIGEST"):
        await here.bind(here.header(), code=b"?" * len(CODE), who=peer("c"))
    await here.bind(here.header(), who=peer("c"))


async def test_who_is_over_its_bytes_is_cut_off(here: Host) -> None:
    def count(size: int) -> None:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "PEER_BYTES", "too many")

    async def stream() -> AsyncIterator[wire.ForwardJobRequest]:
        for part in parts_of(here.header()):
            yield part

    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "PEER_BYTES"):
        await here.hosting.bind(peer(), stream(), count, lambda: None)
    assert await here.store.unfinished_jobs() == []


async def test_who_is_a_peer_no_longer_when_the_bundle_has_come_binds_nothing(here: Host) -> None:
    def gone() -> None:
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "PEER_UNKNOWN", "work with you was ended")

    async def stream() -> AsyncIterator[wire.ForwardJobRequest]:
        for part in parts_of(here.header()):
            yield part

    with refused(grpc.StatusCode.UNAUTHENTICATED, "PEER_UNKNOWN"):
        await here.hosting.bind(peer(), stream(), here.counted.append, gone)
    assert await here.store.unfinished_jobs() == []


async def test_who_falls_silent_or_dawdles_is_not_waited_for(tmp_path: Path) -> None:
    stalled = (grpc.StatusCode.DEADLINE_EXCEEDED, "UPLOAD_STALLED")
    for silent_s, upload_s in ((0.05, 30.0), (30.0, 0.05)):
        async with host(tmp_path / "here", silent_s=silent_s, upload_s=upload_s) as here:

            async def stream(messages: list[wire.ForwardJobRequest]) -> AsyncIterator[wire.ForwardJobRequest]:
                for message in messages:
                    yield message
                await asyncio.Event().wait()

            with refused(*stalled):
                only_header = [next(parts_of(here.header()))]
                await here.hosting.bind(peer(), stream(only_header), here.counted.append, lambda: None)
            with refused(*stalled):
                some = list(parts_of(here.header()))[:3]
                await here.hosting.bind(peer(), stream(some), here.counted.append, lambda: None)
            assert await here.store.guests() == []
    async with host(tmp_path / "here", silent_s=0.05) as here:
        with refused(*stalled):
            await here.hosting.bind(peer(), stream([]), here.counted.append, lambda: None)


async def test_what_is_not_known_of_a_newer_version_is_dropped(here: Host) -> None:
    header = here.header(prediction={"tier": 88, "required_mib": 9000, "elapsed": {"seconds": -5}})
    header.MergeFromString(b"\xfa\x3f\x03abc")  # field 1023
    job = (await here.job((await here.bind(header)).remote_job_id)).job
    assert job.prediction.tier == prediction_pb2.PREDICTION_TIER_UNSPECIFIED
    assert not job.prediction.HasField("elapsed")
    assert job.prediction.required_mib == 9000


async def test_limits_of_this_centre_cap_what_the_origin_filled_in(tmp_path: Path) -> None:
    async with host(tmp_path / "here", policy=CentrePolicy(longest_idle_after_s=600.0)) as here:
        asked = job_pb2.IdlePolicy(idle_after=duration(3600.0), start_grace=duration(3600.0))
        job = (await here.job((await here.bind(here.header(idle_policy=asked))).remote_job_id)).job
        assert (seconds(job.idle_policy.idle_after), seconds(job.idle_policy.start_grace)) == (600.0, 600.0)


# -- commanding


async def test_a_lease_grows_and_its_node_is_told(here: Host) -> None:
    job_id = (await here.bind(here.header(lease_s=300.0))).remote_job_id
    await here.until(job_id, RUNNING)
    first = here.node.leases[job_id, 1]
    assert 0 < first - here.node.clock_s <= 300.0
    here.clock.at += 100.0
    here.node.clock_s += 100.0
    request = wire.RenewLeaseRequest(origin=here.origin(), lease_expire_time=timestamp(here.clock.now() + 1e9))
    answer = await here.hosting.renew(peer(), request)
    assert moment(answer.lease_expire_time) == here.clock.now() + LONGEST_S
    assert moment(answer.time) == here.clock.now()
    assert answer.last_cursor == (await here.job(job_id)).job.last_cursor
    await eventually(lambda: here.node.leases[job_id, 1] > first)
    left_s = here.node.leases[job_id, 1] - here.node.clock_s
    assert LONGEST_S * 0.99 < left_s <= LONGEST_S


async def test_a_node_that_knows_no_leases_starts_no_guest(here: Host) -> None:
    here.node.refuse("renew_container_lease", Refusal(grpc.StatusCode.UNIMPLEMENTED, "RPC_NOT_IMPLEMENTED", "not yet"))
    job_id = (await here.bind(here.header())).remote_job_id
    record = await here.until(job_id, job_pb2.JOB_STATE_FAILED)
    assert record.job.reason == "RPC_NOT_IMPLEMENTED"
    assert here.node.started == []
    await here.until_gone()


async def test_wrong_peers_and_wrong_tokens_command_nothing(here: Host) -> None:
    job_id = (await here.bind(here.header(origin=here.origin(token=5)))).remote_job_id
    unknown = (grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND")
    for who, origin in (
        (peer("c"), here.origin(token=5)),
        (peer(), here.origin("j-other", token=5)),
        (peer(), here.origin(attempt=2, token=5)),
    ):
        with refused(*unknown):
            await here.hosting.renew(who, wire.RenewLeaseRequest(origin=origin))
        for reading in _readings(here.hosting, who, wire.WatchForwardedJobRequest(origin=origin)):
            with refused(*unknown):
                await anext(reading)
    stale = here.origin(token=4)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
        await here.hosting.renew(peer(), wire.RenewLeaseRequest(origin=stale))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
        await here.hosting.cancel(peer(), wire.CancelForwardedJobRequest(origin=stale))
    for reading in _readings(here.hosting, peer(), wire.WatchForwardedJobRequest(origin=stale)):
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
            await anext(reading)
    assert (await here.job(job_id)).state not in FINAL


def _readings(hosting: Hosting, who: object, request: wire.WatchForwardedJobRequest) -> Iterator[AsyncIterator[object]]:
    origin = request.origin
    yield hosting.watch(who, request)  # type: ignore[arg-type]
    yield hosting.read_logs(who, wire.ReadForwardedLogsRequest(origin=origin))  # type: ignore[arg-type]
    yield hosting.artifacts(who, wire.GetForwardedArtifactsRequest(origin=origin))  # type: ignore[arg-type]


async def test_an_end_is_confirmed_when_nothing_runs(here: Host) -> None:
    job_id = (await here.bind(here.header())).remote_job_id
    await here.until(job_id, RUNNING)
    answer = await here.hosting.cancel(peer(), wire.CancelForwardedJobRequest(origin=here.origin(), message="no more"))
    assert answer.job.state == job_pb2.JOB_STATE_CANCELLED
    assert answer.attempt.number == 1
    assert here.node.containers.get((job_id, 1)) is None
    again = await here.hosting.cancel(peer(), wire.CancelForwardedJobRequest(origin=here.origin(token=2)))
    assert again.job.state == job_pb2.JOB_STATE_CANCELLED
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "GUEST_CANCELLED"):
        await here.bind(here.header(origin=here.origin(token=3)))


async def test_an_end_that_overtakes_the_binding_wins(here: Host) -> None:
    answer = await here.hosting.cancel(peer(), wire.CancelForwardedJobRequest(origin=here.origin()))
    assert not answer.HasField("job")
    assert not answer.HasField("attempt")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "GUEST_CANCELLED"):
        await here.bind(here.header())
    assert await here.store.unfinished_jobs() == []
    # Another peer's job of the same id is another job.
    await here.bind(here.header(), who=peer("c"))


async def test_an_end_while_it_waits_for_a_share(here: Host) -> None:
    whole = {"resources": job_pb2.Resources(profile="7g.80gb")}
    first = (await here.bind(here.header(spec=whole))).remote_job_id
    await here.until(first, RUNNING)
    header = here.header(spec=whole, origin=here.origin("j-second"))
    second = (await here.bind(header, code=None)).remote_job_id
    answer = await here.hosting.cancel(peer(), wire.CancelForwardedJobRequest(origin=here.origin("j-second")))
    assert (answer.job.id, answer.job.state) == (second, job_pb2.JOB_STATE_CANCELLED)
    assert not answer.HasField("attempt")


async def test_an_end_is_not_confirmed_while_a_node_out_of_contact_may_run_it(here: Host) -> None:
    header = here.header(lease_s=300.0, spec={"stop_grace": duration(0.0)})
    job_id = (await here.bind(header)).remote_job_id
    await here.until(job_id, RUNNING)
    await here.node.set_reachable(False)
    links = [member.link for member in here.nodes._members.values()]
    await eventually(lambda: not any(link.in_contact for link in links))
    request = wire.CancelForwardedJobRequest(origin=here.origin())
    watched: list[wire.WatchForwardedJobResponse] = []
    tasks = [
        asyncio.create_task(here.hosting.cancel(peer(), request)),
        asyncio.create_task(
            _all_of(here.hosting.watch(peer(), wire.WatchForwardedJobRequest(origin=here.origin())), watched)
        ),
    ]
    await here.until(job_id, job_pb2.JOB_STATE_CANCELLED)  # but its share is held still
    here.clock.at += 304.0
    await here.until(job_id, job_pb2.JOB_STATE_CANCELLED)
    assert not any(task.done() for task in tasks)
    assert all(one.event.state not in FINAL for one in watched)
    here.clock.at += 2.0  # now the node has killed it, in contact or not
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    assert watched[-1].job.state == job_pb2.JOB_STATE_CANCELLED
    await here.node.set_reachable(True)
    await here.until_gone()


async def _all_of(
    responses: AsyncIterator[wire.WatchForwardedJobResponse], into: list[wire.WatchForwardedJobResponse]
) -> None:
    async for response in responses:
        into.append(response)  # noqa: PERF401 - one after the other, as they come


# -- reading


async def test_its_origin_sees_all_of_it_and_nothing_of_others(here: Host) -> None:
    whole = {"resources": job_pb2.Resources(profile="7g.80gb")}
    other = (await here.bind(here.header(spec=whole), who=peer("c"))).remote_job_id
    await here.until(other, RUNNING)
    job_id = (await here.bind(here.header(spec=whole))).remote_job_id
    told: list[wire.WatchForwardedJobResponse] = []
    request = wire.WatchForwardedJobRequest(origin=here.origin())
    watching = asyncio.create_task(_all_of(here.hosting.watch(peer(), request), told))
    await here.node.exit(other, 0)
    await here.until(job_id, RUNNING)
    await here.node.write(job_id, b"hello\n")
    here.node.artifacts[job_id, 1] = b"archive"
    await here.node.exit(job_id, 3)
    await asyncio.wait_for(watching, 20)
    reasons = [one.event.reason for one in told]
    assert reasons[0] == "SUBMITTED"
    for reason in ("WAITING_FOR_SLICE", "SLICE_CREATED", "CONTAINER_STARTED", "RESULTS_COLLECTED"):
        assert reason in reasons
    last = told[-1]
    assert (last.job.state, last.job.exit_code, last.event.state) == (job_pb2.JOB_STATE_FAILED, 3, last.job.state)
    assert [one.kind for one in last.usage] == ["hold"]
    assert last.usage[0].HasField("end_time")
    assert last.usage[0].profile == "7g.80gb"
    assert last.attempt.number == 1
    cursors = [one.event.cursor for one in told]
    assert cursors == sorted(set(cursors))
    for one in told:
        assert other not in str(one)
        assert "127.0.0.1" not in str(one)
    # From any cursor on, also after the end.
    for at in (0, len(told) // 2, len(told)):
        after = told[at - 1].event.cursor if at else 0
        request = wire.WatchForwardedJobRequest(origin=here.origin(), after_cursor=after)
        assert [one.event.cursor async for one in here.hosting.watch(peer(), request)] == cursors[at:]
    request = wire.WatchForwardedJobRequest(origin=here.origin(), after_cursor=2**64 - 1)
    assert [one async for one in here.hosting.watch(peer(), request)] == []


async def test_logs_and_artifacts_come_from_any_offset(here: Host) -> None:
    job_id = (await here.bind(here.header())).remote_job_id
    await here.until(job_id, RUNNING)
    artifacts = wire.GetForwardedArtifactsRequest(origin=here.origin())
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_FINISHED"):
        await anext(here.hosting.artifacts(peer(), artifacts))
    await here.node.write(job_id, b"hello\n")
    logs = wire.ReadForwardedLogsRequest(origin=here.origin(), follow=True)
    following = here.hosting.read_logs(peer(), logs)
    assert (await anext(following)).chunk.data == b"hello\n"
    here.node.artifacts[job_id, 1] = b"archive"
    await here.node.exit(job_id, 0)
    await here.until(job_id, *FINAL)
    assert [one async for one in following] == []
    logs.offset = 3
    assert b"".join([one.chunk.data async for one in here.hosting.read_logs(peer(), logs)]) == b"lo\n"
    parts = [part async for part in here.hosting.artifacts(peer(), artifacts)]
    assert parts[0].manifest.size_bytes == 7
    assert b"".join(part.chunk for part in parts) == b"archive"
    artifacts.offset = 4
    parts = [part async for part in here.hosting.artifacts(peer(), artifacts)]
    assert b"".join(part.chunk for part in parts) == b"ive"
    artifacts.offset = 2**64 - 1
    with refused(grpc.StatusCode.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE"):
        await anext(here.hosting.artifacts(peer(), artifacts))


# -- leases that run out


async def test_it_is_stopped_before_its_lease_is_over(here: Host) -> None:
    header = here.header(lease_s=600.0, spec={"stop_grace": duration(20.0)})
    job_id = (await here.bind(header)).remote_job_id
    await here.until(job_id, RUNNING)
    here.clock.at += 577.0
    await here.expire()
    assert (await here.job(job_id)).state == RUNNING
    here.clock.at += 1.0
    await here.expire()
    record = await here.until(job_id, job_pb2.JOB_STATE_CANCELLED)
    assert record.job.reason == "LEASE_EXPIRED"
    assert "lease" in record.job.message
    guest = await here.store.guest(("b", "j-there", 1))
    assert guest is not None
    assert guest.stage is GuestStage.EXPIRED
    await here.until_gone()
    request = wire.RenewLeaseRequest(origin=here.origin(), lease_expire_time=timestamp(here.clock.now() + 500))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"):
        await here.hosting.renew(peer(), request)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"):
        await here.bind(here.header())
    # How it ended can still be read.
    watched = here.hosting.watch(peer(), wire.WatchForwardedJobRequest(origin=here.origin()))
    assert [one async for one in watched][-1].job.reason == "LEASE_EXPIRED"


async def test_one_that_its_node_has_ended_alone_has_no_result(here: Host) -> None:
    """The node was out of contact with this control plane for as long as the lease, though its origin renewed it."""
    job_id = (await here.bind(here.header())).remote_job_id
    await here.until(job_id, RUNNING)
    here.node.containers[job_id, 1].lease_expired = True
    await here.node.exit(job_id, 137)
    record = await here.until(job_id, job_pb2.JOB_STATE_CANCELLED)
    assert record.job.reason == "LEASE_EXPIRED", "its origin may run it elsewhere: it has not failed by itself"


async def test_one_that_waits_is_ended_too(here: Host) -> None:
    whole = {"resources": job_pb2.Resources(profile="7g.80gb")}
    await here.until((await here.bind(here.header(spec=whole), who=peer("c"))).remote_job_id, RUNNING)
    job_id = (await here.bind(here.header(spec=whole, lease_s=100.0))).remote_job_id
    here.clock.at += 100.0
    await here.expire()
    record = await here.until(job_id, job_pb2.JOB_STATE_CANCELLED)
    assert record.job.reason == "LEASE_EXPIRED"


async def test_what_has_ended_keeps_its_result_whatever_becomes_of_the_lease(here: Host) -> None:
    job_id = (await here.bind(here.header())).remote_job_id
    await here.until(job_id, RUNNING)
    await here.node.write(job_id, b"done\n")
    await here.node.exit(job_id, 0)
    await here.until(job_id, job_pb2.JOB_STATE_SUCCEEDED)
    here.clock.at += 1e6
    await here.expire()
    assert (await here.job(job_id)).state == job_pb2.JOB_STATE_SUCCEEDED
    logs = here.hosting.read_logs(peer(), wire.ReadForwardedLogsRequest(origin=here.origin()))
    assert [one.chunk.data async for one in logs] == [b"done\n"]
    assert here.leases.received("b") == 0


async def test_a_lease_that_ran_out_meanwhile_ends_it_at_the_next_start(tmp_path: Path) -> None:
    node, clock = FakeNode(), TestClock()
    node.exits_at_once = None
    async with host(tmp_path / "here", node, clock) as here:
        job_id = (await here.bind(here.header())).remote_job_id
        await here.until(job_id, RUNNING)
    clock.at += 600.0
    async with host(tmp_path / "here", node, clock) as here:
        looking = asyncio.create_task(here.leases.run())
        record = await here.until(job_id, job_pb2.JOB_STATE_CANCELLED)
        assert record.job.reason == "LEASE_EXPIRED"
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_a_living_guest_is_taken_up_with_its_lease(tmp_path: Path) -> None:
    node, clock = FakeNode(), TestClock()
    node.exits_at_once = None
    async with host(tmp_path / "here", node, clock) as here:
        job_id = (await here.bind(here.header(lease_s=100.0))).remote_job_id
        await here.until(job_id, RUNNING)
    async with host(tmp_path / "here", node, clock) as here:
        await here.expire()
        request = wire.RenewLeaseRequest(origin=here.origin(), lease_expire_time=timestamp(clock.now() + 800))
        await here.hosting.renew(peer(), request)
        await eventually(lambda: node.leases[job_id, 1] > node.clock_s + 700)
        await node.exit(job_id, 0)
        await here.until(job_id, job_pb2.JOB_STATE_SUCCEEDED)
    assert node.started == [(job_id, 1)]


# -- what is kept


async def test_results_of_long_ago_go_and_the_job_stays_in_the_list(here: Host) -> None:
    job_id = (await here.bind(here.header())).remote_job_id
    await here.until(job_id, RUNNING)
    await here.node.write(job_id, b"done\n")
    here.node.artifacts[job_id, 1] = b"archive"
    await here.node.exit(job_id, 0)
    await here.until(job_id, job_pb2.JOB_STATE_SUCCEEDED)
    await here.until_gone()
    await here.forget(KEEP_S - 60)
    assert here.results.has_log(job_id, 1)
    await here.forget(KEEP_S + 60)
    assert not here.results.folder(job_id, 1).exists()
    record = await here.job(job_id)
    assert record.state == job_pb2.JOB_STATE_SUCCEEDED
    assert "kept" in record.results_lost
    assert await here.store.guest(("b", "j-there", 1)) is None
    with refused(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND"):
        await anext(here.hosting.read_logs(peer(), wire.ReadForwardedLogsRequest(origin=here.origin())))


async def test_a_record_without_a_job_is_kept_as_long(here: Host) -> None:
    await here.hosting.cancel(peer(), wire.CancelForwardedJobRequest(origin=here.origin()))
    await here.forget(KEEP_S - 60)
    tombstone = await here.store.guest(("b", "j-there", 1))
    assert tombstone is not None
    assert tombstone.stage is GuestStage.CANCELLED
    await here.forget(KEEP_S + 60)
    assert await here.store.guest(("b", "j-there", 1)) is None
