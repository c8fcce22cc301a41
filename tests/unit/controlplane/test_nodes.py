"""Who may join under which name."""

from __future__ import annotations

from pathlib import Path

import grpc

from puhui.v1 import fleet_service_pb2, job_pb2
from tests.unit.controlplane.centres import RunningCentre, eventually, refused, running
from tests.unit.controlplane.fake_node import FakeNode


def named(daemon_id: str) -> FakeNode:
    node = FakeNode()
    node.has.daemon_id = daemon_id
    node.exits_at_once = None
    return node


async def join_refused(centre: RunningCentre, node: FakeNode) -> None:
    async with refused(grpc.StatusCode.ALREADY_EXISTS, "NODE_NAME_TAKEN", name="node-1"):
        await centre.join(node)


def lease_runs_out(centre: RunningCentre) -> None:
    for member in centre.centre._nodes._members.values():
        member.expires_at = 0.0


async def test_a_second_daemon_does_not_take_over_a_node_that_is_alive(tmp_path: Path) -> None:
    first = named("d-1")
    async with running(tmp_path, first) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, job_pb2.JOB_STATE_RUNNING)
        await join_refused(centre, named("d-2"))
        await first.exit(job_id, 0)
        assert (await centre.ended(job_id)).state == job_pb2.JOB_STATE_SUCCEEDED
        await join_refused(centre, named("d-2"))
        node_id = (await centre.fleet.ListNodes(fleet_service_pb2.ListNodesRequest())).nodes[0].id
        assert await centre.join(first) == node_id
        first.has.daemon_id = ""
        assert await centre.join(first) == node_id


async def test_a_name_is_free_again_when_its_node_is_silent_and_holds_nothing(tmp_path: Path) -> None:
    first = named("d-1")
    async with running(tmp_path, first) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, job_pb2.JOB_STATE_RUNNING)
        await centre.cut(first)
        lease_runs_out(centre)
        await join_refused(centre, named("d-2"))
        assert (await centre.job(job_id)).state == job_pb2.JOB_STATE_RUNNING
        await first.set_reachable(True)
        await first.exit(job_id, 0)
        await centre.ended(job_id)
        await centre.cut(first)
        lease_runs_out(centre)
        first.has.daemon_id = "d-2"
        first.reachable = True
        await centre.join(first)


async def test_another_daemon_at_a_nodes_address_is_not_taken_for_it(tmp_path: Path) -> None:
    node = named("d-1")
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until(job_id, job_pb2.JOB_STATE_RUNNING)
        await centre.cut(node)
        containers = dict(node.containers)
        node.containers.clear()
        node.has.daemon_id = "d-2"
        asked = node.calls.count("list_containers")
        await node.set_reachable(True)
        await eventually(lambda: node.calls.count("list_containers") > asked + 1)
        assert (await centre.job(job_id)).state == job_pb2.JOB_STATE_RUNNING
        node.containers.update(containers)
        node.has.daemon_id = "d-1"
        await node.exit(job_id, 0)
        assert (await centre.ended(job_id)).state == job_pb2.JOB_STATE_SUCCEEDED
