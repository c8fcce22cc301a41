"""Every attempt that is being driven, one task each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from controlplane.attempt_driver import AttemptDriver
from controlplane.faults import retry_delay_s
from controlplane.jobs import PLACED_STATES
from controlplane.peer_driver import PeerDriver
from controlplane.records import JobRecord
from controlplane.surroundings import Surroundings

__all__ = ["Attempts"]

_log = structlog.get_logger(__name__)


class Attempts:
    """Starts, finds and ends drivers."""

    def __init__(self, around: Surroundings, done: Callable[[JobRecord], None]) -> None:
        self._around = around
        self._done = done
        self._drivers: dict[tuple[str, int], AttemptDriver | PeerDriver] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    def drive(self, record: JobRecord, number: int = 0, *, adopt: bool = False) -> None:
        """Begins to drive an attempt.

        Args:
            record: the job.
            number: the attempt; 0 is the newest.
            adopt: its driver's process is gone.
        """
        number = number or len(record.job.attempts)
        key = (record.id, number)
        if key in self._tasks and not self._tasks[key].done():
            return
        driver = self._drivers[key] = self._driver(record, number)
        self._tasks[key] = asyncio.create_task(self._run(key, driver, adopt), name=f"attempt {record.id}/{number}")

    def _driver(self, record: JobRecord, number: int) -> AttemptDriver | PeerDriver:
        if not record.job.attempts[number - 1].peer:
            return AttemptDriver(self._around, record, number)
        if self._around.reach is None:
            raise RuntimeError(f"attempt {record.id}/{number} is at a peer, and this centre works with none")
        return PeerDriver(self._around, self._around.reach, record, number)

    async def _run(self, key: tuple[str, int], driver: AttemptDriver | PeerDriver, adopt: bool) -> None:
        tries = 0
        try:
            while True:
                try:
                    if tries:
                        driver = self._drivers[key] = await self._driver_again(key)
                    record = await driver.run(adopt=adopt or bool(tries))
                    break
                except Exception as error:  # noqa: BLE001 - whatever happens to one attempt, it is driven on
                    tries += 1
                    _log.error("an attempt met the unforeseen", job=key[0], attempt=key[1], exc_info=error)
                await asyncio.sleep(retry_delay_s(tries))
        finally:
            self._drivers.pop(key, None)
            self._tasks.pop(key, None)
        if record.state not in PLACED_STATES:
            self._done(record)

    async def _driver_again(self, key: tuple[str, int]) -> AttemptDriver | PeerDriver:
        """Returns a driver that goes on from what the store holds, as after a crash."""
        record = await self._around.store.job(key[0])
        if record is None:
            raise RuntimeError(f"job {key[0]} is driven, but not in the store")
        return self._driver(record, key[1])

    def cancel(self, job_id: str) -> None:
        """A job's end was asked for, and that is stored."""
        for key, driver in self._drivers.items():
            if key[0] == job_id:
                driver.cancel()

    @property
    def driven(self) -> int:
        """Number of attempts that are being driven."""
        return len(self._tasks)

    async def stop(self) -> None:
        """Ends all drivers where they are. The next start of the control plane goes on from there."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
