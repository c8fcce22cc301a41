"""Runs: commands executed in a job's container, each on a share that is scheduled for it (step S8).

A run is noted, then waits until its job has a share, then runs on the node; its output passes through here and is kept
on the node, so a caller that went away with its request id comes back to it, also after this process was killed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import structlog

from controlplane import happenings
from controlplane.draft import IllegalTransition, current_share
from controlplane.faults import retry_delay_s
from controlplane.idempotency import earlier_answer, request_of, reused
from controlplane.jobs import FINAL_STATES, transition
from controlplane.lasting import Lasting
from controlplane.log_reader import require_job
from controlplane.node_client import is_unreachable
from controlplane.node_link import NodeLink
from controlplane.nodes import Nodes
from controlplane.records import Change, JobRecord
from controlplane.run_book import RunBook
from controlplane.run_input import RunInput, require_valid_start
from controlplane.scheduler import Scheduler
from controlplane.store import RequestReused, Store
from controlplane.wants import Wants
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import now, timestamp
from puhui.v1 import card_pb2, job_pb2, node_service_pb2
from puhui.v1 import job_service_pb2 as wire

__all__ = ["WENT_TO_PEER", "Runs"]

WENT_TO_PEER = "SESSION_WENT_TO_PEER"
"""Reason of the refusal of a run whose session went to a peer while it waited: there, it begins anew."""

_log = structlog.get_logger(__name__)

_MOST_UNDER_WAY = 32
_LOOK_AGAIN_S = 1.0
_RACE_S = 0.01
_MOST_RACES = 200
# The share was there when it was looked at; it is looked at again.
_RACES = frozenset({"CONTAINER_SUSPENDED", "CONTAINER_NOT_RUNNING", "CONTAINER_NOT_FOUND", "CONTAINER_CHECKPOINTED"})
_SHOWN = frozenset(
    {
        "WAITING_FOR_SLICE",
        "RESERVED",
        "RESUMING",
        "SHARE_RESERVED",
        "RESUMED",
        "RESUME_RETRIED",
        "SESSION_MOVES",
        "MOVES",
        "RESTARTS",
        "WORKSPACE_CARRIED",
        "CONTAINER_STARTED",
        "REQUEUED",
        "RECLAIMED",
        "RECLAIM_REFUSED",
        "FORWARDING",
        "BROUGHT_BACK",
    }
)


class Runs:
    """Runs of one centre."""

    def __init__(
        self,
        centre: str,
        store: Store,
        feed: Feed,
        nodes: Nodes,
        scheduler: Scheduler,
        wants: Wants,
        lasting: Lasting,
    ) -> None:
        self._centre = centre
        self._store = store
        self._feed = feed
        self._nodes = nodes
        self._scheduler = scheduler
        self._wants = wants
        self._lasting = lasting
        self._followers: set[asyncio.Task[None]] = set()
        self._book = RunBook(centre, store, nodes, lasting)

    async def take_up(self) -> None:
        """Goes on with the runs that were under way when the last control plane ended."""
        for record in await self._store.unfinished_jobs():
            if record.job.attempts and record.attempt.peer:
                continue  # its peer looks after them
            for run in record.job.runs:
                if run.HasField("end_time"):
                    continue
                known = await self._store.run(run.id)
                if run.HasField("start_time") and known is not None and known[1].request_id:
                    self._follow(run, 0)
                    continue
                # To ask the node for one without a request id again would be to run it again.
                why = (
                    "it was hung up when the control plane ended"
                    if run.HasField("start_time")
                    else "the control plane was started again before it began; give the run instruction again"
                )
                await self._book.tell(record.id, happenings.RunEnded(run.id, None, why))

    async def stop(self) -> None:
        """Lets go of the runs; they run on."""
        for task in self._followers:
            task.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)

    async def run(self, requests: AsyncIterator[wire.RunJobRequest]) -> AsyncGenerator[wire.RunJobResponse, None]:
        """Carries out a run instruction.

        Raises:
            Refusal: INVALID_ARGUMENT with SPEC_INVALID or START_MISSING; NOT_FOUND with JOB_NOT_FOUND;
                FAILED_PRECONDITION with JOB_ENDED; RESOURCE_EXHAUSTED with TOO_MANY_RUNS; ALREADY_EXISTS with
                REQUEST_ID_REUSED; UNAVAILABLE with SESSION_WENT_TO_PEER; and what the node refuses of the command.
        """
        given = RunInput(requests)
        start = await given.start()
        require_valid_start(start)
        run, kept = await self._accept(start)
        yield wire.RunJobResponse(run=run)
        lasting, offset, ended = bool(start.request_id), start.output_offset, False
        started = run.HasField("start_time")
        try:
            async with (
                contextlib.aclosing(given),
                contextlib.aclosing(self._carry_out(kept, start.output_offset, run, given)) as responses,
            ):
                async for response in responses:
                    if response.HasField("output"):
                        offset = response.output.offset + len(response.output.data)
                    ended = ended or response.HasField("exit_code")
                    started = started or response.HasField("run")
                    yield response
        except Refusal as refusal:
            ended = True
            await self._lasting.do(self._book.tell(run.job_id, happenings.RunEnded(run.id, None, refusal.message)))
            raise
        finally:
            if not ended and lasting and started:
                self._follow(run, offset)
            elif not ended:
                why = "its caller went away, and it was hung up" if started else "it was given up before it began"
                gone = happenings.RunEnded(run.id, None, why)
                await self._lasting.do(self._book.tell(run.job_id, gone))

    async def _accept(self, start: wire.RunStart) -> tuple[job_pb2.Run, wire.RunStart]:
        """Notes the run, or finds the one that the same request made before; with what was asked for then."""
        asked = wire.RunStart()
        asked.CopyFrom(start)
        asked.ClearField("output_offset")
        same = wire.RunStart()
        same.CopyFrom(asked)
        same.ClearField("terminal_size")
        noted = request_of("RunJob", same, start.request_id)
        await earlier_answer(self._store, noted)
        record = await require_job(self._store, start.job_id)
        run_id = _run_id(start)
        known = await self._store.run(run_id)
        if known is not None:
            return known
        if record.state in FINAL_STATES or record.state == job_pb2.JOB_STATE_STOPPING or record.cancel_requested:
            raise _ended(record)
        if sum(not run.HasField("end_time") for run in record.job.runs) >= _MOST_UNDER_WAY:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "TOO_MANY_RUNS",
                f"{_MOST_UNDER_WAY} runs are under way in job {record.id}; wait until one has ended",
                job_id=record.id,
            )
        run = job_pb2.Run(
            id=run_id, job_id=record.id, command=start.command, tty=start.tty, create_time=timestamp(now())
        )

        def decide(record: JobRecord, _: int) -> Change:
            try:
                after, event = transition(record, happenings.RunAsked(run), now())
            except IllegalTransition as error:
                raise _ended(record) from error
            return Change(after, (event,), runs=(after.job.runs[-1],), run_start=asked, request=noted)

        try:
            await self._lasting.do(self._store.change_job(record.id, decide))
        except RequestReused as error:
            raise reused(start.request_id) from error
        return run, asked

    # -- from the instruction to the exit code

    async def _carry_out(
        self, start: wire.RunStart, offset: int, run: job_pb2.Run, given: RunInput
    ) -> AsyncGenerator[wire.RunJobResponse, None]:
        """Yields what the scheduler does for the run, its output, and its exit code."""
        started, tries, races = run.HasField("start_time"), 0, 0
        while True:
            try:
                # From before it is looked for a share until the command runs, none is taken back.
                with contextlib.nullcontext() if started else self._wants.waiting(run.job_id):
                    if not started:
                        async with contextlib.aclosing(self._share(run.job_id)) as waited:
                            async for response in waited:
                                yield response
                    record = await require_job(self._store, run.job_id)
                    call = await self._link(record).client.exec(given.for_node(self._exec(record, start, run, offset)))
                with contextlib.closing(call):
                    if not started:
                        started = True
                        self._book.tell_start(run)
                        yield wire.RunJobResponse(run=_begun(run, record))
                    async for answer in call.answers():
                        if answer.HasField("output"):
                            offset, tries = answer.output.offset + len(answer.output.data), 0
                            yield wire.RunJobResponse(output=answer.output)
                        else:
                            await self._book.over(run, answer.exit_code)
                            yield wire.RunJobResponse(exit_code=answer.exit_code)
                            return
                why = Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "the node ended the call without an exit code")
            except Refusal as refusal:
                why = refusal
            if not started and why.reason in _RACES and races < _MOST_RACES:
                races += 1
                await asyncio.sleep(_RACE_S)
                continue
            # Whether a start that was not answered was heard is not known: without a request id it is not tried again.
            if not (is_unreachable(why) and start.request_id):
                raise why
            tries += 1
            await self._until_back(run.job_id, tries)

    async def _share(self, job_id: str) -> AsyncGenerator[wire.RunJobResponse, None]:
        """Yields what happens until the job has a share, and how the waiting goes on."""
        cursor = (await require_job(self._store, job_id)).job.last_cursor
        said = ""
        with self._feed.watching(job_id) as news:
            while True:
                news.clear()
                record = await require_job(self._store, job_id)
                for event in await self._store.events(job_id, cursor):
                    cursor = event.cursor
                    if event.reason in _SHOWN:
                        yield wire.RunJobResponse(event=event)
                if record.state in FINAL_STATES or record.state == job_pb2.JOB_STATE_STOPPING:
                    raise _ended(record)
                if record.state != job_pb2.JOB_STATE_QUEUED and record.job.attempts and record.attempt.peer:
                    raise Refusal(
                        grpc.StatusCode.UNAVAILABLE,
                        WENT_TO_PEER,
                        f"the session went to peer {record.attempt.peer} before the run began; give the run "
                        "instruction again, and it is carried there",
                        retry_after_s=0.0,
                        job_id=job_id,
                    )
                steady = not (record.reclaiming or record.suspend or record.carry_from)
                if record.state == job_pb2.JOB_STATE_RUNNING and steady and current_share(record.attempt) is not None:
                    return
                why = self._scheduler.why_waiting(job_id)
                if why and why != said:
                    said = why
                    yield wire.RunJobResponse(
                        event=job_pb2.JobEvent(
                            time=timestamp(now()),
                            job_id=job_id,
                            state=record.state,
                            reason="WAITING_FOR_SLICE",
                            message=why,
                        )
                    )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await news.wait()

    def _link(self, record: JobRecord) -> NodeLink:
        link = self._nodes.link(record.attempt.node_id)
        if link is None:
            raise RuntimeError(f"node {record.attempt.node_id} of job {record.id} is not known")
        return link

    async def _until_back(self, job_id: str, tries: int) -> None:
        """Waits until asking the job's node again makes sense.

        Raises:
            Refusal: FAILED_PRECONDITION with JOB_ENDED.
        """
        record = await require_job(self._store, job_id)
        if record.state in FINAL_STATES:
            raise _ended(record)
        await asyncio.sleep(min(_LOOK_AGAIN_S, retry_delay_s(tries)))
        await self._link(record).contact()

    def _follow(self, run: job_pb2.Run, offset: int) -> None:
        """Finds out how a run ends whose caller went away and may come back.

        Args:
            run: the run.
            offset: its output up to here, in bytes, was sent to the caller.
        """
        task = asyncio.create_task(self._followed(run, offset), name=f"follow {run.id}")
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    async def _followed(self, run: job_pb2.Run, offset: int) -> None:
        known = await self._store.run(run.id)
        if known is None or known[0].HasField("end_time"):
            return
        tries = 0
        try:
            async with contextlib.aclosing(RunInput(_nothing())) as given:
                while True:
                    try:
                        record = await require_job(self._store, run.job_id)
                        start = self._exec(record, known[1], run, offset)
                        with contextlib.closing(await self._link(record).client.exec(given.for_node(start))) as call:
                            async for answer in call.answers():
                                if answer.HasField("exit_code"):
                                    await self._book.over(run, answer.exit_code)
                                    return
                                offset = answer.output.offset + len(answer.output.data)
                    except Refusal as refusal:
                        if not is_unreachable(refusal):
                            raise
                    tries += 1
                    await self._until_back(run.job_id, tries)
        except Refusal as refusal:
            await self._book.tell(run.job_id, happenings.RunEnded(run.id, None, refusal.message))

    def _exec(
        self, record: JobRecord, start: wire.RunStart, run: job_pb2.Run, offset: int
    ) -> node_service_pb2.ExecStart:
        """Returns what the node is asked for; for the same run always the same, but for the offset."""
        return node_service_pb2.ExecStart(
            owner=card_pb2.AttemptRef(
                centre=self._centre,
                job_id=record.id,
                attempt=len(record.job.attempts),
                fencing_token=record.attempt.fencing_token,
            ),
            command=start.command,
            env={**start.env, "PUHUI_RUN_ID": run.id},
            tty=start.tty,
            # Without one of its caller's, the node hangs the command up when the call ends.
            request_id=run.id if start.request_id else "",
            working_directory=start.working_directory,
            terminal_size=node_service_pb2.ExecTerminalSize(
                columns=start.terminal_size.columns, rows=start.terminal_size.rows
            )
            if start.HasField("terminal_size")
            else None,
            output_offset=offset,
        )


def _begun(run: job_pb2.Run, record: JobRecord) -> job_pb2.Run:
    """Returns a run whose command has just started on the share that its job has."""
    begun = job_pb2.Run()
    begun.CopyFrom(run)
    begun.attempt = len(record.job.attempts)
    begun.start_time.CopyFrom(timestamp(now()))
    share = current_share(record.attempt)
    if share is not None:
        begun.slice_uuid, begun.gpu_index = share.slice_uuid, share.gpu_index
    return begun


async def _nothing() -> AsyncIterator[wire.RunJobRequest]:
    """Yields nothing, for ever: a caller that went away has not ended its input."""
    await asyncio.Event().wait()
    yield wire.RunJobRequest()


def _run_id(start: wire.RunStart) -> str:
    """Returns the id of a run; the same for the same request."""
    if not start.request_id:
        return new_id("r")
    digest = hashlib.sha256(f"{start.job_id}\0{start.request_id}".encode()).digest()
    return "r-" + base64.b32encode(digest).decode().lower()[:12]


def _ended(record: JobRecord) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "JOB_ENDED",
        f"job {record.id} has ended or is being ended ({record.job.reason}), so nothing can run in it; "
        "start a new session with `puhui session start`",
        job_id=record.id,
    )
