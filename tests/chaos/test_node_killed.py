"""A node daemon is killed a hundred times during real work, and in the end nothing is leaked and nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import SliceState
from puhui.v1.node_pb2 import NodeEvent
from tests.chaos.meddler import Meddler
from tests.chaos.traces import mounts_about, processes_about, unfinished
from tests.chaos.victim import Victim
from tests.chaos.witness import Witness
from tests.chaos.worker import Worker
from tests.daemons import open_folder
from tests.integration.node.client import Node
from tests.integration.node.conftest import containers_of, podman

pytestmark = [pytest.mark.podman, pytest.mark.timeout(1200)]

_KILLS = int(os.environ.get("PUHUI_CHAOS_KILLS", "100"))
_SEED = int(os.environ.get("PUHUI_CHAOS_SEED", str(random.SystemRandom().randrange(10**6))))
_CARDS = "H100-80GB-SXM5:2,A100-80GB:1"
_WORKERS = 3
_SHORTEST_LIFE_S, _LONGEST_LIFE_S = 0.005, 1.0
_EARLY = 0.2
_CONVERGED_S = 5.0
_FINISHED_S = 120.0


@dataclass
class _Chaos:
    """Everybody who takes part."""

    victim: Victim
    witness: Witness
    workers: list[Worker]
    meddler: Meddler
    enough: asyncio.Event
    working: list[asyncio.Task[None]]
    watching: asyncio.Task[None]

    async def kill(self) -> None:
        """Kills the daemon again and again, while the others do what they do."""
        chance = random.Random(_SEED)
        meddling = asyncio.create_task(self.meddler.meddle())
        everybody = [*self.working, self.watching, meddling]
        try:
            while self.victim.kills < _KILLS:
                if chance.random() < _EARLY:
                    await self.victim.die_early(chance.random() * _LONGEST_LIFE_S)
                async with self.victim.life():
                    life_s = chance.uniform(_SHORTEST_LIFE_S, _LONGEST_LIFE_S)
                    failed, _ = await asyncio.wait(everybody, timeout=life_s, return_when=asyncio.FIRST_COMPLETED)
                for task in failed:
                    task.result()
        finally:
            meddling.cancel()
            await asyncio.wait([meddling])

    async def finish(self) -> None:
        """Lets the attempts that have begun come to their ends."""
        self.enough.set()
        async with asyncio.timeout(_FINISHED_S):
            while unfinished := [task for task in self.working if not task.done()]:
                done, _ = await asyncio.wait([*unfinished, self.watching], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()

    def story(self) -> str:
        """Returns how it went, for people."""
        starts, attempts = self.victim.starts_s, sum(worker.done for worker in self.workers)
        return (
            f"seed {_SEED}: {self.victim.kills} kills, {attempts} attempts, {len(self.witness.events)} events over "
            f"{self.witness.resumed} broken streams, {dict(self.meddler.did)}; from start to convergence "
            f"{sum(starts) / len(starts):.2f} s in the mean, {max(starts):.2f} s at worst"
        )


@contextlib.asynccontextmanager
async def _chaos(home: Path, centre: str) -> AsyncIterator[_Chaos]:
    arguments = ["--listen", "127.0.0.1:0", "--emulate", _CARDS, "--runtime", "podman", "--log-level", "debug"]
    victim = Victim(home, arguments, centre)
    witness = Witness(victim)
    workers = [Worker(victim, witness, _SEED + number) for number in range(_WORKERS)]
    meddler, enough = Meddler(victim, workers, _CARDS, _SEED), asyncio.Event()
    async with victim.life():
        await meddler.start()  # the cards are there now
    working = [asyncio.create_task(worker.work(enough)) for worker in workers]
    watching = asyncio.create_task(witness.watch())
    try:
        yield _Chaos(victim, witness, workers, meddler, enough, working, watching)
    finally:
        for task in (watching, *working):
            task.cancel()
        await asyncio.gather(watching, *working, return_exceptions=True)
        await meddler.close()


async def test_nothing_is_leaked_and_nothing_lost(capsys: pytest.CaptureFixture[str]) -> None:
    centre, began = new_id("centre"), time.monotonic()
    with open_folder() as home:
        try:
            async with _chaos(home, centre) as chaos:
                await chaos.kill()
                foreign = await chaos.meddler.stop()
                async with chaos.victim.life(gentle_end=True) as node:
                    await chaos.finish()
                    await _until_only(node, foreign)
                    assert await node.containers() == []
                    assert containers_of(centre) == []
                    await _told_the_same(node, chaos.witness)
                    daemon_id = (await node.inventory()).daemon_id
                assert await chaos.meddler.ask(do="own") == foreign
        except BaseException:
            log = (home / "node.log").read_text().splitlines()
            _say(capsys, "\n".join([f"PUHUI_CHAOS_SEED={_SEED}; the daemon's log ends with:", *log[-40:]]))
            # What failed leaves its containers to nobody.
            for container in containers_of(centre):
                podman("rm", "--force", "--time", "0", container)
            raise
        ids = {event.container.id for event in chaos.witness.events if event.container.id}
        about = [str(home), centre, daemon_id, *ids]
        assert unfinished(chaos.victim.state / "node.db") == {}
        assert list((chaos.victim.state / "attempts").iterdir()) == []
        assert processes_about(about) == []
        assert mounts_about(about) == []
    slices, containers = chaos.witness.replay()
    assert (slices, containers) == (set(), set())
    _say(capsys, f"{chaos.story()}, {time.monotonic() - began:.0f} s altogether")
    assert chaos.victim.kills >= _KILLS
    assert max(chaos.victim.starts_s) <= _CONVERGED_S


def _say(capsys: pytest.CaptureFixture[str], words: str) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{words}\n")


async def _until_only(node: Node, foreign: list[list[object]]) -> None:
    """Waits until the daemon has no slice of its own: what it could not destroy at first it tries again by itself."""
    async with asyncio.timeout(20):
        while True:
            slices = await node.slices()
            if all(one.state == SliceState.SLICE_STATE_FOREIGN for one in slices):
                break
            await asyncio.sleep(0.1)
    assert sorted([one.gpu_uuid, one.gpu_instance_id, one.uuid] for one in slices) == foreign


async def _told_the_same(node: Node, witness: Witness) -> None:
    """What is read again from the beginning is what was told, piece by piece, over all lives."""
    again: list[NodeEvent] = []
    async for event in node.events():
        again.append(event)
        if event.cursor == witness.events[-1].cursor:
            break
    assert again == witness.events[: len(again)]
    assert [event.cursor for event in again] == list(range(1, len(again) + 1))
