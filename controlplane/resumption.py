"""Suspending and resuming jobs by request: a person's word about a share, and what came of it."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from controlplane import happenings
from controlplane.happenings import Happening
from controlplane.idempotency import earlier_answer, request_of, reused
from controlplane.jobs import FINAL_STATES, LIVING_STATES, transition
from controlplane.lasting import Lasting
from controlplane.log_reader import require_job
from controlplane.records import Change, JobRecord, Request
from controlplane.store import RequestReused, Store
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1 import job_pb2
from puhui.v1 import job_service_pb2 as wire
from puhui.v1.job_pb2 import JOB_STATE_IDLE, JOB_STATE_RESUMING, JOB_STATE_RUNNING, RECLAIM_MODE_CHECKPOINT

__all__ = ["Resumption"]


class Resumption:
    """Suspends and resumes the jobs of one centre."""

    def __init__(self, store: Store, feed: Feed, lasting: Lasting) -> None:
        self._store = store
        self._feed = feed
        self._lasting = lasting

    async def suspend(self, request: wire.SuspendJobRequest) -> JobRecord:
        """Has a job's share taken back, and returns the job once it is.

        Raises:
            Refusal: NOT_FOUND with JOB_NOT_FOUND; FAILED_PRECONDITION with JOB_ENDED, JOB_NOT_STARTED, or what the node
                says that keeps the share from being taken; ALREADY_EXISTS with REQUEST_ID_REUSED.
        """
        noted = request_of("SuspendJob", request, request.request_id)
        earlier = await earlier_answer(self._store, noted)
        hardest = request.hardest or RECLAIM_MODE_CHECKPOINT
        if hardest not in (
            job_pb2.RECLAIM_MODE_DETACH,
            job_pb2.RECLAIM_MODE_CHECKPOINT,
            job_pb2.RECLAIM_MODE_STOP,
        ):
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "SPEC_INVALID",
                "hardest is DETACH, CHECKPOINT or STOP",
                field="hardest",
            )
        record = await require_job(self._store, request.job_id)
        cursor = record.job.last_cursor
        if earlier is None:
            record = await self._store_change(request.job_id, noted, lambda record: _suspended(record, hardest))
        with self._feed.watching(record.id) as news:
            while True:
                news.clear()
                record = await require_job(self._store, record.id)
                if record.state not in (JOB_STATE_RUNNING, JOB_STATE_RESUMING):
                    return record
                if not record.suspend and not record.reclaiming:
                    await self._require_not_refused(record, cursor)
                    return record
                await news.wait()

    async def _require_not_refused(self, record: JobRecord, cursor: int) -> None:
        for event in reversed(await self._store.events(record.id, cursor)):
            if event.reason == "RECLAIM_REFUSED":
                raise Refusal(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    event.details.get("node_reason", event.reason),
                    event.message,
                    job_id=record.id,
                )
            if event.reason == "RECLAIMED":
                return

    async def resume(self, request: wire.ResumeJobRequest) -> JobRecord:
        """Has a share scheduled for a job without one, and returns the job; it waits for nothing.

        Raises:
            Refusal: NOT_FOUND with JOB_NOT_FOUND; FAILED_PRECONDITION with JOB_ENDED or JOB_NOT_STARTED; ALREADY_EXISTS
                with REQUEST_ID_REUSED.
        """
        noted = request_of("ResumeJob", request, request.request_id)
        if await earlier_answer(self._store, noted) is not None:
            return await require_job(self._store, request.job_id)
        record = await require_job(self._store, request.job_id)
        with self._feed.watching(record.id) as news:
            # A reclaim that is under way is let come to its end: nothing is left half taken.
            while (record.reclaiming or record.suspend) and record.state == JOB_STATE_RUNNING:
                news.clear()
                record = await require_job(self._store, record.id)
                if record.reclaiming or record.suspend:
                    await news.wait()
        return await self._store_change(request.job_id, noted, _resumed)

    async def _store_change(
        self, job_id: str, noted: Request | None, told: Callable[[JobRecord], Happening | None]
    ) -> JobRecord:
        def decide(record: JobRecord, _: int) -> Change | None:
            _require_living(record)
            happening = told(record)
            if happening is None:
                return Change(record, request=noted) if noted is not None else None
            after, event = transition(record, happening, now())
            return Change(after, (event,), request=noted)

        try:
            return await self._lasting.do(self._store.change_job(job_id, decide))
        except RequestReused as error:
            raise reused(noted.id if noted is not None else "") from error


def _suspended(record: JobRecord, hardest: job_pb2.ReclaimMode.ValueType) -> Happening | None:
    if record.state == JOB_STATE_IDLE and record.parked:
        return None
    return happenings.SuspendRequested(hardest)


def _resumed(record: JobRecord) -> Happening | None:
    return happenings.ResumeRequested("RESUME") if record.state == JOB_STATE_IDLE else None


def _require_living(record: JobRecord) -> None:
    if record.state in FINAL_STATES or record.state == job_pb2.JOB_STATE_STOPPING:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "JOB_ENDED",
            f"job {record.id} has ended or is being ended ({record.job.reason}): it has no share to take or to give",
            job_id=record.id,
        )
    if record.state not in LIVING_STATES:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "JOB_NOT_STARTED",
            f"job {record.id} has not started yet ({record.job.reason}): wait until it runs, or `puhui cancel` it",
            job_id=record.id,
        )
