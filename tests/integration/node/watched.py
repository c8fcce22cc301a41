"""Containers that say which cap nodes they see, and what they should see."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from puhui.rpc.channel import open_channel
from puhui.v1.card_pb2 import AttemptRef, Slice
from puhui.v1.node_pb2 import Container, NodeEvent
from tests.daemons import Daemon
from tests.integration.node.client import Node

# Prints the nodes that it may open, whenever they change.
WATCHING = """
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


@contextlib.asynccontextmanager
async def connected(running: Daemon, centre: str) -> AsyncIterator[Node]:
    async with open_channel(running.address) as channel:
        yield Node(channel, centre)


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


def seen(container: Container) -> set[str]:
    """Returns the nodes that a living container sees, as the kernel shows its files."""
    here = Path(f"/proc/{container.pid}/root/dev/nvidia-caps")
    return {entry.name for entry in here.iterdir() if entry.stat().st_mode & 0o444}


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
