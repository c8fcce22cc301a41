"""Somebody deletes things, or holds them, behind the back of a daemon that serves."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import Slice, SliceState
from puhui.v1.node_pb2 import ContainerState, NodeEventKind
from tests.integration.node.client import refused
from tests.integration.node.conftest import Start, podman
from tests.integration.node.hands import destroy_by_hand, driver_of
from tests.integration.node.watched import connected

pytestmark = pytest.mark.podman

_IMAGE = "localhost/puhui/base:latest"
_HOLDING = "import sys, time; held = open('/card'); print('holds', flush=True); time.sleep(600)"


async def test_a_slice_destroyed_by_hand_is_told_and_the_same_request_makes_it_again(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as running:
        async with connected(running, centre) as node:
            owner, other = node.attempt(), node.attempt()
            one, beside = await node.cut(owner, start=0), await node.cut(other, start=1)
            with driver_of(home / "node") as driver:
                destroy_by_hand(driver, one)
            event = await node.event(owner, NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED)
            assert (event.reason, event.slice.uuid) == ("SLICE_VANISHED", one.uuid)
            assert [left.uuid for left in await node.slices()] == [beside.uuid]
            again = await node.cut(owner, start=0)
            assert again.uuid != one.uuid
            assert again.state == SliceState.SLICE_STATE_IDLE
            # The old one is gone, which is all that was wanted of it.
            await node.destroy(owner, one)
            assert {left.uuid for left in await node.slices()} == {again.uuid, beside.uuid}
            await node.clear()


async def test_a_container_removed_by_hand_is_told_and_its_slice_serves_the_next(start: Start) -> None:
    centre = new_id("centre")
    with start() as running:
        async with connected(running, centre) as node:
            owner = node.attempt()
            one = await node.cut(owner)
            container = await node.start(owner, "import time; time.sleep(600)", slices=[one])
            podman("rm", "--force", "--time", "0", container.id)
            event = await node.exited(owner)
            assert event.container.id == container.id
            (shown,) = await node.containers()
            assert shown.state == ContainerState.CONTAINER_STATE_EXITED
            (freed,) = await node.slices()
            assert (freed.state, freed.container_id) == (SliceState.SLICE_STATE_IDLE, "")
            await node.remove(owner)
            # Nothing is known of the attempt now, so the same request makes its container, on the same slice.
            again = await node.start(owner, "print('again')", slices=[one])
            assert again.id != container.id
            assert await node.log(owner, follow=True) == b"again\n"
            await node.clear()


@contextlib.contextmanager
def _outsider(state: Path, one: Slice) -> Iterator[int]:
    """A process of no job that holds a slice. Yields its id; it lets go at the end of the block."""
    command = [sys.executable, "-m", "nodedaemon", "emulation", "hold", one.uuid, "--state", str(state)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()
        assert process.wait() == 0


@contextlib.contextmanager
def _container_of_somebody(card: Path) -> Iterator[str]:
    """A container that this daemon did not make, in which a process holds a slice. Yields its id."""
    volume = ("--volume", f"{card}:/card:ro")
    name = podman("run", "--detach", "--network", "none", *volume, _IMAGE, "python3", "-c", _HOLDING).strip()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "nodedaemon", "podman", "--", "logs", "--follow", name], stdout=subprocess.PIPE
        ) as logs:
            assert logs.stdout is not None
            assert logs.stdout.readline() == b"holds\n"
            logs.terminate()
        yield name
    finally:
        podman("rm", "--force", "--time", "0", name)


async def test_a_slice_that_an_outsider_holds_is_destroyed_as_soon_as_it_lets_go(start: Start, home: Path) -> None:
    centre, state = new_id("centre"), home / "node"
    with start() as running:
        async with connected(running, centre) as node:
            owner = node.attempt()
            one = await node.cut(owner)
            await node.start(owner, "print('done')", slices=[one])
            await node.exited(owner)
            await node.remove(owner)
            card = state / "emulation" / "caps" / f"nvidia-cap{3 + 9 * one.gpu_instance_id + 1}"
            with _outsider(state, one) as pid, _container_of_somebody(card) as container:
                with refused(grpc.StatusCode.FAILED_PRECONDITION, "SLICE_IN_USE") as refusal:
                    await node.destroy(owner, one)
                assert f"{pid} (" in refusal.message
                assert f"emulation hold {one.uuid}" in refusal.message
                assert f"in container {container[:12]}" in refusal.message
                (shown,) = await node.slices()
                assert shown.state == SliceState.SLICE_STATE_ERROR
                assert str(pid) in shown.notice
                event = await node.event(owner, NodeEventKind.NODE_EVENT_KIND_SLICE_ERROR)
                assert (event.reason, event.slice.uuid) == ("SLICE_IN_USE", one.uuid)
                # It is still whole: nothing was taken from under those that hold it.
                with driver_of(state) as driver:
                    (instance,) = driver.instances(one.gpu_uuid)
                    assert [compute.uuid for compute in instance.compute_instances] == [one.uuid]
            event = await node.event(owner, NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED)
            assert (event.reason, event.slice.uuid) == ("SLICE_DESTROYED", one.uuid)
            assert await node.slices() == []
            await node.destroy(owner, one)
            await node.cut(node.attempt())
            await node.clear()
