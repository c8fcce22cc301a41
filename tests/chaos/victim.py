"""A daemon that is killed again and again, and started again at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from puhui.rpc.channel import open_channel
from puhui.rpc.notify import ReadySocket
from puhui.v1.card_pb2 import SliceState
from puhui.v1.node_pb2 import ContainerState
from tests.integration.node.client import Node

_START_S = 30.0
_STOP_S = 20.0
_HALF_DONE = (SliceState.SLICE_STATE_CREATING, SliceState.SLICE_STATE_DESTROYING)


class Victim:
    """The daemon of one state directory over all its lives.

    Args:
        home: where its state is, in node/, and its log, node.log.
        arguments: how it is to serve, beside its state directory.
        centre: the centre whose control plane its clients are.

    Attributes:
        kills: how often it was killed.
        starts_s: how long each start took until everything that an earlier life had left was made good, in seconds.
    """

    def __init__(self, home: Path, arguments: Sequence[str], centre: str) -> None:
        self.state = home / "node"
        self.log = home / "node.log"
        self.kills = 0
        self.starts_s: list[float] = []
        self._centre = centre
        self._arguments = ["--state", str(self.state), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._serving = asyncio.Event()
        self._node: Node | None = None

    async def node(self) -> Node:
        """Returns a connection to the daemon of this moment, as soon as it serves."""
        await self._serving.wait()
        assert self._node is not None
        return self._node

    @contextlib.asynccontextmanager
    async def life(self, *, gentle_end: bool = False) -> AsyncIterator[Node]:
        """One life: it serves for the length of the block, and is killed at its end, or asked to stop."""
        began = time.monotonic()
        with self._born() as (process, ready):
            address = await asyncio.to_thread(ready.wait, process.pid, _START_S)
            channel = open_channel(address)
            try:
                node = Node(channel, self._centre)
                await self._converge(node, began + _START_S)
                self.starts_s.append(time.monotonic() - began)
                self._node = node
                self._serving.set()
                yield node
            finally:
                self._serving.clear()
                if gentle_end:
                    process.terminate()
                    assert await asyncio.to_thread(process.wait, _STOP_S) == 0
                else:
                    self._kill(process)
                # Calls that were cut off are to learn it from the daemon's death, not from this end.
                await channel.close(_STOP_S)

    async def die_early(self, after_s: float) -> bool:
        """One life that is cut short while the daemon starts. Says whether it had become ready before."""
        with self._born() as (process, ready):
            waiting = asyncio.ensure_future(asyncio.to_thread(ready.wait, process.pid, _START_S))
            await asyncio.wait([waiting], timeout=after_s)
            self._kill(process)
            with contextlib.suppress(ChildProcessError):
                await waiting
                return True
            return False

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kills it as a crash would. It must have lived until then."""
        assert process.poll() is None, f"it ended by itself, with {process.returncode}"
        process.kill()
        self.kills += 1

    @contextlib.contextmanager
    def _born(self) -> Iterator[tuple[subprocess.Popen[bytes], ReadySocket]]:
        with ReadySocket() as ready:
            with self.log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "nodedaemon", "serve", *self._arguments],
                    env={**os.environ, "NOTIFY_SOCKET": ready.path},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            self._process = process
            try:
                yield process, ready
            finally:
                process.kill()
                process.wait()

    async def _converge(self, node: Node, deadline: float) -> None:
        """Waits until nothing of an earlier life is half done."""
        while True:
            slices, containers = await node.slices(), await node.containers()
            half = [one for one in slices if one.state in _HALF_DONE]
            made = [one for one in containers if one.state == ContainerState.CONTAINER_STATE_CREATING]
            if not half and not made:
                return
            assert time.monotonic() < deadline, f"half done: {half} {made}"
            await asyncio.sleep(0.02)  # it tells only what is done

    def serves(self) -> bool:
        """Says whether it serves now."""
        return self._serving.is_set()

    def service(self) -> int:
        """Returns the process id of the podman service of this life."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if "podman service runs" in line]
        return int(lines[-1]["pid"])

    def mounters(self) -> list[int]:
        """Returns the processes of this life that mount nodes into containers."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return [pid for pid in map(int, children.read_text().split()) if _mounts(pid)]
        return []  # it has just died


def _mounts(pid: int) -> bool:
    return b"hotplug_mounter.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
