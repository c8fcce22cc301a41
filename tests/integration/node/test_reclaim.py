"""Cards are taken from living containers by each rung of the ladder, and given back, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from puhui.rpc.identity import new_id
from puhui.rpc.moment import duration
from puhui.v1.card_pb2 import AttemptRef, Slice
from puhui.v1.job_pb2 import ReclaimMode
from puhui.v1.node_pb2 import Container, ContainerState, NodeEvent, NodeEventKind
from puhui.v1.node_service_pb2 import ReclaimContainerRequest, ReclaimContainerResponse, ResumeContainerRequest
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import Start
from tests.integration.node.exec_call import Exec, request_id, run
from tests.integration.node.test_suspend import states
from tests.integration.node.watched import WATCHING, Watched, caps, connected, told

pytestmark = pytest.mark.podman

_FAILED = grpc.StatusCode.FAILED_PRECONDITION
_DETACH = ReclaimMode.RECLAIM_MODE_DETACH
_CHECKPOINT = ReclaimMode.RECLAIM_MODE_CHECKPOINT
_STOP = ReclaimMode.RECLAIM_MODE_STOP
_WANTED = NodeEventKind.NODE_EVENT_KIND_CARD_WANTED
_WARNED = NodeEventKind.NODE_EVENT_KIND_RECLAIM_WARNED

# Holds its card in a process with a second thread, and computes on it (reads it) whenever a file tells it to.
WORKING = """
import os, threading, time
here = '/dev/nvidia-caps/'
names = sorted(os.listdir(here))
card = os.open(here + names[-1], os.O_RDONLY)
memory = bytearray(os.urandom(1 << 20))
digest = hash(bytes(memory))
ticks = 0
def tick():
    global ticks
    while True:
        time.sleep(.01)
        ticks += 1
threading.Thread(target=tick, daemon=True).start()
me = os.getpid()
print('up', flush=True)
step = 0
while True:
    ticks = 0
    while ticks == 0 or not os.path.exists(f'/workspace/step{step}'):
        time.sleep(.005)
    os.read(card, 64)
    assert hash(bytes(memory)) == digest
    print('step', step, os.getpid() == me, flush=True)
    step += 1
