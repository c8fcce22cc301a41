"""A peer that is paired, and means harm, or is broken: each call is answered with code and reason, and harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from controlplane.certificates import CentreIdentity, key_from_secret, name_of, new_secret
from controlplane.peer_limits import most_streams
from controlplane.records import PeerRecord
from puhui.rpc.bundle import pack_files
from puhui.rpc.channel import open_pinned_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, moment, now
from puhui.rpc.tls import Pinned
from puhui.v1 import card_pb2, job_pb2, job_service_pb2, peer_service_pb2, prediction_pb2, stream_pb2
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.federation_service_pb2_grpc import FederationServiceStub
from tests.integration.federation.neighbourhood import Neighbour, neighbour

CODE = pack_files({"x.py": b"print(1)\n"})
INVALID, FAILED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND, EXHAUSTED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED
MANY = 10**6
"""Calls a second: these tests ask for more than a peer would."""


@dataclass
class Caller:
    """Somebody who is paired with a centre, and calls it as he likes."""

    name: str
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return FederationServiceStub(self.channel)

    def origin(self, job_id: str = "j-there", attempt: int = 1, token: int = 1) -> card_pb2.AttemptRef:
        return card_pb2.AttemptRef(centre=self.name, job_id=job_id, attempt=attempt, fencing_token=token)

    async def offer(self, origin: card_pb2.AttemptRef | None = None, **fields: Any) -> wire.GetOfferResponse:
        request = wire.GetOfferRequest(origin=origin or self.origin(), visited_centres=["f" * 32], tenant="t", **fields)
        if "sizing" not in fields:
            request.sizing.required_mib = 9000
        answer: wire.GetOfferResponse = await self.stub.GetOffer(request, timeout=20)
        return answer

    async def header(self, code: bytes | None = CODE, **fields: Any) -> wire.ForwardHeader:
        """Returns a header that would be taken, but for what the test makes of it."""
        origin = fields.pop("origin", self.origin())
        offer = await self.offer(origin)
        assert offer.accepted, offer
        given: dict[str, Any] = {
            "origin": origin,
            "spec": job_pb2.JobSpec(tenant="t", command=["python3", "x.py"]),
            "sizing": prediction_pb2.Sizing(required_mib=9000),
            "offer_id": offer.offer_id,
            "visited_centres": ["f" * 32],
            **fields,
        }
        header = wire.ForwardHeader(**given)
        if "lease_expire_time" not in fields:
            header.lease_expire_time.FromNanoseconds(round((moment(offer.time) + 300) * 1e9))
        if code is not None and "bundle" not in fields:
            header.bundle.bundle_id = "sha256:" + hashlib.sha256(code).hexdigest()
            header.bundle.size_bytes = len(code)
        return header

    async def forward(self, header: wire.ForwardHeader, code: bytes | None = CODE) -> wire.ForwardJobResponse:
        messages = [wire.ForwardJobRequest(header=header)]
        content = code or b""
        chunks = (content[at : at + 2**16] for at in range(0, len(content), 2**16))
        messages += [wire.ForwardJobRequest(chunk=chunk) for chunk in chunks]
        return await self.send(messages)

    async def send(self, messages: Iterable[wire.ForwardJobRequest]) -> wire.ForwardJobResponse:
        answer: wire.ForwardJobResponse = await self.stub.ForwardJob(iter(messages), timeout=30)
        return answer


@contextlib.asynccontextmanager
async def caller(to: Neighbour, name: str, **terms: Any) -> AsyncIterator[Caller]:
    """Pairs somebody with a centre, who is at nobody's mercy."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    who = CentreIdentity.of_key(key_from_secret(new_secret()), digest)
    agreed = peer_service_pb2.PeerTerms(**{"most_calls_a_second": MANY, **terms})
    federation = to.centre._federation
    await federation.peers.add(PeerRecord(name, digest, "", who.certificate, agreed, now()))
    server_name = name_of(await to.centre._store.centre_id())
    tls = Pinned(who.key_pem, who.certificate_pem, federation._identity.certificate_pem, server_name)
    channel = open_pinned_channel(federation.address, tls)
    try:
        yield Caller(name, channel)
    finally:
        await channel.close(None)


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Neighbour]:
    async with neighbour("b", tmp_path, gpus=2) as centre:
        yield centre


