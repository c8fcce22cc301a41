"""Events and output have no gap and no repetition over killed daemons, and what is done by hand is seen."""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc
import pytest

from puhui.rpc.identity import new_id
from puhui.v1.node_pb2 import NodeEvent, NodeEventKind
from puhui.v1.node_service_pb2 import NodeServiceReadLogsRequest
from tests.integration.node.client import Node
from tests.integration.node.conftest import Start, podman
from tests.integration.node.test_restart import connected

pytestmark = pytest.mark.podman

_LINES = 60_000
_QUICK = f"""
import sys, time
for n in range({_LINES}):
    print(n)
    if n % 100 == 0:
        sys.stdout.flush()
        time.sleep(.005)
"""


async def test_a_container_removed_by_hand_is_noticed_and_frees_its_slice(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    container = await node.start(owner, "import time; time.sleep(600)", slices=[one])
    podman("rm", "--force", "--time", "0", container.id)
    event = await node.exited(owner)
    assert event.reason in ("COMMAND_ENDED", "CONTAINER_LOST")
    await node.destroy(owner, one)
    assert await node.slices() == []


async def test_a_container_stopped_by_hand_is_noticed(node: Node) -> None:
    owner = node.attempt()
    container = await node.start(owner, "import time; time.sleep(600)")
    podman("kill", "--signal", "KILL", container.id)
    assert (await node.exited(owner)).container.exit_code == 137


async def test_events_are_resumed_over_killed_daemons(start: Start) -> None:
    centre = new_id("centre")
    seen: list[NodeEvent] = []
    for life in range(4):
        with start() as running:
            async with connected(running, centre) as node:
                after = seen[-1].cursor if seen else 0

                async def watch(node: Node = node, after: int = after) -> None:
                    with contextlib.suppress(grpc.aio.AioRpcError, AssertionError):
                        async for event in node.events(after=after):
                            seen.append(event)  # noqa: PERF401 - what came before the break counts

                watching = asyncio.create_task(watch())
                working = [asyncio.create_task(node.run(f"print({life}, {n})")) for n in range(4)]
                await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
                running.kill()
                await asyncio.gather(*working, return_exceptions=True)
                await watching
    with start() as running:
        async with connected(running, centre) as node:
            # What is kept is what was told live.
            kept = []
            async for event in node.events():
                kept.append(event.cursor)
                if len(kept) == len(seen):
                    break
            await node.clear()
    assert [event.cursor for event in seen] == kept == list(range(1, len(seen) + 1))
    ends = [event.owner.job_id for event in seen if event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_EXITED]
    assert len(ends) == len(set(ends))


async def test_output_that_is_followed_over_killed_daemons_is_exactly_what_was_written(start: Start) -> None:
    centre, output, kills = new_id("centre"), b"", 0
    expected = b"".join(b"%d\n" % n for n in range(_LINES))
    chance = random.Random(3)
    owner = None
    while True:
        with start() as running:
            async with connected(running, centre) as node:
                if owner is None:
                    owner = node.attempt()
                    await node.start(owner, _QUICK)
                stop_at = len(output) + chance.randrange(1, 60_000) if kills < 4 else len(expected) + 1
                request = NodeServiceReadLogsRequest(owner=owner, offset=len(output), follow=True)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for response in node.stub.ReadLogs(request, timeout=60):
                        assert response.chunk.offset == len(output)
                        output += response.chunk.data
                        if len(output) >= stop_at and running.process.poll() is None:
                            running.kill()
                            kills += 1
                if running.process.poll() is None:
                    await node.clear()
                    break
    assert kills >= 3
    assert output == expected
