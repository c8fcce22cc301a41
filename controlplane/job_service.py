"""JobService: what people ask of a centre."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc

from controlplane.artifact_reader import read_artifacts
from controlplane.away import waits_there
from controlplane.bundles import Bundles
from controlplane.cancelling import Cancelling
from controlplane.idempotency import earlier_answer, request_of, reused
from controlplane.jobs import FINAL_STATES, PLACED_STATES
from controlplane.lasting import Lasting
from controlplane.log_reader import LogReader, require_job
from controlplane.nodes import Nodes
from controlplane.pages import Page, Pages, page_size
from controlplane.profile_outlook import outlooks
from controlplane.records import BundleRecord, JobQuery, JobRecord
from controlplane.results import Results
from controlplane.resumption import Resumption
from controlplane.room import Room
from controlplane.runs import Runs
from controlplane.scheduler import Scheduler
from controlplane.store import RequestReused, Store
from controlplane.submission import Submission
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment
from puhui.v1 import idle_pb2, job_pb2, prediction_pb2, stream_pb2
from puhui.v1 import job_service_pb2 as wire
from puhui.v1.job_service_pb2_grpc import JobServiceServicer

__all__ = ["JobService"]

# Jobs may be large; a page of them is not read from the store as a whole.
_READ_AT_ONCE = 50
_LOOK_S = 1.0

_Context = grpc.aio.ServicerContext[Any, Any]


class JobService(JobServiceServicer):
    """Serves JobService for one centre."""

    def __init__(
        self,
        store: Store,
        feed: Feed,
        bundles: Bundles,
        results: Results,
        nodes: Nodes,
        scheduler: Scheduler,
        cancelling: Cancelling,
        submission: Submission,
        logs: LogReader,
        pages: Pages,
        lasting: Lasting,
        runs: Runs,
        resumption: Resumption,
        why_here: Callable[[str], str],
        elsewhere: Callable[[job_pb2.JobSpec, prediction_pb2.Sizing], str],
    ) -> None:
        self._store = store
        self._feed = feed
        self._bundles = bundles
        self._results = results
        self._nodes = nodes
        self._scheduler = scheduler
        self._cancelling = cancelling
        self._submission = submission
        self._logs = logs
        self._pages = pages
        self._lasting = lasting
        self._runs = runs
        self._resumption = resumption
        self._why_here = why_here
        self._elsewhere = elsewhere

    async def PutBundle(  # noqa: N802 - named by the contract
        self, request_iterator: AsyncIterator[wire.PutBundleRequest], context: _Context
    ) -> wire.PutBundleResponse:
        """Receives a bundle."""
        record, present = await self._bundles.receive(request_iterator)
        return wire.PutBundleResponse(bundle=_bundle(record), already_present=present)

    async def SubmitJob(self, request: wire.SubmitJobRequest, context: _Context) -> wire.SubmitJobResponse:  # noqa: N802
        """Accepts a job."""
        return wire.SubmitJobResponse(job=self._shown(await self._submission.submit(request)))

    async def PredictJob(self, request: wire.PredictJobRequest, context: _Context) -> wire.PredictJobResponse:  # noqa: N802
        """Says what slice some code would get."""
        need = await self._submission.predict(request)
        decision = Room(self._nodes.gpus()).best(need.sizing.choices)
        if decision is not None:
            message = f"{decision.shape.profile} is free on GPU {decision.gpu.gpu_index} of {decision.gpu.node_name}"
        elif need.sizing.choices:
            message = f"{need.sizing.choices[0].profile} is not free now; the job would wait"
        else:
            message = f"the job would wait: {need.sizing.reason}"
        if decision is None and (there := self._elsewhere(need.spec, need.sizing)):
            message += f"; {there}"
        return wire.PredictJobResponse(
            prediction=need.prediction,
            sizing=need.sizing,
            fits_now=decision is not None,
            message=message,
            profiles=outlooks(need.prediction, need.sizing, self._nodes.geometries(), need.paces),
        )

    async def GetJob(self, request: wire.GetJobRequest, context: _Context) -> wire.GetJobResponse:  # noqa: N802
        """Returns one job."""
        record = await require_job(self._store, request.job_id)
        return wire.GetJobResponse(job=self._shown(record, await self._looked(record)))

    async def ListJobs(self, request: wire.ListJobsRequest, context: _Context) -> wire.ListJobsResponse:  # noqa: N802
        """Returns a page of jobs."""
        of = b"jobs\0" + request.filter.SerializeToString(deterministic=True)
        before = int(self._pages.after(of, request.page_token)) if request.page_token else None
        wanted = request.filter
        query = JobQuery(
            states=tuple(state for state in wanted.states if state),
            tenant=wanted.tenant,
            name_prefix=wanted.name_prefix,
            labels=dict(wanted.labels),
            created_since=moment(wanted.created_since) if wanted.HasField("created_since") else 0.0,
            before_sequence=before,
            limit=_READ_AT_ONCE,
        )
        page, more = await self._page(query, Page(page_size(request.page_size)))
        return wire.ListJobsResponse(
            jobs=[self._shown(record) for record in page],
            next_page_token=self._pages.token(of, str(page[-1].sequence)) if more else "",
        )

    async def _page(self, query: JobQuery, page: Page) -> tuple[list[JobRecord], bool]:
        """Returns the jobs of a page, and whether there are more."""
        taken: list[JobRecord] = []
        while True:
            found = await self._store.jobs(query)
            for record in found:
                if not page.takes(record.job):
                    return taken, True
                taken.append(record)
            if len(found) < query.limit:
                return taken, False
            query = replace(query, before_sequence=found[-1].sequence)

    async def WatchJob(  # noqa: N802
        self, request: wire.WatchJobRequest, context: _Context
    ) -> AsyncIterator[wire.WatchJobResponse]:
        """Yields events of a job until it has ended."""
        cursor = request.after_cursor
        with self._feed.watching(request.job_id) as news:
            while True:
                news.clear()
                record = await require_job(self._store, request.job_id)
                events = await self._store.events(request.job_id, cursor)
                if events:  # the job must not be older than what is told of it
                    record = await require_job(self._store, request.job_id)
                for event in events:
                    cursor = event.cursor
                    yield wire.WatchJobResponse(event=event, job=self._shown(record))
                    if event.state in FINAL_STATES:
                        return
                if events:
                    continue
                if record.state in FINAL_STATES:
                    return
                await news.wait()

    async def CancelJob(self, request: wire.CancelJobRequest, context: _Context) -> wire.CancelJobResponse:  # noqa: N802
        """Ends a job."""
        noted = request_of("CancelJob", request, request.request_id)
        await earlier_answer(self._store, noted)
        await require_job(self._store, request.job_id)
        try:
            record = await self._lasting.do(self._cancelling.end(request.job_id, request.message, noted=noted))
        except RequestReused as error:
            raise reused(request.request_id) from error
        return wire.CancelJobResponse(job=self._shown(record))

    async def ReadLogs(  # noqa: N802
        self, request: wire.ReadLogsRequest, context: _Context
    ) -> AsyncIterator[wire.ReadLogsResponse]:
        """Yields output of a job."""
        async for chunk in self._logs.read(request):
            yield wire.ReadLogsResponse(chunk=chunk)

    async def GetArtifacts(  # noqa: N802
        self, request: wire.GetArtifactsRequest, context: _Context
    ) -> AsyncIterator[wire.GetArtifactsResponse]:
        """Yields artifacts of a job that has ended."""
        record = await require_job(self._store, request.job_id)
        for response in read_artifacts(record, self._results, request.attempt, request.offset):
            yield response

    async def RunJob(  # noqa: N802
        self, request_iterator: AsyncIterator[wire.RunJobRequest], context: _Context
    ) -> AsyncIterator[wire.RunJobResponse]:
        """Carries out a run instruction."""
        async with contextlib.aclosing(self._runs.run(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def ListRuns(self, request: wire.ListRunsRequest, context: _Context) -> wire.ListRunsResponse:  # noqa: N802
        """Returns a page of runs."""
        await require_job(self._store, request.job_id)
        of = b"runs\0" + request.job_id.encode()
        before = int(self._pages.after(of, request.page_token)) if request.page_token else None
        size = page_size(request.page_size)
        found = await self._store.runs(request.job_id, before, size + 1)
        page = found[:size]
        more = self._pages.token(of, str(page[-1][0])) if len(found) > size else ""
        return wire.ListRunsResponse(runs=[run for _, run in page], next_page_token=more)

    async def SuspendJob(self, request: wire.SuspendJobRequest, context: _Context) -> wire.SuspendJobResponse:  # noqa: N802
        """Takes a job's share back."""
        return wire.SuspendJobResponse(job=self._shown(await self._resumption.suspend(request)))

    async def ResumeJob(self, request: wire.ResumeJobRequest, context: _Context) -> wire.ResumeJobResponse:  # noqa: N802
        """Schedules a share for a job without one."""
        return wire.ResumeJobResponse(job=self._shown(await self._resumption.resume(request)))

    async def ExplainJob(self, request: wire.ExplainJobRequest, context: _Context) -> wire.ExplainJobResponse:  # noqa: N802
        """Says why a job waits."""
        record = await require_job(self._store, request.job_id)
        position, why = self._scheduler.place_of(record.id), self._why_waiting(record.id)
        return wire.ExplainJobResponse(message=why or self._shown(record).message, queue_position=position)

    def _why_waiting(self, job_id: str) -> str:
        """Returns why a job waits, and why no peer has it, in a sentence; "" when it has not been looked at yet."""
        why, here = self._scheduler.why_waiting(job_id), self._why_here(job_id)
        return f"{why}; {here}" if why and here else why

    async def _looked(self, record: JobRecord) -> idle_pb2.Idleness | None:
        """Asks a running job's node whether the job uses its share now; None when that cannot be had at once.

        The node tells of changes only, which is enough to act upon, but not for who wants to know what keeps it busy.
        """
        link = self._nodes.link(record.attempt.node_id) if record.state == job_pb2.JOB_STATE_RUNNING else None
        if link is None or not link.in_contact:
            return None
        try:
            async with asyncio.timeout(_LOOK_S):
                containers = await link.client.list_containers()
        except (Refusal, TimeoutError):
            return None
        for container in containers:
            if (container.owner.job_id, container.owner.attempt) == (record.id, len(record.job.attempts)):
                return container.idleness if container.HasField("idleness") else None
        return None

    def _shown(self, record: JobRecord, looked: idle_pb2.Idleness | None = None) -> job_pb2.Job:
        """Returns a job as people see it: with what is known only at this moment."""
        job = record.job
        note = ""
        if job.state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RESUMING):
            note = self._why_waiting(job.id)
        elif there := waits_there(job):
            note = there
        elif job.state in PLACED_STATES:
            link = self._nodes.link(record.attempt.node_id)
            if link is not None and not link.in_contact:
                note = f"{job.message}; its node {self._nodes.name(link.node_id)} is out of contact"
        idleness = looked or self._idleness(record)
        if not note and idleness is None:
            return job
        shown = job_pb2.Job()
        shown.CopyFrom(job)
        shown.message = note or job.message
        if idleness is not None:
            shown.idleness.CopyFrom(idleness)
        return shown

    def _idleness(self, record: JobRecord) -> idle_pb2.Idleness | None:
        """Returns whether a job uses its share, by its node's last word; None when that is not known."""
        if record.state != job_pb2.JOB_STATE_RUNNING:
            return None
        link = self._nodes.link(record.attempt.node_id)
        container = link.containers.get((record.id, len(record.job.attempts))) if link is not None else None
        return container.idleness if container is not None and container.HasField("idleness") else None


def _bundle(record: BundleRecord) -> stream_pb2.Bundle:
    return stream_pb2.Bundle(
        id=record.id,
        size_bytes=record.size_bytes,
        unpacked_bytes=record.unpacked_bytes,
        file_count=len(record.sizes),
    )
