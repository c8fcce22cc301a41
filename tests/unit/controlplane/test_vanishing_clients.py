"""A client goes away while what it asked for is being stored: it is carried through, and all of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from controlplane.lasting import Lasting
from puhui.rpc.bundle import pack_files
from puhui.rpc.identity import request_digest
from puhui.v1 import job_pb2, stream_pb2
from puhui.v1 import job_service_pb2 as wire
from tests.unit.controlplane.centres import RunningCentre, eventually, running
from tests.unit.controlplane.fake_node import FakeNode


@contextlib.asynccontextmanager
async def stalled_commits(centre: RunningCentre) -> AsyncIterator[None]:
    """Nothing is committed while the block runs, which begins a write and abandons it."""
    await centre.jobs.ListJobs(wire.ListJobsRequest())  # what the centre writes when it starts is on its way
    writer = centre.centre._store._writer
    begun, go_on = threading.Event(), threading.Event()

    def stall(_: object) -> None:
        begun.set()
        go_on.wait()

    stalled = asyncio.create_task(writer.write(stall))
    await asyncio.to_thread(begun.wait)
    try:
        yield
    finally:
        go_on.set()
        await stalled
        await writer.write(lambda _: None)  # what waited has been committed by now


async def abandon(centre: RunningCentre, call: Any) -> None:
    """Cancels a call whose write waits to be committed, and waits until the server knows."""
    waiting = asyncio.ensure_future(call)
    writes = centre.centre._store._writer._writes
    await eventually(lambda: writes.qsize() > 0)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    for _ in range(3):  # the cancellation is ahead of these in the same connection
        await centre.jobs.ListJobs(wire.ListJobsRequest())


async def test_an_abandoned_submission_is_stored_and_runs(tmp_path: Path) -> None:
    async with running(tmp_path) as centre:
        request = wire.SubmitJobRequest(
            spec=job_pb2.JobSpec(command=["python3", "x.py"]),
            inline=wire.InlineCode(files={"x.py": "print(1)\n"}),
            request_id="r-1",
        )
        async with stalled_commits(centre):
            await abandon(centre, centre.jobs.SubmitJob(request))
        job = (await centre.jobs.SubmitJob(request)).job
        assert (await centre.ended(job.id)).state == job_pb2.JOB_STATE_SUCCEEDED
        assert [one.id for one in (await centre.jobs.ListJobs(wire.ListJobsRequest())).jobs] == [job.id]
        assert [name for name in centre.files() if name.startswith("bundles/")] == [
            f"bundles/{job.bundle_id.removeprefix('sha256:')}.tar.gz"
        ]


async def test_an_abandoned_upload_is_stored_with_its_archive(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        archive = pack_files({"x.py": b"print(1)\n"})
        header = stream_pb2.BundleHeader(bundle_id="sha256:" + request_digest(archive), size_bytes=len(archive))
        parts = [wire.PutBundleRequest(header=header), wire.PutBundleRequest(chunk=archive)]
        async with stalled_commits(centre):
            await abandon(centre, cast("Any", centre.jobs).PutBundle(iter(parts)))
        assert centre.files() == [f"bundles/{header.bundle_id.removeprefix('sha256:')}.tar.gz"]
        assert (await centre.jobs.PutBundle(iter(parts[:1]))).already_present


async def test_an_abandoned_cancellation_ends_the_job(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, job_pb2.JOB_STATE_RUNNING)
        async with stalled_commits(centre):
            await abandon(centre, centre.jobs.CancelJob(wire.CancelJobRequest(job_id=job_id)))
        assert (await centre.ended(job_id)).state == job_pb2.JOB_STATE_CANCELLED
        assert node.empty


async def test_one_of_two_uploads_of_a_bundle_fails_and_the_archive_stays(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        request = wire.SubmitJobRequest(
            spec=job_pb2.JobSpec(command=["python3", "x.py"]),
            inline=wire.InlineCode(files={"x.py": "print(1)\n"}),
            request_id="r-1",
        )
        other = wire.SubmitJobRequest()
        other.CopyFrom(request)
        other.spec.name = "other"
        writes = centre.centre._store._writer._writes
        async with stalled_commits(centre):
            calls = [asyncio.ensure_future(centre.jobs.SubmitJob(one)) for one in (request, other)]
            await eventually(lambda: writes.qsize() == 2)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(outcome, BaseException) for outcome in outcomes) == 1
        assert len(centre.files()) == 1


async def test_who_is_cancelled_stays_until_the_work_is_done() -> None:
    lasting, begun, go_on = Lasting(), asyncio.Event(), asyncio.Event()
    done: list[str] = []

    async def work() -> None:
        begun.set()
        await go_on.wait()
        done.append("work")

    async def caller() -> None:
        try:
            await lasting.do(work())
        finally:
            done.append("caller")

    task = asyncio.create_task(caller())
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.wait({task}, timeout=0)
    finishing = asyncio.create_task(lasting.finish())
    go_on.set()
    await finishing
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["work", "caller"]
