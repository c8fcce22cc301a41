"""Slices appear in living containers and vanish from them, whatever happens to the daemon meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from nodedaemon.driver import Driver
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from puhui.rpc.channel import open_channel
from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef, Slice, SliceState
from puhui.v1.node_pb2 import Container, ContainerState, NodeEvent, NodeEventKind
from tests.daemons import Daemon
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import CARDS, Start

pytestmark = pytest.mark.podman

_FAILED = grpc.StatusCode.FAILED_PRECONDITION
_ATTACHED = NodeEventKind.NODE_EVENT_KIND_SLICE_ATTACHED
_DETACHED = NodeEventKind.NODE_EVENT_KIND_SLICE_DETACHED

# Prints the nodes that it may open, whenever they change.
_WATCHING = """
import os, time
last = None
while True:
    here = os.environ['PUHUI_CAPS']
    now = [name for name in sorted(os.listdir(here)) if os.access(here + '/' + name, os.R_OK)]
    if now != last:
        print(*now, flush=True)
        last = now
    time.sleep(.005)
"""

# Opens every node that it sees, says what it read, and keeps them open until it is told to let go, and then waits.
_HOLDING = """
import os, time
here = '/dev/nvidia-caps/'
held = [open(here + name) for name in os.listdir(here)]
print('holds', flush=True)
while not os.path.exists('/workspace/let-go'):
    time.sleep(.005)
print([one.read() for one in held], flush=True)
for one in held:
    one.close()
print('let go', flush=True)
time.sleep(60)
"""

# What code that is shut in may try.
_HOSTILE = """
import ctypes, json, os, stat
libc = ctypes.CDLL(None, use_errno=True)
here = '/dev/nvidia-caps'
node = here + '/' + os.listdir(here)[0]
def tried(call):
    try:
        return call() == 0
    except OSError:
        return False
def empty(path):
    open(path, 'w').close()
    return 0
