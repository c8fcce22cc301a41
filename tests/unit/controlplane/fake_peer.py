"""A peer that does what the test says, at the seam. What it decides about leases is really decided so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from controlplane.guests import GuestRecord, bind, cancel, renew
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import card_pb2, job_pb2, peer_service_pb2, stream_pb2
from puhui.v1 import federation_service_pb2 as wire

LONGEST_S = 3600.0
FINAL = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


class TestClock:
    """A lease clock that is set."""

    __test__ = False

    def __init__(self, at: float = 1000.0) -> None:
        self.at = at
        self.boot = "boot-1"

    def now(self) -> float:
        return self.at


class FakePeer:
    """A peer and its connection.

    Attributes:
        in_contact: whether calls arrive.
        answers: whether, of calls that arrive, the answers do.
        refuses: what it says to the next binding.
        calls: names of the calls that arrived.
    """

    def __init__(self, name: str = "b", at: float = 5000.0) -> None:
        self.record = PeerRecord(name, f"id-of-{name}", "", b"", peer_service_pb2.PeerTerms(), 0.0)
        self.clock = TestClock(at)
        self.in_contact = True
        self.answers = True
        self.refuses: list[Refusal] = []
        self.late_refuses: list[Refusal] = []
        """What it says to the next binding after it has bound it."""
        self.denies: list[Refusal] = []
        """What it says to who reads output, in turn."""
        self.calls: list[str] = []
        self.headers: list[wire.ForwardHeader] = []
        self.bundles: list[bytes | None] = []
        self.guests: dict[tuple[str, int], GuestRecord] = {}
        self.jobs: dict[tuple[str, int], job_pb2.Job] = {}
        self.events: dict[tuple[str, int], list[wire.WatchForwardedJobResponse]] = {}
        self.logs: dict[tuple[str, int], bytes] = {}
        self.artifacts: dict[tuple[str, int], tuple[stream_pb2.ArtifactManifest, bytes]] = {}
        self.breaks_after = 0
        """Streams of results break after so many chunks; 0 never."""
        self.promises: list[tuple[float, float]] = []
        self._news = asyncio.Condition()
        self._cursor = 0

    # -- the peer, as a forward sees it

    @property
    def client(self) -> FakePeer:
        return self

    def carried(self, size_bytes: int, elapsed_s: float) -> None:
        assert size_bytes >= 0

    def began(self, promised_s: float, actual_s: float) -> None:
        self.promises.append((promised_s, actual_s))

    async def contact(self) -> None:
        async with self._news:
            await self._news.wait_for(lambda: self.in_contact)

    # -- what the test does

    async def set_contact(self, there: bool) -> None:
        async with self._news:
            self.in_contact = there
            self._news.notify_all()

    async def tell(
        self, key: tuple[str, int], state: job_pb2.JobState.ValueType, reason: str = "", **fields: object
    ) -> None:
        """Something happens to a guest."""
        job = self.jobs[key]
        job.state = state
        job.reason = reason or job_pb2.JobState.Name(state)
        for name, value in fields.items():
            setattr(job, name, value)
        if state == job_pb2.JOB_STATE_RUNNING and not job.attempts:
            job.attempts.add(number=1, slice_uuid="MIG-there", container_id="c-there", profile="1g.10gb", node_id="n-x")
            job.attempts[0].start_time.CopyFrom(timestamp(1.0))
        self._cursor += 1
        event = job_pb2.JobEvent(
            cursor=self._cursor, time=timestamp(2.0), job_id=job.id, state=state, reason=job.reason, message="told"
        )
        shown = job_pb2.Job()
        shown.CopyFrom(job)
        async with self._news:
            self.events[key].append(wire.WatchForwardedJobResponse(event=event, job=shown))
            self._news.notify_all()

    def _arrive(self, call: str) -> None:
        if not self.in_contact:
            raise _away()
        self.calls.append(call)

    def _answer(self) -> None:
        if not (self.answers and self.in_contact):
            raise _away()

    # -- the connection

    async def get_offer(self, request: wire.GetOfferRequest) -> wire.GetOfferResponse:
        raise NotImplementedError

    async def forward(self, header: wire.ForwardHeader, archive: Path | None) -> wire.ForwardJobResponse:
        self._arrive("forward")
        self.headers.append(header)
        self.bundles.append(archive.read_bytes() if archive is not None else None)
        if self.refuses:
            raise self.refuses.pop(0)
        key = (header.origin.job_id, header.origin.attempt)
        wanted = GuestRecord(
            "a",
            *key,
            header.origin.fencing_token,
            job_id=f"there-{header.origin.attempt}",
            lease_end=moment(header.lease_expire_time),
            boot=self.clock.boot,
        )
        new = key not in self.guests
        self.guests[key] = bind(self.guests.get(key), wanted, self.clock.now(), LONGEST_S)
        if new:
            self.jobs[key] = job_pb2.Job(id=wanted.job_id, state=job_pb2.JOB_STATE_QUEUED)
            self.events[key] = []
        if self.late_refuses:
            raise self.late_refuses.pop(0)
        self._answer()
        guest = self.guests[key]
        return wire.ForwardJobResponse(
            remote_job_id=guest.job_id,
            lease_expire_time=timestamp(guest.lease_end),
            time=timestamp(self.clock.now()),
        )

    async def watch(
        self, request: wire.WatchForwardedJobRequest
    ) -> AsyncGenerator[wire.WatchForwardedJobResponse, None]:
        self._arrive("watch")
        cursor, key = request.after_cursor, _key(request.origin)
        if key not in self.events:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND", "never bound")
        sent = 0
        while True:
            async with self._news:
                while self.in_contact and len(self.events[key]) == sent:
                    await self._news.wait()
                fresh = self.events[key][sent:]
            if not self.in_contact:
                raise _away()
            for one in fresh:
                sent += 1
                if one.event.cursor > cursor:
                    yield one
                if one.event.state in FINAL:
                    return

    async def renew(self, request: wire.RenewLeaseRequest) -> wire.RenewLeaseResponse:
        self._arrive("renew")
        key = _key(request.origin)
        until = moment(request.lease_expire_time)
        token, clock = request.origin.fencing_token, self.clock
        self.guests[key] = renew(self.guests.get(key), token, until, clock.now(), LONGEST_S, boot=clock.boot)
        self._answer()
        return wire.RenewLeaseResponse(
            lease_expire_time=timestamp(self.guests[key].lease_end), time=timestamp(self.clock.now())
        )

    async def cancel(self, request: wire.CancelForwardedJobRequest) -> wire.CancelForwardedJobResponse:
        self._arrive("cancel")
        key = _key(request.origin)
        asked = GuestRecord("a", *key, request.origin.fencing_token)
        self.guests[key] = cancel(self.guests.get(key), asked)
        if key not in self.jobs:
            self._answer()
            return wire.CancelForwardedJobResponse()
        job = self.jobs[key]
        if job.state not in FINAL:
            await self.tell(key, job_pb2.JOB_STATE_CANCELLED, "CANCELLED")
        self._answer()
        return wire.CancelForwardedJobResponse(job=self.jobs[key])

    async def read_logs(self, request: wire.ReadForwardedLogsRequest) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        self._arrive("read_logs")
        if self.denies:
            raise self.denies.pop(0)
        output = self.logs.get(_key(request.origin), b"")
        for sent, at in enumerate(range(request.offset, len(output), 4), 1):
            self._answer()
            yield stream_pb2.LogChunk(offset=at, data=output[at : at + 4])
            if sent == self.breaks_after:
                raise _away()

    async def read_artifacts(
        self, request: wire.GetForwardedArtifactsRequest
    ) -> AsyncGenerator[wire.GetForwardedArtifactsResponse, None]:
        self._arrive("read_artifacts")
        manifest, archive = self.artifacts.get(_key(request.origin), (stream_pb2.ArtifactManifest(), b""))
        yield wire.GetForwardedArtifactsResponse(manifest=manifest)
        for sent, at in enumerate(range(request.offset, len(archive), 4), 1):
            self._answer()
            yield wire.GetForwardedArtifactsResponse(chunk=archive[at : at + 4])
            if sent == self.breaks_after:
                raise _away()

    def call(
        self, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncGenerator[wire.CallForwardedJobResponse, None]:
        raise NotImplementedError

    def exchange(
        self, summaries: AsyncIterator[wire.ExchangeCapacityRequest]
    ) -> AsyncGenerator[wire.ExchangeCapacityResponse, None]:
        raise NotImplementedError

    async def ping(self) -> None:
        self._arrive("ping")

    async def pair(self, request: wire.PairRequest) -> wire.PairResponse:
        raise NotImplementedError

    async def unpair(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        return None


def _key(origin: card_pb2.AttemptRef) -> tuple[str, int]:
    return origin.job_id, origin.attempt


def _away() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "the connection is broken")


class Book(dict[str, Any]):
    """Who is a peer, by name.

    Attributes:
        is_open: whether who is not in it is no peer.
        asked_in_vain: how often it was asked for one who was not in it.
    """

    is_open = True
    asked_in_vain = 0

    def get(self, name: str, default: Any = None) -> Any:
        self.asked_in_vain += name not in self
        return super().get(name, default)
