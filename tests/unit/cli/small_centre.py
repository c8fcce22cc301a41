"""A small centre behind a real gRPC server: keeps jobs in memory and plays the course that a label names.

It is what the client and the CLI are tested against where the test must decide what the centre does.
"""

# ruff: noqa: N802 - gRPC names methods so

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import tarfile
import tempfile
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id, request_digest
from puhui.rpc.moment import now, timestamp
from puhui.rpc.server import RpcServer
from puhui.rpc.transfer import receive
from puhui.v1 import card_pb2, fleet_service_pb2, job_pb2, job_service_pb2, node_pb2, prediction_pb2, stream_pb2
from puhui.v1.fleet_service_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server
from puhui.v1.job_service_pb2_grpc import add_JobServiceServicer_to_server
from tests.unit.cli.small_runs import SmallRuns

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)

PREDICTION = prediction_pb2.Prediction(
    tier=prediction_pb2.PREDICTION_TIER_STATIC,
    memory=prediction_pb2.MemoryQuantiles(p50_mib=5200, p90_mib=6100, p99_mib=8800),
    required_mib=9100,
    parts=[prediction_pb2.MemoryPart(category="activations", mib=4000)],
    facts=[prediction_pb2.CodeFact(name="batch_size", value="64")],
    reason="a convolutional network of 25.6 M parameters at batch 64",
    model_version="test-1",
)
SIZING = prediction_pb2.Sizing(
    origin=prediction_pb2.SIZING_ORIGIN_PREDICTION,
    required_mib=9100,
    choices=[
        prediction_pb2.ProfileChoice(
            profile="1g.10gb", gpu_model="NVIDIA H100 80GB HBM3", memory_mib=9728, compute_slices=1
        )
    ],
    reason="1g.10gb is the smallest profile with 9100 MiB",
)


