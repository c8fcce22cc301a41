"""The end of an attempt at a peer: what it left comes here, at once or late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from controlplane import happenings
from controlplane.away import ending_there
from controlplane.draft import IllegalTransition
from controlplane.endings import Ending
from controlplane.forwards import ForwardStage
from controlplane.growing import Outgrown, credible_mib, nominal_mib
from controlplane.happenings import Happening
from controlplane.jobs import FINAL_STATES
from controlplane.node_asker import Fenced
from controlplane.peer_attempt import PeerAttempt
from controlplane.peer_results import collect_from_peer
from controlplane.records import JobRecord
from controlplane.results import Results
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2

__all__ = ["PeerEnd"]

_log = structlog.get_logger(__name__)

_MOST_REFUSALS = 4
_OFTEN = 6
_RARELY_S = 300.0
_FOR_CERTAIN = frozenset({"ARTIFACTS_DIGEST", "GUEST_NOT_FOUND", "PEER_ANSWER_INVALID", "RESULTS_LOST", "WORK_ENDED"})
"""What makes it certain that a peer will not give results; whatever else it says may be otherwise later.

Work with it was ended here: paired again it is another peer, which has nothing of this attempt. When it is the peer
that knows us no longer, it may know us again.
"""
_TELL_AFTER_TRIES = 2
_TOO_LATE = "could not be had for as long as the peer keeps it"

_Fetched = tuple[int, job_pb2.JobArtifacts, str]
"""Size of the log, artifacts, and what of both is lost ("" for nothing)."""


class PeerEnd:
    """Ends one attempt at a peer.

    Args:
        attempt: how it stands.
        results: where what it left is kept.
        withdraw: a job waits for a share no longer.
        outgrown: returns what becomes of a job that ran out of device memory, None of one that did not: given the job,
            the size of its output in bytes, and the memory of its slice in MiB.
    """

    def __init__(
        self,
        attempt: PeerAttempt,
        results: Results,
        withdraw: Callable[[str], None],
        outgrown: Callable[[JobRecord, int, int], Awaitable[Outgrown | None]],
    ) -> None:
        self._attempt = attempt
        self._results = results
        self._withdraw = withdraw
        self._outgrown = outgrown

    async def look_late(self) -> None:
        """Asks a peer that is back whether it had ended there after all."""
        tries = 0
        while now() < self._attempt.forward.keep_until:
            request = wire.CancelForwardedJobRequest(origin=self._attempt.origin, message="its lease was over")
            try:
                answer = await self._attempt.peer().client.cancel(request)
            except Refusal as refusal:
                _require_ours(refusal)
                if refusal.reason in _FOR_CERTAIN:
                    break
                tries += 1
                await self._patiently(tries)
                continue
            ending = ending_there(False, "", answer.job) if answer.HasField("job") else None
            if ending is None:
                break
            await self._take_late(answer.job, ending)
            return
        await self._attempt.change(stage=ForwardStage.SETTLED)

    async def _take_late(self, job: job_pb2.Job, ending: Ending) -> None:
        got = await self._fetched(job)
        if isinstance(got, str):
            await self._attempt.change(stage=ForwardStage.SETTLED)
            return
        log_bytes, artifacts, lost = got
        number = self._attempt.forward.attempt
        late = happenings.CameLate(number, job, ending)
        results = _told(log_bytes, artifacts, lost)
        kept = happenings.KeptLate(number, job, log_bytes, artifacts)
        await self._attempt.change(late, results, happenings.Ended(), otherwise=kept, stage=ForwardStage.SETTLED)
        if self._attempt.record.state in FINAL_STATES:
            self._withdraw(self._attempt.record.id)

    async def collect(self, known: job_pb2.Job | None) -> None:
        """Brings log and artifacts here; the job has ended then.

        Args:
            known: the job as the peer knows it; None after a restart.
        """
        there = known or await self._asked()
        got = await self._fetched(there) if not isinstance(there, str) else there
        told: list[Happening] = [
            happenings.ResultsLost(
                f"what it left at peer {self._attempt.forward.peer} {got}", 0, job_pb2.JobArtifacts()
            )
            if isinstance(got, str)
            else _told(*got)
        ]
        if self._attempt.record.state in FINAL_STATES:
            await self._attempt.change(*told, over=True, stage=ForwardStage.SETTLED)
            return
        found = None
        if not isinstance(there, str) and not isinstance(got, str):
            found = await self._look_at_memory(there, got[0])
        if found is not None:
            last = happenings.Grows() if found.sizing is not None else happenings.Ended()
            # Unless its end was asked for meanwhile.
            with contextlib.suppress(IllegalTransition):
                ran_out = happenings.RanOut(found)
                await self._attempt.change(*told, ran_out, last, over=True, stage=ForwardStage.SETTLED)
                return
        await self._attempt.change(*told, happenings.Ended(), over=True, stage=ForwardStage.SETTLED)

    async def _look_at_memory(self, there: job_pb2.Job, log_bytes: int) -> Outgrown | None:
        """Returns what becomes of it when it ran out of device memory there; None when it did not."""
        record = self._attempt.record
        if self._attempt.is_cancelled or not record.job.attempts:
            return None
        profile = record.attempt.profile
        told = [one.memory_mib for one in there.sizing.choices if one.profile == profile]
        slice_mib = next((mib for mib in told if credible_mib(profile, mib)), 0) or nominal_mib(profile)
        # What it had is at least what was asked for.
        slice_mib = slice_mib or record.job.sizing.required_mib
        return await self._outgrown(record, log_bytes, slice_mib)

    async def _asked(self) -> job_pb2.Job | str:
        """Returns the job as the peer knows it, after a restart; or why what it left cannot be had."""
        tries = 0
        while now() < self._attempt.forward.keep_until:
            try:
                # What has ended is not changed by this.
                answer = await self._attempt.peer().client.cancel(
                    wire.CancelForwardedJobRequest(origin=self._attempt.origin)
                )
                return answer.job if answer.HasField("job") else "is not known there any longer"
            except Refusal as refusal:
                _require_ours(refusal)
                if refusal.reason in _FOR_CERTAIN:
                    return f"cannot be had: {refusal.message}"
                _log.warning("a peer does not tell how an attempt ended", job=self._attempt.record.id, why=str(refusal))
                tries += 1
            await self._bear(tries)
        return _TOO_LATE

    async def _fetched(self, job: job_pb2.Job) -> _Fetched | str:
        """Returns what was brought here, or why nothing could be."""
        tries, refusals, got = 0, 0, None
        while now() < self._attempt.forward.keep_until:
            got = await collect_from_peer(
                lambda: self._attempt.peer().client,
                self._attempt.origin,
                job,
                self._results,
                self._bear,
                self._attempt.most_result_bytes,
                got,
            )
            if got.error is None:
                return got.log_bytes, got.artifacts, ""
            _log.warning("results at a peer cannot be collected yet", job=self._attempt.record.id, why=str(got.error))
            tries += 1
            for error in got.errors.values():
                _require_ours(error)
            certain = [one for one in got.errors.values() if isinstance(one, Refusal) and one.reason in _FOR_CERTAIN]
            # What will not come does not keep from waiting for what will.
            if len(certain) == len(got.errors):
                refusals += 1
                if refusals >= _MOST_REFUSALS:
                    name = self._attempt.forward.peer
                    why = f"its {got.missing} could not be had from peer {name}: {certain[0].message}"
                    return got.log_bytes, got.artifacts, why
            await self._bear(tries)
        if got is not None and len(got.errors) == 1:
            return got.log_bytes, got.artifacts, f"its {got.missing} {_TOO_LATE}"
        return _TOO_LATE

    async def _bear(self, tries: int) -> None:
        """Waits after results could not be had. Whoever asked for the job's end does not wait for them."""
        attempt, name = self._attempt, self._attempt.forward.peer
        if attempt.record.state not in FINAL_STATES and attempt.forward.stage is ForwardStage.ENDED:
            if attempt.is_cancelled:
                held = f"its results are at peer {name} still, and come when they can be had"
                await attempt.change(happenings.Ended(held))
            elif tries == _TELL_AFTER_TRIES:
                what = f"its results cannot be had from peer {name} yet; they are asked for as long as it has them"
                await attempt.change(happenings.ResultsDelayed(what))
        await self._patiently(tries)

    async def _patiently(self, tries: int) -> None:
        """Waits: for a peer that is away until it is back, for one that refuses the longer the more often it has."""
        peer = self._attempt.reach.peers.get(self._attempt.forward.peer)
        was_there = peer is not None and peer.in_contact
        await self._attempt.until_contact(tries)
        if was_there and tries > _OFTEN:
            await asyncio.sleep(min(_RARELY_S, 2.0 ** (tries - _OFTEN)))


def _require_ours(error: Refusal | OSError) -> None:
    """Ends the driving of an attempt that somebody else commands.

    Raises:
        Fenced: somebody does.
    """
    if isinstance(error, Refusal) and error.reason == "STALE_FENCING_TOKEN":
        raise Fenced from error


def _told(log_bytes: int, artifacts: job_pb2.JobArtifacts, lost: str) -> Happening:
    if lost:
        return happenings.ResultsLost(lost, log_bytes, artifacts)
    return happenings.ResultsCollected(log_bytes, artifacts)
