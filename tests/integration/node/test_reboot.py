"""The cards are rebooted: every slice is gone, MIG mode is off on Hopper, and the node goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef, MigMode, Slice, SliceState
from puhui.v1.node_pb2 import Container, ContainerState, NodeEventKind
from puhui.v1.node_service_pb2 import CreateSliceRequest
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import Start
from tests.integration.node.hands import all_slices, cut_by_hand, driver_of, enable_mig, reboot
from tests.integration.node.watched import WATCHING, connected, seen

pytestmark = pytest.mark.podman

_HOPPER, _AMPERE = 0, 1


async def _working(node: Node) -> tuple[AttemptRef, Slice, Slice, Container]:
    """Returns an attempt whose container sees a slice of each card."""
    owner = node.attempt()
    hopper, ampere = await node.cut(owner, gpu=_HOPPER), await node.cut(owner, gpu=_AMPERE, name="second")
    container = await node.start(owner, WATCHING, slices=[hopper, ampere])
    assert len(seen(container)) == 4
    return owner, hopper, ampere, container


async def _gone(node: Node, owner: AttemptRef, *slices: Slice) -> None:
    """Waits until slices are told to be gone, and to have gone from the attempt's container."""
    wanted = {
        (kind, one.uuid)
        for one in slices
        for kind in (NodeEventKind.NODE_EVENT_KIND_SLICE_DETACHED, NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED)
    }
    async for event in node.events():
        if event.owner.job_id == owner.job_id and (event.kind, event.slice.uuid) in wanted:
            assert event.reason == "SLICE_VANISHED"
            wanted.remove((event.kind, event.slice.uuid))
        if not wanted:
            return


async def _goes_on(node: Node, owner: AttemptRef, container: Container, state: Path) -> None:
    """Requires that the container lives without its slices, and that each card can be used as far as it allows."""
    (living,) = await node.containers()
    assert (living.id, living.state) == (container.id, ContainerState.CONTAINER_STATE_RUNNING)
    assert list(living.slice_uuids) == []
    assert seen(container) == set()
    assert await node.slices() == []

    gpus = (await node.inventory()).gpus
    assert [gpu.mig_mode for gpu in gpus] == [MigMode.MIG_MODE_DISABLED, MigMode.MIG_MODE_ENABLED]
    assert "puhui-nodedaemon emulation mig 0 on" in gpus[_HOPPER].notice
    again = await node.cut(owner, gpu=_AMPERE, name="second")
    await node.attach(owner, again)
    assert len(seen(container)) == 2
    with driver_of(state):
        enable_mig(_HOPPER)
    # It is noticed without a restart.
    first = await node.cut(owner, gpu=_HOPPER)
    await node.attach(owner, first)
    assert len(seen(container)) == 4
    assert {one.state for one in await node.slices()} == {SliceState.SLICE_STATE_ACTIVE}


async def test_a_reboot_while_no_daemon_looked(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner, hopper, ampere, container = await _working(node)
        first.kill()
    reboot(home / "node")
    with start() as second:
        async with connected(second, centre) as node:
            await _gone(node, owner, hopper, ampere)
            await _goes_on(node, owner, container, home / "node")
            await node.clear()


async def test_a_reboot_under_a_daemon_that_serves(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as running:
        async with connected(running, centre) as node:
            owner, hopper, ampere, container = await _working(node)
            await asyncio.to_thread(reboot, home / "node")
            await _gone(node, owner, hopper, ampere)
            request = CreateSliceRequest(
                owner=node.attempt(), gpu_uuid=hopper.gpu_uuid, profile=hopper.profile, placement=hopper.placement
            )
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "MIG_DISABLED") as refusal:
                await node.stub.CreateSlice(request)
            assert "puhui-nodedaemon emulation mig 0 on" in refusal.message
            await _goes_on(node, owner, container, home / "node")
            await node.clear()


@pytest.mark.parametrize("alive", [True, False], ids=["under a running daemon", "while no daemon looked"])
async def test_a_slice_that_somebody_made_after_the_reboot_is_not_taken_for_the_old_one(
    start: Start, home: Path, alive: bool
) -> None:
    centre = new_id("centre")

    def reboot_and_cut(one: Slice) -> list[tuple[str, int, str]]:
        reboot(home / "node")
        with driver_of(home / "node") as driver:
            made = cut_by_hand(driver, one.gpu_uuid, one.profile, one.placement.start)
            # The same place, the same profile, the same id.
            assert made[:2] == (one.gpu_uuid, one.gpu_instance_id)
            return all_slices(driver)

    with start() as first:
        async with connected(first, centre) as node:
            owner = node.attempt()
            one = await node.cut(owner, gpu=_AMPERE)
            container = await node.start(owner, WATCHING, slices=[one])
            if alive:
                foreign = await asyncio.to_thread(reboot_and_cut, one)
                await _gone(node, owner, one)
        first.kill()
    if not alive:
        foreign = reboot_and_cut(one)
    with start() as second:
        async with connected(second, centre) as node:
            await _gone(node, owner, one)
            assert seen(container) == set()
            (other,) = await node.slices()
            assert (other.state, other.uuid) == (SliceState.SLICE_STATE_FOREIGN, foreign[0][2])
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "PLACEMENT_TAKEN"):
                await node.cut(owner, gpu=_AMPERE)
            # It is destroyed already, and what has its place is none of its owner's business.
            await node.destroy(owner, one)
            await node.clear()
    with driver_of(home / "node") as driver:
        assert all_slices(driver) == foreign