"""


async def reclaim(
    node: Node, owner: AttemptRef, hardest: ReclaimMode.ValueType, **terms: Any
) -> ReclaimContainerResponse:
    request = ReclaimContainerRequest(owner=owner, hardest=hardest, **terms)
    return await node.stub.ReclaimContainer(request, timeout=60)


async def resume(node: Node, owner: AttemptRef) -> Container:
    return (await node.stub.ResumeContainer(ResumeContainerRequest(owner=owner), timeout=30)).container


def step(state: Path, owner: AttemptRef, number: int) -> None:
    workspace = Path(state, "attempts", owner.centre, owner.job_id, str(owner.attempt), "workspace")
    (workspace / f"step{number}").touch()


def pids_in(message: str) -> list[int]:
    return [int(found) for found in re.findall(r"\b(\d+) \(", message)]


def open_files(pid: int) -> set[str]:
    names = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.add(os.readlink(entry.path))  # noqa: PTH115 - deleted ones, too
    return names


async def working(node: Node, state: Path, gpu: int = 0) -> tuple[AttemptRef, Slice, Container, Watched]:
    owner = node.attempt()
    one = await node.cut(owner, gpu=gpu)
    container = await node.start(owner, WORKING, slices=[one], stop_grace_s=5)
    says = Watched(node, owner)
    await says.sees("up")
    step(state, owner, 0)
    await says.sees("step 0 True")
    return owner, one, container, says


async def first(node: Node, owner: AttemptRef, kind: NodeEventKind.ValueType, reason: str) -> NodeEvent:
    async for event in node.events():
        if (event.owner.job_id, event.kind, event.reason) == (owner.job_id, kind, reason):
            return event
    raise AssertionError("the event stream ended")


async def test_cards_that_nobody_holds_are_detached_and_a_batch_job_is_frozen(node: Node) -> None:
    owner = node.attempt()
    one, two = await node.cut(owner, start=0), await node.cut(owner, start=1, name="two")
    container = await node.start(owner, WATCHING, slices=[one, two])
    watched = Watched(node, owner)
    await watched.sees(caps(one, two))
    done = await reclaim(node, owner, _CHECKPOINT, request_id="one")
    assert (done.mode, set(done.slice_uuids)) == (_DETACH, {one.uuid, two.uuid})
    assert (list(done.container.slice_uuids), done.container.pid) == ([], container.pid)
    assert done.container.state == ContainerState.CONTAINER_STATE_RUNNING
    await watched.sees("")
    assert await reclaim(node, owner, _CHECKPOINT, request_id="one") == done
    reasons = [event.reason for event in await told(node, owner)]
    assert reasons.count("DETACHED") == 1
    # Nothing is left to take, and then it is frozen.
    frozen = await reclaim(node, owner, _DETACH, freeze=True)
    assert (frozen.container.state, list(frozen.slice_uuids)) == (ContainerState.CONTAINER_STATE_SUSPENDED, [])
    assert "S" not in states(frozen.container)
    await node.attach(owner, one)
    await resume(node, owner)
    await watched.sees(caps(one))


async def test_a_holder_is_named_when_its_card_may_not_be_taken(node: Node, state: Path) -> None:
    owner, one, container, says = await working(node, state)
    with refused(_FAILED, "RECLAIM_IMPOSSIBLE") as refusal:
        await reclaim(node, owner, _DETACH)
    (held,) = pids_in(refusal.message)
    assert Path(f"/proc/{held}").exists()
    assert "checkpointing is not allowed" in refusal.message
    (living,) = [c for c in await node.containers() if c.id == container.id]
    assert list(living.slice_uuids) == [one.uuid]
    step(state, owner, 1)
    await says.sees("step 1 True")
    reasons = [event.reason for event in await told(node, owner)]
    assert "RECLAIM_IMPOSSIBLE" in reasons


async def test_a_holder_is_checkpointed_and_goes_on_on_another_gpu(start: Start, home: Path) -> None:
    with start("H100-80GB-SXM5:2") as running:
        async with connected(running, new_id("centre")) as node:
            await _moved(node, home / "node")
            await node.clear()


async def _moved(node: Node, state: Path) -> None:
    inventory = await node.inventory()
    assert inventory.runtime.checkpoint == "emulated"
    owner, one, container, says = await working(node, state)
    done = await reclaim(node, owner, _CHECKPOINT)
    assert (done.mode, list(done.slice_uuids), done.container.checkpointed) == (_CHECKPOINT, [one.uuid], True)
    (held,) = pids_in(done.message)
    assert not any("nvidia-cap" in name for name in open_files(held))
    await node.destroy(owner, one)
    step(state, owner, 1)
    wanted = await node.event(owner, _WANTED)
    assert str(held) in wanted.message
    # It waits for a card and for nothing else: its other thread ticks on, and nothing was said.
    assert b"step 1" not in await node.log(owner)

    # Only the same profile of the same model will do.
    wrong = await node.cut(owner, "2g.20gb", start=2, name="wrong")
    with refused(_FAILED, "RESTORE_MISMATCH") as refusal:
        await resume(node, owner)
    assert "no slice" in refusal.message
    await node.attach(owner, wrong)
    with refused(_FAILED, "RESTORE_MISMATCH"):
        await resume(node, owner)
    await node.detach(owner, wrong)
    new = await node.cut(owner, start=6, gpu=1, name="new")
    assert new.gpu_uuid != one.gpu_uuid
    await node.attach(owner, new)
    after = await resume(node, owner)
    assert (after.checkpointed, after.pid) == (False, container.pid)
    await says.sees("step 1 True")
    assert any(name.endswith(caps(new, minor=1).split()[-1]) for name in open_files(held))
    with refused(_FAILED, "SLICE_IN_USE"):
        await node.detach(owner, new)
    # And again.
    assert (await reclaim(node, owner, _CHECKPOINT)).mode == _CHECKPOINT
    await node.attach(owner, new)
    await resume(node, owner)
    step(state, owner, 2)
    await says.sees("step 2 True")


async def test_what_holds_a_card_beside_the_command_is_ended_and_the_container_lives_on(
    start: Start, home: Path
) -> None:
    with start() as running:
        async with connected(running, new_id("centre")) as node:
            owner = node.attempt()
            one = await node.cut(owner)
            container = await node.start(owner, WATCHING, slices=[one], stop_grace_s=1)
            hold = f"trap '' TERM; exec 3< $PUHUI_CAPS/{caps(one).split()[0]}; echo holds; while :; do sleep 60; done"
            async with Exec(node, owner, ["sh", "-c", hold], request_id=request_id()) as call:
                await call.until(b"holds\n")
                (home / "node" / "checkpoints").rename(home / "node" / "gone")
                # Held by the shell, which is deaf to SIGTERM, and by its child.
                done = await reclaim(node, owner, _STOP)
                assert (done.mode, done.container.pid) == (_STOP, container.pid)
                assert done.container.state == ContainerState.CONTAINER_STATE_RUNNING
                await call.rest()
                assert call.exit_code == 137
            assert (await run(node, owner, "true")).exit_code == 0
            await node.clear()


async def test_a_command_that_holds_its_card_is_stopped_where_nothing_can_checkpoint(start: Start, home: Path) -> None:
    with start() as running:
        async with connected(running, new_id("centre")) as node:
            owner, _, _, _ = await working(node, home / "node")
            # What moves cards cannot write what it does down, and so does nothing.
            (home / "node" / "checkpoints").rename(home / "node" / "gone")
            with refused(_FAILED, "RECLAIM_IMPOSSIBLE") as refusal:
                await reclaim(node, owner, _CHECKPOINT)
            assert "checkpoint failed" in refusal.message
            done = await reclaim(node, owner, _STOP)
            assert (done.mode, done.container.state) == (_STOP, ContainerState.CONTAINER_STATE_EXITED)
            await node.clear()


async def test_containers_are_warned_and_run_what_was_asked_before(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    code = (
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: print('warned', flush=True))\n"
        "print('up', flush=True)\nwhile True: time.sleep(1)\n"
    )
    await node.start(owner, code, slices=[one])
    says = Watched(node, owner)
    await says.sees("up")
    async with Exec(node, owner, ["sleep", "600"], request_id=request_id()):
        save = ["sh", "-c", "ls $PUHUI_CAPS | wc -l > /workspace/saved"]
        await reclaim(node, owner, _DETACH, warn_signal=True, on_reclaim=save)
        await says.sees("warned")
        # What has no handler for the signal lives on.
        assert (await run(node, owner, "pidof", "sleep")).exit_code in (0, 127)
    folder = Path(state, "attempts", owner.centre, owner.job_id, "1", "workspace")
    assert (folder / "saved").read_text() == "2\n"
    assert (await node.event(owner, _WARNED)).reason == "RECLAIM_WARNED"
    # One that takes too long, or fails, does not keep the card.
    await node.attach(owner, one)
    done = await reclaim(node, owner, _DETACH, on_reclaim=["sleep", "60"], on_reclaim_limit=duration(0.2))
    assert done.mode == _DETACH
    assert "0.2 s" in (await first(node, owner, _WARNED, "ON_RECLAIM_FAILED")).message


async def test_cards_in_use_are_not_taken_by_who_wants_only_idle_ones(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    await node.start(owner, WATCHING, slices=[one])
    with refused(_FAILED, "NOT_IDLE") as refusal:
        await reclaim(node, owner, _DETACH, only_if_idle=True)
    assert "nobody watches" in refusal.message
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"):
        await reclaim(node, owner, ReclaimMode.RECLAIM_MODE_UNSPECIFIED)


async def test_what_is_checkpointed_can_die_and_be_stopped_and_removed(node: Node, state: Path) -> None:
    owner, one, _, _ = await working(node, state)
    done = await reclaim(node, owner, _CHECKPOINT)
    (held,) = pids_in(done.message)
    await node.destroy(owner, one)
    os.kill(held, signal.SIGKILL)
    ended = (await node.exited(owner)).container
    assert (ended.exit_code, ended.checkpointed) == (137, False)
    await node.remove(owner)
    other, _, _, _ = await working(node, state)
    await reclaim(node, other, _CHECKPOINT)
    assert (await node.stop(other, 1)).exit_code == 143
    await node.remove(other)


async def test_a_crash_at_any_moment_leaves_a_container_as_it_was_or_reclaimed(start: Start, home: Path) -> None:
    centre = new_id("centre")
    state = home / "node"
    outcomes = set()
    number = 1
    with start() as running:
        async with connected(running, centre) as node:
            owner, one, container, _ = await working(node, state)
        for wait_ms in (0, 15, 30, 45, 60, 75, 90, 120, 160, 250):
            async with connected(running, centre) as node:
                asking = asyncio.create_task(reclaim(node, owner, _CHECKPOINT))
                await asyncio.wait([asking], timeout=wait_ms / 1000)
                running.kill()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await asking
            with start() as again:
                async with connected(again, centre) as node:
                    (living,) = await node.containers()
                    assert living.pid == container.pid
                    reclaimed = not living.slice_uuids
                    outcomes.add(reclaimed)
                    assert living.checkpointed == reclaimed
                    if reclaimed:
                        await node.attach(owner, one)
                        # A restore that is cut off is finished at the next start.
                        asking_back = asyncio.create_task(resume(node, owner))
                        await asyncio.wait([asking_back], timeout=wait_ms / 2000)
                        again.kill()
                        with contextlib.suppress(grpc.aio.AioRpcError):
                            await asking_back
            with start() as third:
                async with connected(third, centre) as node:
                    await resume(node, owner)
                    (living,) = await node.containers()
                    assert (living.checkpointed, list(living.slice_uuids)) == (False, [one.uuid])
                    says = Watched(node, owner)
                    step(state, owner, number)
                    await says.sees(f"step {number} True")
                    number += 1
                third.kill()
            context = start()
            running = context.__enter__()
            if wait_ms == 250:
                async with connected(running, centre) as node:
                    await node.clear()
                context.__exit__(None, None, None)
    assert outcomes == {True, False}
