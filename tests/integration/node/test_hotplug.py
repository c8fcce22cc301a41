"""Slices appear in living containers and vanish from them, whatever happens to the daemon meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from puhui.v1.card_pb2 import AttemptRef, Slice, SliceState
from puhui.v1.node_pb2 import ContainerState, NodeEventKind
from puhui.v1.node_service_pb2 import ResumeContainerRequest, SuspendContainerRequest
from tests.integration.node.client import Node, refused
from tests.integration.node.exec_call import Exec, run
from tests.integration.node.watched import WATCHING, Watched, caps, told

pytestmark = pytest.mark.podman

_FAILED = grpc.StatusCode.FAILED_PRECONDITION
_ATTACHED = NodeEventKind.NODE_EVENT_KIND_SLICE_ATTACHED
_DETACHED = NodeEventKind.NODE_EVENT_KIND_SLICE_DETACHED

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


async def state_of(node: Node, one: Slice) -> tuple[SliceState.ValueType, str]:
    (found,) = [other for other in await node.slices() if other.uuid == one.uuid]
    return found.state, found.container_id


def let_go(state: Path, owner: AttemptRef) -> None:
    Path(state, "attempts", owner.centre, owner.job_id, str(owner.attempt), "workspace", "let-go").touch()


async def test_each_container_sees_its_own_slices_come_and_go(node: Node, state: Path) -> None:
    ann, bob = node.attempt(), node.attempt()
    mine, yours = await node.cut(ann, start=0), await node.cut(bob, "2g.20gb", start=2)
    first, second = await node.start(ann, WATCHING), await node.start(bob, WATCHING)
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
    seen = await node.log(bob)
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
    assert await node.log(bob) == seen
    await node.detach(bob, yours)
    await two.sees("")
    changes = [event.kind for event in await told(node, ann) if event.kind in (_ATTACHED, _DETACHED)]
    assert changes == [_ATTACHED, _DETACHED, _ATTACHED]
    assert str(state) not in Path("/proc/self/mountinfo").read_text()


async def test_slices_of_two_gpus_and_from_the_start(node: Node) -> None:
    owner = node.attempt()
    first = await node.cut(owner, start=0)
    container = await node.start(owner, WATCHING, slices=[first])
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
    await node.start(owner, WATCHING, slices=[one])
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
    container = await node.start(owner, WATCHING)
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


async def test_a_command_beside_is_given_what_is_attached_and_holds_what_it_opens(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    container = await node.start(owner, WATCHING)
    look = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES:$(ls $PUHUI_CAPS | xargs)"]
    assert (await run(node, owner, *look)).output == b":\n"
    await node.attach(owner, one)
    assert (await run(node, owner, *look)).output.decode() == f"{one.uuid}:{caps(one)}\n"
    hold = f"exec 3< $PUHUI_CAPS/{caps(one).split()[0]}; echo holds; cat"
    async with Exec(node, owner, ["sh", "-c", hold]) as call:
        await call.until(b"holds\n")
        with refused(_FAILED, "SLICE_IN_USE") as refusal:
            await node.detach(owner, one)
        assert "holds; cat" in refusal.message
        assert f"in container {container.id[:12]}" in refusal.message
        await call.send(stdin_closed=True)
        await call.rest()
    await node.detach(owner, one)
    assert (await run(node, owner, *look)).output == b":\n"


async def test_a_frozen_container_can_be_given_slices_too(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    container = await node.start(owner, WATCHING)
    watched = Watched(node, owner)
    await watched.sees("")
    await node.stub.SuspendContainer(SuspendContainerRequest(owner=owner), timeout=30)
    attached = await node.attach(owner, one)
    assert attached.state == ContainerState.CONTAINER_STATE_SUSPENDED
    assert await state_of(node, one) == (SliceState.SLICE_STATE_ACTIVE, container.id)
    await node.stub.ResumeContainer(ResumeContainerRequest(owner=owner), timeout=30)
    await watched.sees(caps(one))
    await node.stub.SuspendContainer(SuspendContainerRequest(owner=owner), timeout=30)
    await node.detach(owner, one)
    await node.stub.ResumeContainer(ResumeContainerRequest(owner=owner), timeout=30)
    await watched.sees("")
