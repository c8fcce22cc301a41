"""One container that does not go keeps a daemon from nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nodedaemon.recovery import Recovery
from nodedaemon.slice_recovery import SliceRecovery
from puhui.v1.node_pb2 import NodeEvent
from tests.unit.node.test_containers import opened


async def test_a_container_that_cannot_be_removed_does_not_stop_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await bench.create("python3", "wait.py")
        (container,) = bench.containers.describe_all()
        # The journal lost it, say, and now nobody owns it.
        bench.journal.delete_container(bench.journal.containers()[0].owner)
        bench.runtime.fault = "before remove"
        slices = SliceRecovery(bench.journal, bench.events, bench.gpus, bench.slices)
        recovery = Recovery(bench.journal, bench.events, bench.containers, bench.runtime, slices)
        await asyncio.wait_for(recovery.run(), 5)
        told = [NodeEvent.FromString(message) for _, message in bench.journal.events(0, 100)]
        assert any(one.reason == "RUNTIME_REFUSED" and container.id[:12] in one.message for one in told)
        # The next start removes it.
        await recovery.run()
        assert await bench.runtime.containers() == []
