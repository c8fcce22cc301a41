"""What peers have run here: guests are bound once, watched, and ended when their origin says so.

A guest becomes a job like every other, in one transaction with its binding; only who may command it, and for how long,
is different. Of a guest its origin may know everything, of anything else nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import grpc

from controlplane.artifact_reader import read_artifacts
from controlplane.bundles import Bundles
from controlplane.cancelling import Cancelling
from controlplane.fleet import Geometry
from controlplane.guest_leases import GuestLeases
from controlplane.guest_request import digest_of_header, invalid, job_of, require_allowed, spec_here
from controlplane.guest_telling import told_event, told_job
from controlplane.guest_upload import Desk, GuestUploads
from controlplane.guests import GuestKey, GuestRecord, bind, cancel, renew, require_command
from controlplane.idle_policy import CentrePolicy, resolve
from controlplane.jobs import FINAL_STATES
from controlplane.lasting import Lasting
from controlplane.log_reader import LogReader
from controlplane.peers import Peer
from controlplane.reach import Clock
from controlplane.records import JobRecord
from controlplane.results import Results
from controlplane.spec import require_offered
from controlplane.store import Store
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import moment, now, timestamp
from puhui.v1 import card_pb2, job_pb2, job_service_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["Hosting"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOOK_S = 1.0
_NODE_ENDS_S = 5.0
"""After a lease has run out, its node has killed what ran within this time."""
_MOST_EVENTS = 100
_MOST_UNBOUND = 10_000
"""So many ends of what never came are noted of a peer; an honest one has few."""
_USAGE_CHANGES = frozenset({"RECLAIMED", "RESUMED", "SLICE_DESTROYED", "RUN_ENDED"})


class Hosting:
    """The guests of one centre.

    Args:
        centre: its name.
        centre_id: its id.
        store: where guests and their jobs are.
        feed: tells of what was stored.
        bundles: where their code is.
        results: where their results are.
        logs: reads their output.
        desk: who promised to take them.
        cancelling: ends jobs.
        accepted: told of every new job once it is stored.
        geometries: what the GPUs of this centre can be cut into.
        policy: when unused shares are taken back.
        clock: this centre's lease clock.
        lasting: carries through what was begun for a peer that has gone.
        longest_lease_s: the longest lease that is given, in seconds.
        leases: told of every guest that comes.
        silent_s: who sends nothing for so long in the middle of a request is not waited for, in seconds.
        upload_s: a bundle must have come within this time, in seconds.
    """

    def __init__(
        self,
        centre: str,
        centre_id: str,
        store: Store,
        feed: Feed,
        bundles: Bundles,
        results: Results,
        logs: LogReader,
        desk: Desk,
        cancelling: Cancelling,
        accepted: Callable[[JobRecord], None],
        geometries: Callable[[], list[Geometry]],
        policy: CentrePolicy,
        clock: Clock,
        lasting: Lasting,
        longest_lease_s: float,
        leases: GuestLeases,
        silent_s: float = 30.0,
        upload_s: float = 600.0,
    ) -> None:
        self._centre = centre
        self._centre_id = centre_id
        self._store = store
        self._feed = feed
        self._results = results
        self._logs = logs
        self._desk = desk
        self._cancelling = cancelling
        self._accepted = accepted
        self._geometries = geometries
        self._policy = policy
        self._clock = clock
        self._lasting = lasting
        self._longest_lease_s = longest_lease_s
        self._leases = leases
        self._uploads = GuestUploads(bundles, desk, silent_s, upload_s)

    # -- binding

    async def bind(
        self,
        peer: Peer,
        parts: AsyncIterator[wire.ForwardJobRequest],
        count: Callable[[int], None],
        require_peer: Callable[[], None],
    ) -> wire.ForwardJobResponse:
        """Binds an attempt, or finds what it was bound to before.

        Args:
            peer: whose it is.
            parts: its header, then its bundle.
            count: told of the bytes that come; refuses when they are too many.
            require_peer: refuses when it is a peer no longer: an upload takes its time.

        Raises:
            Refusal: it is not bound, and, unless it was before, nothing of it is here.
        """
        messages = aiter(parts)
        first = await self._uploads.next(messages)
        if first is None or first.WhichOneof("part") != "header":
            raise invalid("HEADER_MISSING", "the first message says what is forwarded")
        header = wire.ForwardHeader()
        header.CopyFrom(first.header)
        header.DiscardUnknownFields()  # nobody has looked at those
        key = self._key(peer, header.origin)
        wanted = GuestRecord(
            *key,
            token=header.origin.fencing_token,
            digest=digest_of_header(header),
            job_id=new_id("j"),
            lease_end=moment(header.lease_expire_time),
            boot=self._clock.boot,
            at=now(),
        )
        if await self._store.guest(key) is not None:
            return self._answer(await self._store.change_guest(key, lambda known: self._bound(known, wanted)))
        require_allowed(self._centre_id, peer.record, header)
        spec, geometries = spec_here(peer.record, header, self._policy.longest_idle_after_s), self._geometries()
        policy = resolve(spec, self._policy)
        require_offered(spec.resources, geometries)
        job = job_of(self._centre, peer.record, header, spec, policy, wanted, geometries)
        self._desk.take(header.offer_id, peer.record.name, header.origin)
        await self._uploads.bundle(peer.record, header.bundle, messages, count)
        bound = await self._lasting.do(self._keep(job, wanted, require_peer))
        self._desk.settle(peer.record.name, header.origin)
        return self._answer(bound)

    def _key(self, peer: Peer, origin: card_pb2.AttemptRef) -> GuestKey:
        if not _ID.fullmatch(origin.job_id) or not origin.attempt:
            raise invalid("ORIGIN_INVALID", "an attempt is named by the job's id at its origin and a number from 1")
        return peer.record.name, origin.job_id, origin.attempt

    def _bound(self, known: GuestRecord | None, wanted: GuestRecord) -> GuestRecord:
        return bind(known, wanted, self._clock.now(), self._longest_lease_s)

    def _answer(self, guest: GuestRecord) -> wire.ForwardJobResponse:
        return wire.ForwardJobResponse(
            remote_job_id=guest.job_id,
            lease_expire_time=timestamp(guest.lease_end),
            time=timestamp(self._clock.now()),
        )

    async def _keep(
        self,
        made: tuple[JobRecord, list[job_pb2.JobEvent]],
        wanted: GuestRecord,
        require_peer: Callable[[], None],
    ) -> GuestRecord:
        bound: list[GuestRecord] = []

        def decide(known: GuestRecord | None) -> GuestRecord:
            bound.append(self._bound(known, wanted))
            return bound[-1]

        require_peer()
        stored = await self._store.add_job(*made, guest=decide)
        if stored.id == wanted.job_id:
            self._leases.came(wanted.peer)
            self._accepted(stored)
        return bound[-1]

    # -- commanding

    async def renew(self, peer: Peer, request: wire.RenewLeaseRequest) -> wire.RenewLeaseResponse:
        """Prolongs a lease.

        Raises:
            Refusal: NOT_FOUND with GUEST_NOT_FOUND; FAILED_PRECONDITION with STALE_FENCING_TOKEN or LEASE_EXPIRED.
        """
        key, until = self._key(peer, request.origin), moment(request.lease_expire_time)

        def decide(known: GuestRecord | None) -> GuestRecord:
            clock = self._clock
            return renew(
                known, request.origin.fencing_token, until, clock.now(), self._longest_lease_s, boot=clock.boot
            )

        guest = await self._store.change_guest(key, decide)
        # Whoever drives it tells its node.
        self._feed.publish([guest.job_id])
        record = await self._store.job(guest.job_id)
        return wire.RenewLeaseResponse(
            lease_expire_time=timestamp(guest.lease_end),
            time=timestamp(self._clock.now()),
            last_cursor=record.job.last_cursor if record is not None else 0,
        )

    async def cancel(self, peer: Peer, request: wire.CancelForwardedJobRequest) -> wire.CancelForwardedJobResponse:
        """Has an attempt ended, and answers when nothing of it runs, nor ever will.

        Raises:
            Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN.
        """
        key = self._key(peer, request.origin)
        asked = GuestRecord(*key, token=request.origin.fencing_token, at=now())
        if await self._store.guest(key) is None and await self._store.unbound_guests(key[0]) >= _MOST_UNBOUND:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "TOO_MANY_UNBOUND",
                f"{_MOST_UNBOUND} attempts of yours that were never bound here were cancelled, and more are not noted",
                retry_after_s=3600.0,
            )
        guest = await self._store.change_guest(key, lambda known: cancel(known, asked))
        self._desk.settle(peer.record.name, request.origin)
        if not guest.job_id:
            return wire.CancelForwardedJobResponse()
        message = request.message or f"by its origin, {peer.record.name}"
        await self._lasting.do(self._cancelling.end(guest.job_id, message))
        record = await self._over(guest)
        attempts = record.job.attempts
        return wire.CancelForwardedJobResponse(attempt=attempts[-1] if attempts else None, job=told_job(record.job))

    async def _over(self, guest: GuestRecord) -> JobRecord:
        """Returns a guest's job once it has ended and nothing of it can run any longer.

        A job ends although its node is out of contact; what runs there is ended by the node when the lease is over.
        """
        with self._feed.watching(guest.job_id) as news:
            while True:
                news.clear()
                record = await self._require(guest)
                if record.state in FINAL_STATES and await self._is_gone(guest, record):
                    return record
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await news.wait()
                except TimeoutError:
                    continue

    async def _is_gone(self, guest: GuestRecord, record: JobRecord) -> bool:
        if record.job.HasField("exit_code"):
            return True  # its command has ended: only its share is held still
        held = any(one.job_id == guest.job_id and not one.is_warm for one in await self._store.reservations())
        # One whose share was taken back lives on without it: its container counts.
        held = held or (bool(record.job.attempts) and not await self._is_removed(record.attempt, guest.job_id))
        known = await self._store.guest(guest.key) or guest
        # After a reboot this clock may be ahead of the node's: only the node's own word counts then.
        over = known.boot == self._clock.boot and self._clock.now() > known.lease_end + _NODE_ENDS_S
        return not held or over

    async def _is_removed(self, attempt: job_pb2.Attempt, job_id: str) -> bool:
        """Returns whether an attempt has no container: it never had one, or its node has confirmed that it is gone."""
        cursor = 0
        while attempt.container_id:
            events = await self._store.events(job_id, cursor)
            if not events:
                return False
            cursor = events[-1].cursor
            if any((one.reason, one.attempt) == ("CONTAINER_REMOVED", attempt.number) for one in events):
                return True
        return True

    async def _require(self, guest: GuestRecord) -> JobRecord:
        record = await self._store.job(guest.job_id)
        if record is None:
            raise RuntimeError(f"the store holds a guest that is job {guest.job_id}, but no such job")
        return record

    # -- reading

    async def _commanded(self, peer: Peer, origin: card_pb2.AttemptRef) -> GuestRecord:
        """Returns a guest of a peer for whoever may command it.

        Raises:
            Refusal: NOT_FOUND with GUEST_NOT_FOUND; FAILED_PRECONDITION with STALE_FENCING_TOKEN.
        """
        guest = await self._store.guest(self._key(peer, origin))
        if guest is None or not guest.job_id:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND", "this attempt was never bound here")
        require_command(guest, origin.fencing_token)
        return guest

    async def watch(
        self, peer: Peer, request: wire.WatchForwardedJobRequest
    ) -> AsyncGenerator[wire.WatchForwardedJobResponse, None]:
        """Yields events of a guest, until it has ended and nothing of it runs.

        Raises:
            Refusal: as `_commanded`.
        """
        guest = await self._commanded(peer, request.origin)
        cursor = request.after_cursor
        with self._feed.watching(guest.job_id) as news:
            while True:
                news.clear()
                # Looked at first: what ends it in between is among the events, or wakes this again.
                over = (await self._require(guest)).state in FINAL_STATES
                events = await self._store.events(guest.job_id, cursor, _MOST_EVENTS)
                record = await self._require(guest)
                for event in events:
                    if event.state in FINAL_STATES:
                        record = await self._over(guest)
                    cursor = event.cursor
                    yield await self._told(guest, record, event)
                    if event.state in FINAL_STATES:
                        return
                if events:
                    continue
                if over:
                    return
                await news.wait()

    async def _told(
        self, guest: GuestRecord, record: JobRecord, event: job_pb2.JobEvent
    ) -> wire.WatchForwardedJobResponse:
        told = wire.WatchForwardedJobResponse(event=told_event(event), job=told_job(record.job))
        if record.job.attempts:
            told.attempt.CopyFrom(record.job.attempts[-1])
        if event.state in FINAL_STATES or event.reason in _USAGE_CHANGES:
            for one in await self._store.usage(0.0, now() + 1.0, job_id=guest.job_id):
                told.usage.add(
                    kind=one.kind.value,
                    number=one.number,
                    run_id=one.run_id,
                    profile=one.profile,
                    gpu_model=one.gpu_model,
                    compute_slices=one.compute_slices,
                    gpu_slices=one.gpu_slices,
                    emulated=one.emulated,
                    start_time=timestamp(one.start),
                    end_time=timestamp(one.end) if one.end is not None else None,
                    busy_seconds=one.busy_s,
                    reclaim_mode=one.reclaim_mode,
                )
        return told

    async def read_logs(
        self, peer: Peer, request: wire.ReadForwardedLogsRequest
    ) -> AsyncGenerator[wire.ReadForwardedLogsResponse, None]:
        """Yields output of a guest.

        Raises:
            Refusal: as `_commanded`, and as `LogReader.read`.
        """
        guest = await self._commanded(peer, request.origin)
        asked = job_service_pb2.ReadLogsRequest(
            job_id=guest.job_id, offset=request.offset, tail_lines=request.tail_lines, follow=request.follow
        )
        async for chunk in self._logs.read(asked):
            yield wire.ReadForwardedLogsResponse(chunk=chunk)

    async def artifacts(
        self, peer: Peer, request: wire.GetForwardedArtifactsRequest
    ) -> AsyncGenerator[wire.GetForwardedArtifactsResponse, None]:
        """Yields artifacts of a guest that has ended.

        Raises:
            Refusal: as `_commanded`, and as `read_artifacts`.
        """
        guest = await self._commanded(peer, request.origin)
        record = await self._require(guest)
        for part in read_artifacts(record, self._results, 0, request.offset):
            if part.HasField("manifest"):
                yield wire.GetForwardedArtifactsResponse(manifest=part.manifest)
            else:
                yield wire.GetForwardedArtifactsResponse(chunk=part.chunk)
