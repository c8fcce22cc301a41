"""Shares between two steps: refusals, crashes and words at the wrong moment, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from controlplane.idle_policy import CentrePolicy
from controlplane.records import Decide, JobRecord
from puhui.rpc.errors import Refusal
from puhui.v1 import fleet_service_pb2
from puhui.v1.job_pb2 import (
    JOB_KIND_SESSION,
    JOB_STATE_CANCELLED,
    JOB_STATE_IDLE,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    RECLAIM_MODE_STOP,
)
from tests.unit.controlplane.centres import RunningCentre, eventually, running
from tests.unit.controlplane.fake_node import FakeNode
from tests.unit.controlplane.test_sharing import COLD, WHOLE, Run, capacity, idle, node, resume, suspend

__all__ = ["node"]


def refusal(code: grpc.StatusCode, reason: str) -> Refusal:
    return Refusal(code, reason, f"the node says {reason}")


async def join(centre: RunningCentre, state: Path, far: FakeNode) -> None:
    """A second node joins the centre."""
    connect = centre.centre._nodes._connect
    centre.centre._nodes._connect = lambda address: far if address.endswith(":2") else connect(address)
    token = (state / "join-token").read_text()
    await centre.fleet.RegisterNode(
        fleet_service_pb2.RegisterNodeRequest(join_token=token, address="127.0.0.1:2", inventory=await far.inventory())
    )


async def crowded(centre: RunningCentre, node: FakeNode) -> str:
    """Returns an idle session with a workspace, on a node that has no room for it any longer."""
    job_id = await idle(centre, node, kind=JOB_KIND_SESSION, **WHOLE)
    node.workspaces[job_id, 1] = b"notes"
    await centre.until_told(job_id, "WARM_SLICE_DROPPED")
    blocker = await centre.submit(**WHOLE)
    await centre.until(blocker, JOB_STATE_RUNNING)
    return job_id


async def told_times(centre: RunningCentre, job_id: str, reason: str, times: int) -> None:
    with centre.centre._feed.watching(job_id) as news:
        async with asyncio.timeout(20):
            while (await centre.reasons(job_id)).count(reason) < times:
                news.clear()
                await news.wait()


async def test_a_move_that_is_refused_keeps_the_workspace(tmp_path: Path, node: FakeNode) -> None:
    far = FakeNode("node-2")
    far.exits_at_once = None
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await crowded(centre, node)
        far.refuse("create_container", refusal(grpc.StatusCode.INTERNAL, "RUNTIME_FAILED"))
        await join(centre, tmp_path, far)
        run = Run(centre, job_id)
        await centre.until_told(job_id, "REQUEUED")
        await run.until_started()
        assert far.workspaces == {(job_id, 3): b"notes"}
        await eventually(lambda: (job_id, 1) not in node.containers)
        run.leave()


async def test_a_former_node_that_is_gone_does_not_hold_up_the_new_one(tmp_path: Path, node: FakeNode) -> None:
    far = FakeNode("node-2")
    far.exits_at_once = None
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await crowded(centre, node)
        gate = far.hold("create_container")
        await join(centre, tmp_path, far)
        run = Run(centre, job_id)
        await eventually(lambda: "create_container" in far.calls)
        await node.set_reachable(False)
        far.held.clear()
        gate.set()
        await run.until_started()
        await far.exit(job_id, 0, 2)
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED


async def test_a_warm_slice_that_cannot_be_taken_over_is_destroyed_and_another_is_cut(
    tmp_path: Path, node: FakeNode
) -> None:
    async with running(tmp_path, node) as centre:
        await idle(centre, node, kind=JOB_KIND_SESSION)
        node.refuse("transfer_slice", refusal(grpc.StatusCode.FAILED_PRECONDITION, "HOLDERS_UNKNOWN"))
        other = await centre.submit()
        job = await centre.until(other, JOB_STATE_RUNNING)
        assert job.attempts[0].slice_uuid == "MIG-2"
        assert list(node.slices) == ["MIG-2"]
        assert len(await centre.centre._store.reservations()) == 1


async def test_a_job_that_waits_for_a_share_can_be_suspended(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await idle(centre, node, **WHOLE)
        await centre.until_told(job_id, "WARM_SLICE_DROPPED")
        blocker = await centre.submit(**WHOLE)
        await centre.until(blocker, JOB_STATE_RUNNING)
        await resume(centre, job_id)
        await centre.until_told(job_id, "WAITING_FOR_SLICE")
        assert (await suspend(centre, job_id)).state == JOB_STATE_IDLE
        await node.exit(blocker, 0)
        await centre.ended(blocker)
        # There is room now, and nobody has asked for it.
        assert centre.centre._scheduler._queue == []
        assert (await centre.reasons(job_id))[-1] == "RESUME_WITHDRAWN"


async def test_a_job_that_is_being_given_a_share_can_be_suspended(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await idle(centre, node)
        await centre.until_told(job_id, "WARM_SLICE_DROPPED")
        gate = node.hold("attach_slice")
        await resume(centre, job_id)
        await eventually(lambda: "attach_slice" in node.calls)
        suspending = asyncio.ensure_future(suspend(centre, job_id))
        await centre.until_told(job_id, "SUSPEND_REQUESTED")
        gate.set()
        assert (await suspending).state == JOB_STATE_IDLE
        await told_times(centre, job_id, "WARM_SLICE_DROPPED", 2)
        assert not node.slices
        assert not await centre.centre._store.reservations()


async def test_a_warm_slice_that_is_being_taken_over_is_not_dropped(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node, idle=CentrePolicy(warm_s=1.0)) as centre:
        job_id = await idle(centre, node)
        store, slow = centre.centre._store, asyncio.Event()
        change = store.change_job

        async def change_job(job: str, decide: Decide) -> JobRecord:
            if "Scheduler._reserve" in decide.__qualname__:
                [warm] = centre.centre._reservations.warm()
                # The commit lasts until its time is over, and a little longer.
                asyncio.get_running_loop().call_later(1.2, slow.set)
                assert warm.key in centre.centre._reservations.spoken_for
                await slow.wait()
            return await change(job, decide)

        store.change_job = change_job  # type: ignore[method-assign,assignment]
        await resume(centre, job_id)
        told = await centre.until_told(job_id, "RESUMED")
        assert told.details["slice_uuid"] == "MIG-1"
        assert "WARM_SLICE_DROPPED" not in await centre.reasons(job_id)
        assert (await capacity(centre)).memory_slices_busy == 1
        assert len(await store.reservations()) == 1


async def test_a_run_without_a_request_id_is_not_run_again_after_a_crash(tmp_path: Path, node: FakeNode) -> None:
    killed = tmp_path / "killed"
    async with running(tmp_path / "first", node) as centre:
        job_id = await centre.submit(kind=JOB_KIND_SESSION)
        await centre.until(job_id, JOB_STATE_RUNNING)
        run = Run(centre, job_id)
        await run.until_started()
        await centre.until_told(job_id, "RUN_STARTED")
        # What a crash leaves.
        shutil.copytree(tmp_path / "first", killed)
    node.tokens.clear()
    async with running(killed, node, join=False) as centre:
        told = await centre.until_told(job_id, "RUN_ENDED")
        assert told.message == "it was hung up when the control plane ended"
        assert len(node.commands) == 1


async def test_a_job_can_be_cancelled_while_its_node_is_away_in_the_middle_of_a_reclaim(
    tmp_path: Path, node: FakeNode
) -> None:
    async with running(tmp_path, node, release_patience_s=0.3) as centre:
        job_id = await centre.submit(stop_grace=Duration(nanos=100_000_000))
        await centre.until(job_id, JOB_STATE_RUNNING)
        gate = node.hold("reclaim_container")
        await node.idle(job_id)
        await eventually(lambda: "reclaim_container" in node.calls)
        await centre.cut(node)
        node.held.clear()
        gate.set()
        await centre.cancel(job_id)
        assert (await centre.ended(job_id)).state == JOB_STATE_CANCELLED


async def test_a_command_that_reclaim_has_ended_can_begin_again_although_nobody_said_so(
    tmp_path: Path, node: FakeNode
) -> None:
    # Its node was killed between the end of the command and its answer.
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        gate = node.hold("reclaim_container")
        node.refuse("reclaim_container", refusal(grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING"))
        suspending = asyncio.ensure_future(suspend(centre, job_id, hardest=RECLAIM_MODE_STOP))
        await eventually(lambda: "reclaim_container" in node.calls)
        await node.exit(job_id, 143)
        gate.set()
        assert (await suspending).state == JOB_STATE_IDLE
        node.workspaces[job_id, 1] = b"half done"
        await resume(centre, job_id)
        await centre.until_told(job_id, "WORKSPACE_CARRIED")
        assert node.workspaces[job_id, 2] == b"half done"


async def test_what_a_job_used_until_its_end_is_counted(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node) as centre:
        job_id = await idle(centre, node)
        await resume(centre, job_id)
        await centre.until_told(job_id, "RESUMED")
        node.containers[job_id, 1].idleness.busy_seconds = 3.25
        await node.exit(job_id, 0)
        job = await centre.ended(job_id)
        assert [share.busy_seconds for share in job.attempts[0].shares] == [3.0, 0.25]


async def test_moves_and_restarts_are_no_failed_starts(tmp_path: Path, node: FakeNode) -> None:
    node.reclaim_mode = RECLAIM_MODE_STOP
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        for number in range(1, 6):
            await suspend(centre, job_id, hardest=RECLAIM_MODE_STOP)
            if number == 5:
                node.workspaces[job_id, 5] = b"notes"
                node.refuse("create_container", refusal(grpc.StatusCode.INTERNAL, "RUNTIME_FAILED"))
            await resume(centre, job_id)
            await told_times(centre, job_id, "WORKSPACE_CARRIED", number)
        job = await centre.job(job_id)
        assert (job.state, len(job.attempts)) == (JOB_STATE_RUNNING, 7)
        assert node.workspaces[job_id, 7] == b"notes"


async def test_a_share_that_cannot_be_given_is_tried_more_and_more_rarely(tmp_path: Path, node: FakeNode) -> None:
    async with running(tmp_path, node, idle=COLD) as centre:
        job_id = await idle(centre, node, kind=JOB_KIND_SESSION)
        await centre.until_told(job_id, "WARM_SLICE_DROPPED")
        for _ in range(3):
            node.refuse("attach_slice", refusal(grpc.StatusCode.FAILED_PRECONDITION, "RESTORE_FAILED"))
        await resume(centre, job_id)
        await centre.until_told(job_id, "RESUMED")
        events = await centre.centre._store.events(job_id, 0)
        times: list[Any] = [event.time.ToNanoseconds() / 1e9 for event in events if event.reason == "SHARE_RESERVED"]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert len(gaps) == 3
        assert gaps[2] > 1.5 * gaps[0]
