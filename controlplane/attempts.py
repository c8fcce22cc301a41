"""Every attempt that is being driven, one task each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from controlplane.attempt_driver import AttemptDriver, Surroundings
from controlplane.jobs import PLACED_STATES
from controlplane.records import JobRecord

__all__ = ["Attempts"]

_log = structlog.get_logger(__name__)


class Attempts:
    """Starts, finds and ends drivers."""

    def __init__(self, around: Surroundings, requeued: Callable[[JobRecord], None]) -> None:
        self._around = around
        self._requeued = requeued
        self._drivers: dict[tuple[str, int], AttemptDriver] = {}
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
        driver = AttemptDriver(self._around, record, number)
        self._drivers[key] = driver
        self._tasks[key] = asyncio.create_task(self._run(key, driver, adopt), name=f"attempt {record.id}/{number}")

    async def _run(self, key: tuple[str, int], driver: AttemptDriver, adopt: bool) -> None:
        try:
            record = await driver.run(adopt=adopt)
        except Exception as error:  # noqa: BLE001 - one attempt must not end the others
            _log.error("an attempt could not be driven on", job=key[0], attempt=key[1], exc_info=error)
            return
        finally:
            self._drivers.pop(key, None)
            self._tasks.pop(key, None)
        if record.state not in PLACED_STATES:
            self._requeued(record)

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