def archive_of(files: dict[str, bytes]) -> bytes:
    """Returns a gzip-compressed tar archive of `files`."""
    data = io.BytesIO()
    with gzip.GzipFile(fileobj=data, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return data.getvalue()


@dataclass
class Kept:
    """A job and what belongs to it."""

    job: job_pb2.Job
    updates: list[job_service_pb2.WatchJobResponse] = field(default_factory=list)
    log: list[stream_pb2.LogChunk] = field(default_factory=list)
    log_ended: bool = False
    log_bytes: int = 0
    artifacts: dict[str, bytes] = field(default_factory=dict)


class SmallCentre(SmallRuns, FleetServiceServicer):
    """Serves what a test has told it to.

    Attributes:
        kept: jobs by id, in the order of submission.
        bundles: archives by bundle id.
        calls: how often each RPC was called.
        request_ids: request_id of each mutation, in order.
        faults: code with which the next calls of an RPC fail, each used up by one call.
        break_after: after how many messages the next stream of an RPC breaks off, used up by one call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Kept] = {}
        self.bundles: dict[str, bytes] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.request_ids: list[str] = []
        self.faults: dict[str, list[Refusal | grpc.StatusCode]] = defaultdict(list)
        self.break_after: dict[str, list[int]] = defaultdict(list)
        self._cursor = 0
        self._changed = asyncio.Condition()
        self._courses: set[asyncio.Task[None]] = set()
        self._seen_requests: dict[str, tuple[str, str]] = {}

    # Courses of jobs.

    async def tell(self, kept: Kept, state: job_pb2.JobState.ValueType, reason: str, **details: str) -> None:
        """Moves a job to a state with an event."""
        self._cursor += 1
        job = kept.job
        job.state, job.reason, job.last_cursor = state, reason, self._cursor
        job.message = f"{reason.lower().replace('_', ' ')}"
        event = job_pb2.JobEvent(
            cursor=self._cursor,
            time=timestamp(now()),
            job_id=job.id,
            attempt=len(job.attempts),
            state=state,
            reason=reason,
            message=job.message,
            details=details,
        )
        kept.updates.append(job_service_pb2.WatchJobResponse(event=event, job=job))
        await self._notify()

    async def write(self, kept: Kept, data: bytes, stream: stream_pb2.LogStream.ValueType) -> None:
        """Writes output of a job."""
        kept.log.append(stream_pb2.LogChunk(offset=kept.log_bytes, data=data, stream=stream, time=timestamp(now())))
        kept.log_bytes += len(data)
        await self._notify()

    async def end(self, kept: Kept, state: job_pb2.JobState.ValueType, reason: str, exit_code: int | None) -> None:
        """Ends a job."""
        kept.log_ended = True
        if exit_code is not None:
            kept.job.exit_code = exit_code
        await self.tell(kept, job_pb2.JOB_STATE_STOPPING, "COMMAND_ENDED")
        kept.job.end_time.CopyFrom(timestamp(now()))
        await self.tell(kept, state, reason)

    async def _course(self, kept: Kept) -> None:
        course = kept.job.spec.labels.get("course", "succeed")
        if course == "wait":
            await self.tell(kept, job_pb2.JOB_STATE_QUEUED, "WAITING_FOR_SLICE")
            return
        if course == "never-starts":
            await self.tell(kept, job_pb2.JOB_STATE_FAILED, "IMAGE_NOT_FOUND")
            kept.log_ended = True
            return
        kept.job.attempts.add(
            number=1,
            node_id="n-1",
            gpu_model="NVIDIA H100 80GB HBM3",
            profile="1g.10gb",
            placement=card_pb2.Placement(start=0, size=1),
            emulated=True,
            runtime="process",
        )
        await self.tell(kept, job_pb2.JOB_STATE_STARTING, "RESERVED")
        kept.job.start_time.CopyFrom(timestamp(now()))
        await self.tell(kept, job_pb2.JOB_STATE_RUNNING, "CONTAINER_STARTED", container_id="c1")
        await self.write(kept, b"to stdout \xe6\x99\xae", stream_pb2.LOG_STREAM_STDOUT)
        await self.write(kept, b"to stderr\n", stream_pb2.LOG_STREAM_STDERR)
        await self.write(kept, b" again\n", stream_pb2.LOG_STREAM_STDOUT)
        if course == "hang" or kept.job.spec.kind == job_pb2.JOB_KIND_SESSION:
            return
        kept.artifacts = {"model.pt": b"weights", "deep/metrics.json": b"{}"}
        exit_code = int(kept.job.spec.labels.get("exit", "0"))
        if exit_code:
            await self.end(kept, job_pb2.JOB_STATE_FAILED, "EXIT_CODE", exit_code)
        else:
            await self.end(kept, job_pb2.JOB_STATE_SUCCEEDED, "SUCCEEDED", 0)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _change(self) -> None:
        async with self._changed:
            await self._changed.wait()

    def _enter(self, rpc: str) -> int | None:
        self.calls[rpc] += 1
        if self.faults[rpc]:
            fault = self.faults[rpc].pop(0)
            if isinstance(fault, Refusal):
                raise fault
            raise _Broken(fault)
        return self.break_after[rpc].pop(0) if self.break_after[rpc] else None

    def _job(self, job_id: str) -> Kept:
        if job_id not in self.kept:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", f"no job {job_id}; see `puhui ps`", job_id=job_id)
        return self.kept[job_id]

    def _session(self, job_id: str) -> job_pb2.Job:
        return self._job(job_id).job

    def _limit(self, rpc: str) -> int | None:
        return self._enter(rpc)

    # JobService.

    async def PutBundle(self, request_iterator: Any, context: Any) -> Any:
        await self._guard("PutBundle", context)
        with tempfile.TemporaryDirectory() as folder:
            async with receive(aiter(request_iterator), Path(folder), 512 * 2**20) as upload:
                known = upload.bundle_id in self.bundles
                if not known:
                    await upload.finish()
                    self.bundles[upload.bundle_id] = upload.path.read_bytes()
                bundle = stream_pb2.Bundle(id=upload.bundle_id, size_bytes=upload.size_bytes, file_count=1)
                return job_service_pb2.PutBundleResponse(bundle=bundle, already_present=known)

    async def SubmitJob(self, request: Any, context: Any) -> Any:
        digest = request_digest(request.SerializeToString(deterministic=True))
        self.request_ids.append(request.request_id)
        known, job_id = self._seen_requests.get(request.request_id, (digest, ""))
        if known != digest:
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", "this request_id had another body")
        if not job_id:
            session = request.spec.kind == job_pb2.JOB_KIND_SESSION
            if request.bundle_id not in self.bundles and not (session and not request.bundle_id):
                raise Refusal(grpc.StatusCode.NOT_FOUND, "BUNDLE_NOT_FOUND", "upload it first")
            job = job_pb2.Job(
                id=new_id("j"),
                centre="small",
                spec=request.spec,
                bundle_id=request.bundle_id,
                prediction=PREDICTION,
                sizing=SIZING,
                create_time=timestamp(now()),
            )
            job_id = job.id
            kept = self.kept[job_id] = Kept(job)
            self._seen_requests[request.request_id] = (digest, job_id)
            await self.tell(kept, job_pb2.JOB_STATE_QUEUED, "SUBMITTED")
            await self.tell(kept, job_pb2.JOB_STATE_QUEUED, "PREDICTED")
            course = asyncio.create_task(self._course(kept))
            self._courses.add(course)
            course.add_done_callback(self._courses.discard)
        await self._guard("SubmitJob", context)  # the answer is lost, not the request
        return job_service_pb2.SubmitJobResponse(job=self.kept[job_id].job)

    async def GetJob(self, request: Any, context: Any) -> Any:
        await self._guard("GetJob", context)
        return job_service_pb2.GetJobResponse(job=self._job(request.job_id).job)

    async def ListJobs(self, request: Any, context: Any) -> Any:
        await self._guard("ListJobs", context)
        wanted = request.filter
        jobs = [
            kept.job
            for kept in reversed(self.kept.values())
            if (not wanted.states or kept.job.state in wanted.states)
            and kept.job.spec.name.startswith(wanted.name_prefix)
            and all(kept.job.spec.labels.get(key) == value for key, value in wanted.labels.items())
        ]
        start = int(request.page_token or 0)
        stop = start + (request.page_size or 50)
        more = str(stop) if stop < len(jobs) else ""
        return job_service_pb2.ListJobsResponse(jobs=jobs[start:stop], next_page_token=more)

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        left = await self._guard("WatchJob", context)
        kept = self._job(request.job_id)
        after = request.after_cursor
        while True:
            for update in [update for update in kept.updates if update.event.cursor > after]:
                if left == 0:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
                left = None if left is None else left - 1
                after = update.event.cursor
                yield update
            if kept.job.state in ENDED and kept.job.last_cursor <= after:
                return
            await self._change()

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        left = await self._guard("ReadLogs", context)
        kept = self._job(request.job_id)
        offset = request.offset
        if request.tail_lines:
            whole = b"".join(chunk.data for chunk in kept.log)
            offset = len(whole) - len(b"".join(whole.splitlines(keepends=True)[-request.tail_lines :]))
        while True:
            for chunk in list(kept.log):
                if chunk.offset + len(chunk.data) <= offset:
                    continue
                if left == 0:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
                left = None if left is None else left - 1
                skipped = max(offset - chunk.offset, 0)
                part = stream_pb2.LogChunk(
                    offset=chunk.offset + skipped, data=chunk.data[skipped:], stream=chunk.stream, time=chunk.time
                )
                offset = part.offset + len(part.data)
                yield job_service_pb2.ReadLogsResponse(chunk=part)
            if not request.follow or (kept.log_ended and offset >= kept.log_bytes):
                return
            await self._change()

    async def GetArtifacts(self, request: Any, context: Any) -> AsyncIterator[Any]:
        left = await self._guard("GetArtifacts", context)
        kept = self._job(request.job_id)
        if kept.job.state not in ENDED:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "NOT_FINISHED", "the job has not ended; `puhui wait` it")
        data = archive_of(kept.artifacts)
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if kept.job.spec.labels.get("artifacts") == "damaged":
            data = data[:-1] + bytes([data[-1] ^ 1])
        files = [stream_pb2.ArtifactFile(path=path, size_bytes=len(file)) for path, file in kept.artifacts.items()]
        yield job_service_pb2.GetArtifactsResponse(
            manifest=stream_pb2.ArtifactManifest(digest=digest, size_bytes=len(data), files=files)
        )
        for start in range(request.offset, len(data), 50):
            if left == 0:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            left = None if left is None else left - 1
            yield job_service_pb2.GetArtifactsResponse(chunk=data[start : start + 50])

    async def CancelJob(self, request: Any, context: Any) -> Any:
        self.request_ids.append(request.request_id)
        await self._guard("CancelJob", context)
        kept = self._job(request.job_id)
        if kept.job.state not in ENDED:
            started = kept.job.HasField("start_time")
            await self.end(kept, job_pb2.JOB_STATE_CANCELLED, "CANCELLED", 143 if started else None)
        return job_service_pb2.CancelJobResponse(job=kept.job)

    async def PredictJob(self, request: Any, context: Any) -> Any:
        await self._guard("PredictJob", context)
        return job_service_pb2.PredictJobResponse(
            prediction=PREDICTION,
            sizing=SIZING,
            fits_now=True,
            message="a 1g.10gb is free on GPU 0 of node one",
            profiles=[
                prediction_pb2.ProfileOutlook(
                    profile=profile,
                    gpu_model=SIZING.choices[0].gpu_model,
                    memory_mib=memory_mib,
                    chosen=chosen,
                    satisfies=True,
                    chance_of_fit=chance,
                )
                for profile, memory_mib, chosen, chance in (
                    ("1g.10gb", 9728, True, 0.93),
                    ("7g.80gb", 81152, False, 1.0),
                )
            ],
        )

    # FleetService.

    async def ListNodes(self, request: Any, context: Any) -> Any:
        await self._guard("ListNodes", context)
        gpu = card_pb2.Gpu(
            uuid="GPU-1",
            index=0,
            model="NVIDIA H100 80GB HBM3",
            memory_mib=81559,
            mig_mode=card_pb2.MIG_MODE_ENABLED,
            emulated=True,
        )
        held = card_pb2.Slice(
            uuid="MIG-1",
            gpu_uuid="GPU-1",
            profile="1g.10gb",
            placement=card_pb2.Placement(start=0, size=1),
            memory_mib=9728,
            state=card_pb2.SLICE_STATE_ACTIVE,
            owner=card_pb2.AttemptRef(centre="small", job_id="j-held", attempt=1),
            emulated=True,
        )
        inventory = node_pb2.NodeInventory(
            name="one", gpus=[gpu], slices=[held], runtime=node_pb2.Runtime(kind=node_pb2.RUNTIME_KIND_PROCESS)
        )
        node = fleet_service_pb2.Node(
            id="n-1", address="127.0.0.1:7071", state=fleet_service_pb2.NODE_STATE_READY, inventory=inventory
        )
        return fleet_service_pb2.ListNodesResponse(nodes=[node])

    async def GetCapacity(self, request: Any, context: Any) -> Any:
        await self._guard("GetCapacity", context)
        model = "NVIDIA H100 80GB HBM3"
        sizes = {"1g.10gb": 9728, "2g.20gb": 19968, "3g.40gb": 40448, "7g.80gb": 81050}
        return fleet_service_pb2.GetCapacityResponse(
            centre="small",
            profiles=[
                fleet_service_pb2.ProfileCapacity(gpu_model=model, profile=name, memory_mib=size, free=1, total=2)
                for name, size in sizes.items()
            ],
            gpus=[
                fleet_service_pb2.GpuCapacity(
                    node_id="n-1",
                    gpu_uuid="GPU-1",
                    gpu_model=model,
                    emulated=True,
                    memory_slices_total=8,
                    memory_slices_free=7,
                    memory_slices_busy=1,
                )
            ],
        )

    async def _guard(self, rpc: str, context: Any) -> int | None:
        try:
            return self._enter(rpc)
        except _Broken as broken:
            await context.abort(broken.code, "connection lost")
            raise


class _Broken(Exception):  # noqa: N818
    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code


class RunningCentre:
    """A small centre that is served from a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._server: RpcServer | None = None
        self.address = "127.0.0.1:0"

    def start(self) -> None:
        """Starts serving."""
        self._thread.start()
        self.centre = self._do(self._make())
        self.listen()

    def listen(self) -> None:
        """Listens, at the address that it had before if there was one."""
        port = self._do(self._listen())
        self.address = f"127.0.0.1:{port}"

    def hang_up(self) -> None:
        """Stops listening and ends all calls, as a control plane that restarts does."""
        assert self._server is not None
        self._do(self._server.stop(0))
        self._server = None

    def open_gate(self) -> None:
        """Lets runs start."""
        self._loop.call_soon_threadsafe(self.centre.gate.set)

    def shut_gate(self) -> None:
        """Lets no run start."""
        self._loop.call_soon_threadsafe(self.centre.gate.clear)

    def close(self) -> None:
        """Ends everything."""
        if self._server is not None:
            self.hang_up()
        self._do(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, name: str, job_id: str, *arguments: Any) -> None:
        """Has the centre do something to a job."""
        self._do(getattr(self.centre, name)(self.centre.kept[job_id], *arguments))

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _make(self) -> SmallCentre:
        return SmallCentre()  # type: ignore[abstract]  # what it lacks answers UNIMPLEMENTED

    async def _listen(self) -> int:
        self._server = RpcServer(self.address)
        self._server.add("puhui.v1.JobService", add_JobServiceServicer_to_server, self.centre)
        self._server.add("puhui.v1.FleetService", add_FleetServiceServicer_to_server, self.centre)
        return await self._server.start()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def running_centre() -> Iterator[RunningCentre]:
    """Serves a small centre until the block ends."""
    running = RunningCentre()
    running.start()
    try:
        yield running
    finally:
        running.close()
