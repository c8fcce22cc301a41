"""What is frozen, and what the journal says of it, agree whatever fails in between."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from nodedaemon.frozen import continue_all, processes_in_sessions, stop_all
from nodedaemon.records import ContainerStage
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import NodeEventKind
from tests.unit.node.test_containers import _OWNER, Bench, opened

_STUCK = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "SUSPEND_STUCK", "as the test asked")


@pytest.fixture
def forking() -> Iterator[int]:
    """A session that starts new processes all the time."""
    script = "while :; do (sleep 0.001; sh -c 'sleep 0.001') & sleep 0.002; done"
    process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    yield process.pid
    while left := processes_in_sessions(frozenset([process.pid])):
        for one, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.poll()


def states(leader: int) -> set[str]:
    found = set()
    for process, _ in processes_in_sessions(frozenset([leader])):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found.add(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0])
    return found


async def test_processes_that_start_others_all_the_time_are_all_stopped(forking: int) -> None:
    for _ in range(5):
        await stop_all(lambda: processes_in_sessions(frozenset([forking])))
        assert states(forking) <= {"T", "Z", "D"}  # D: waits for a process that is stopped
        assert "T" in states(forking)
        continue_all(processes_in_sessions(frozenset([forking])))
        assert "T" not in states(forking)


async def started(bench: Bench) -> None:
    await bench.create("python3", "wait.py")


async def removed(bench: Bench) -> None:
    await bench.containers.stop(_OWNER, 0)
    await bench.containers.remove(_OWNER, discard_results=True)
    bench.require_nothing_left()


def stage(bench: Bench) -> ContainerStage:
    (record,) = bench.journal.containers()
    return record.stage


async def test_what_cannot_be_frozen_runs_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await started(bench)

        async def stuck(container_id: str) -> None:
            assert stage(bench) is ContainerStage.SUSPENDED
            raise _STUCK

        bench.runtime.suspend = stuck  # type: ignore[method-assign]
        with pytest.raises(Refusal) as caught:
            await bench.containers.suspension.suspend(_OWNER)
        assert caught.value is _STUCK
        assert stage(bench) is ContainerStage.RUNNING
        await removed(bench)


async def test_what_ends_as_it_is_frozen_has_ended(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await started(bench)

        async def ends(container_id: str) -> None:
            await bench.runtime.signal(container_id, 9)
            await bench.ended()

        bench.runtime.suspend = ends  # type: ignore[method-assign]
        with pytest.raises(Refusal) as caught:
            await bench.containers.suspension.suspend(_OWNER)
        assert caught.value.reason == "CONTAINER_NOT_RUNNING"
        assert stage(bench) is ContainerStage.EXITED
        await removed(bench)


async def test_a_start_freezes_what_the_journal_says_is_suspended(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await started(bench)
        (container,) = bench.containers.describe_all()
        await bench.containers.suspension.suspend(_OWNER)
    continue_all(processes_in_sessions(frozenset([container.pid])))
    async with opened(tmp_path) as bench:
        assert stage(bench) is ContainerStage.SUSPENDED
        assert states(container.pid) == {"T"}
        assert bench.containers.holder_of("no slice") is None
        await bench.containers.suspension.resume(_OWNER)
        assert stage(bench) is ContainerStage.RUNNING
        await removed(bench)


async def test_a_suspended_container_is_thawed_to_be_stopped_and_each_step_is_told_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await started(bench)
        for _ in range(2):
            await bench.containers.suspension.suspend(_OWNER)
        await bench.containers.stop(_OWNER, 10)
        bench.events.close()
        kinds = [event.kind async for event in bench.events.watch(0)]
        assert kinds.count(NodeEventKind.NODE_EVENT_KIND_CONTAINER_SUSPENDED) == 1
        assert kinds.count(NodeEventKind.NODE_EVENT_KIND_CONTAINER_RESUMED) == 1
        assert kinds.count(NodeEventKind.NODE_EVENT_KIND_CONTAINER_EXITED) == 1
        await removed(bench)


async def test_a_container_that_vanished_is_noted_as_lost_and_one_being_started_is_not(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await started(bench)
        (record,) = bench.journal.containers()
        statuses = bench.runtime.containers

        async def none() -> list[object]:
            # Between the look at the journal and the list, another one begins.
            await bench.create("python3", "wait.py", owner=other)
            return []

        other = type(_OWNER)("centre", "j-2", 1)
        bench.runtime.containers = none  # type: ignore[method-assign, assignment]
        await bench.containers.ends.look()
        bench.runtime.containers = statuses  # type: ignore[method-assign]
        stages = {one.owner: one.stage for one in bench.journal.containers()}
        assert stages == {_OWNER: ContainerStage.EXITED, other: ContainerStage.RUNNING}
        await bench.runtime.remove(record.container_id)
        for owner in (_OWNER, other):
            await bench.containers.stop(owner, 0)
            await bench.containers.remove(owner, discard_results=True)
        bench.require_nothing_left()
