"""Drives one attempt at a peer, from the offer that was taken until nothing more is to be asked of the peer.

The stage of its `ForwardRecord` in the store says where to go on, and every step may be done again: after a crash of
the control plane at any point it is taken up under a higher fencing token. A peer that cannot be reached has neither
failed nor succeeded: the job is taken to be running there until the peer says otherwise, or its lease is over for
certain.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import structlog

from controlplane import happenings
from controlplane.away import ending_there
from controlplane.draft import IllegalTransition
from controlplane.endings import Ending, cancelled
from controlplane.forwards import ForwardStage
from controlplane.growing import Outgrown
from controlplane.jobs import FINAL_STATES
from controlplane.memory_verdict import look_at_memory
from controlplane.node_asker import Fenced
from controlplane.peer_attempt import PeerAttempt
from controlplane.peer_client import is_away
from controlplane.peer_end import PeerEnd
from controlplane.peer_follow import PeerFollow
from controlplane.peer_request import forward_header
from controlplane.reach import Reach
from controlplane.records import JobRecord
from controlplane.surroundings import Surroundings
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, now
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2
from puhui.v1.job_pb2 import JOB_STATE_FAILED

__all__ = ["PeerDriver"]

_log = structlog.get_logger(__name__)

_MOST_SENDS = 4
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
        "WORK_ENDED",
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
        "WORK_ENDED",
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
        self._attempt = PeerAttempt(around.centre, around.store, reach, record, number)
        self._adopted = False
        self._job_there: job_pb2.Job | None = None
        self._at_end = PeerEnd(self._attempt, around.results, around.withdraw, self._outgrown)

    async def _outgrown(self, record: JobRecord, log_bytes: int, slice_mib: int) -> Outgrown | None:
        around = self._around
        return await look_at_memory(
            record, log_bytes, slice_mib, around.results, lambda: around.nodes.geometries(), around.offered
        )

    def cancel(self) -> None:
        """The job's end was asked for, and that is stored."""
        self._attempt.cancel()

    async def run(self, *, adopt: bool) -> JobRecord:
        """Drives the attempt to its end. Returns the job as it is then.

        Args:
            adopt: take the attempt up under a new token, because its driver's process is gone.
        """
        attempt = self._attempt
        await attempt.load()
        self._adopted = adopt
        steps: Mapping[ForwardStage, Callable[[], Awaitable[None]]] = {
            ForwardStage.SENDING: self._send,
            ForwardStage.BOUND: self._follow,
            ForwardStage.ENDING: self._end,
            ForwardStage.ENDED: lambda: self._at_end.collect(self._job_there),
            ForwardStage.LOST: self._at_end.look_late,
        }
        try:
            if adopt:
                await attempt.adopt()
            while attempt.forward.stage is not ForwardStage.SETTLED:
                await steps[attempt.forward.stage]()
        except Fenced:
            _log.error("another control plane commands this attempt", job=attempt.record.id, attempt=attempt.number)
        stored = await self._around.store.job(attempt.record.id)
        return stored or attempt.record

    # -- SENDING

    async def _send(self) -> None:
        """Has the peer bind it."""
        tries, began = 0, now()
        while True:
            if self._attempt.is_cancelled:
                await self._attempt.change(stage=ForwardStage.ENDING, why="CANCELLED")
                return
            if self._attempt.is_over:
                await self._lose()
                return
            try:
                await self._bind(began)
                return
            except Refusal as refusal:
                if refusal.reason == "STALE_FENCING_TOKEN":
                    raise Fenced from refusal
                if refusal.reason == "BUNDLE_NOT_FOUND" and self._attempt.forward.bundle_there:
                    await self._attempt.change(bundle_there=False)
                    continue
                certain = refusal.reason in _BEFORE_BINDING
                if certain and not tries and not self._adopted:
                    await self._bring_back(refusal.reason, refusal.message, shun=refusal.reason not in _PASSING)
                    return
                tries += 1
                # Another upload of the same bundle would take as long.
                stalled = refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED and not self._attempt.forward.bundle_there
                if not is_away(refusal) or stalled or tries >= _MOST_SENDS:
                    await self._attempt.change(
                        stage=ForwardStage.ENDING, why="UPLOAD_STALLED" if stalled else refusal.reason
                    )
                    return
            await self._attempt.until_contact(tries)

    async def _bind(self, began: float) -> None:
        peer = self._attempt.peer()
        archive: Path | None = None
        size_bytes = 0
        header = forward_header(self._attempt.record, self._attempt.forward, self._reach, peer.record.terms)
        if self._attempt.record.job.bundle_id:
            bundle, path = await self._around.bundles.locate(self._attempt.record.job.bundle_id)
            header.bundle.CopyFrom(bundle)
            if not self._attempt.forward.bundle_there:
                archive, size_bytes = path, bundle.size_bytes
        sent = self._reach.clock.now()
        answer = await peer.client.forward(header, archive)
        self._attempt.heard(moment(answer.time))
        if archive is not None:
            peer.carried(size_bytes, self._reach.clock.now() - sent)
        await self._attempt.change(
            happenings.Forwarded(answer.remote_job_id[:64], size_bytes),
            stage=ForwardStage.BOUND,
            peer_job_id=answer.remote_job_id[:64],
        )

    # -- BOUND

    async def _follow(self) -> None:
        """Follows what happens at the peer, and renews the lease, until it has ended or is not wanted any longer."""
        follow = PeerFollow(self._attempt)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(follow.watch()),
            asyncio.create_task(follow.renew()),
            asyncio.create_task(self._attempt.until_cancelled()),
            asyncio.create_task(self._attempt.until_over()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        if self._attempt.forward.stage is not ForwardStage.BOUND:
            return
        if follow.ended is not None:
            await self._ended(follow.ended)
        elif follow.unknown:
            await self._attempt.change(stage=ForwardStage.ENDING, why="GUEST_NOT_FOUND")
        elif self._attempt.is_cancelled:
            await self._attempt.change(stage=ForwardStage.ENDING, why="CANCELLED")
        elif self._attempt.is_over:
            await self._lose()

    async def _ended(self, job: job_pb2.Job) -> None:
        """It has come to a final state at the peer."""
        ending = ending_there(self._attempt.record.cancel_requested, self._attempt.record.cancel_message, job)
        if ending is None and self._has_to_fail(job):
            ending = _PEER_LOST
        if ending is None:
            passing = job.reason == "LEASE_EXPIRED"
            await self._bring_back(job.reason, job.message, shun=not passing)
            return
        self._job_there = job
        await self._attempt.change(
            happenings.PeerEnded(job, ending), stage=ForwardStage.ENDED, keep_until=now() + self._reach.keep_s
        )

    def _has_to_fail(self, job: job_pb2.Job) -> bool:
        """Whether it is a session that people have worked in: another one would not be the same."""
        session = self._attempt.record.job.spec.kind == job_pb2.JOB_KIND_SESSION
        return session and any(attempt.HasField("start_time") for attempt in job.attempts)

    async def _bring_back(self, reason: str, message: str, *, shun: bool) -> None:
        """The peer has confirmed that nothing of it runs there, nor ever will."""
        if self._attempt.is_cancelled:
            await self._finish(cancelled(self._attempt.record.cancel_message))
            return
        words = f"peer {self._attempt.forward.peer} does not run it ({reason}: {message[:500]}); it waits again"
        await self._attempt.change(happenings.BroughtBack(reason, words, shun), over=True, stage=ForwardStage.SETTLED)

    async def _finish(self, ending: Ending, note: str = "") -> None:
        """Ends the job without results of this attempt."""
        ended = happenings.PeerEnded(self._attempt.record.job, ending)
        await self._attempt.change(ended, happenings.Ended(note), over=True, stage=ForwardStage.SETTLED)

    # -- ENDING

    async def _end(self) -> None:
        """Has the peer end it, until that is confirmed or the lease is over."""
        tries = 0
        message = self._attempt.record.cancel_message or f"its origin wants it no longer ({self._attempt.forward.why})"
        while True:
            request = wire.CancelForwardedJobRequest(origin=self._attempt.origin, message=message[:500])
            try:
                answer = await self._attempt.peer().client.cancel(request)
                break
            except Refusal as refusal:
                if refusal.reason == "STALE_FENCING_TOKEN":
                    raise Fenced from refusal
                _log.info("a peer has not confirmed an end yet", job=self._attempt.record.id, why=str(refusal))
                tries += 1
                if self._attempt.is_over:
                    await self._lose()
                    return
                if tries == 2:
                    await self._tell_away("its end is asked for again until the peer confirms it")
            await self._attempt.until_contact(tries)
        if not answer.HasField("job") and self._attempt.forward.peer_job_id:
            # It has said that it runs it, and knows nothing of that now: its word is worth nothing. Its lease is.
            await self._outlast()
        elif not answer.HasField("job"):
            shun = self._attempt.forward.why not in _PASSING
            await self._bring_back(self._attempt.forward.why, "it was never begun there", shun=shun)
        elif answer.job.state in FINAL_STATES:
            await self._ended(answer.job)
        else:
            await self._attempt.until_contact(1)

    async def _outlast(self) -> None:
        """Waits until the lease is over."""
        await self._tell_away("it does not know any longer what it runs, so its lease is waited for")
        await self._attempt.until_over()
        await self._lose()

    async def _tell_away(self, what: str) -> None:
        words = (
            f"peer {self._attempt.forward.peer} is out of contact; it is taken to be running there still; its lease "
            f"lasts {max(0.0, self._attempt.left_s):.0f} s; {what}"
        )
        with contextlib.suppress(IllegalTransition):
            await self._attempt.change(happenings.PeerAway("PEER_OUT_OF_CONTACT", words))

    # -- LOST

    async def _lose(self) -> None:
        """Its lease is over without a word: by now the peer has ended it, or had never begun."""
        why = f"peer {self._attempt.forward.peer} could not be reached until the lease was over"
        if self._attempt.is_cancelled:
            await self._finish(cancelled(self._attempt.record.cancel_message), f"{why}; nothing of it runs there now")
            return
        if self._has_to_fail(self._attempt.record.job):
            await self._finish(_PEER_LOST)
            return
        back = happenings.BroughtBack("PEER_LOST", f"{why}, so nothing of it runs there now; it waits again", False)
        await self._attempt.change(back, over=True, stage=ForwardStage.LOST, keep_until=now() + self._reach.keep_s)
        self._around.queue(self._attempt.record)