@pytest.fixture
async def eve(there: Neighbour) -> AsyncIterator[Caller]:
    async with caller(there, "eve") as one:
        yield one


@contextlib.contextmanager
def refused(code: grpc.StatusCode, *reasons: str) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    refusal = Refusal.of(caught.value)
    assert (refusal.code, refusal.reason in reasons) == (code, True), refusal
    assert refusal.message


async def nothing_came(there: Neighbour) -> None:
    """Nothing of what was refused is left, and the centre works for everybody else."""
    store = there.centre._store
    assert await store.unfinished_jobs() == []
    assert await store.guests() == []
    assert not [name for name in there.files() if "upload-" in name]
    async with caller(there, "alice") as alice:
        await works_for(there, alice)
    own = await there.submit()
    await there.until(own, job_pb2.JOB_STATE_RUNNING)
    await there.node.exit(own, 0)
    assert (await there.ended(own)).state == job_pb2.JOB_STATE_SUCCEEDED
    assert there.node.empty


async def works_for(there: Neighbour, one: Caller, job_id: str = "j-good") -> None:
    """A job of this peer runs here to its end."""
    origin = one.origin(job_id)
    bound = await one.forward(await one.header(origin=origin))
    await there.until(bound.remote_job_id, job_pb2.JOB_STATE_RUNNING)
    await there.node.exit(bound.remote_job_id, 0)
    watched = one.stub.WatchForwardedJob(wire.WatchForwardedJobRequest(origin=origin), timeout=30)
    told = [response async for response in watched]
    assert told[-1].job.state == job_pb2.JOB_STATE_SUCCEEDED


# -- messages


