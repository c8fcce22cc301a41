"""Containers are frozen and thawed, whatever happens to them or to the daemon meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import grpc
import pytest

from nodedaemon.frozen import processes_in_namespace
from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef
from puhui.v1.node_pb2 import Container, ContainerState, NodeEventKind
from puhui.v1.node_service_pb2 import ResumeContainerRequest, SuspendContainerRequest
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import Start, containers_of
from tests.integration.node.exec_call import Exec, request_id, run
from tests.integration.node.test_restart import connected

pytestmark = pytest.mark.podman

_FAMILY = """
import os, subprocess, sys, time
children = [subprocess.Popen(["sh", "-c", "while :; do sleep 0.01; done"]) for _ in range(3)]
print("up", flush=True)
time.sleep(600)
"""


async def suspend(node: Node, owner: AttemptRef) -> Container:
    return (await node.stub.SuspendContainer(SuspendContainerRequest(owner=owner), timeout=30)).container


async def resume(node: Node, owner: AttemptRef) -> Container:
    return (await node.stub.ResumeContainer(ResumeContainerRequest(owner=owner), timeout=30)).container


async def living(node: Node, code: str = _FAMILY, **arguments: float) -> tuple[AttemptRef, Container]:
    owner = node.attempt()
    container = await node.start(owner, code, stop_grace_s=5, **arguments)  # type: ignore[arg-type]
    await node.said(owner, b"up\n")
    return owner, container


def states(container: Container) -> list[str]:
    """Returns the states of a container's processes, as the kernel tells them."""
    found = []
    for process, _ in processes_in_namespace(container.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # those that run come and go
            found.append(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0])
    return found


async def test_every_process_stops_and_goes_on(node: Node) -> None:
    owner, container = await living(node)
    async with Exec(
        node, owner, ["sh", "-c", "echo up; while :; do sleep 0.01; done"], request_id=request_id()
    ) as call:
        await call.until(b"up\n")
        frozen = await suspend(node, owner)
        assert frozen.state == ContainerState.CONTAINER_STATE_SUSPENDED
        seen = states(container)
        assert len(seen) >= 6
        assert set(seen) <= {"T", "Z", "D"}
        assert (await suspend(node, owner)).state == ContainerState.CONTAINER_STATE_SUSPENDED
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_SUSPENDED"):
            await run(node, owner, "true")
        assert (await resume(node, owner)).state == ContainerState.CONTAINER_STATE_RUNNING
        assert "T" not in states(container)
        assert (await resume(node, owner)).state == ContainerState.CONTAINER_STATE_RUNNING
        assert (await run(node, owner, "true")).exit_code == 0
    kinds = []
    async for event in node.events():
        if event.owner.job_id == owner.job_id:
            kinds.append(event.kind)
        if event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_RESUMED:
            break
    assert kinds.count(NodeEventKind.NODE_EVENT_KIND_CONTAINER_SUSPENDED) == 1


async def test_the_node_says_how_it_freezes(node: Node) -> None:
    runtime = (await node.inventory()).runtime
    # With v2 it depends on whose this process's cgroup is; without, nothing can be frozen.
    assert any("SIGSTOP" in notice for notice in runtime.notices) or runtime.cgroup_layout == "v2"


async def test_a_suspended_container_keeps_its_slice_and_can_be_stopped(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    code = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(4))\nprint('up', flush=True)\ntime.sleep(600)"
    )
    await node.start(owner, code, slices=[one], stop_grace_s=20)
    await node.said(owner, b"up\n")
    await suspend(node, owner)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "SLICE_IN_USE"):
        await node.destroy(owner, one)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_FINISHED"):
        await node.artifacts(owner)
    # It is thawed, and so ends by itself at SIGTERM.
    assert (await node.stop(owner)).exit_code == 4


async def test_a_suspended_container_can_be_removed(node: Node) -> None:
    owner, container = await living(node)
    await suspend(node, owner)
    await node.remove(owner)
    assert states(container) == []
    with refused(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND"):
        await resume(node, owner)


async def test_time_goes_on_for_a_suspended_container(node: Node) -> None:
    owner, _ = await living(node, max_duration_s=1.5)
    await suspend(node, owner)
    ended = (await node.exited(owner)).container
    assert ended.timed_out
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING"):
        await suspend(node, owner)


async def test_the_end_of_a_suspended_container_is_noted(node: Node) -> None:
    owner, container = await living(node)
    await suspend(node, owner)
    os.kill(container.pid, signal.SIGKILL)
    assert (await node.exited(owner)).container.exit_code == 128 + signal.SIGKILL


async def test_a_suspended_container_stays_so_over_a_killed_daemon(start: Start) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner, container = await living(node)
            await suspend(node, owner)
        first.kill()
    # As if it had been killed before all were stopped.
    for process, _ in processes_in_namespace(container.pid):
        with contextlib.suppress(ProcessLookupError):  # what has just been continued may end
            os.kill(process, signal.SIGCONT)
    with start() as second:
        async with connected(second, centre) as node:
            (adopted,) = await node.containers()
            assert adopted.state == ContainerState.CONTAINER_STATE_SUSPENDED
            assert set(states(container)) <= {"T", "Z", "D"}
            assert (await resume(node, owner)).state == ContainerState.CONTAINER_STATE_RUNNING
            assert (await run(node, owner, "true")).exit_code == 0
            await node.clear()
    assert containers_of(centre) == []
