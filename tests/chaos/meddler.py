"""What happens to a node that nobody asked for: foreign slices, deletions by hand, a driver and helpers that fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.chaos.victim import Victim
from tests.chaos.worker import Worker

_PAUSE_S = 0.4
# Calls of the driver that go wrong now and then, and how.
_FAULTS = (
    ("nvmlDeviceCreateGpuInstanceWithPlacement", "UNKNOWN"),
    ("nvmlGpuInstanceCreateComputeInstance", "INSUFFICIENT_RESOURCES"),
    ("nvmlGpuInstanceCreateComputeInstance", "UNKNOWN"),
    ("nvmlComputeInstanceDestroy", "UNKNOWN"),
    ("nvmlGpuInstanceDestroy", "UNKNOWN"),
    ("nvmlGpuInstanceGetComputeInstances", "GPU_IS_LOST"),
)


async def run(*command: str) -> int:
    """Runs a program to its end, and returns its exit code."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


class Meddler:
    """Somebody who does harm at random moments.

    Attributes:
        did: how often each harm was done.
    """

    def __init__(self, victim: Victim, workers: Sequence[Worker], cards: str, seed: int) -> None:
        self.did: Counter[str] = Counter()
        self._victim = victim
        self._workers = workers
        self._cards = cards
        self._seed = seed
        self._chance = random.Random(seed)
        self._outsider: asyncio.subprocess.Process | None = None
        self._harm: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Starts the process that makes foreign slices."""
        self._outsider = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.outsider"),
            *(str(self._victim.state / "emulation"), self._cards, str(self._seed)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )

    async def meddle(self) -> None:
        """Does harm until cancelled."""
        harms = {self._foreign: 8, self._take_slice: 2, self._take_container: 1, self._fault: 1, self._help_dies: 2}
        while True:
            await asyncio.sleep(self._chance.random() * _PAUSE_S)
            (harm,) = self._chance.choices(list(harms), list(harms.values()))
            # Done to its end: what was begun by hand is known as done by hand.
            self._harm = asyncio.ensure_future(harm())
            await asyncio.shield(self._harm)

    async def stop(self) -> list[list[Any]]:
        """Stops doing harm, and returns the foreign slices that are there now: GPU, GPU instance and UUID of each."""
        if self._harm is not None:
            await self._harm
        await run(*self._operator("fault", "clear"))
        return list(await self.ask(do="own"))

    async def close(self) -> None:
        """Ends the process that makes foreign slices."""
        if self._harm is not None:
            await asyncio.gather(self._harm, return_exceptions=True)
        assert self._outsider is not None
        assert self._outsider.stdin is not None
        self._outsider.stdin.close()
        assert await self._outsider.wait() == 0

    async def ask(self, **deed: Any) -> Any:
        """Has the outsider do something, and returns what came of it."""
        assert self._outsider is not None
        assert self._outsider.stdin is not None
        assert self._outsider.stdout is not None
        self._outsider.stdin.write(json.dumps(deed).encode() + b"\n")
        return json.loads(await self._outsider.stdout.readline())

    def _operator(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "nodedaemon", "emulation", *arguments, "--state", str(self._victim.state)]

    async def _foreign(self) -> None:
        said = await self.ask(do="meddle")
        self.did[f"foreign {said.split()[0]}"] += 1

    async def _take_slice(self) -> None:
        worker = self._chance.choice(self._workers)
        if not worker.slices:
            return
        one = self._chance.choice(worker.slices)
        worker.exempt.add(one.uuid)
        if await self.ask(do="destroy", gpu=one.gpu_uuid, gi=one.gpu_instance_id, uuid=one.uuid):
            self.did["slice destroyed by hand"] += 1

    async def _take_container(self) -> None:
        worker = self._chance.choice(self._workers)
        if worker.container is None:
            return
        container_id = worker.container.id
        worker.exempt.add(container_id)
        remove = ("rm", "--force", "--time", "0", container_id)
        if await run(sys.executable, "-m", "nodedaemon", "podman", "--", *remove) == 0:
            self.did["container removed by hand"] += 1

    async def _fault(self) -> None:
        function, code = self._chance.choice(_FAULTS)
        count = str(self._chance.randint(1, 2))
        if await run(*self._operator("fault", "add", function, "--code", code, "--count", count)) == 0:
            self.did["fault of the driver"] += 1

    async def _help_dies(self) -> None:
        if not self._victim.serves():
            return
        service = self._chance.random() < 0.5
        for pid in [self._victim.service()] if service else self._victim.mounters():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.did["podman service killed" if service else "mounter killed"] += 1
