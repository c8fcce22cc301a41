"""What a centre expects: how long its waiting jobs will wait, and what it could do for one more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

import structlog

from controlplane.capacity import profile_capacity
from controlplane.durations import Estimate
from controlplane.fleet import Geometry, GpuView
from controlplane.queue_model import Expectation, expect
from controlplane.queued_job import QueuedJob
from controlplane.reservations import AttemptKey
from puhui.rpc.moment import duration, now
from puhui.v1 import federation_service_pb2, job_pb2

__all__ = ["LAST", "Fleet", "Guesses", "Outlook", "Queue"]

_log = structlog.get_logger(__name__)

LAST = 2**62
"""`sequence` of one that comes after all that wait."""

_AT_LEAST_S = 0.5
_COST_TO_AGE = 20.0
"""What the loop spends on this stays below a twentieth of its time."""
_MOST_WAITING = 2000
_REFRESH_S = 1.0


class Fleet(Protocol):
    """The GPUs of the centre; `Nodes` is one."""

    def gpus(self) -> list[GpuView]:
        """Returns every GPU that can be cut, with what is held of it."""


class Queue(Protocol):
    """The jobs that wait; `Scheduler` is one."""

    @property
    def queue(self) -> Sequence[QueuedJob]:
        """Every job that waits, in the order of the queue."""


class Guesses(Protocol):
    """How long jobs take; `Durations` is one."""

    async def refresh(self, held: Collection[AttemptKey], queued: Iterable[str]) -> None:
        """Reads what is not known yet."""

    def of_share(self, key: AttemptKey, at: float) -> Estimate:
        """Returns for how long an attempt still holds its share."""

    def of_job(self, job_id: str) -> Estimate:
        """Returns how long a waiting job is going to take once it has begun."""

    def of_spec(self, spec: job_pb2.JobSpec) -> Estimate:
        """Returns how long a job like this takes."""


class Outlook:
    """Answers from the queue model, with what the centre knows.

    Args:
        fleet: its GPUs.
        queue: its waiting jobs.
        durations: how long jobs take.
        patience_s: how long a waiting job lets itself be overtaken, in seconds.
        clock: seconds since the epoch.
        meter: seconds that only grow, to measure what an answer costs.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: Queue,
        durations: Guesses,
        patience_s: float,
        clock: Callable[[], float] = now,
        meter: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._queue = queue
        self._durations = durations
        self._patience_s = patience_s
        self._clock = clock
        self._meter = meter
        self._last: Expectation = Expectation()
        self._made_at = -float("inf")
        self._cost_s = 0.0
        self._read_at = -float("inf")

    async def refresh(self) -> None:
        """Reads how long jobs take, as far as that is not known yet; not again within half a second."""
        if self._meter() - self._read_at < _REFRESH_S / 2:
            return
        self._read_at = self._meter()
        held = {use.key for gpu in self._fleet.gpus() for use in gpu.uses if use.key is not None and not use.warm}
        await self._durations.refresh(held, [job.id for job in self._queue.queue[:_MOST_WAITING]])

    async def run(self) -> None:
        """Keeps up with how long jobs take, for ever."""
        while True:
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - it only guesses worse meanwhile
                _log.error("how long jobs take could not be read", exc_info=error)
            await asyncio.sleep(_REFRESH_S)

    @property
    def gpus(self) -> list[GpuView]:
        """Every GPU that can be cut."""
        return self._fleet.gpus()

    @property
    def geometries(self) -> list[Geometry]:
        """What the GPUs on which something may be placed now can be cut into."""
        return list(dict.fromkeys(gpu.geometry for gpu in self._fleet.gpus() if gpu.usable))

    def duration_s(self, spec: job_pb2.JobSpec) -> float | None:
        """Returns how long a job like this takes, in seconds; None when that is not known."""
        return self._durations.of_spec(spec).seconds

    def expect(
        self, promised: Sequence[QueuedJob], durations_s: Mapping[str, float], wondering: Iterable[QueuedJob]
    ) -> Expectation:
        """Returns how long jobs would wait, as of now.

        Args:
            promised: jobs that will come, behind those of their priority that wait already.
            durations_s: how long these are going to take, by id.
            wondering: jobs that only ask.
        """
        at = self._clock()
        return expect(
            self._fleet.gpus(),
            [*self._queue.queue, *promised],
            at,
            patience_s=self._patience_s,
            remaining_s=lambda key: self._durations.of_share(key, at).seconds,
            duration_s=lambda job: durations_s.get(job.id, self._durations.of_job(job.id).seconds),
            wondering=wondering,
        )

    def waits(self, jobs: Iterable[str] = ()) -> Expectation:
        """Returns how long the waiting jobs will wait; as of a moment ago, the longer ago the more it costs.

        Args:
            jobs: ids of jobs that are asked about; for one that came since, that moment is shorter.
        """
        at = self._meter()
        age_s, known = at - self._made_at, self._last.waits
        fresh_for_s = self._cost_s * _COST_TO_AGE
        if all(job_id in known for job_id in jobs):
            fresh_for_s = max(_AT_LEAST_S, fresh_for_s)
        if age_s > fresh_for_s:
            self._last = self.expect((), {}, self._one_of_each())
            self._made_at, self._cost_s = at, self._meter() - at
        return self._last

    def _one_of_each(self) -> list[QueuedJob]:
        names = {shape.profile for geometry in self.geometries for shape in geometry.shapes}
        at = self._clock()
        return [QueuedJob(f"?{name}", 0, LAST, name, 0, at) for name in sorted(names)]

    def summaries(self) -> list[federation_service_pb2.CapacitySummary]:
        """Returns what peers are told of this centre's capacity."""
        waits = self.waits()
        told = []
        for one in profile_capacity([gpu for gpu in self._fleet.gpus() if gpu.usable]):
            wait_s = waits.of(f"?{one.profile}").seconds
            told.append(
                federation_service_pb2.CapacitySummary(
                    gpu_model=one.gpu_model,
                    profile=one.profile,
                    free=one.free,
                    idle=one.idle,
                    expected_wait=duration(wait_s) if wait_s is not None else None,
                )
            )
        return told