print(json.dumps({
    'unmount a node': tried(lambda: libc.umount2(node.encode(), 2)),
    'unmount all': tried(lambda: libc.umount2(here.encode(), 2)),
    'remount': tried(lambda: libc.mount(None, here.encode(), None, 32, None)),
    'mount over': tried(lambda: libc.mount(b'none', here.encode(), b'tmpfs', 0, None)),
    'bind elsewhere': tried(lambda: libc.mount(here.encode(), b'/tmp', None, 4096, None)),
    'new namespaces': tried(lambda: libc.unshare(0x10000000 | 0x00020000)),
    'make a device': tried(lambda: os.mknod('/tmp/cap', 0o600 | stat.S_IFCHR, os.makedev(1, 7)) or 0),
    'make a device there': tried(lambda: os.mknod(here + '/x', 0o600 | stat.S_IFCHR, os.makedev(1, 7)) or 0),
    'make a file there': tried(lambda: empty(here + '/x')),
    'remove a node': tried(lambda: os.unlink(node) or 0),
    'open it up': tried(lambda: os.chmod(node, 0o777) or 0),
    'link it': tried(lambda: os.link(node, '/tmp/cap') or 0),
}), flush=True)
import time
time.sleep(60)
"""


def caps(*slices: Slice, minor: int = 0) -> str:
    """Returns the names of the nodes of slices of one GPU, as a container lists them."""
    numbers = []
    for one in slices:
        gi = 3 + 135 * minor + 9 * one.gpu_instance_id
        numbers += [gi, gi + 1 + one.compute_instance_id]
    return " ".join(sorted(f"nvidia-cap{number}" for number in numbers))


class Watched:
    """A container that says what it sees."""

    def __init__(self, node: Node, owner: AttemptRef) -> None:
        self._chunks = node.follow(owner)
        self._lines: list[str] = []
        self._rest = ""

    async def sees(self, line: str) -> None:
        """Waits until it says exactly this, from where the last wait ended."""
        while True:
            while self._lines:
                if self._lines.pop(0) == line:
                    return
            chunk = await anext(self._chunks)
            *self._lines, self._rest = (self._rest + chunk.data.decode()).split("\n")


@contextlib.asynccontextmanager
async def connected(running: Daemon, centre: str) -> AsyncIterator[Node]:
    async with open_channel(running.address) as channel:
        yield Node(channel, centre)


async def state_of(node: Node, one: Slice) -> tuple[SliceState.ValueType, str]:
    (found,) = [other for other in await node.slices() if other.uuid == one.uuid]
    return found.state, found.container_id


def let_go(state: Path, owner: AttemptRef) -> None:
    Path(state, "attempts", owner.centre, owner.job_id, str(owner.attempt), "workspace", "let-go").touch()


async def test_each_container_sees_its_own_slices_come_and_go(node: Node, state: Path) -> None:
    ann, bob = node.attempt(), node.attempt()
    mine, yours = await node.cut(ann, start=0), await node.cut(bob, "2g.20gb", start=2)
    first, second = await node.start(ann, _WATCHING), await node.start(bob, _WATCHING)
    one, two = Watched(node, ann), Watched(node, bob)
    await one.sees("")
    await two.sees("")
    assert await state_of(node, mine) == (SliceState.SLICE_STATE_IDLE, "")

    assert list((await node.attach(ann, mine)).slice_uuids) == [mine.uuid]
    await one.sees(caps(mine))
    assert await state_of(node, mine) == (SliceState.SLICE_STATE_ACTIVE, first.id)
    await node.attach(bob, yours)
    await two.sees(caps(yours))
    assert await state_of(node, yours) == (SliceState.SLICE_STATE_ACTIVE, second.id)
    event = await node.event(ann, _ATTACHED)
    assert (event.reason, event.slice.uuid, event.slice.state) == (
        "SLICE_ATTACHED",
        mine.uuid,
        SliceState.SLICE_STATE_ACTIVE,
    )
    assert list(event.container.slice_uuids) == [mine.uuid]

    # What is so already is answered so, and nobody is told twice.
    assert (await node.attach(ann, mine)).id == first.id
    with refused(_FAILED, "SLICE_IN_USE"):
        await node.destroy(ann, mine)
    assert list((await node.detach(ann, mine)).slice_uuids) == []
    await one.sees("")
    assert list((await node.detach(ann, mine)).slice_uuids) == []
    assert await state_of(node, mine) == (SliceState.SLICE_STATE_IDLE, "")
    # The other saw nothing of all that, and the container lives on without its slice.
    await node.destroy(ann, mine)
    (living,) = [one for one in await node.containers() if one.id == first.id]
    assert living.state == ContainerState.CONTAINER_STATE_RUNNING

    # The next slice has the same place, and nodes of the same name.
    again = await node.cut(ann, start=0, name="again")
    await node.attach(ann, again)
    await one.sees(caps(again))
    await node.detach(bob, yours)
    await two.sees("")
    assert await node.log(bob) == f"\n{caps(yours)}\n\n".encode()
    changes = [event.kind for event in await told(node, ann) if event.kind in (_ATTACHED, _DETACHED)]
    assert changes == [_ATTACHED, _DETACHED, _ATTACHED]
    assert str(state) not in Path("/proc/self/mountinfo").read_text()


async def test_slices_of_two_gpus_and_from_the_start(node: Node) -> None:
    owner = node.attempt()
    first = await node.cut(owner, start=0)
    container = await node.start(owner, _WATCHING, slices=[first])
    watched = Watched(node, owner)
    await watched.sees(caps(first))
    inventory = await node.inventory()
    second = await node.cut(owner, "1g.10gb", start=1, gpu=1, name="second")
    assert second.gpu_uuid == inventory.gpus[1].uuid
    await node.attach(owner, second)
    await watched.sees(" ".join(sorted([*caps(first).split(), *caps(second, minor=1).split()])))
    # One that was there from the start goes as any other.
    after = await node.detach(owner, first)
    await watched.sees(caps(second, minor=1))
    assert (after.id, list(after.slice_uuids)) == (container.id, [second.uuid])
    await node.stop(owner, 0)
    assert await state_of(node, second) == (SliceState.SLICE_STATE_IDLE, "")
    for one in (first, second):
        await node.destroy(owner, one)
    await node.remove(owner)


async def test_a_slice_that_is_held_is_not_detached_and_the_holder_is_named(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    container = await node.start(owner, _HOLDING, slices=[one])
    await node.said(owner, b"holds\n")
    with refused(_FAILED, "SLICE_IN_USE") as refusal:
        await node.detach(owner, one)
    assert f"in container {container.id[:12]}" in refusal.message
    assert "(python3 main.py)" in refusal.message
    (held,) = [word for word in refusal.message.split() if word.isdecimal()]
    assert Path(f"/proc/{held}").exists()
    # It sees the slice as before, and what it held open never broke.
    assert await state_of(node, one) == (SliceState.SLICE_STATE_ACTIVE, container.id)
    let_go(state, owner)
    await node.said(owner, b"holds\n['', '']\nlet go\n")
    assert list((await node.detach(owner, one)).slice_uuids) == []
    await node.destroy(owner, one)


async def test_a_holder_outside_the_container_does_not_keep_a_slice_in_it(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    await node.start(owner, _WATCHING, slices=[one])
    watched = Watched(node, owner)
    await watched.sees(caps(one))
    with (state / "emulation" / "caps" / caps(one).split()[0]).open():
        await node.detach(owner, one)
        await watched.sees("")


async def test_code_that_is_shut_in_cannot_change_what_it_sees(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    await node.start(owner, _HOSTILE, slices=[one])
    said = (await anext(node.follow(owner))).data
    assert {what for what, worked in json.loads(said).items() if worked} == set()
    await node.detach(owner, one)


async def test_what_cannot_be_attached_is_refused_in_words(node: Node) -> None:
    owner, other = node.attempt(), node.attempt()
    one, foreign = await node.cut(owner, start=0), await node.cut(other, start=1)
    with refused(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND"):
        await node.attach(owner, one)
    with refused(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND"):
        await node.detach(owner, one)
    container = await node.start(owner, _WATCHING)
    with refused(_FAILED, "SLICE_NOT_FOUND"):
        await node.attach(owner, foreign)
    with refused(_FAILED, "SLICE_NOT_FOUND"):
        await node.attach(owner, Slice(uuid="MIG-nobody"))
    owner.fencing_token = 2
    await node.attach(owner, one, request_id="attach")
    assert (await node.attach(owner, one, request_id="attach")).id == container.id
    with refused(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"):
        await node.attach(owner, foreign, request_id="attach")
    owner.fencing_token = 1
    with refused(_FAILED, "STALE_FENCING_TOKEN"):
        await node.detach(owner, one)
    owner.fencing_token = 2
    await node.stop(owner, 0)
    for change in (node.attach, node.detach):
        with refused(_FAILED, "CONTAINER_NOT_RUNNING"):
            await change(owner, one)


def mounters(daemon: Daemon) -> list[int]:
    """Returns the processes of a daemon that mount nodes into containers."""
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"hotplug_mounter.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_the_mounter_has_no_rights_and_is_started_again_when_it_dies(start: Start) -> None:
    with start() as running:
        async with connected(running, new_id("centre")) as node:
            owner = node.attempt()
            one, two = await node.cut(owner, start=0), await node.cut(owner, start=1, name="two")
            await node.start(owner, _WATCHING)
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


def seen(container: Container) -> set[str]:
    """Returns the nodes that a living container sees, as the kernel shows its files."""
    here = Path(f"/proc/{container.pid}/root/dev/nvidia-caps")
    return {entry.name for entry in here.iterdir() if entry.stat().st_mode & 0o444}


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
                        await node.start(owner, _WATCHING)
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
            container = await node.start(owner, _WATCHING)
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


async def told(node: Node, owner: AttemptRef) -> list[NodeEvent]:
    """Returns what was told of an attempt until now."""
    marker = node.attempt()
    await node.cut(marker, start=6)
    found = []
    async for event in node.events():
        if event.owner.job_id == owner.job_id:
            found.append(event)
        if event.owner.job_id == marker.job_id:
            return found
    raise AssertionError("the event stream ended")


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
            container = await node.start(owner, _WATCHING, slices=[one, two])
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