async def test_messages_that_are_huge_or_none_at_all(there: Neighbour, eve: Caller) -> None:
    huge = wire.GetOfferRequest(tenant="x" * (9 * 2**20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await eve.stub.GetOffer(huge, timeout=20)
    assert caught.value.code() is EXHAUSTED
    raw: Any = eve.channel
    call = raw.unary_unary("/puhui.v1.FederationService/RenewLease")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\xff\xff\xff\xff this is no message", timeout=20)
    assert caught.value.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw.unary_unary("/puhui.v1.FederationService/GiveMeAll")(b"", timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for service in ("JobService/ListJobs", "FleetService/ListNodes", "PeerService/ListPeers"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw.unary_unary(f"/puhui.v1.{service}")(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "what is for people is not served to peers"
    with refused(INVALID, "HEADER_INVALID"):
        header = await eve.header(visited_centres=["y" * 60_000] * 16, hops_left=1)
        header.spec.env["X"] = "x" * 2**18
        await eve.forward(header)
    await nothing_came(there)


async def test_empty_messages_everywhere(there: Neighbour, eve: Caller) -> None:
    stub = eve.stub
    assert (await stub.GetOffer(wire.GetOfferRequest(), timeout=20)).time.seconds
    with refused(INVALID, "ORIGIN_INVALID"):
        await stub.RenewLease(wire.RenewLeaseRequest(), timeout=20)
    with refused(INVALID, "ORIGIN_INVALID"):
        await stub.CancelForwardedJob(wire.CancelForwardedJobRequest(), timeout=20)
    with refused(INVALID, "HEADER_MISSING"):
        await eve.send([])
    with refused(INVALID, "HEADER_MISSING"):
        await eve.send([wire.ForwardJobRequest()])
    with refused(INVALID, "ORIGIN_INVALID"):
        await eve.forward(wire.ForwardHeader(), code=None)
    for stream in (
        stub.WatchForwardedJob(wire.WatchForwardedJobRequest(), timeout=20),
        stub.ReadForwardedLogs(wire.ReadForwardedLogsRequest(), timeout=20),
        stub.GetForwardedArtifacts(wire.GetForwardedArtifactsRequest(), timeout=20),
    ):
        with refused(INVALID, "ORIGIN_INVALID"):
            await stream.read()
    await nothing_came(there)


async def test_numbers_that_nobody_means(there: Neighbour, eve: Caller) -> None:
    far: Any = {"seconds": 2**62, "nanos": -(2**31)}
    past: Any = {"seconds": -(2**62), "nanos": 2**31 - 1}
    for odd in (
        {"expected_duration": {"seconds": -(2**62)}},
        {"expected_duration": {"seconds": 2**62, "nanos": -1}},
        {"bundle_bytes": 2**64 - 1},
        {"sizing": prediction_pb2.Sizing(required_mib=2**64 - 1)},
        {"kind": 77},
        {"hops_left": 2**32 - 1},
        {"resources": job_pb2.Resources(cpus=float("nan"), profile="x" * 10**5)},
        {"required_labels": {str(n): "x" for n in range(10_000)}},
    ):
        answer = await eve.offer(**odd)
        assert answer.accepted or answer.reason
        assert moment(answer.time) > 0
    bound = await eve.forward(await eve.header(lease_expire_time=far))
    assert moment(bound.lease_expire_time) <= moment(bound.time) + 900, "no lease is longer than this centre gives"
    asked = wire.RenewLeaseRequest(origin=eve.origin(), lease_expire_time=past)
    answer = await eve.stub.RenewLease(asked, timeout=20)
    assert moment(answer.lease_expire_time) == moment(bound.lease_expire_time), "and none becomes shorter"
    with refused(FAILED, "LEASE_EXPIRED"):
        await eve.forward(await eve.header(origin=eve.origin("j-late"), lease_expire_time=past))
    nan = float("nan")
    for spec in (
        {"kind": 77},
        {"resources": job_pb2.Resources(cpus=nan)},
        {"max_duration": duration(-1.0)},
        {"stop_grace": {"seconds": 2**62}},
        {"env": {"PUHUI_JOB_ID": "j-another"}},
        {"env": {"CUDA_VISIBLE_DEVICES": "all"}},
        {"command": ["a\0b"]},
        {"image": "x" * 1000},
        {"labels": {"a b": "x"}},
    ):
        with refused(INVALID, "SPEC_INVALID"):
            full: dict[str, Any] = {"tenant": "t", "command": ["python3", "x.py"], **spec}
            await eve.forward(await eve.header(origin=eve.origin("j-odd"), spec=job_pb2.JobSpec(**full)))
    for policy in (
        {"idle_after": {"seconds": -(2**40)}},
        {"idle_below_percent": nan},
        {"reclaim_mode": 99},
        {"start_grace": {"seconds": -5}},
    ):
        with refused(INVALID, "SPEC_INVALID", "IDLE_AFTER_TOO_SHORT"):
            idle = job_pb2.IdlePolicy(**policy)
            await eve.forward(await eve.header(origin=eve.origin("j-odd"), idle_policy=idle))
    await eve.stub.CancelForwardedJob(wire.CancelForwardedJobRequest(origin=eve.origin()), timeout=30)
    await nothing_came(there)


# -- streams


async def test_a_stream_without_end_is_cut(there: Neighbour, eve: Caller) -> None:
    header = await eve.header()
    sent = 0

    async def flood() -> AsyncIterator[wire.ForwardJobRequest]:
        nonlocal sent
        yield wire.ForwardJobRequest(header=header)
        while True:
            sent += 1
            yield wire.ForwardJobRequest(chunk=b"x" * 2**16)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await eve.stub.ForwardJob(flood(), timeout=30)
    # A caller who is still writing may see that the stream was reset, and not why.
    assert caught.value.code() in {INVALID, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    assert sent * 2**16 < 64 * 2**20, "no more than what was on its way is taken"

    async def headers() -> AsyncIterator[wire.ForwardJobRequest]:
        while True:
            yield wire.ForwardJobRequest(header=header)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await eve.stub.ForwardJob(headers(), timeout=30)
    assert caught.value.code() in {INVALID, FAILED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    await nothing_came(there)


async def test_capacity_without_end_is_cut(there: Neighbour, eve: Caller) -> None:
    async def flood() -> AsyncIterator[wire.ExchangeCapacityRequest]:
        number = 0
        while True:
            number += 1
            profiles = [wire.CapacitySummary(profile="1g.10gb", free=2**32 - 1)] * 100
            yield wire.ExchangeCapacityRequest(centre="eve", sequence=number, profiles=profiles)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [told async for told in eve.stub.ExchangeCapacity(flood(), timeout=30)]
    assert caught.value.code() in {EXHAUSTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
    await nothing_came(there)


async def test_too_many_streams_and_calls_and_bytes_are_refused(there: Neighbour, eve: Caller) -> None:
    async with caller(there, "mallory", most_received=1) as mallory:
        bound = await mallory.forward(await mallory.header())
        request = wire.WatchForwardedJobRequest(origin=mallory.origin())
        peer = there.centre._federation.peers.get("mallory")
        assert peer is not None
        watches = [mallory.stub.WatchForwardedJob(request, timeout=60) for _ in range(most_streams(peer.record))]
        await asyncio.gather(*(watch.read() for watch in watches))
        with refused(EXHAUSTED, "PEER_STREAMS"):
            await mallory.stub.WatchForwardedJob(request, timeout=20).read()
        await works_for(there, eve, "j-meanwhile")
        await there.node.exit(bound.remote_job_id, 0)
        await there.ended(bound.remote_job_id)
    async with caller(there, "trudy", most_calls_a_second=1, most_bytes_a_day=10) as trudy:
        with refused(EXHAUSTED, "PEER_BYTES"):
            await trudy.forward(await trudy.header())
        with refused(EXHAUSTED, "PEER_RATE"):
            await asyncio.gather(*(trudy.stub.GetOffer(wire.GetOfferRequest(), timeout=20) for _ in range(50)))
        await works_for(there, eve, "j-thereafter")
    await nothing_came(there)


# -- what is forwarded


def archive_of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"x") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
        tar.addfile(entry, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return packed.getvalue()


def bomb() -> bytes:
    """Returns 1 MiB that unpacks to more than 1 GiB."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9) as file:
        entry = tarfile.TarInfo("big")
        entry.size = 2**30 + 2**28
        file.write(entry.tobuf())
        zeros = b"\0" * 2**24
        for _ in range(entry.size // len(zeros)):
            file.write(zeros)
    return packed.getvalue()


async def test_bundles_that_are_not_what_they_seem(there: Neighbour, eve: Caller) -> None:
    for code in (
        archive_of("../../../escape"),
        archive_of("/etc/passwd"),
        archive_of("link", tarfile.SYMTYPE, "/etc/passwd"),
        archive_of("pipe", tarfile.FIFOTYPE),
        archive_of("null", tarfile.CHRTYPE),
        b"this is no archive",
        CODE[:-10],
        bomb(),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await eve.forward(await eve.header(code), code)
        refusal = Refusal.of(caught.value)
        assert refusal.code in {INVALID, EXHAUSTED}, refusal
        assert refusal.reason.startswith("BUNDLE"), refusal
    lies = {
        "UPLOAD_DIGEST": stream_pb2.BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=len(CODE)),
        "UPLOAD_INCOMPLETE": stream_pb2.BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=len(CODE) + 1),
        "UPLOAD_MALFORMED": stream_pb2.BundleHeader(bundle_id="sha256:../../../x", size_bytes=len(CODE)),
    }
    for reason, bundle in lies.items():
        with refused(INVALID, reason):
            await eve.forward(await eve.header(bundle=bundle))
    with refused(EXHAUSTED, "BUNDLE_TOO_LARGE"):
        vast = stream_pb2.BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=2**64 - 1)
        await eve.forward(await eve.header(bundle=vast))
    # What another peer has sent is not hers, though she knows its name.
    async with caller(there, "alice") as alice:
        await works_for(there, alice)
    with refused(NOT_FOUND, "BUNDLE_NOT_FOUND"):
        await eve.forward(await eve.header(), code=None)


async def test_offers_are_for_whom_they_were_given(there: Neighbour, eve: Caller) -> None:
    async with caller(there, "alice") as alice:
        stolen = await alice.header()
        with refused(FAILED, "OFFER_EXPIRED"):
            await eve.forward(stolen)
        other = await eve.header()
        other.origin.job_id = "j-another"
        with refused(FAILED, "OFFER_EXPIRED"):
            await eve.forward(other)
        made_up = await eve.header()
        made_up.offer_id = "x" * 10_000
        with refused(FAILED, "OFFER_EXPIRED"):
            await eve.forward(made_up)
        # A small offer is no way to a large share that is not there.
        small = await eve.header()
        small.sizing.required_mib = 10**7
        with refused(FAILED, "TOO_LARGE"):
            await eve.forward(small)
    loop = await eve.header()
    loop.visited_centres.append(await there.centre._store.centre_id())
    with refused(FAILED, "FORWARDING_LOOP"):
        await eve.forward(loop)
    await nothing_came(there)


async def test_what_comes_again_or_in_another_order(there: Neighbour, eve: Caller) -> None:
    header = await eve.header()
    answers = await asyncio.gather(*(eve.forward(header) for _ in range(8)))
    assert len({answer.remote_job_id for answer in answers}) == 1
    other = wire.ForwardHeader()
    other.CopyFrom(header)
    other.spec.command.append("--more")
    with refused(grpc.StatusCode.ALREADY_EXISTS, "GUEST_DIFFERS"):
        await eve.forward(other)
    end = wire.CancelForwardedJobRequest(origin=eve.origin(token=2))
    ends = await asyncio.gather(*(eve.stub.CancelForwardedJob(end, timeout=30) for _ in range(8)))
    assert {one.job.state for one in ends} == {job_pb2.JOB_STATE_CANCELLED}
    with refused(FAILED, "STALE_FENCING_TOKEN"):
        await eve.forward(header)
    header.origin.fencing_token = 3
    with refused(FAILED, "GUEST_CANCELLED"):
        await eve.forward(header)
    # An end that overtakes what it ends.
    late = await eve.header(origin=eve.origin("j-late"))
    gone = await eve.stub.CancelForwardedJob(wire.CancelForwardedJobRequest(origin=late.origin), timeout=30)
    assert not gone.HasField("job")
    with refused(FAILED, "GUEST_CANCELLED"):
        await eve.forward(late)
    renewal = wire.RenewLeaseRequest(origin=late.origin)
    with refused(NOT_FOUND, "GUEST_NOT_FOUND"):
        await eve.stub.RenewLease(renewal, timeout=20)
    await nothing_came(there)


async def test_another_peers_guest_is_like_one_that_never_was(there: Neighbour, eve: Caller) -> None:
    async with caller(there, "alice") as alice:
        bound = await alice.forward(await alice.header())
        await there.until(bound.remote_job_id, job_pb2.JOB_STATE_RUNNING)
        # By the origin's name for it, by the one it has here, and as if she were alice.
        for origin in (
            eve.origin(token=99),
            eve.origin(bound.remote_job_id, token=99),
            alice.origin(token=99),
        ):
            with refused(NOT_FOUND, "GUEST_NOT_FOUND"):
                await eve.stub.RenewLease(wire.RenewLeaseRequest(origin=origin), timeout=20)
            for stream in (
                eve.stub.WatchForwardedJob(wire.WatchForwardedJobRequest(origin=origin), timeout=20),
                eve.stub.ReadForwardedLogs(wire.ReadForwardedLogsRequest(origin=origin, follow=True), timeout=20),
                eve.stub.GetForwardedArtifacts(wire.GetForwardedArtifactsRequest(origin=origin), timeout=20),
            ):
                with refused(NOT_FOUND, "GUEST_NOT_FOUND"):
                    await stream.read()
            answer = await eve.stub.CancelForwardedJob(wire.CancelForwardedJobRequest(origin=origin), timeout=20)
            assert not answer.HasField("job"), "she has ended something of her own that never was"
        renewed = await alice.stub.RenewLease(wire.RenewLeaseRequest(origin=alice.origin()), timeout=20)
        assert moment(renewed.lease_expire_time) >= moment(bound.lease_expire_time)
        assert (await there.job(bound.remote_job_id)).state == job_pb2.JOB_STATE_RUNNING
        await there.node.exit(bound.remote_job_id, 0)
        assert (await there.ended(bound.remote_job_id)).state == job_pb2.JOB_STATE_SUCCEEDED
    await there.operator.RemovePeer(peer_service_pb2.RemovePeerRequest(name="alice", force=True))
    await nothing_came(there)


async def test_many_ends_of_what_never_was_do_not_hinder_others(there: Neighbour, eve: Caller) -> None:
    ends = (
        eve.stub.CancelForwardedJob(
            wire.CancelForwardedJobRequest(origin=eve.origin(f"j-{number}"), message="x" * 10_000), timeout=30
        )
        for number in range(300)
    )
    answers = await asyncio.gather(*ends)
    assert not any(answer.HasField("job") for answer in answers)
    await nothing_came(there)


# -- calls that are carried


def call_of(one: Caller, method: str, origin: card_pb2.AttemptRef, *messages: bytes) -> Any:
    """Begins a call. Of what is refused at its header send no more: a caller who writes on may not see why."""
    header = wire.CallHeader(origin=origin, method=method)
    parts = [wire.CallForwardedJobRequest(header=header)]
    parts += [wire.CallForwardedJobRequest(message=message) for message in messages]
    return one.stub.CallForwardedJob(iter(parts), timeout=30)


async def test_calls_reach_nothing_but_ones_own_guest(there: Neighbour, eve: Caller) -> None:
    own = await there.submit(name="secret", resources=job_pb2.Resources(profile="1g.10gb"))
    await there.until(own, job_pb2.JOB_STATE_RUNNING)
    bound = await eve.forward(await eve.header())
    await there.until(bound.remote_job_id, job_pb2.JOB_STATE_RUNNING)
    about_own = job_service_pb2.ListRunsRequest(job_id=own).SerializeToString()
    for method in ("SubmitJob", "ListJobs", "PutBundle", "PredictJob", "__init__", "", "x" * 10**5):
        with refused(grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_CARRIED"):
            await call_of(eve, method, eve.origin()).read()
    for origin in (eve.origin("j-other"), eve.origin(own), eve.origin(attempt=2)):
        with refused(NOT_FOUND, "GUEST_NOT_FOUND"):
            await call_of(eve, "ExplainJob", origin).read()
    async with caller(there, "alice") as alice:
        with refused(NOT_FOUND, "GUEST_NOT_FOUND"):
            await call_of(alice, "SuspendJob", eve.origin(token=9)).read()
    with refused(INVALID, "MESSAGE_INVALID"):
        await call_of(eve, "ListRuns", eve.origin(), b"\xff\xff\xff").read()
    with refused(INVALID, "MESSAGE_INVALID"):
        await call_of(eve, "ListRuns", eve.origin()).read()
    header = wire.CallForwardedJobRequest(header=wire.CallHeader(origin=eve.origin(), method="ListRuns"))
    with refused(INVALID, "MESSAGE_INVALID"):
        await eve.stub.CallForwardedJob(iter([header, header]), timeout=20).read()
    with refused(INVALID, "HEADER_MISSING"):
        await eve.stub.CallForwardedJob(iter([wire.CallForwardedJobRequest(message=b"")]), timeout=20).read()
    with refused(INVALID, "HEADER_MISSING"):
        await eve.stub.CallForwardedJob(iter([]), timeout=20).read()
    # Whatever job she names, it is about hers.
    answer = await call_of(eve, "ExplainJob", eve.origin(), about_own).read()
    assert own.encode() not in answer.message
    assert b"secret" not in answer.message
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call_of(eve, "ResumeJob", eve.origin(), about_own).read()
    assert (await there.job(own)).state == job_pb2.JOB_STATE_RUNNING
    assert "RESUME_REQUESTED" not in await there.reasons(own)
    with refused(FAILED, "STALE_FENCING_TOKEN"):
        await call_of(eve, "ListRuns", eve.origin(token=0)).read()
    await there.node.exit(own, 0)
    await there.ended(own)
    await eve.stub.CancelForwardedJob(wire.CancelForwardedJobRequest(origin=eve.origin()), timeout=30)
    await nothing_came(there)


async def test_a_call_without_end_waits_for_who_reads_it(there: Neighbour, eve: Caller) -> None:
    bound = await eve.forward(await eve.header())
    await there.until(bound.remote_job_id, job_pb2.JOB_STATE_RUNNING)

    async def flood() -> AsyncIterator[wire.CallForwardedJobRequest]:
        yield wire.CallForwardedJobRequest(header=wire.CallHeader(origin=eve.origin(), method="RunJob"))
        start = job_service_pb2.RunStart(job_id="j-x", command=["cat"])
        yield wire.CallForwardedJobRequest(message=job_service_pb2.RunJobRequest(start=start).SerializeToString())
        while True:
            yield wire.CallForwardedJobRequest(message=b"")

    call = eve.stub.CallForwardedJob(flood(), timeout=60)
    await call.read()  # its command begins, and reads nothing
    async with caller(there, "alice") as alice:
        await works_for(there, alice, "j-meanwhile")
    call.cancel()
    await eve.stub.CancelForwardedJob(wire.CancelForwardedJobRequest(origin=eve.origin()), timeout=30)
    await there.operator.RemovePeer(peer_service_pb2.RemovePeerRequest(name="alice", force=True))
    await nothing_came(there)
