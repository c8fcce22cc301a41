"""Containers that use their cards, or do not: real processes in real rootless containers, over emulated cards."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from nodedaemon.emulation import Fault, Operator
from puhui.rpc.identity import new_id
from puhui.rpc.moment import duration, moment
from puhui.v1.card_pb2 import AttemptRef
from puhui.v1.idle_pb2 import IdleWatch
from puhui.v1.node_pb2 import Container, NodeEvent, NodeEventKind
from puhui.v1.node_service_pb2 import ResumeContainerRequest, SuspendContainerRequest
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import Start
from tests.integration.node.watched import connected

pytestmark = pytest.mark.podman

_IDLE = NodeEventKind.NODE_EVENT_KIND_CONTAINER_IDLE
_BUSY = NodeEventKind.NODE_EVENT_KIND_CONTAINER_BUSY
_EXITED = NodeEventKind.NODE_EVENT_KIND_CONTAINER_EXITED

# Opens its card, computes while /workspace/work is there, sleeps holding the card otherwise, and lets go of it when
# /workspace/let-go is there.
_CODE = """
import os, time
held = []
said = ''
def say(word):
    global said
    if word != said:
        said = word
        print(word, flush=True)
while not os.path.exists('/workspace/end'):
    caps = [] if os.path.exists('/workspace/let-go') else os.listdir(os.environ['PUHUI_CAPS'])
    if bool(caps) != bool(held):
        for one in held:
            one.close()
        held = [open(os.environ['PUHUI_CAPS'] + '/' + name) for name in caps]
    say('working' if os.path.exists('/workspace/work') else 'holding' if held else 'free')
    until = time.monotonic() + .05
    while os.path.exists('/workspace/work') and time.monotonic() < until:
        pass
    if not os.path.exists('/workspace/work'):
        time.sleep(.05)
"""


def watching(idle_after_s: float = 1.0, start_grace_s: float = 0.0) -> IdleWatch:
    return IdleWatch(idle_after=duration(idle_after_s), idle_below_percent=3, start_grace=duration(start_grace_s))


def order(state: Path, owner: AttemptRef, name: str) -> Path:
    """Returns the file in a container's workspace by which it is told what to do."""
    return state / "attempts" / owner.centre / owner.job_id / str(owner.attempt) / "workspace" / name


async def next_event(
    node: Node, owner: AttemptRef, kind: NodeEventKind.ValueType, after: NodeEvent | None = None
) -> NodeEvent:
    async for event in node.events(after.cursor if after else 0):
        if event.owner.job_id == owner.job_id and event.kind == kind:
            return event
    raise AssertionError("the event stream ended")


async def container_of(node: Node, owner: AttemptRef) -> Container:
    return next(one for one in await node.containers() if one.owner.job_id == owner.job_id)


