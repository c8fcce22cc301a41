"""A job's way through a centre, over a real server and store, on a node that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import pytest

from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, fleet_service_pb2, job_pb2, node_pb2
from puhui.v1 import job_service_pb2 as wire
from puhui.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
)
from tests.unit.controlplane.centres import RunningCentre, eventually, refused, running
from tests.unit.controlplane.fake_node import FakeNode


def refusal(reason: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION) -> Refusal:
    return Refusal(code, reason, f"the node says {reason}")


async def held(centre: RunningCentre) -> int:
    return len(await centre.centre._store.reservations())


async def artifacts(centre: RunningCentre, job_id: str) -> bytes:
    parts = centre.jobs.GetArtifacts(wire.GetArtifactsRequest(job_id=job_id))
    return b"".join([part.chunk async for part in parts])


async def free(centre: RunningCentre) -> int:
    capacity = await centre.fleet.GetCapacity(fleet_service_pb2.GetCapacityRequest())
    return capacity.gpus[0].memory_slices_free


async def test_a_job_goes_all_the_way_and_leaves_nothing(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit(name="one")
        job = await centre.until(job_id, JOB_STATE_RUNNING)
        assert (job.attempts[0].profile, job.attempts[0].slice_uuid) == ("1g.10gb", "MIG-1")
        assert await free(centre) == 7
        await node.write(job_id, b"hello\n")
        node.artifacts[job_id, 1] = b"archive"
        await node.exit(job_id, 0)
        job = await centre.ended(job_id)
        assert (job.state, job.exit_code, job.log_size_bytes) == (JOB_STATE_SUCCEEDED, 0, 6)
        assert (job.artifacts.file_count, job.artifacts.size_bytes) == (1, 7)
        assert await centre.reasons(job_id) == [
            "SUBMITTED",
            "PREDICTED",
            "RESERVED",
            "SLICE_CREATED",
            "CONTAINER_STARTED",
            "COMMAND_ENDED",
            "RESULTS_COLLECTED",
            "CONTAINER_REMOVED",
            "SLICE_DESTROYED",
            "SUCCEEDED",
        ]
        assert await centre.log(job_id) == b"hello\n"
        assert (node.empty, await held(centre), await free(centre)) == (True, 0, 8)


async def test_artifacts_of_a_failed_job_can_be_resumed(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        request = wire.GetArtifactsRequest(job_id=job_id)
        async with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_FINISHED"):
            await anext(aiter(centre.jobs.GetArtifacts(request)))
        node.artifacts[job_id, 1] = b"0123456789"
        await node.exit(job_id, 3)
        job = await centre.ended(job_id)
        assert (job.state, job.reason, job.exit_code) == (JOB_STATE_FAILED, "EXIT_CODE", 3)
        for offset in (0, 4, 10):
            request.offset = offset
            manifest, *chunks = [part async for part in centre.jobs.GetArtifacts(request)]
            assert manifest.manifest.digest == job.artifacts.digest
            assert b"".join(part.chunk for part in chunks) == b"0123456789"[offset:]
        request.offset = 11
        async with refused(grpc.StatusCode.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE", size_bytes="10"):
            await anext(aiter(centre.jobs.GetArtifacts(request)))


async def test_a_job_that_does_not_fit_waits_says_why_and_starts_when_there_is_room(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, required_mib=60_000) as centre:
        first = await centre.submit()
        await centre.until(first, JOB_STATE_RUNNING)
        second = await centre.submit()
        event = await centre.until_told(second, "WAITING_FOR_SLICE")
        assert event.message.startswith("1st in the queue; waits for 7g.80gb: 0 of 1 placements free")
        third = await centre.submit()
        await centre.until_told(third, "WAITING_FOR_SLICE")
        assert (await centre.job(third)).message.startswith("2nd in the queue; waits for 7g.80gb")
        await node.exit(first, 0)
        await centre.until(second, JOB_STATE_RUNNING)
        assert (await centre.job(third)).state == JOB_STATE_QUEUED
        await node.exit(second, 0)
        await centre.until(third, JOB_STATE_RUNNING)


async def test_with_no_node_a_job_waits_for_one(tmp_path: Path) -> None:
    node = FakeNode()
    async with running(tmp_path, node, join=False) as centre:
        job_id = await centre.submit(resources=job_pb2.Resources(profile="7g.80gb"))
        assert "none has joined" in (await centre.until_told(job_id, "WAITING_FOR_SLICE")).message
        await centre.join(node)
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED


async def test_memory_larger_than_every_card_waits_and_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as centre:
        job_id = await centre.submit(resources=job_pb2.Resources(memory_mib=500_000))
        assert "no card here is that large" in (await centre.until_told(job_id, "WAITING_FOR_SLICE")).message


# -- faults of the node


@pytest.mark.parametrize("call", ["create_slice", "create_container", "put_bundle"])
async def test_a_fault_of_the_node_rolls_back_and_tries_another_slice(tmp_path: Path, call: str) -> None:
    node = FakeNode()
    async with running(tmp_path, node) as centre:
        node.refuse(call, refusal("PLACEMENT_TAKEN"))
        job_id = await centre.submit()
        job = await centre.ended(job_id)
        assert (job.state, len(job.attempts)) == (JOB_STATE_SUCCEEDED, 2)
        assert job.attempts[1].fencing_token > job.attempts[0].fencing_token
        assert "REQUEUED" in await centre.reasons(job_id)
        assert node.started == [(job_id, 2)]
        assert (node.empty, await held(centre)) == (True, 0)


async def test_a_fault_of_the_job_ends_it_with_the_nodes_words(tmp_path: Path) -> None:
    node = FakeNode()
    async with running(tmp_path, node) as centre:
        node.refuse("create_container", refusal("IMAGE_NOT_FOUND", grpc.StatusCode.NOT_FOUND))
        job = await centre.ended(await centre.submit(image="localhost/absent"))
        assert (job.state, job.reason) == (JOB_STATE_FAILED, "IMAGE_NOT_FOUND")
        assert "the node says IMAGE_NOT_FOUND" in job.message
        assert (node.empty, node.started, await held(centre)) == (True, [], 0)


async def test_a_node_that_lost_the_bundle_gets_it_again(tmp_path: Path) -> None:
    node = FakeNode()
    async with running(tmp_path, node) as centre:
        node.refuse("create_container", refusal("BUNDLE_NOT_FOUND", grpc.StatusCode.NOT_FOUND))
        job = await centre.ended(await centre.submit())
        assert (job.state, len(job.attempts), node.calls.count("put_bundle")) == (JOB_STATE_SUCCEEDED, 1, 2)


@pytest.mark.parametrize(
    "call", ["create_slice", "put_bundle", "create_container", "remove_container", "destroy_slice"]
)
async def test_an_answer_that_never_came_is_asked_for_again(tmp_path: Path, call: str) -> None:
    node = FakeNode()
    async with running(tmp_path, node) as centre:
        for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            node.refuse(call, Refusal(code, "UNKNOWN", "no answer"))
        job_id = await centre.submit()
        job = await centre.ended(job_id)
        assert (job.state, len(job.attempts), node.started) == (JOB_STATE_SUCCEEDED, 1, [(job_id, 1)])
        assert node.empty


async def test_a_node_out_of_contact_does_not_fail_its_job(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await centre.cut(node)
        waiting = await centre.submit()
        event = await centre.until_told(waiting, "WAITING_FOR_SLICE")
        assert event.message.endswith("(1 more out of contact)")
        job = await centre.job(job_id)
        assert job.state == JOB_STATE_RUNNING
        assert job.message.endswith("its node node-1 is out of contact")
        node.containers[job_id, 1].state = node_pb2.CONTAINER_STATE_EXITED  # it ends while nobody can see it
        node.containers[job_id, 1].exit_code = 0
        await node.set_reachable(True)
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED
        await centre.until(waiting, JOB_STATE_RUNNING)


async def test_results_on_a_node_out_of_contact_are_waited_for(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await node.write(job_id, b"precious")
        for call in ("read_logs", "read_artifacts"):
            for _ in range(2):
                node.refuse(call, refusal("STORAGE", grpc.StatusCode.INTERNAL))
        await node.exit(job_id, 0)
        assert "STORAGE" in (await centre.until_told(job_id, "RESULTS_DELAYED")).message
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED
        assert await centre.log(job_id) == b"precious"


@pytest.mark.parametrize("call", ["read_logs", "read_artifacts"])
async def test_results_that_cannot_be_had_are_lost_and_the_share_is_not(tmp_path: Path, call: str) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, collect_patience_s=0.2) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await node.write(job_id, b"precious")
        node.artifacts[job_id, 1] = b"archive"
        for _ in range(100):
            node.refuse(call, refusal("STORAGE", grpc.StatusCode.INTERNAL))
        await node.exit(job_id, 0)
        job = await centre.ended(job_id)
        assert (job.state, job.reason) == (JOB_STATE_SUCCEEDED, "SUCCEEDED")
        lost = "log" if call == "read_logs" else "artifacts"
        words = f"its {lost} could not be had from its node and are lost: the node says STORAGE (STORAGE)"
        assert job.message == f"the command ended with exit code 0; {words}"
        event = await centre.until_told(job_id, "RESULTS_LOST")
        assert event.message == words
        assert node.calls.count(call) >= 5
        assert (node.empty, await held(centre)) == (True, 0)
        # What could be had is here.
        kept = (0, 1) if call == "read_logs" else (8, 0)
        assert (job.log_size_bytes, job.artifacts.file_count) == kept
        read = centre.log(job_id) if call == "read_logs" else artifacts(centre, job_id)
        async with refused(grpc.StatusCode.DATA_LOSS, "RESULTS_LOST"):
            await read
        read = centre.log(job_id) if call != "read_logs" else artifacts(centre, job_id)
        assert await read == (b"archive" if call == "read_logs" else b"precious")


async def test_a_cancelled_job_does_not_wait_for_results_that_cannot_be_had(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, collect_patience_s=0.2, release_patience_s=0.05) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        for _ in range(100):
            node.refuse("read_artifacts", refusal("STORAGE"))
        await centre.cancel(job_id)
        assert (await centre.ended(job_id)).state == JOB_STATE_CANCELLED
        await centre.until_told(job_id, "SLICE_DESTROYED")
        assert (node.empty, await held(centre)) == (True, 0)
        job = await centre.job(job_id)
        assert (job.state, job.reason) == (JOB_STATE_CANCELLED, "CANCELLED")
        assert "are lost: the node says STORAGE" in job.message


async def test_results_on_a_node_that_cannot_be_reached_are_never_given_up(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, collect_patience_s=0.0) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await node.write(job_id, b"precious")
        for _ in range(4):
            node.refuse("read_logs", refusal("STORAGE", grpc.StatusCode.INTERNAL))
        for _ in range(4):
            node.refuse("read_logs", Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "no answer"))
        await node.exit(job_id, 0)
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED
        assert "RESULTS_LOST" not in await centre.reasons(job_id)
        assert await centre.log(job_id) == b"precious"


async def test_a_job_ends_although_its_release_is_not_confirmed_and_the_share_stays_held(tmp_path: Path) -> None:
    node = FakeNode()
    async with running(tmp_path, node, release_patience_s=0.2) as centre:
        gate = node.hold("destroy_slice")
        job_id = await centre.submit()
        job = await centre.ended(job_id)
        assert job.state == JOB_STATE_SUCCEEDED
        assert "its share stays held until node node-1 confirms" in job.message
        assert (await held(centre), await free(centre)) == (1, 7)
        gate.set()
        await centre.until_told(job_id, "SLICE_DESTROYED")
        assert (await held(centre), await free(centre), node.empty) == (0, 8, True)
        assert (await centre.job(job_id)).state == JOB_STATE_SUCCEEDED


async def test_a_lost_container_fails_its_job(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await centre.cut(node)
        node.containers.clear()
        await node.set_reachable(True)
        job = await centre.ended(job_id)
        assert (job.state, job.reason) == (JOB_STATE_FAILED, "CONTAINER_LOST")
        assert (node.empty, await held(centre)) == (True, 0)


async def test_orphans_of_attempts_that_are_over_are_removed_and_strangers_are_not(tmp_path: Path) -> None:
    node = FakeNode()
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.ended(job_id)
        await centre.cut(node)
        owners = [
            card_pb2.AttemptRef(centre="here", job_id=job_id, attempt=1, fencing_token=1),
            card_pb2.AttemptRef(centre="here", job_id="j-unknown", attempt=1),
            card_pb2.AttemptRef(centre="elsewhere", job_id=job_id, attempt=1),
        ]
        for number, owner in enumerate(owners):
            node.slices[f"MIG-x{number}"] = card_pb2.Slice(
                uuid=f"MIG-x{number}",
                gpu_uuid="GPU-node-1-0",
                profile="1g.10gb",
                placement=card_pb2.Placement(start=number, size=1),
                owner=owner,
            )
        await node.set_reachable(True)
        await centre.join(node)
        assert sorted(node.slices) == ["MIG-x1", "MIG-x2"]
        assert await free(centre) == 6


# -- ending a job


async def test_a_waiting_job_that_is_cancelled_never_starts(tmp_path: Path) -> None:
    node = FakeNode()
    async with running(tmp_path, node, join=False) as centre:
        job_id = await centre.submit()
        assert (await centre.cancel(job_id)).state == JOB_STATE_CANCELLED
        assert (await centre.cancel(job_id)).state == JOB_STATE_CANCELLED
        await centre.join(node)
        last = await centre.submit()
        await centre.ended(last)
        assert node.started == [(last, 1)]
        assert await centre.log(job_id, follow=True) == b""
        manifest = await anext(aiter(centre.jobs.GetArtifacts(wire.GetArtifactsRequest(job_id=job_id))))
        assert manifest.manifest.size_bytes == 0


@pytest.mark.parametrize("call", ["put_bundle", "create_slice", "create_container"])
async def test_a_job_cancelled_while_it_starts_is_rolled_back(tmp_path: Path, call: str) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        gate = node.hold(call)
        job_id = await centre.submit()
        await centre.until_told(job_id, "RESERVED")
        assert (await centre.cancel(job_id)).state != JOB_STATE_CANCELLED
        gate.set()
        job = await centre.ended(job_id)
        assert (job.state, job.message) == (JOB_STATE_CANCELLED, "cancelled by request: enough")
        assert (node.empty, await held(centre)) == (True, 0)


async def test_a_running_job_is_stopped_and_keeps_its_log(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await node.write(job_id, b"so far\n")
        await centre.cancel(job_id)
        job = await centre.ended(job_id)
        assert (job.state, job.exit_code) == (JOB_STATE_CANCELLED, 143)
        assert await centre.log(job_id) == b"so far\n"
        assert (node.empty, await held(centre)) == (True, 0)


async def test_a_command_that_was_stopped_by_a_control_plane_that_died_is_cancelled(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        node.hold("stop_container")
        await centre.cancel(job_id)
        await eventually(lambda: "stop_container" in node.calls)
    node.held.clear()
    await node.exit(job_id, 143)
    async with running(tmp_path, node, join=False) as centre:
        assert (await centre.ended(job_id)).state == JOB_STATE_CANCELLED
        assert (node.empty, await held(centre)) == (True, 0)


async def test_a_job_on_a_node_out_of_contact_can_be_cancelled(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, release_patience_s=0.2) as centre:
        job_id = await centre.submit(stop_grace={"nanos": 1})
        await centre.until(job_id, JOB_STATE_RUNNING)
        await node.write(job_id, b"so far\n")
        await centre.cut(node)
        await centre.cancel(job_id)
        job = await centre.ended(job_id)
        assert (job.state, await held(centre)) == (JOB_STATE_CANCELLED, 1)
        await node.set_reachable(True)
        # Its node hears only now that its end was asked for.
        await centre.until_told(job_id, "SLICE_DESTROYED")
        assert (node.empty, await held(centre)) == (True, 0)
        assert await centre.log(job_id) == b"so far\n", "results are collected when the node is back"


# -- logs


async def test_following_a_waiting_job_shows_all_it_ever_writes(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, join=False) as centre:
        job_id = await centre.submit()
        following = asyncio.create_task(centre.log(job_id, follow=True))
        await centre.join(node)
        await centre.until(job_id, JOB_STATE_RUNNING)
        for number in range(20):
            await node.write(job_id, f"line {number}\n".encode())
        await node.exit(job_id, 0)
        whole = b"".join(f"line {number}\n".encode() for number in range(20))
        assert await following == whole
        await centre.ended(job_id)
        assert await centre.log(job_id, tail_lines=2) == b"line 18\nline 19\n"
        assert await centre.log(job_id, offset=len(whole) - 3) == b"19\n"
        assert await centre.log(job_id, offset=10_000) == b""


async def test_a_reader_whose_node_goes_away_reads_on_without_a_gap(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await node.write(job_id, b"before ")
        read = aiter(centre.jobs.ReadLogs(wire.ReadLogsRequest(job_id=job_id, follow=True), timeout=30))
        assert (await anext(read)).chunk.data == b"before "
        await centre.cut(node)
        node.output[job_id, 1] += b"during "
        await node.set_reachable(True)
        await node.write(job_id, b"after")
        await node.exit(job_id, 0)
        rest = [response.chunk async for response in read]
        assert b"".join(chunk.data for chunk in rest) == b"during after"
        assert rest[0].offset == 7


async def test_output_on_a_node_out_of_contact_is_refused_unless_followed(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, JOB_STATE_RUNNING)
        await centre.cut(node)
        async with refused(grpc.StatusCode.UNAVAILABLE, "NODE_UNREACHABLE"):
            await centre.log(job_id)


# -- watching


async def test_a_watcher_that_vanishes_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        job_id = await centre.submit()
        calls: list[Any] = [
            centre.jobs.WatchJob(wire.WatchJobRequest(job_id=job_id)),
            centre.jobs.ReadLogs(wire.ReadLogsRequest(job_id=job_id, follow=True)),
        ]
        await anext(aiter(calls[0]))
        reading = asyncio.ensure_future(anext(aiter(calls[1])))
        feed = centre.centre._feed
        await eventually(lambda: feed.watchers == 2)
        for call in calls:
            call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await eventually(lambda: feed.watchers == 0)


async def test_watching_resumes_at_a_cursor_and_ends_with_the_job(tmp_path: Path) -> None:
    async with running(tmp_path) as centre:
        job_id = await centre.submit()
        job = await centre.ended(job_id)
        told = [one async for one in centre.jobs.WatchJob(wire.WatchJobRequest(job_id=job_id))]
        assert told[-1].event.reason == "SUCCEEDED"
        assert told[-1].event.cursor == job.last_cursor
        middle = told[4].event.cursor
        rest = [one async for one in centre.jobs.WatchJob(wire.WatchJobRequest(job_id=job_id, after_cursor=middle))]
        assert [one.event.cursor for one in rest] == [one.event.cursor for one in told[5:]]
        past = wire.WatchJobRequest(job_id=job_id, after_cursor=2**64 - 1)
        assert [one async for one in centre.jobs.WatchJob(past)] == []


# -- a control plane that starts again


@pytest.mark.parametrize("call", ["create_slice", "put_bundle", "create_container", "read_logs", "destroy_slice"])
async def test_the_next_control_plane_goes_on_where_the_last_one_was(tmp_path: Path, call: str) -> None:
    node = FakeNode()
    gate = node.hold(call)
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await eventually(lambda: call in node.calls)
        token = (await centre.job(job_id)).attempts[0].fencing_token
    gate.set()
    async with running(tmp_path, node, join=False) as centre:
        job = await centre.ended(job_id)
        assert (job.state, len(job.attempts), node.started) == (JOB_STATE_SUCCEEDED, 1, [(job_id, 1)])
        assert job.attempts[0].fencing_token > token
        assert "ADOPTED" in await centre.reasons(job_id)
        assert (node.empty, await held(centre)) == (True, 0)


async def test_a_command_that_ended_while_no_control_plane_ran_is_noticed(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        waiting = await centre.submit(resources=job_pb2.Resources(profile="7g.80gb"))
        await centre.until(job_id, JOB_STATE_RUNNING)
    await node.exit(job_id, 0)
    node.exits_at_once = 0
    async with running(tmp_path, node, join=False) as centre:
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED
        assert (await centre.ended(waiting)).state == JOB_STATE_SUCCEEDED
        assert node.empty


async def test_a_share_held_past_its_jobs_end_is_released_by_the_next_control_plane(tmp_path: Path) -> None:
    node = FakeNode()
    gate = node.hold("destroy_slice")
    async with running(tmp_path, node, release_patience_s=0.1) as centre:
        job_id = await centre.submit()
        await centre.ended(job_id)
    gate.set()
    async with running(tmp_path, node, join=False) as centre:
        await centre.until_told(job_id, "SLICE_DESTROYED")
        assert (node.empty, await held(centre)) == (True, 0)


async def test_two_control_planes_cannot_share_their_state(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(OSError, match="in use by another control plane"):
            async with running(tmp_path, join=False):
                pass
