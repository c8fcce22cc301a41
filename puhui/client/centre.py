"""A centre, as its users see it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from puhui.client.archives import ArtifactArchive, Code, Progress, Pulled, packed
from puhui.client.connection import CALL_S
from puhui.client.fleet_calls import FleetCalls
from puhui.client.patience import Patience, Trouble
from puhui.client.peer_calls import PeerCalls
from puhui.client.run import RunCall
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration
from puhui.v1 import job_pb2, job_service_pb2
from puhui.v1.job_service_pb2_grpc import JobServiceStub
from puhui.v1.stream_pb2 import Bundle, LogChunk

__all__ = ["DEFAULT_ADDRESS", "FINAL_STATES", "Centre"]

DEFAULT_ADDRESS = "127.0.0.1:7070"
"""Where `puhui up` serves unless told otherwise."""

FINAL_STATES = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})
"""States that a job does not leave."""

_UPLOAD_S = 3600.0
# A warning may be heeded for minutes before a share is taken.
_SUSPEND_S = 600.0
_PAUSE_S = 0.2


class Centre(FleetCalls, PeerCalls):
    """A connection to a centre's control plane. Calls block; several threads may share it.

    Every mutation carries a request_id of its own and is tried again while the centre cannot be reached; what
    is followed (events, logs, artifacts) goes on where it was after a broken connection.

    Args:
        address: "host:port" or "unix:/path" of the control plane.
        patience: how long a centre that cannot be reached is waited for.
        on_trouble: is told before each further try.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        patience: Patience | None = None,
        on_trouble: Callable[[Trouble], None] | None = None,
    ) -> None:
        super().__init__(address, patience, on_trouble)
        self._jobs = JobServiceStub(self._channel)

    def put_bundle(self, code: Code, progress: Progress | None = None) -> Bundle:
        """Uploads code, unless the centre has it already, and returns the bundle.

        Args:
            code: a directory, one file, or files by path and content.
            progress: is told bytes sent and bytes in all, from another thread.

        Raises:
            Refusal: the code cannot be a bundle, the centre refuses it or cannot be reached.
            OSError: the code cannot be read.
        """
        with packed(code) as ready:
            response: job_service_pb2.PutBundleResponse = self._contact.call(
                lambda: self._jobs.PutBundle(ready.requests(progress), timeout=_UPLOAD_S)
            )
            if progress is not None:
                progress(ready.header.size_bytes, ready.header.size_bytes)
        return response.bundle

    def submit(
        self,
        spec: job_pb2.JobSpec,
        code: Code | str | None,
        *,
        request_id: str = "",
        progress: Progress | None = None,
    ) -> job_pb2.Job:
        """Submits a job and returns it, queued.

        Args:
            spec: what is asked for.
            code: its code, or the id of a bundle that the centre has; None for a session without code.
            request_id: names this submission, so that a repetition is not a second job. Empty makes one up.
            progress: as in `put_bundle`.

        Raises:
            Refusal: the centre refuses it or cannot be reached.
            OSError: the code cannot be read.
        """
        request = job_service_pb2.SubmitJobRequest(spec=spec, request_id=request_id or uuid.uuid4().hex)
        if code is not None:
            request.bundle_id = code if isinstance(code, str) else self.put_bundle(code, progress).id
        return self._contact.call(lambda: self._jobs.SubmitJob(request, timeout=CALL_S)).job

    def predict(
        self,
        spec: job_pb2.JobSpec,
        code: Code | str,
        progress: Progress | None = None,
        *,
        budget_s: float | None = None,
    ) -> job_service_pb2.PredictJobResponse:
        """Returns what slice the code would get, and why. No job is made.

        Args:
            spec: what would be asked for.
            code: the code, or the id of a bundle.
            progress: is told how the upload goes on.
            budget_s: longest wait for the prediction, in seconds; the centre's own if not given.

        Raises:
            Refusal: the centre refuses it or cannot be reached.
            OSError: the code cannot be read.
        """
        bundle_id = code if isinstance(code, str) else self.put_bundle(code, progress).id
        request = job_service_pb2.PredictJobRequest(spec=spec, bundle_id=bundle_id)
        if budget_s is not None:
            request.budget.CopyFrom(duration(budget_s))
        return self._contact.call(lambda: self._jobs.PredictJob(request, timeout=CALL_S + (budget_s or 0)))

    def get(self, job_id: str) -> job_pb2.Job:
        """Returns a job.

        Raises:
            Refusal: there is none (NOT_FOUND, JOB_NOT_FOUND), or the centre cannot be reached.
        """
        request = job_service_pb2.GetJobRequest(job_id=job_id)
        return self._contact.call(lambda: self._jobs.GetJob(request, timeout=CALL_S)).job

    def jobs(self, where: job_service_pb2.JobFilter | None = None, page_size: int = 100) -> Iterator[job_pb2.Job]:
        """Yields the jobs that satisfy a filter, the newest first; pages are fetched as needed.

        Raises:
            Refusal: the centre refuses the filter or cannot be reached.
        """
        request = job_service_pb2.ListJobsRequest(page_size=page_size, filter=where)
        while True:
            page = self._contact.call(lambda: self._jobs.ListJobs(request, timeout=CALL_S))
            yield from page.jobs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def updates(self, job_id: str, after_cursor: int = 0) -> Iterator[job_service_pb2.WatchJobResponse]:
        """Yields each event of a job with the job as it was after it, until the job has ended.

        Args:
            job_id: the job.
            after_cursor: events after this cursor; 0 is all of them.

        Raises:
            Refusal: there is no such job, or the centre cannot be reached for too long.
        """
        return self._updates(job_id, after_cursor, deadline=None)

    def watch(self, job_id: str, after_cursor: int = 0) -> Iterator[job_pb2.JobEvent]:
        """Yields the events of a job until it has ended. Arguments and errors are those of `updates`."""
        for update in self.updates(job_id, after_cursor):
            yield update.event

    def wait(self, job_id: str, timeout_s: float | None = None) -> job_pb2.Job:
        """Waits until a job has ended, and returns it.

        Args:
            job_id: the job.
            timeout_s: longest wait, in seconds; None is for ever.

        Raises:
            Refusal: DEADLINE_EXCEEDED with WAIT_TIMED_OUT; as `get` and `updates` do.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = self.get(job_id)
        if job.state in FINAL_STATES:
            return job
        try:
            for update in self._updates(job_id, job.last_cursor, deadline):
                job = update.job
        except Refusal as refusal:
            late = deadline is not None and time.monotonic() >= deadline
            if refusal.code is not grpc.StatusCode.DEADLINE_EXCEEDED or not late:
                raise
            raise Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "WAIT_TIMED_OUT",
                f"{job_id} has not ended within {timeout_s:g} s; it goes on",
                job_id=job_id,
            ) from refusal
        return job if job.state in FINAL_STATES else self.get(job_id)

    def _updates(
        self, job_id: str, after_cursor: int, deadline: float | None
    ) -> Iterator[job_service_pb2.WatchJobResponse]:
        request = job_service_pb2.WatchJobRequest(job_id=job_id, after_cursor=after_cursor)

        def attempt() -> Iterator[job_service_pb2.WatchJobResponse]:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            return _read(self._jobs.WatchJob(request, timeout=left))

        while True:
            for update in self._contact.stream(attempt):
                request.after_cursor = update.event.cursor
                yield update
            # A stream that ends while the job goes on was ended by a server that stops.
            job = self.get(job_id)
            if job.state in FINAL_STATES and job.last_cursor <= request.after_cursor:
                return
            time.sleep(_PAUSE_S)

    def logs(
        self,
        job_id: str,
        *,
        attempt: int = 0,
        offset: int = 0,
        tail_lines: int = 0,
        follow: bool = False,
    ) -> Iterator[LogChunk]:
        """Yields the output of a job.

        Args:
            job_id: the job.
            attempt: which attempt; 0 is the newest.
            offset: first byte wanted, counted over both streams together.
            tail_lines: start at most this many lines before the end instead; 0 is not to.
            follow: stay until the command has ended and all has been sent.

        Raises:
            Refusal: there is no such job, or the centre cannot be reached for too long.
        """
        request = job_service_pb2.ReadLogsRequest(
            job_id=job_id, attempt=attempt, offset=offset, tail_lines=tail_lines, follow=follow
        )
        for response in self._contact.stream(lambda: _read(self._jobs.ReadLogs(request))):
            chunk = response.chunk
            # From here on the place is known, so a second try neither repeats nor leaves out a byte.
            request.tail_lines = 0
            request.offset = chunk.offset + len(chunk.data)
            yield chunk

    def pull(self, job_id: str, target: Path, *, attempt: int = 0, progress: Progress | None = None) -> Pulled:
        """Fetches the artifacts of a job that has ended into a new folder.

        The folder appears when all of them have arrived and match their digest.

        Args:
            job_id: the job.
            target: the folder; it must not be there, or be empty.
            attempt: which attempt; 0 is the newest.
            progress: is told bytes received and bytes in all.

        Raises:
            Refusal: FAILED_PRECONDITION with TARGET_NOT_EMPTY or TARGET_NOT_WRITABLE; DATA_LOSS with
                ARTIFACTS_DIGEST; there is no such job, it has not ended, or the centre cannot be reached for too long.
            OSError: the disk is full.
        """
        with ArtifactArchive(target) as archive:
            request = job_service_pb2.GetArtifactsRequest(job_id=job_id, attempt=attempt)
            for response in self._contact.stream(lambda: _read(self._jobs.GetArtifacts(request))):
                if response.WhichOneof("part") == "manifest":
                    archive.begin(response.manifest)
                else:
                    archive.write(response.chunk)
                    request.offset = archive.received_bytes
                if progress is not None:
                    progress(archive.received_bytes, archive.size_bytes)
            return archive.finish()

    def run(
        self,
        job_id: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        working_directory: str = "",
        terminal_size: tuple[int, int] | None = None,
        request_id: str = "",
    ) -> RunCall:
        """Returns a run of a command in a session's container; it begins when it is iterated.

        Args:
            job_id: the session.
            command: the command and its arguments.
            env: environment beside the session's own.
            working_directory: directory in the container; empty is that of the code.
            terminal_size: columns and rows of the terminal that the command gets; None is no terminal.
            request_id: names this run, so that a caller that went away takes it up again. Empty makes one up.
        """
        start = job_service_pb2.RunStart(
            job_id=job_id,
            command=command,
            env=env,
            tty=terminal_size is not None,
            request_id=request_id or uuid.uuid4().hex,
            working_directory=working_directory,
        )
        if terminal_size is not None:
            start.terminal_size.columns, start.terminal_size.rows = terminal_size
        return RunCall(self._contact, self._jobs, start)

    def runs(self, job_id: str, page_size: int = 50) -> Iterator[job_pb2.Run]:
        """Yields the runs of a job, the newest first; pages are fetched as needed.

        Raises:
            Refusal: there is no such job, or the centre cannot be reached.
        """
        request = job_service_pb2.ListRunsRequest(job_id=job_id, page_size=page_size)
        while True:
            page = self._contact.call(lambda: self._jobs.ListRuns(request, timeout=CALL_S))
            yield from page.runs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def suspend(
        self, job_id: str, hardest: job_pb2.ReclaimMode.ValueType = job_pb2.RECLAIM_MODE_UNSPECIFIED
    ) -> job_pb2.Job:
        """Takes a job's share back now, and returns the job once that is done. Its container lives on.

        Args:
            job_id: the job.
            hardest: the hardest rung of the ladder that may be taken; UNSPECIFIED is what ends no work.

        Raises:
            Refusal: there is no such job, its share cannot be taken so, or the centre cannot be reached.
        """
        request = job_service_pb2.SuspendJobRequest(job_id=job_id, hardest=hardest, request_id=uuid.uuid4().hex)
        return self._contact.call(lambda: self._jobs.SuspendJob(request, timeout=_SUSPEND_S)).job

    def resume(self, job_id: str) -> job_pb2.Job:
        """Has a share scheduled for a job that has none, and returns the job; it waits for nothing.

        Raises:
            Refusal: there is no such job, it cannot have a share, or the centre cannot be reached.
        """
        request = job_service_pb2.ResumeJobRequest(job_id=job_id, request_id=uuid.uuid4().hex)
        return self._contact.call(lambda: self._jobs.ResumeJob(request, timeout=_SUSPEND_S)).job

    def explain(self, job_id: str) -> job_service_pb2.ExplainJobResponse:
        """Returns why a job waits.

        Raises:
            Refusal: there is no such job, or the centre cannot be reached.
        """
        request = job_service_pb2.ExplainJobRequest(job_id=job_id)
        return self._contact.call(lambda: self._jobs.ExplainJob(request, timeout=CALL_S))

    def cancel(self, job_id: str, message: str = "") -> job_pb2.Job:
        """Asks a job to end, and returns it. A job that has ended stays as it is.

        Args:
            job_id: the job.
            message: why, for the event and for people.

        Raises:
            Refusal: there is no such job, or the centre cannot be reached.
        """
        request = job_service_pb2.CancelJobRequest(job_id=job_id, message=message, request_id=uuid.uuid4().hex)
        return self._contact.call(lambda: self._jobs.CancelJob(request, timeout=CALL_S)).job


def _read(call: Any) -> Iterator[Any]:
    """Yields the messages of a stream, and ends the call when nobody wants more of them."""
    try:
        yield from call
    finally:
        call.cancel()
