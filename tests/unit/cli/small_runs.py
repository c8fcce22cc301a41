"""Runs in the sessions of a small centre: what a command does is played, not executed."""

# ruff: noqa: N802 - gRPC names methods so

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import now, timestamp
from puhui.v1 import job_pb2, job_service_pb2, stream_pb2
from puhui.v1.job_service_pb2_grpc import JobServiceServicer

__all__ = ["SmallRun", "SmallRuns"]

COUNTED = 2000
"""Lines that the command `count` writes."""


@dataclass
class SmallRun:
    """A run, and all that it wrote."""

    start: job_service_pb2.RunStart
    run: job_pb2.Run
    output: list[stream_pb2.LogChunk] = field(default_factory=list)
    exit_code: int | None = None
    size: int = 0
    inputs: asyncio.Queue[job_service_pb2.RunJobRequest] = field(default_factory=lambda: asyncio.Queue(1))
    signals: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    received: int = 0


class SmallRuns(JobServiceServicer):
    """The part of a small centre that is about runs and shares.

    Attributes:
        runs: runs by request id.
        before_start: events that the next run tells before it starts.
        gate: a run starts once it is set.
        connections: calls of RunJob that got as far as a start.
    """

    def __init__(self) -> None:
        self.runs: dict[str, SmallRun] = {}
        self.before_start: list[job_pb2.JobEvent] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.connections = 0
        self.suspended: list[job_service_pb2.SuspendJobRequest] = []
        self._run_changed = asyncio.Condition()
        self._players: set[asyncio.Task[None]] = set()

    def _session(self, job_id: str) -> job_pb2.Job:
        raise NotImplementedError

    def _limit(self, rpc: str) -> int | None:
        raise NotImplementedError

    async def RunJob(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        requests = aiter(request_iterator)
        start = (await anext(requests)).start
        left = self._limit("RunJob")
        self.connections += 1
        job = self._session(start.job_id)
        if job.HasField("end_time"):
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED", f"job {job.id} has ended", job_id=job.id)
        offset, known = start.output_offset, self.runs.get(start.request_id)
        start.output_offset = 0
        if known is None:
            run = job_pb2.Run(id=new_id("r"), job_id=job.id, command=start.command, create_time=timestamp(now()))
            job.runs.append(run)
            known = self.runs[start.request_id] = SmallRun(start, job.runs[-1])
            job.run_count += 1
        assert known.start == start  # the same request, whatever became of the terminal meanwhile
        yield job_service_pb2.RunJobResponse(run=known.run)
        for event in self.before_start:
            yield job_service_pb2.RunJobResponse(event=event)
        self.before_start = []
        await self.gate.wait()
        if not known.run.HasField("start_time"):
            known.run.start_time.CopyFrom(timestamp(now()))
            player = asyncio.create_task(self._play(known))
            self._players.add(player)
            player.add_done_callback(self._players.discard)
        yield job_service_pb2.RunJobResponse(run=known.run)
        reader = asyncio.create_task(self._read(requests, known))
        try:
            async for response in self._tell(known, offset):
                if left == 0:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
                left = None if left is None else left - 1
                yield response
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _tell(self, run: SmallRun, offset: int) -> AsyncIterator[job_service_pb2.RunJobResponse]:
        told = 0
        while True:
            async with self._run_changed:
                while told == len(run.output) and run.exit_code is None:
                    await self._run_changed.wait()
            while told < len(run.output):
                chunk = run.output[told]
                told += 1
                if chunk.offset + len(chunk.data) <= offset:
                    continue
                yield job_service_pb2.RunJobResponse(output=chunk)  # whole, even where part of it is known
            if run.exit_code is not None:
                yield job_service_pb2.RunJobResponse(exit_code=run.exit_code)
                return

    async def _read(self, requests: Any, run: SmallRun) -> None:
        async for request in requests:
            await run.inputs.put(request)

    async def _play(self, run: SmallRun) -> None:
        match list(run.start.command):
            case ["echo", *words]:
                await self._write(run, " ".join(words).encode() + b"\n")
                await self._write(run, b"and an error\n", stream_pb2.LOG_STREAM_STDERR)
            case ["exit", code]:
                run.exit_code = int(code)
            case ["count"]:
                for number in range(COUNTED):
                    await self._write(run, b"%d\n" % number)
            case ["env"]:
                pairs = sorted(run.start.env.items())
                text = "".join(f"{key}={value}\n" for key, value in pairs)
                await self._write(run, f"{text}{run.start.working_directory}\n".encode())
            case ["cat"]:
                await self._hear(run)
            case _:
                raise AssertionError(run.start.command)
        run.exit_code = run.exit_code or 0
        run.run.end_time.CopyFrom(timestamp(now()))
        run.run.exit_code = run.exit_code
        await self._run_told()

    async def _hear(self, run: SmallRun) -> None:
        await self._write(run, b"listening\n")
        while run.exit_code is None:
            request = await run.inputs.get()
            match request.WhichOneof("part"):
                case "stdin":
                    run.received += len(request.stdin)
                    await self._write(run, request.stdin)
                    if b"\x04" in request.stdin:
                        return
                case "terminal_size":
                    size = (request.terminal_size.columns, request.terminal_size.rows)
                    run.sizes.append(size)
                    await self._write(run, b"size %d %d\r\n" % size)
                case "signal":
                    run.signals.append(request.signal)
                    await self._write(run, b"signal %d\n" % request.signal)
                    if request.signal != 2:
                        run.exit_code = 128 + request.signal
                case _:
                    return

    async def _write(
        self, run: SmallRun, data: bytes, stream: stream_pb2.LogStream.ValueType = stream_pb2.LOG_STREAM_STDOUT
    ) -> None:
        run.output.append(stream_pb2.LogChunk(offset=run.size, data=data, stream=stream))
        run.size += len(data)
        await self._run_told()

    async def _run_told(self) -> None:
        async with self._run_changed:
            self._run_changed.notify_all()

    async def ListRuns(self, request: Any, context: Any) -> Any:
        runs = [run.run for run in self.runs.values() if run.run.job_id == self._session(request.job_id).id]
        start = int(request.page_token or 0)
        stop = start + (request.page_size or 50)
        more = str(stop) if stop < len(runs) else ""
        return job_service_pb2.ListRunsResponse(runs=runs[::-1][start:stop], next_page_token=more)

    async def SuspendJob(self, request: Any, context: Any) -> Any:
        job = self._session(request.job_id)
        self.suspended.append(request)
        job.state, job.reason = job_pb2.JOB_STATE_IDLE, "RECLAIMED"
        job.message = "its share was taken back (detach)"
        return job_service_pb2.SuspendJobResponse(job=job)

    async def ResumeJob(self, request: Any, context: Any) -> Any:
        job = self._session(request.job_id)
        job.state, job.reason, job.message = job_pb2.JOB_STATE_RESUMING, "RESUMING", "2nd in the queue"
        return job_service_pb2.ResumeJobResponse(job=job)

    async def ExplainJob(self, request: Any, context: Any) -> Any:
        self._session(request.job_id)
        response = job_service_pb2.ExplainJobResponse(message="two jobs are before it", queue_position=3)
        response.expected_wait.seconds = 90
        return response
