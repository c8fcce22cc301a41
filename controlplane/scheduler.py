"""Places waiting jobs as soon as something has changed. `schedule` decides; this reserves and starts."""

from __future__ import annotations

import asyncio
import bisect
import contextlib

import structlog

from controlplane import happenings
from controlplane.attempts import Attempts
from controlplane.faults import retry_delay_s
from controlplane.jobs import transition
from controlplane.nodes import Nodes
from controlplane.placement import Decision
from controlplane.records import Change, Decide, JobRecord, Reservation
from controlplane.reservations import Reservations
from controlplane.schedule import Plan, QueuedJob, make_plan
from controlplane.sizing import need_of, sizing_for
from controlplane.store import Store
from puhui.rpc.moment import moment, now
from puhui.v1 import job_pb2
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["Scheduler"]

_log = structlog.get_logger(__name__)


class Scheduler:
    """The queue of a centre."""

    def __init__(self, store: Store, nodes: Nodes, reservations: Reservations, patience_s: float) -> None:
        self._store = store
        self._nodes = nodes
        self._reservations = reservations
        self._patience_s = patience_s
        self._queue: list[QueuedJob] = []
        self._told: set[str] = set()
        self._waiting: dict[str, str] = {}
        self._wake = asyncio.Event()

    def add(self, record: JobRecord) -> None:
        """A job waits."""
        resources = record.job.spec.resources
        prediction = record.job.prediction if record.job.HasField("prediction") else None
        _, profile, required_mib = need_of(resources, prediction)
        attempts = record.job.attempts
        queued = QueuedJob(
            record.id,
            record.job.spec.priority,
            record.sequence,
            profile,
            required_mib,
            moment(record.job.create_time),
            now() + retry_delay_s(len(attempts)) if attempts else 0.0,
        )
        bisect.insort(self._queue, queued, key=lambda job: job.rank)
        self.wake()

    def put_back(self, record: JobRecord) -> None:
        """A driver is done with a job: it waits again, or has ended."""
        if record.state == job_pb2.JOB_STATE_QUEUED:
            self.add(record)
        else:
            self.wake()

    def remove(self, job_id: str) -> None:
        """A job waits no longer."""
        self._queue = [job for job in self._queue if job.id != job_id]
        self._waiting.pop(job_id, None)
        self.wake()

    def wake(self) -> None:
        """Something has changed that may let a job start."""
        self._wake.set()

    @property
    def queued(self) -> int:
        """Number of jobs that wait."""
        return len(self._queue)

    def why_waiting(self, job_id: str) -> str:
        """Returns why a job waits, in a sentence; "" when it has not been looked at yet."""
        return self._waiting.get(job_id, "")

    async def run(self, attempts: Attempts) -> None:
        """Places jobs for ever."""
        while True:
            self._wake.clear()
            try:
                wake_at = await self._place(attempts)
            except Exception as error:  # noqa: BLE001 - the queue must live on
                _log.error("placing failed; trying again", exc_info=error)
                wake_at = now() + 1.0
            timeout_s = None if wake_at is None else max(0.01, wake_at - now())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout_s)

    async def _place(self, attempts: Attempts) -> float | None:
        if not self._queue:
            self._waiting.clear()
            return None
        plan = make_plan(self._queue, self._nodes.gpus(), now(), self._patience_s, nodes_known=len(self._nodes))
        self._waiting = plan.waiting
        placed = {job.id for job, _, _ in plan.placed}
        self._queue = [job for job in self._queue if job.id not in placed]
        # Told of together, they share one commit.
        await asyncio.gather(
            *(self._reserve(job, decision, choices, attempts) for job, decision, choices in plan.placed),
            self._tell(plan),
        )
        return plan.wake_at

    async def _reserve(
        self, queued: QueuedJob, decision: Decision, choices: list[ProfileChoice], attempts: Attempts
    ) -> None:
        gpu, shape = decision.gpu, decision.shape

        def decide(record: JobRecord, token: int) -> Change | None:
            if record.state != job_pb2.JOB_STATE_QUEUED:
                return None
            attempt = job_pb2.Attempt(
                fencing_token=token,
                node_id=gpu.node_id,
                gpu_uuid=gpu.gpu_uuid,
                gpu_index=gpu.gpu_index,
                gpu_model=gpu.geometry.gpu_model,
                profile=shape.profile,
                emulated=gpu.emulated,
            )
            attempt.placement.start, attempt.placement.size = decision.start, shape.size
            happening = happenings.Reserved(attempt, sizing_for(record.job, choices), gpu.node_name)
            after, event = transition(record, happening, now())
            return Change(after, (event,), reserve=reservation(len(after.job.attempts)), token_taken=True)

        def reservation(number: int) -> Reservation:
            return Reservation(
                queued.id,
                number,
                gpu.node_id,
                gpu.gpu_uuid,
                shape.profile,
                decision.start,
                shape.size,
                shape.compute_slices,
                shape.memory_mib,
            )

        try:
            record = await self._store.change_job(queued.id, decide)
        except BaseException:
            bisect.insort(self._queue, queued, key=lambda job: job.rank)
            raise
        if record.state == job_pb2.JOB_STATE_STARTING:
            self._reservations.hold(reservation(len(record.job.attempts)))
            attempts.drive(record)

    async def _tell(self, plan: Plan) -> None:
        """Stores, once for each wait of a job, that it waits and why."""
        fresh = [(job_id, why) for job_id, why in plan.waiting.items() if job_id not in self._told]
        self._told = set(plan.waiting)
        await asyncio.gather(*(self._store.change_job(job_id, _telling(why)) for job_id, why in fresh))


def _telling(why: str) -> Decide:
    def decide(record: JobRecord, _: int) -> Change | None:
        # After a restart of the control plane it has been told already.
        if record.state != job_pb2.JOB_STATE_QUEUED or record.job.reason == "WAITING_FOR_SLICE":
            return None
        after, event = transition(record, happenings.Waits(why), now())
        return Change(after, (event,))

    return decide
