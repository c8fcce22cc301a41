"""What is stored of runs: that they began, how they ended, and how much of their share they used."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import structlog

from controlplane import happenings
from controlplane.draft import IllegalTransition
from controlplane.faults import retry_delay_s
from controlplane.happenings import Happening
from controlplane.jobs import transition
from controlplane.lasting import Lasting
from controlplane.metering import BusyCounted, RunBegun, RunEnded, UsageChange
from controlplane.nodes import Nodes
from controlplane.records import Change, JobRecord
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1 import job_pb2

__all__ = ["RunBook"]

_log = structlog.get_logger(__name__)

_COUNT_S = 1.0


class RunBook:
    """Writes down what becomes of the runs of one centre."""

    def __init__(self, centre: str, store: Store, nodes: Nodes, lasting: Lasting) -> None:
        self._centre = centre
        self._store = store
        self._nodes = nodes
        self._lasting = lasting
        self._telling: dict[str, asyncio.Task[None]] = {}
        """What is being stored of the start of a run, by its id."""
        self._counters: dict[str, float] = {}
        """For how long its container had used its cards when a run began, in seconds."""

    def tell_start(self, run: job_pb2.Run) -> None:
        """Stores that a run has started without keeping its output waiting for that."""
        task = asyncio.create_task(self.tell(run.job_id, happenings.RunStarted(run.id)))
        self._telling[run.id] = task
        task.add_done_callback(lambda _: self._telling.pop(run.id, None))

    async def over(self, run: job_pb2.Run, exit_code: int) -> None:
        """Stores how a run ended, after that it has begun."""
        telling = self._telling.get(run.id)
        if telling is not None:
            await asyncio.wait({telling})
        await self._lasting.do(self.tell(run.job_id, happenings.RunEnded(run.id, exit_code)))

    async def _counter_s(self, job_id: str) -> float | None:
        """Returns for how long a job's container has used its cards, in seconds; None when that cannot be had now."""
        record = await self._store.job(job_id)
        link = self._nodes.link(record.attempt.node_id) if record is not None and record.job.attempts else None
        if record is None or link is None:
            return None
        try:
            async with asyncio.timeout(_COUNT_S):
                containers = await link.client.list_containers()
        except (Refusal, TimeoutError):
            return None
        for container in containers:
            owner = container.owner
            if (owner.centre, owner.job_id, owner.attempt) == (self._centre, job_id, len(record.job.attempts)):
                return container.idleness.busy_seconds if container.HasField("idleness") else None
        return None

    async def tell(self, job_id: str, happening: Happening) -> None:
        """Stores what happened to a run, unless it cannot have; a full disk is waited out."""
        counter_s = await self._counter_s(job_id)
        if isinstance(happening, happenings.RunStarted) and counter_s is not None:
            self._counters[happening.run_id] = counter_s
        elif isinstance(happening, happenings.RunEnded):
            before = self._counters.pop(happening.run_id, None)
            if counter_s is not None and before is not None:
                happening = replace(happening, busy_s=max(0.0, counter_s - before))

        def decide(record: JobRecord, _: int) -> Change | None:
            known = {run.id: run for run in record.job.runs}
            if isinstance(happening, happenings.RunEnded):
                run = known.get(happening.run_id)
                if run is not None and run.HasField("end_time"):
                    return None
            try:
                after, event = transition(record, happening, now())
            except IllegalTransition as error:
                _log.warning("a run could not be told of", job=job_id, why=str(error))
                return None
            runs = tuple(run for run in after.job.runs if run != known.get(run.id))
            return Change(after, (event,), runs=runs, usage=_usage(happening, counter_s))

        tries = 0
        while True:
            try:
                await self._store.change_job(job_id, decide)
                return
            except OSError as error:
                tries += 1
                _log.error("the store cannot be written; trying again", job=job_id, why=str(error))
                await asyncio.sleep(retry_delay_s(tries))


def _usage(happening: Happening, counter_s: float | None) -> tuple[UsageChange, ...]:
    if isinstance(happening, happenings.RunStarted):
        return (RunBegun(happening.run_id, now(), counter_s),)
    if isinstance(happening, happenings.RunEnded):
        counted = (BusyCounted(counter_s),) if counter_s is not None else ()
        return (*counted, RunEnded(happening.run_id, now(), counter_s))
    return ()
