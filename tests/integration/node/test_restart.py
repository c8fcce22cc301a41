"""The daemon dies, or somebody meddles behind its back; it comes back knowing what it owns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Span
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from puhui.rpc.channel import open_channel
from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import SliceState
from puhui.v1.node_pb2 import ContainerState, NodeEventKind
from tests.daemons import Daemon
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import CARDS, Start, containers_of, podman

pytestmark = pytest.mark.podman

# Counts, and then waits to be told that it may end.
_COUNTING = """
import os, time
for n in range(60):
    print(n, flush=True)
    time.sleep(.05)
while not os.path.exists('/workspace/end'):
    time.sleep(.01)
"""


@contextlib.asynccontextmanager
async def connected(running: Daemon, centre: str) -> AsyncIterator[Node]:
    async with open_channel(running.address) as channel:
        yield Node(channel, centre)


async def test_a_container_outlives_a_killed_daemon_and_loses_no_output(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner = node.attempt()
            one = await node.cut(owner, "2g.20gb")
            container = await node.start(owner, _COUNTING, slices=[one])
            before = (await anext(node.follow(owner))).data
            cursor = (await node.event(owner, NodeEventKind.NODE_EVENT_KIND_CONTAINER_STARTED)).cursor
        first.kill()
    with start() as second:
        async with connected(second, centre) as node:
            (adopted,) = await node.containers()
            assert (adopted.id, adopted.state) == (container.id, ContainerState.CONTAINER_STATE_RUNNING)
            assert [s.uuid for s in await node.slices()] == [one.uuid]
            (home / "node" / "attempts" / centre / owner.job_id / "1" / "workspace" / "end").touch()
            rest = await node.log(owner, offset=len(before), follow=True)
            assert before + rest == b"".join(b"%d\n" % n for n in range(60))
            reasons = []
            async for event in node.events(after=cursor):
                assert event.cursor > cursor
                reasons.append(event.reason)
                if event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_EXITED:
                    break
            assert set(reasons) == {"CONTAINER_ADOPTED", "SLICE_ADOPTED", "COMMAND_ENDED"}
            # What was asked for before is answered the same after.
            assert (await node.cut(owner, "2g.20gb")).uuid == one.uuid
            await node.clear()
            assert await node.slices() == []
    assert containers_of(centre) == []


async def test_an_end_that_nobody_watched_is_told_after_the_restart(start: Start) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner = node.attempt()
            container = await node.start(owner, "import time, sys; time.sleep(1); print('done'); sys.exit(5)")
        first.kill()
    podman("wait", container.id)
    with start() as second:
        async with connected(second, centre) as node:
            ended = (await node.exited(owner)).container
            assert ended.exit_code == 5
            assert await node.log(owner) == b"done\n"
            await node.clear()


async def test_a_time_limit_holds_over_a_restart(start: Start) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner = node.attempt()
            await node.start(owner, "import time; time.sleep(60)", max_duration_s=1.5, stop_grace_s=1)
        first.kill()
    with start() as second:
        async with connected(second, centre) as node:
            event = await node.exited(owner)
            assert (event.reason, event.container.timed_out) == ("TIMED_OUT", True)
            await node.clear()


async def test_what_was_removed_by_hand_is_told_and_not_made_up(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner = node.attempt()
            one = await node.cut(owner)
            container = await node.start(owner, "import time; time.sleep(60)", slices=[one])
        first.kill()
    podman("rm", "--force", "--time", "0", container.id)
    with installed(EmulatedDriver(home / "node" / "emulation", parse_cards(CARDS))):
        driver = Driver()
        driver.destroy_compute_instance(one.gpu_uuid, one.gpu_instance_id, one.compute_instance_id)
        driver.destroy_gpu_instance(one.gpu_uuid, one.gpu_instance_id)
        driver.close()
    with start() as second:
        async with connected(second, centre) as node:
            event = await node.exited(owner)
            assert event.reason == "CONTAINER_LOST"
            assert not event.container.HasField("exit_code")
            assert await node.slices() == []
            # The same request makes it again: what it was answered is not so any more.
            again = await node.cut(owner)
            assert again.state == SliceState.SLICE_STATE_IDLE
            await node.clear()


async def test_a_foreign_slice_is_worked_around_and_never_touched(start: Start, home: Path) -> None:
    centre = new_id("centre")
    emulated = EmulatedDriver(home / "node" / "emulation", parse_cards(CARDS))
    with installed(emulated):
        driver = Driver()
        gpu = driver.gpus()[0]
        profile = next(p for p in driver.profiles(gpu.uuid) if p.name == "3g.40gb")
        gi = driver.create_gpu_instance(gpu.uuid, profile.profile_id, Span(0, 4))
        driver.create_compute_instance(gpu.uuid, gi, profile.compute_slices)
        foreign = driver.instances(gpu.uuid)
    for _ in range(2):
        with start() as running:
            async with connected(running, centre) as node:
                (seen,) = await node.slices()
                assert seen.state == SliceState.SLICE_STATE_FOREIGN
                assert not seen.HasField("owner")
                owner = node.attempt()
                with refused(grpc.StatusCode.FAILED_PRECONDITION, "PLACEMENT_TAKEN") as refusal:
                    await node.cut(owner, start=2)
                assert "not touched" in refusal.message
                with refused(grpc.StatusCode.NOT_FOUND, "SLICE_NOT_FOUND"):
                    await node.destroy(owner, seen)
                await node.cut(node.attempt(), start=4)
                await node.clear()
            running.kill()
    with installed(emulated):
        assert driver.instances(gpu.uuid) == foreign
        driver.close()


async def test_the_podman_service_is_started_again_when_it_dies(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as running:
        async with connected(running, centre) as node:
            owner = node.attempt()
            await node.start(owner, "import time; time.sleep(1.5)")
            lines = [json.loads(line) for line in (home / "node.log").read_text().splitlines()]
            service = next(line["pid"] for line in lines if line["event"] == "podman service runs")
            os.kill(service, signal.SIGKILL)
            assert (await node.exited(owner)).container.exit_code == 0
            _, ended, output = await node.run("print('again')")
            assert (ended.exit_code, output) == (0, b"again\n")
            await node.clear()
    assert containers_of(centre) == []


async def test_one_state_directory_has_one_daemon(start: Start) -> None:
    with start(), pytest.raises(AssertionError, match="in use by process"):
        start().__enter__()


async def test_a_daemon_stops_at_once_and_its_containers_live_on(start: Start) -> None:
    centre = new_id("centre")
    with start() as running:
        async with connected(running, centre) as node:
            owner = node.attempt()
            container = await node.start(owner, "import time; time.sleep(60)")
            watching = asyncio.create_task(node.exited(owner))
            assert running.stop(timeout_s=8) == 0
            with pytest.raises((grpc.aio.AioRpcError, AssertionError)):
                await watching
    assert containers_of(centre) == [container.id[:12]]
    with start() as running:
        async with connected(running, centre) as node:
            await node.clear()
