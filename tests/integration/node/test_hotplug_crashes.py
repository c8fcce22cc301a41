"""Containers see what the daemon says they do, whatever dies or is meddled with meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

import grpc
import pytest

from nodedaemon.driver import Driver
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef, Slice
from puhui.v1.node_pb2 import ContainerState, NodeEventKind
from tests.daemons import Daemon
from tests.integration.node.client import Node
from tests.integration.node.conftest import CARDS, Start
from tests.integration.node.watched import WATCHING, Watched, caps, connected, seen, told

pytestmark = pytest.mark.podman

_DETACHED = NodeEventKind.NODE_EVENT_KIND_SLICE_DETACHED


def mounters(daemon: Daemon) -> list[int]:
    """Returns the processes of a daemon that mount nodes into containers."""
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"hotplug_mounter.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_the_mounter_has_no_rights_and_is_started_again_when_it_dies(start: Start) -> None:
    with start() as running:
        async with connected(running, new_id("centre")) as node:
            owner = node.attempt()
            one, two = await node.cut(owner, start=0), await node.cut(owner, start=1, name="two")
            await node.start(owner, WATCHING)
            watched = Watched(node, owner)
            await node.attach(owner, one)
            await watched.sees(caps(one))
            (mounter,) = mounters(running)
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{mounter}/status").read_text().splitlines()
                if ":\t" in line
            )
            assert {status[name] for name in ("CapPrm", "CapEff", "CapInh")} == {"0" * 16}
            assert status["NoNewPrivs"] == "1"
            assert "0" not in status["Uid"].split()
            os.kill(mounter, signal.SIGKILL)
            await node.attach(owner, two)
            await watched.sees(caps(one, two))
            (second,) = mounters(running)
            assert second != mounter
            await node.detach(owner, one)
            await watched.sees(caps(two))
            await node.clear()
        process = os.pidfd_open(second)
        running.kill()
        # It ends with the daemon, however that ends.
        await ended(process)


async def test_after_a_crash_in_the_middle_containers_see_what_the_daemon_says(start: Start) -> None:
    centre = new_id("centre")
    chance = random.Random(3)
    owners: list[AttemptRef] = []
    slices: dict[str, list[Slice]] = {}
    changes = 0

    async def change(node: Node, owner: AttemptRef, running: Daemon, last: int) -> None:
        """Attaches and detaches until the daemon is gone; kills it after so many changes of anybody."""
        nonlocal changes
        with contextlib.suppress(grpc.aio.AioRpcError):
            while True:
                await chance.choice((node.attach, node.detach))(owner, chance.choice(slices[owner.job_id]))
                changes += 1
                if changes == last:
                    running.kill()

    for number in range(5):
        with start() as running:
            async with connected(running, centre) as node:
                if number == 0:
                    owners = [node.attempt(), node.attempt()]
                    for at, owner in enumerate(owners):
                        slices[owner.job_id] = [await node.cut(owner, start=2 * at + n, name=str(n)) for n in (0, 1)]
                        await node.start(owner, WATCHING)
                containers = await node.containers()
                assert len(containers) == len(owners)
                for container in containers:
                    mine = slices[container.owner.job_id]
                    attached = [one for one in mine if one.uuid in container.slice_uuids]
                    assert seen(container) == set(caps(*attached).split())
                if number == 4:
                    await node.clear()
                    return
                last = changes + chance.randint(5, 30)
                await asyncio.gather(*(change(node, owner, running, last) for owner in owners))


async def test_what_was_meddled_with_while_no_daemon_looked_is_put_right(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as running:
        async with connected(running, centre) as node:
            owner = node.attempt()
            one = await node.cut(owner)
            container = await node.start(owner, WATCHING)
            await node.attach(owner, one)
        running.kill()
    folder = home / "node" / "attempts" / centre / owner.job_id / "1" / "caps"
    for file in folder.iterdir():
        file.unlink()
    (folder / "nvidia-cap1").touch()
    assert seen(container) == {"nvidia-cap1"}
    with start() as running:
        async with connected(running, centre) as node:
            assert seen(container) == set(caps(one).split())
            reasons = [e.reason for e in await told(node, owner)]
            assert "ATTACHMENTS_RESTORED" in reasons
            await node.clear()


@pytest.mark.parametrize("alive", [True, False], ids=["under a running daemon", "while no daemon looked"])
async def test_a_slice_that_vanishes_vanishes_from_its_container(start: Start, home: Path, alive: bool) -> None:
    centre = new_id("centre")

    def destroy(one: Slice) -> None:
        with installed(EmulatedDriver(home / "node" / "emulation", parse_cards(CARDS))):
            driver = Driver()
            driver.destroy_compute_instance(one.gpu_uuid, one.gpu_instance_id, one.compute_instance_id)
            driver.destroy_gpu_instance(one.gpu_uuid, one.gpu_instance_id)
            driver.close()

    with start() as first:
        async with connected(first, centre) as node:
            owner = node.attempt()
            one, two = await node.cut(owner, start=0), await node.cut(owner, start=1, name="two")
            container = await node.start(owner, WATCHING, slices=[one, two])
            if alive:
                destroy(one)
                event = await node.event(owner, _DETACHED)
        first.kill()
    if not alive:
        destroy(one)
    with start() as second:
        async with connected(second, centre) as node:
            event = await node.event(owner, _DETACHED)
            assert (event.reason, event.slice.uuid) == ("SLICE_VANISHED", one.uuid)
            assert list(event.container.slice_uuids) == [two.uuid]
            assert seen(container) == set(caps(two).split())
            (living,) = await node.containers()
            assert living.state == ContainerState.CONTAINER_STATE_RUNNING
            await node.clear()


async def ended(process: int) -> None:
    """Waits for the end of a process, of which this is a descriptor."""
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(process, over.set)
    async with asyncio.timeout(10):
        await over.wait()
    asyncio.get_running_loop().remove_reader(process)
    os.close(process)
