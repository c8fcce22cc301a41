"""Drives one attempt at a peer, from the offer that was taken until nothing more is to be asked of the peer.

The stage of its `ForwardRecord` in the store says where to go on, and every step may be done again: after a crash of
the control plane at any point it is taken up under a higher fencing token. A peer that cannot be reached has neither
failed nor succeeded: the job is taken to be running there until the peer says otherwise, or its lease is over for
certain.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import structlog

from controlplane import happenings
from controlplane.away import ending_there
from controlplane.draft import IllegalTransition
from controlplane.endings import Ending, cancelled
from controlplane.faults import retry_delay_s
from controlplane.forwards import LAST_MOMENT_S, ForwardRecord, ForwardStage, is_surely_over, read_clock, rebooted
from controlplane.happenings import Happening
from controlplane.jobs import FINAL_STATES, PLACED_STATES, transition
from controlplane.lasting import Lasting
from controlplane.metering import AllEnded, Stretch
from controlplane.node_asker import Fenced
from controlplane.peer_client import is_away
from controlplane.peer_end import PeerEnd
from controlplane.peer_follow import PeerFollow
from controlplane.peer_request import forward_header, lease_left, origin_of
from controlplane.peer_terms import DEFAULT_RESULT_BYTES
from controlplane.reach import KnownPeer, Reach
from controlplane.records import Change, Decide, JobRecord
from controlplane.store import Store
from controlplane.surroundings import Surroundings
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, now
from puhui.v1 import card_pb2, job_pb2
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.job_pb2 import JOB_STATE_FAILED

__all__ = ["PeerDriver"]

_log = structlog.get_logger(__name__)

_MOST_SENDS = 4
_LOOK_S = 2.0
# What a peer says before it binds anything: after that as the first answer it is certain that nothing is bound.
# Whatever else it says, it may have said it after.
_BEFORE_BINDING = frozenset(
    {
        "BUNDLE_TOO_LARGE",
        "FORWARDING_LOOP",
        "HEADER_INVALID",
        "NOT_RECEIVING",
        "OFFER_EXPIRED",
        "PEER_BYTES",
        "PEER_RATE",
        "PEER_STREAMS",
        "PEER_UNKNOWN",
        "PROFILE_NOT_AVAILABLE",
        "SPEC_INVALID",
        "TENANT_INVALID",
        "TOO_LARGE",
    }
)
# The peer is full, or could not be asked: it may be asked again for this job.
_PASSING = frozenset(
    {
        "CANCELLED",
        "CLOSED",
        "DISK_FULL",
        "FULL",
        "GUEST_NOT_FOUND",
        "INTERNAL",
        "LEASE_EXPIRED",
        "OFFER_EXPIRED",
        "PEER_BYTES",
        "PEER_RATE",
        "PEER_STREAMS",
        "PEER_UNKNOWN",
        "UNKNOWN",
    }
)
_PEER_LOST = Ending(
    JOB_STATE_FAILED,
    "PEER_LOST",
    "the peer that had this session could not be reached until its lease was over, so it was ended there, with its "
    "files; start a new session with `puhui session start`",
)


class PeerDriver:
    """Drives one attempt of one job at a peer. `run` returns when nothing of it is left to do."""

    def __init__(self, around: Surroundings, reach: Reach, record: JobRecord, number: int) -> None:
        self._around = around
        self._reach = reach
        self._record = record
        self._number = number
        self._forward = ForwardRecord(record.id, number, record.job.attempts[number - 1].peer, 0)
        self._cancel = asyncio.Event()
        self._adopted = False
        self._lasting = Lasting()
        self._storing = asyncio.Lock()
        self._job_there: job_pb2.Job | None = None
        self._at_end = PeerEnd(self, around.results, around.withdraw)
        if record.cancel_requested:
            self._cancel.set()

    def cancel(self) -> None:
        """The job's end was asked for, and that is stored."""
        self._cancel.set()

    async def run(self, *, adopt: bool) -> JobRecord:
        """Drives the attempt to its end. Returns the job as it is then.

        Args:
            adopt: take the attempt up under a new token, because its driver's process is gone.
        """
        forward = await self._around.store.forward(self._record.id, self._number)
        if forward is None:
            raise RuntimeError(f"attempt {self._record.id}/{self._number} is at a peer, but the store has no forward")
        self._forward, self._adopted = forward, adopt
        steps: Mapping[ForwardStage, Callable[[], Awaitable[None]]] = {
            ForwardStage.SENDING: self._send,
            ForwardStage.BOUND: self._follow,
            ForwardStage.ENDING: self._end,
            ForwardStage.ENDED: lambda: self._at_end.collect(self._job_there),
            ForwardStage.LOST: self._at_end.look_late,
        }
        try:
            if adopt:
                await self._adopt()
            while self._forward.stage is not ForwardStage.SETTLED:
                await steps[self._forward.stage]()
        except Fenced:
            _log.error("another control plane commands this attempt", job=self._record.id, attempt=self._number)
        stored = await self._around.store.job(self._record.id)
        return stored or self._record

    # -- what it stands on

    @property
    def forward(self) -> ForwardRecord:
        """The forward, as it is stored."""
        return self._forward

    @property
    def record(self) -> JobRecord:
        """The job, as it was last stored from here."""
        return self._record

    @property
    def reach(self) -> Reach:
        """What it works with."""
        return self._reach

    @property
    def store(self) -> Store:
        """The centre's memory."""
        return self._around.store

    @property
    def origin(self) -> card_pb2.AttemptRef:
        """Under which the peer is commanded."""
        return origin_of(self._around.centre, self._forward)

    def peer(self) -> KnownPeer:
        """Returns the peer.

        Raises:
            Refusal: UNAVAILABLE with PEER_UNKNOWN: work with it was ended.
        """
        peer = self._reach.peers.get(self._forward.peer)
        if peer is None or peer.record.create_time != self._forward.paired:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "PEER_UNKNOWN",
                f"{self._forward.peer} is no peer of this centre any longer",
            )
        return peer

    async def until_contact(self, tries: int) -> None:
        """Waits until asking the peer again makes sense, but never past the end of the lease."""
        peer = self._reach.peers.get(self._forward.peer)
        delay_s = min(_LOOK_S, retry_delay_s(tries))
        if peer is None or peer.in_contact:
            await asyncio.sleep(delay_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await peer.contact()

    def heard(self, peer_time: float) -> None:
        """The peer has told its lease clock."""
        if 0 < peer_time < LAST_MOMENT_S:
            self._forward = read_clock(self._forward, peer_time, self._reach.clock.now())

    @property
    def most_result_bytes(self) -> int:
        """So much is taken of what it left, in bytes."""
        peer = self._reach.peers.get(self._forward.peer)
        return (peer.record.terms.most_result_bytes if peer is not None else 0) or DEFAULT_RESULT_BYTES

    @property
    def _left_s(self) -> float:
        """How long its lease still lasts, in seconds, as far as known."""
        here_s = self._reach.clock.now() - self._forward.read_at
        return self._forward.lease_end - self._forward.peer_time - here_s

    @property
    def is_over(self) -> bool:
        """Whether its lease is over for certain."""
        return is_surely_over(self._forward, self._reach.clock.now(), self._reach.margin_s)

    @property
    def is_cancelled(self) -> bool:
        """Whether the job's end was asked for."""
        return self._cancel.is_set()

    def is_newest(self, record: JobRecord) -> bool:
        """Whether the job has no newer attempt."""
        return len(record.job.attempts) == self._number

    async def change(
        self,
        *told: Happening,
        usage_there: Sequence[Stretch] = (),
        over: bool = False,
        otherwise: Happening | None = None,
        **forward: Any,
    ) -> None:
        """Stores what happened, and how the forward is now, in one transaction.

        Args:
            told: what happened to the job; nothing when it has a newer attempt.
            usage_there: what it has used at the peer, as that is now.
            over: whatever was counted as usage ends.
            otherwise: what happened when that cannot happen to the job, or it has a newer attempt.
            forward: fields of the forward that have changed.

        Raises:
            IllegalTransition: it cannot happen to the job.
        """
        await self._lasting.do(self._change(told, usage_there, over, otherwise, forward))

    async def _change(
        self,
        told: Sequence[Happening],
        usage_there: Sequence[Stretch],
        over: bool,
        otherwise: Happening | None,
        fields: Mapping[str, Any],
    ) -> None:
        async with self._storing:
            after = replace(self._forward, **fields)

            def decide(record: JobRecord, _: int) -> Change:
                before, events = record, []
                try:
                    for one in told if self.is_newest(record) else ():
                        record, event = transition(record, one, now())
                        events.append(event)
                except IllegalTransition:
                    if otherwise is None:
                        raise
                    record, events = before, []
                if otherwise is not None and not events:
                    record, event = transition(record, otherwise, now())
                    events.append(event)
                ended = (AllEnded(now()),) if over else ()
                runs = tuple(record.job.runs) if events and self.is_newest(record) else ()
                return Change(
                    record, tuple(events), forward=after, runs=runs, usage=ended, usage_there=tuple(usage_there)
                )

            self._record = await self._patient_store(decide)
            # What the peer has told meanwhile is not stored: an older reading is as true.
            known = self._forward
            self._forward = replace(after, peer_time=known.peer_time, read_at=known.read_at)

    async def _patient_store(self, decide: Decide) -> JobRecord:
        """Stores a change; a full disk is waited out, because what happened has happened."""
        tries = 0
        while True:
            try:
                return await self._around.store.change_job(self._record.id, decide)
            except OSError as error:
                tries += 1
                _log.error("the store cannot be written; trying again", job=self._record.id, why=str(error))
                await asyncio.sleep(retry_delay_s(tries))

    async def _adopt(self) -> None:
        at = self._reach.clock.now()

        def decide(record: JobRecord, token: int) -> Change:
            after = replace(rebooted(self._forward, self._reach.clock.boot, at), token=token)
            if not self.is_newest(record) or record.state not in PLACED_STATES:
                return Change(record, forward=after, token_taken=True)
            record, event = transition(record, happenings.Adopted(token), now())
            return Change(record, (event,), forward=after, token_taken=True)

        self._record = await self._patient_store(decide)
        stored = await self._around.store.forward(self._record.id, self._number)
        self._forward = stored or self._forward

    # -- SENDING

    async def _send(self) -> None:
        """Has the peer bind it."""
        tries, began = 0, now()
        while True:
            if self._cancel.is_set():
                await self.change(stage=ForwardStage.ENDING, why="CANCELLED")
                return
            if self.is_over:
                await self._lose()
                return
            try:
                await self._bind(began)
                return
            except Refusal as refusal:
                if refusal.reason == "STALE_FENCING_TOKEN":
                    raise Fenced from refusal
                if refusal.reason == "BUNDLE_NOT_FOUND" and self._forward.bundle_there:
                    await self.change(bundle_there=False)
                    continue
                certain = refusal.reason in _BEFORE_BINDING
                if certain and not tries and not self._adopted:
                    await self._bring_back(refusal.reason, refusal.message, shun=refusal.reason not in _PASSING)
                    return
                tries += 1
                # Another upload of the same bundle would take as long.
                stalled = refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED and not self._forward.bundle_there
                if not is_away(refusal) or stalled or tries >= _MOST_SENDS:
                    await self.change(stage=ForwardStage.ENDING, why="UPLOAD_STALLED" if stalled else refusal.reason)
                    return
            await self.until_contact(tries)

    async def _bind(self, began: float) -> None:
        peer = self.peer()
        archive: Path | None = None
        size_bytes = 0
        header = forward_header(self._record, self._forward, self._reach, peer.record.terms)
        if self._record.job.bundle_id:
            bundle, path = await self._around.bundles.locate(self._record.job.bundle_id)
            header.bundle.CopyFrom(bundle)
            if not self._forward.bundle_there:
                archive, size_bytes = path, bundle.size_bytes
        sent = self._reach.clock.now()
        answer = await peer.client.forward(header, archive)
        self.heard(moment(answer.time))
        if archive is not None:
            peer.carried(size_bytes, self._reach.clock.now() - sent)
        await self.change(
            happenings.Forwarded(answer.remote_job_id[:64], size_bytes),
            stage=ForwardStage.BOUND,
            peer_job_id=answer.remote_job_id[:64],
        )

    # -- BOUND

    async def _follow(self) -> None:
        """Follows what happens at the peer, and renews the lease, until it has ended or is not wanted any longer."""
        follow = PeerFollow(self)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(follow.watch()),
            asyncio.create_task(follow.renew()),
            asyncio.create_task(self._cancel.wait()),
            asyncio.create_task(self._until_over()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        if self._forward.stage is not ForwardStage.BOUND:
            return
        if follow.ended is not None:
            await self._ended(follow.ended)
        elif follow.unknown:
            await self.change(stage=ForwardStage.ENDING, why="GUEST_NOT_FOUND")
        elif self._cancel.is_set():
            await self.change(stage=ForwardStage.ENDING, why="CANCELLED")
        elif self.is_over:
            await self._lose()

    async def _until_over(self) -> None:
        while not self.is_over:  # noqa: ASYNC110 - it is time that is waited for, and the lease may be renewed
            await asyncio.sleep(min(_LOOK_S, max(0.05, self._left_s)))

    async def _ended(self, job: job_pb2.Job) -> None:
        """It has come to a final state at the peer."""
        ending = ending_there(self._record.cancel_requested, self._record.cancel_message, job)
        if ending is None and self._has_to_fail(job):
            ending = _PEER_LOST
        if ending is None:
            passing = job.reason == "LEASE_EXPIRED"
            await self._bring_back(job.reason, job.message, shun=not passing)
            return
        self._job_there = job
        await self.change(
            happenings.PeerEnded(job, ending), stage=ForwardStage.ENDED, keep_until=now() + self._reach.keep_s
        )

    def _has_to_fail(self, job: job_pb2.Job) -> bool:
        """Whether it is a session that people have worked in: another one would not be the same."""
        session = self._record.job.spec.kind == job_pb2.JOB_KIND_SESSION
        return session and any(attempt.HasField("start_time") for attempt in job.attempts)

    async def _bring_back(self, reason: str, message: str, *, shun: bool) -> None:
        """The peer has confirmed that nothing of it runs there, nor ever will."""
        if self._cancel.is_set():
            await self._finish(cancelled(self._record.cancel_message))
            return
        words = f"peer {self._forward.peer} does not run it ({reason}: {message[:500]}); it waits again"
        await self.change(happenings.BroughtBack(reason, words, shun), over=True, stage=ForwardStage.SETTLED)

    async def _finish(self, ending: Ending, note: str = "") -> None:
        """Ends the job without results of this attempt."""
        ended = happenings.PeerEnded(self._record.job, ending)
        await self.change(ended, happenings.Ended(note), over=True, stage=ForwardStage.SETTLED)

    # -- ENDING

    async def _end(self) -> None:
        """Has the peer end it, until that is confirmed or the lease is over."""
        tries = 0
        message = self._record.cancel_message or f"its origin wants it no longer ({self._forward.why})"
        while True:
            request = wire.CancelForwardedJobRequest(origin=self.origin, message=message[:500])
            try:
                answer = await self.peer().client.cancel(request)
                break
            except Refusal as refusal:
                if refusal.reason == "STALE_FENCING_TOKEN":
                    raise Fenced from refusal
                _log.info("a peer has not confirmed an end yet", job=self._record.id, why=str(refusal))
                tries += 1
                if self.is_over:
                    await self._lose()
                    return
                if tries == 2:
                    await self._tell_away("its end is asked for again until the peer confirms it")
            await self.until_contact(tries)
        if not answer.HasField("job") and self._forward.peer_job_id:
            # It has said that it runs it, and knows nothing of that now: its word is worth nothing. Its lease is.
            await self._outlast()
        elif not answer.HasField("job"):
            shun = self._forward.why not in _PASSING
            await self._bring_back(self._forward.why, "it was never begun there", shun=shun)
        elif answer.job.state in FINAL_STATES:
            await self._ended(answer.job)
        else:
            await self.until_contact(1)

    async def _outlast(self) -> None:
        """Waits until the lease is over."""
        await self._tell_away("it does not know any longer what it runs, so its lease is waited for")
        await self._until_over()
        await self._lose()

    async def _tell_away(self, what: str) -> None:
        words = (
            f"peer {self._forward.peer} is out of contact; it is taken to be running there still; its lease lasts "
            f"{max(0.0, self._left_s):.0f} s; {what}"
        )
        with contextlib.suppress(IllegalTransition):
            await self.change(happenings.PeerAway("PEER_OUT_OF_CONTACT", words))

    # -- LOST

    async def _lose(self) -> None:
        """Its lease is over without a word: by now the peer has ended it, or had never begun."""
        why = f"peer {self._forward.peer} could not be reached until the lease was over"
        if self._cancel.is_set():
            await self._finish(cancelled(self._record.cancel_message), f"{why}; nothing of it runs there now")
            return
        if self._has_to_fail(self._record.job):
            await self._finish(_PEER_LOST)
            return
        back = happenings.BroughtBack("PEER_LOST", f"{why}, so nothing of it runs there now; it waits again", False)
        await self.change(back, over=True, stage=ForwardStage.LOST, keep_until=now() + self._reach.keep_s)
        self._around.queue(self._record)

    def lease_s(self, guest_left_s: float | None) -> float:
        """Returns the length of lease to ask for: no longer than the lease that this centre itself has."""
        return lease_left(self._reach, guest_left_s)
