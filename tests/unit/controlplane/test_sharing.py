"""Shares that come and go while a job lives: over a real server and store, on a node that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from controlplane.idle_policy import CentrePolicy
from puhui.rpc.errors import Refusal
from puhui.v1 import fleet_service_pb2, job_pb2
from puhui.v1 import job_service_pb2 as wire
from puhui.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_IDLE,
    JOB_STATE_RESUMING,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    RECLAIM_MODE_CHECKPOINT,
    RECLAIM_MODE_DETACH,
    RECLAIM_MODE_STOP,
)
from tests.unit.controlplane.centres import RunningCentre, eventually, refused, running
from tests.unit.controlplane.fake_node import FakeNode

COLD = CentrePolicy(warm_s=0.0)
WHOLE = {"resources": job_pb2.Resources(profile="7g.80gb")}


@pytest.fixture
def node() -> FakeNode:
    fake = FakeNode()
    fake.exits_at_once = None
    return fake


async def idle(centre: RunningCentre, node: FakeNode, **spec: Any) -> str:
    """Returns a job whose share was taken back because it was idle."""
    job_id = await centre.submit(**spec)
    await centre.until(job_id, JOB_STATE_RUNNING)
    await node.idle(job_id)
    await centre.until_told(job_id, "RECLAIMED")
    return job_id


async def resume(centre: RunningCentre, job_id: str, **fields: Any) -> job_pb2.Job:
    return (await centre.jobs.ResumeJob(wire.ResumeJobRequest(job_id=job_id, **fields), timeout=20)).job


async def suspend(centre: RunningCentre, job_id: str, **fields: Any) -> job_pb2.Job:
    return (await centre.jobs.SuspendJob(wire.SuspendJobRequest(job_id=job_id, **fields), timeout=20)).job


async def capacity(centre: RunningCentre) -> fleet_service_pb2.GpuCapacity:
    return (await centre.fleet.GetCapacity(fleet_service_pb2.GetCapacityRequest())).gpus[0]


async def ended(centre: RunningCentre, job_id: str, count: int) -> None:
    """Waits until so many runs of a job have ended."""
    with centre.centre._feed.watching(job_id) as news:
        async with asyncio.timeout(20):
            while (await centre.reasons(job_id)).count("RUN_ENDED") < count:
                news.clear()
                await news.wait()


class Run:
    """One RunJob call."""

    def __init__(self, centre: RunningCentre, job_id: str, **start: Any) -> None:
        begin = wire.RunStart(job_id=job_id, command=["python3", "train.py"], **start)
        self._more = asyncio.Event()
        self._call = centre.jobs.RunJob(self._requests(begin), timeout=30)
        self.parts: list[wire.RunJobResponse] = []

    async def _requests(self, start: wire.RunStart) -> AsyncIterator[wire.RunJobRequest]:
        yield wire.RunJobRequest(start=start)
        await self._more.wait()

    async def until(self, part: str) -> Any:
        """Reads on until such a part comes, and returns it."""
        async for response in self._call:
            self.parts.append(response)
            if response.WhichOneof("part") == part:
                return getattr(response, part)
        raise AssertionError(f"it ended without {part}: {self.parts}")

    async def until_started(self) -> job_pb2.Run:
        await self.until("run")  # accepted
        started: job_pb2.Run = await self.until("run")
        return started

    def leave(self) -> None:
        self._call.cancel()


async def test_an_idle_share_is_taken_back_and_given_again(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await idle(centre, node)
        job = await centre.job(job_id)
        assert job.state == JOB_STATE_IDLE
        share = job.attempts[0].shares[0]
        assert (share.slice_uuid, share.reclaim_mode, share.busy_seconds) == ("MIG-1", RECLAIM_MODE_DETACH, 3.0)
        assert share.HasField("release_time")
        has = await capacity(centre)
        assert (has.memory_slices_busy, has.memory_slices_idle, has.memory_slices_free) == (0, 1, 7)
        await resume(centre, job_id)
        job = await centre.until(job_id, JOB_STATE_RUNNING)
        told = await centre.until_told(job_id, "RESUMED")
        # The very slice, kept warm, is taken again: none was cut.
        assert told.details["slice_uuid"] == "MIG-1"
        assert node.calls.count("create_slice") == 1
        assert len(job.attempts) == 1
        has = await capacity(centre)
        assert (has.memory_slices_busy, has.memory_slices_idle) == (1, 0)
        assert node.started == [(job_id, 1)]


async def test_a_share_that_is_not_kept_warm_is_destroyed_and_cut_anew(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await idle(centre, node)
        await centre.until_told(job_id, "WARM_SLICE_DROPPED")
        assert not node.slices
        assert not await centre.centre._store.reservations()
        assert (await capacity(centre)).memory_slices_free == 8
        await resume(centre, job_id)
        told = await centre.until_told(job_id, "RESUMED")
        assert told.details["slice_uuid"] == "MIG-2"
        await node.exit(job_id, 0)
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED
        assert node.empty
        assert not await centre.centre._store.reservations()


async def test_a_waiting_job_of_another_tenant_evicts_a_warm_share(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        first = await idle(centre, node, tenant="red", **WHOLE)
        second = await centre.submit(tenant="blue", **WHOLE)
        job = await centre.until(second, JOB_STATE_RUNNING)
        assert job.attempts[0].slice_uuid == "MIG-2"
        dropped = await centre.until_told(first, "WARM_SLICE_DROPPED")
        assert dropped.details["for_job"] == second
        assert (await centre.job(first)).state == JOB_STATE_IDLE
        # A person waits for the first; the second is busy, so nothing is taken from it.
        assert (await resume(centre, first)).state == JOB_STATE_RESUMING
        await centre.until_told(first, "WAITING_FOR_SLICE")
        await node.exit(second, 0)
        await centre.until_told(first, "RESUMED")


async def test_a_job_of_the_same_tenant_takes_a_warm_slice_over(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        first = await idle(centre, node, tenant="red", **WHOLE)
        second = await centre.submit(tenant="red", **WHOLE)
        job = await centre.until(second, JOB_STATE_RUNNING)
        assert job.attempts[0].slice_uuid == "MIG-1"
        assert "SLICE_TAKEN_OVER" in await centre.reasons(second)
        assert node.calls.count("create_slice") == 1
        assert node.slices["MIG-1"].owner.job_id == second
        await node.exit(second, 0)
        await centre.ended(second)
        assert not node.slices
        await resume(centre, first)
        assert (await centre.until_told(first, "RESUMED")).details["slice_uuid"] == "MIG-2"


async def test_a_share_that_comes_into_use_again_stays(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        gate = node.hold("reclaim_container")
        await node.idle(job_id)
        await centre.until_told(job_id, "RECLAIMING")
        await node.idle(job_id, idle=False)
        gate.set()
        refused_ = await centre.until_told(job_id, "RECLAIM_REFUSED")
        assert refused_.details["node_reason"] == "NOT_IDLE"
        assert (await centre.job(job_id)).state == JOB_STATE_RUNNING
        # Idle again later, it is tried again.
        await node.idle(job_id)
        await centre.until_told(job_id, "RECLAIMED")


async def test_what_ends_work_is_done_only_for_somebody_who_waits(tmp_path: Path, node: FakeNode) -> None:
    node.reclaim_mode = RECLAIM_MODE_STOP
    policy = job_pb2.IdlePolicy(reclaim_mode=RECLAIM_MODE_STOP)
    async with running(tmp_path, node) as centre:
        first = await centre.submit(idle=policy, **WHOLE)
        await centre.until(first, JOB_STATE_RUNNING)
        node.workspaces[first, 1] = b"half done"
        await node.idle(first)
        await centre.until_told(first, "RECLAIM_REFUSED")
        has = await capacity(centre)
        assert (has.memory_slices_busy, has.memory_slices_idle) == (0, 8)
        second = await centre.submit(**WHOLE)
        await centre.until(second, JOB_STATE_RUNNING)
        told = await centre.until_told(first, "RECLAIMED")
        assert (told.details["why"], told.details["mode"]) == ("NEEDED", "stop")
        assert (await centre.job(first)).state == JOB_STATE_IDLE
        # Going on means to begin again with the workspace.
        await resume(centre, first)
        await node.exit(second, 0)
        await centre.until_told(first, "WORKSPACE_CARRIED")
        job = await centre.until(first, JOB_STATE_RUNNING)
        assert [attempt.number for attempt in job.attempts] == [1, 2]
        assert node.workspaces == {(first, 2): b"half done"}
        assert node.started == [(first, 1), (second, 1), (first, 2)]


async def test_an_idle_share_that_comes_into_use_is_promised_to_nobody(tmp_path: Path, node: FakeNode) -> None:
    node.reclaim_mode = RECLAIM_MODE_STOP
    policy = job_pb2.IdlePolicy(reclaim_mode=RECLAIM_MODE_STOP)
    async with running(tmp_path, node) as centre:
        first = await centre.submit(idle=policy, **WHOLE)
        await centre.until(first, JOB_STATE_RUNNING)
        await node.idle(first)
        await centre.until_told(first, "RECLAIM_REFUSED")
        gate = node.hold("reclaim_container")
        second = await centre.submit(**WHOLE)
        await eventually(lambda: node.calls.count("reclaim_container") == 2)
        await node.idle(first, idle=False)
        gate.set()
        await eventually(lambda: not centre.centre._reservations.leaving)
        assert (await capacity(centre)).memory_slices_busy == 8
        # Idle once more, it goes to who still waits.
        await node.idle(first)
        await centre.until(second, JOB_STATE_RUNNING)


async def test_what_was_checkpointed_is_restored_and_comes_back_when_it_asks(tmp_path: Path, node: FakeNode) -> None:
    node.reclaim_mode = RECLAIM_MODE_CHECKPOINT
    async with running(tmp_path, node) as centre:
        job_id = await idle(centre, node)
        await node.want_card(job_id)
        told = await centre.until_told(job_id, "RESUMED")
        assert (told.details["why"], told.details["restored"]) == ("WANTED", "true")
        assert not node.containers[job_id, 1].checkpointed


async def test_a_run_that_was_checkpointed_is_not_left_standing(tmp_path: Path, node: FakeNode) -> None:
    node.reclaim_mode = RECLAIM_MODE_CHECKPOINT
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit(kind=job_pb2.JOB_KIND_SESSION)
        await centre.until(job_id, JOB_STATE_RUNNING)
        run = Run(centre, job_id)
        await run.until_started()
        await node.idle(job_id)
        await centre.until_told(job_id, "RECLAIMED")
        await node.want_card(job_id)
        assert (await centre.until_told(job_id, "RESUMED")).details["why"] == "WANTED"
        await node.commands[0].end(0)
        assert await run.until("exit_code") == 0


async def test_a_batch_job_comes_back_by_itself_after_a_rest(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await idle(centre, node, idle=job_pb2.IdlePolicy(idle_after=Duration(seconds=1)))
        told = await centre.until_told(job_id, "RESUMED")
        assert told.details["why"] == "ROOM"
        assert int(told.details["without_share_ms"]) >= 1000


async def test_suspend_and_resume_by_request(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit(idle=job_pb2.IdlePolicy(idle_after=Duration(nanos=300_000_000)))
        async with refused(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"):
            await suspend(centre, "j-nosuchjob")
        await centre.until(job_id, JOB_STATE_RUNNING)
        job = await suspend(centre, job_id, request_id="once")
        assert job.state == JOB_STATE_IDLE
        assert (await suspend(centre, job_id, request_id="once")).state == JOB_STATE_IDLE
        # By request means: until somebody asks for it.
        assert centre.centre._scheduler.queued == 0
        await resume(centre, job_id)
        await centre.until_told(job_id, "RESUMED")
        node.reclaim_mode = RECLAIM_MODE_CHECKPOINT
        async with refused(grpc.StatusCode.FAILED_PRECONDITION, "RECLAIM_IMPOSSIBLE"):
            await suspend(centre, job_id, hardest=RECLAIM_MODE_DETACH)
        assert (await centre.job(job_id)).state == JOB_STATE_RUNNING


async def test_a_run_gets_a_share_and_its_output_comes_home(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await idle(centre, node)
        run = Run(centre, job_id)
        started = await run.until_started()
        assert (started.attempt, started.slice_uuid, started.HasField("start_time")) == (1, "MIG-1", True)
        command = node.commands[0]
        assert command.slice_uuids == ["MIG-1"]
        await command.write(b"hello")
        assert (await run.until("output")).data == b"hello"
        await command.end(7)
        assert await run.until("exit_code") == 7
        kept = (await centre.jobs.ListRuns(wire.ListRunsRequest(job_id=job_id))).runs
        assert [(one.id, one.exit_code, one.slice_uuid) for one in kept] == [(started.id, 7, "MIG-1")]
        assert (await centre.job(job_id)).runs[0].exit_code == 7


async def test_a_run_that_arrives_in_the_middle_of_a_reclaim(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        gate = node.hold("reclaim_container")
        await node.idle(job_id)
        await centre.until_told(job_id, "RECLAIMING")
        run = Run(centre, job_id)
        await run.until("run")
        gate.set()
        await run.until("run")
        assert node.commands[0].slice_uuids == ["MIG-1"]
        await node.commands[0].end(0)
        assert await run.until("exit_code") == 0


async def test_a_share_is_not_taken_from_a_run_that_is_about_to_begin(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        gate = node.hold("exec")
        run = Run(centre, job_id)
        await run.until("run")
        await node.idle(job_id)
        gate.set()
        await run.until("run")
        assert "RECLAIMING" not in (await centre.reasons(job_id))[: (await centre.reasons(job_id)).index("RUN_ASKED")]
        assert node.commands[0].slice_uuids == ["MIG-1"]


async def test_a_caller_that_went_away_comes_back_to_its_run(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        run = Run(centre, job_id, request_id="mine")
        await run.until_started()
        await node.commands[0].write(b"one")
        assert (await run.until("output")).data == b"one"
        run.leave()
    # The centre ends too, and another takes over.
    async with running(tmp_path, node, join=False) as centre:
        again = Run(centre, job_id, request_id="mine", output_offset=3)
        await node.commands[0].write(b"two")
        assert (await again.until("output")).data == b"two"
        await node.commands[0].end(0)
        assert await again.until("exit_code") == 0
        assert len(node.commands) == 1
        assert len((await centre.job(job_id)).runs) == 1


async def test_the_end_of_a_run_without_a_caller_is_told(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        kept = Run(centre, job_id, request_id="mine")
        await kept.until_started()
        kept.leave()
        await node.commands[0].end(3)
        assert (await centre.until_told(job_id, "RUN_ENDED")).details["exit_code"] == "3"
        hung_up = Run(centre, job_id)
        await hung_up.until_started()
        hung_up.leave()
        await ended(centre, job_id, 2)
        assert (await centre.job(job_id)).runs[-1].message == "its caller went away, and it was hung up"


async def test_a_waiting_run_that_is_given_up_frees_its_place(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await idle(centre, node, kind=job_pb2.JOB_KIND_SESSION, **WHOLE)
        other = await centre.submit(**WHOLE)
        await centre.until(other, JOB_STATE_RUNNING)
        run = Run(centre, job_id)
        waits = await run.until("event")
        assert waits.reason in ("RESUMING", "WAITING_FOR_SLICE")
        run.leave()
        await centre.until_told(job_id, "RESUME_WITHDRAWN")
        await ended(centre, job_id, 1)
        assert (await centre.job(job_id)).runs[0].message == "it was given up before it began"
        assert (await centre.job(job_id)).state == JOB_STATE_IDLE
        assert centre.centre._scheduler.queued == 0
        assert (await centre.cancel(job_id)).state != JOB_STATE_CANCELLED
        assert (await centre.ended(job_id)).state == JOB_STATE_CANCELLED
        assert list(node.containers) == [(other, 1)]


@pytest.mark.parametrize("call", ["reclaim_container", "create_slice", "attach_slice", "exec"])
async def test_a_control_plane_that_ends_in_the_middle_is_taken_up(tmp_path: Path, node: FakeNode, call: str) -> None:
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        if call != "reclaim_container":
            await node.idle(job_id)
            await centre.until_told(job_id, "WARM_SLICE_DROPPED")
        made = node.calls.count(call)
        node.hold(call)
        if call == "reclaim_container":
            await node.idle(job_id)
        elif call == "exec":
            run = Run(centre, job_id, request_id="mine")
            await run.until("run")
        else:
            await resume(centre, job_id)
        await eventually(lambda: node.calls.count(call) > made)
    node.held.clear()
    async with running(tmp_path, node, join=False, idle=COLD) as centre:
        if call == "reclaim_container":
            await centre.until_told(job_id, "RECLAIMED")
            await resume(centre, job_id)
        if call == "exec":
            again = Run(centre, job_id, request_id="mine")
            await again.until("run")
            await again.until("run")
            await node.commands[0].end(0)
            assert await again.until("exit_code") == 0
        await centre.until_told(job_id, "RESUMED")
        assert len(node.slices) == 1
        assert list(node.containers[job_id, 1].slice_uuids) == list(node.slices)
        await node.exit(job_id, 0)
        await centre.ended(job_id)
        assert node.empty


async def test_a_node_that_cannot_attach_is_asked_for_another_share(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await idle(centre, node)
        await centre.until_told(job_id, "WARM_SLICE_DROPPED")
        node.refuse("attach_slice", Refusal(grpc.StatusCode.INTERNAL, "HOTPLUG_FAILED", "the mount was refused"))
        await resume(centre, job_id)
        await centre.until_told(job_id, "RESUME_RETRIED")
        await centre.until_told(job_id, "RESUMED")
        assert len(node.slices) == 1
        assert len(await centre.centre._store.reservations()) == 1


async def test_an_idle_session_moves_when_its_node_has_no_room(tmp_path: Path, node: FakeNode) -> None:
    far = FakeNode("node-2")
    far.exits_at_once = None
    node.reclaim_mode = RECLAIM_MODE_DETACH
    session = {"kind": job_pb2.JOB_KIND_SESSION, **WHOLE}
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await idle(centre, node, **session)
        node.workspaces[job_id, 1] = b"notes"
        await centre.until_told(job_id, "WARM_SLICE_DROPPED")
        blocker = await centre.submit(**WHOLE)
        await centre.until(blocker, JOB_STATE_RUNNING)
        connect = centre.centre._nodes._connect
        centre.centre._nodes._connect = lambda address: far if address.endswith(":2") else connect(address)
        token = (tmp_path / "join-token").read_text()
        await centre.fleet.RegisterNode(
            fleet_service_pb2.RegisterNodeRequest(
                join_token=token, address="127.0.0.1:2", inventory=await far.inventory()
            )
        )
        run = Run(centre, job_id)
        await run.until_started()
        reasons = [part.event.reason for part in run.parts if part.HasField("event")]
        assert reasons.index("SESSION_MOVES") < reasons.index("CONTAINER_STARTED")
        await centre.until_told(job_id, "WORKSPACE_CARRIED")
        assert far.workspaces == {(job_id, 2): b"notes"}
        assert (job_id, 1) not in node.containers
        assert [path for path in centre.files() if "workspace" in path] == []
        await far.commands[0].end(0)
        assert await run.until("exit_code") == 0