async def test_who_computes_is_busy_and_who_sleeps_with_its_card_is_idle(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    created = await node.start(owner, _CODE, slices=[one], idle_watch=watching())
    assert created.idleness.held_seconds < 5
    assert not created.idleness.idle
    told = await next_event(node, owner, _IDLE)
    idleness = told.container.idleness
    assert (idleness.idle, idleness.signal, told.reason) == (True, "multiprocessors", "CARDS_UNUSED")
    assert "has not used its card since" in told.message
    assert "(below 3 %)" in told.message
    assert 1.0 <= moment(told.time) - moment(idleness.unused_since) < 5
    assert (await container_of(node, owner)).idleness.idle

    order(state, owner, "work").touch()
    told = await next_event(node, owner, _BUSY, told)
    assert told.container.idleness.signal in ("multiprocessors", "engine")
    assert not told.container.idleness.HasField("unused_since")
    order(state, owner, "work").unlink()
    told = await next_event(node, owner, _IDLE, told)
    assert 0 < told.container.idleness.busy_seconds < told.container.idleness.held_seconds
    order(state, owner, "end").touch()
    ended = (await next_event(node, owner, _EXITED)).container.idleness
    assert (ended.idle, ended.signal) == (False, "")
    assert ended.held_seconds >= told.container.idleness.held_seconds
    assert ended.busy_seconds >= told.container.idleness.busy_seconds


async def test_before_hopper_only_who_lets_go_of_its_card_is_idle(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner, gpu=1)
    # Watched beside one with GPM, which is idle after the same time: this one would be by then.
    beside = node.attempt()
    other = await node.cut(beside)
    await node.start(owner, _CODE, slices=[one], idle_watch=watching())
    await node.said(owner, b"holding\n")
    await node.start(beside, _CODE, slices=[other], idle_watch=watching(2.0))
    await next_event(node, beside, _IDLE)
    idleness = (await container_of(node, owner)).idleness
    assert (idleness.idle, idleness.signal) == (False, "processes")
    assert "1 process holds its card" in idleness.message
    order(state, owner, "let-go").touch()
    told = (await next_event(node, owner, _IDLE)).container.idleness
    assert (told.signal, told.message.rpartition(": ")[2]) == ("processes", "no process holds it")


async def test_a_container_that_has_not_begun_is_busy_for_its_grace(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    created = await node.start(
        owner, "import time; time.sleep(600)", slices=[one], idle_watch=watching(0.5, start_grace_s=2.5), stop_grace_s=0
    )
    told = await next_event(node, owner, _IDLE)
    assert moment(told.container.idleness.unused_since) - moment(created.start_time) >= 2.5
    assert told.container.idleness.busy_seconds < 2.5


async def test_what_cannot_be_read_is_busy_and_said_to_be(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    await node.start(owner, _CODE, slices=[one], idle_watch=watching())
    told = await next_event(node, owner, _IDLE)
    operator = Operator.of_existing(state / "emulation")
    operator.inject(Fault("nvmlGpmMigSampleGet", 999, count=100_000))
    try:
        told = await next_event(node, owner, _BUSY, told)
        assert (told.container.idleness.signal, told.reason) == ("unavailable", "CARDS_NOT_SEEN")
    finally:
        operator.clear_faults()
    await next_event(node, owner, _IDLE, told)


async def test_without_a_card_or_frozen_nobody_is_idle(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    await node.start(owner, _CODE, slices=[one], idle_watch=watching())
    told = await next_event(node, owner, _IDLE)
    frozen = (await node.stub.SuspendContainer(SuspendContainerRequest(owner=owner), timeout=30)).container
    assert (frozen.idleness.idle, frozen.idleness.signal) == (False, "")
    thawed = (await node.stub.ResumeContainer(ResumeContainerRequest(owner=owner), timeout=30)).container
    assert thawed.idleness.held_seconds >= frozen.idleness.held_seconds
    told = await next_event(node, owner, _IDLE, told)
    order(state, owner, "let-go").touch()
    await node.said(owner, b"holding\nfree\n")
    without = (await node.detach(owner, one)).idleness
    assert (without.idle, without.message) == (False, "has no card")
    assert (await container_of(node, owner)).idleness.held_seconds == pytest.approx(without.held_seconds, abs=0.5)
    again = (await node.attach(owner, one)).idleness
    assert not again.idle
    told = await next_event(node, owner, _IDLE, told)
    assert told.container.idleness.held_seconds >= without.held_seconds + 1


async def test_a_watch_too_short_is_refused_and_nobody_is_watched_unasked(node: Node) -> None:
    owner = node.attempt()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "IDLE_AFTER_TOO_SHORT") as refusal:
        await node.start(owner, _CODE, idle_watch=watching(0.2))
    assert "3 samples" in refusal.message
    assert await node.containers() == []
    assert not (await node.start(owner, _CODE)).HasField("idleness")


async def test_the_watch_goes_on_after_the_daemon_was_killed(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner = node.attempt()
            one = await node.cut(owner)
            await node.start(owner, _CODE, slices=[one], idle_watch=watching())
            before = await next_event(node, owner, _IDLE)
        first.kill()
    with start() as second:
        async with connected(second, centre) as node:
            now = (await container_of(node, owner)).idleness
            assert now.held_seconds >= before.container.idleness.held_seconds
            after = await next_event(node, owner, _IDLE, before)
            idleness = after.container.idleness
            # What was not seen is unknown: the clock began anew.
            assert moment(idleness.unused_since) > moment(before.time)
            assert idleness.held_seconds == pytest.approx(
                before.container.idleness.held_seconds + moment(after.time) - moment(before.time), abs=1
            )
            assert idleness.busy_seconds >= before.container.idleness.busy_seconds
            await node.clear()
