"""Places waiting jobs as soon as something has changed. `schedule` decides; this reserves and starts."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import structlog

from controlplane import happenings
from controlplane.attempts import Attempts
from controlplane.eviction import Promise
from controlplane.faults import retry_delay_s
from controlplane.jobs import LIVING_STATES, transition
from controlplane.nodes import Nodes
from controlplane.placement import Decision
from controlplane.records import Change, Decide, JobRecord
from controlplane.reservations import AttemptKey, Reservations
from controlplane.reserving import WAITING_STATES, reserve
from controlplane.schedule import Plan, QueuedJob, make_plan
from controlplane.share_driver import rest_until
from controlplane.sizing import need_of
from controlplane.store import ShareTaken, Store
from controlplane.warm import WarmShares
from controlplane.watch import Feed
from puhui.rpc.moment import moment, now
from puhui.v1 import job_pb2
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["Scheduler"]

_log = structlog.get_logger(__name__)


class Scheduler:
    """The queue of a centre."""

    def __init__(
        self, store: Store, nodes: Nodes, reservations: Reservations, warm: WarmShares, feed: Feed, patience_s: float
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._reservations = reservations
        self._warm = warm
        self._feed = feed
        self._patience_s = patience_s
        self._queue: list[QueuedJob] = []
        self._placing: set[str] = set()
        self._keys: dict[str, AttemptKey] = {}
        """The newest attempt of every job that waits with a container, or a workspace, of its own."""
        self._told: set[str] = set()
        self._promised: Mapping[str, Promise] = {}
        self._waiting: dict[str, str] = {}
        self._wake = asyncio.Event()
        self.on_planned: Callable[[], None] = lambda: None
        """Called when it is known which jobs cannot be placed now."""

    def add(self, record: JobRecord) -> None:
        """A job waits: for its first share, or, with a container that lives, for another."""
        if record.id in self._placing:
            return
        resources = record.job.spec.resources
        prediction = record.job.prediction if record.job.HasField("prediction") else None
        _, profile, required_mib = need_of(resources, prediction)
        if record.job.spec.kind == job_pb2.JOB_KIND_SESSION and not profile:
            required_mib = required_mib or record.job.sizing.required_mib  # the centre's default
        if not profile:
            required_mib = max(required_mib, record.at_least_mib)
        queued = QueuedJob(
            record.id,
            record.job.spec.priority,
            record.sequence,
            profile,
            required_mib,
            moment(record.job.create_time),
            now() + retry_delay_s(record.failed_starts) if record.failed_starts else 0.0,
            tenant=record.job.spec.tenant,
        )
        self._keys.pop(record.id, None)
        if record.state in LIVING_STATES:
            queued = self._living(queued, record)
        known = next((job for job in self._queue if job.id == record.id), None)
        if known == queued:
            return
        if known is not None:
            self._queue.remove(known)
            self._told.discard(record.id)
        self._put(queued)
        self.wake()

    def _living(self, queued: QueuedJob, record: JobRecord) -> QueuedJob:
        """Returns the entry of a job whose container lives, or whose workspace is kept, on its node."""
        attempt, session = record.attempt, record.job.spec.kind == job_pb2.JOB_KIND_SESSION
        self._keys[record.id] = (record.id, attempt.number)
        link = self._nodes.link(attempt.node_id)
        container = link.containers.get((record.id, attempt.number)) if link is not None else None
        queued = replace(
            queued,
            since=record.idle_at,
            home=attempt.node_id,
            person=record.wake in ("RUN", "RESUME"),
            # What is frozen or checkpointed cannot be carried.
            may_move=session or record.restart,
            not_before=now() + retry_delay_s(record.failed_resumes) if record.failed_resumes else 0.0,
        )
        if container is not None and container.checkpointed:
            queued = replace(queued, profile=attempt.profile, gpu_model=attempt.gpu_model, may_move=False)
        if record.state == job_pb2.JOB_STATE_IDLE:
            queued = replace(queued, rest=True, not_before=rest_until(record))
        return queued

    def _put(self, queued: QueuedJob) -> None:
        bisect.insort(self._queue, queued, key=lambda job: job.rank)

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
        """Number of jobs that wait; those that only rest do not."""
        return sum(not job.rest for job in self._queue)

    @property
    def queue(self) -> Sequence[QueuedJob]:
        """Every job that waits, in the order of the queue."""
        return self._queue

    def why_waiting(self, job_id: str) -> str:
        """Returns why a job waits, in a sentence; "" when it has not been looked at yet."""
        return self._waiting.get(job_id, "")

    def place_of(self, job_id: str) -> int:
        """Returns a job's place in the queue, from 1; 0 when it does not wait."""
        return next((place for place, job in enumerate(self._queue, 1) if job.id == job_id), 0)

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
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()

    async def _place(self, attempts: Attempts) -> float | None:
        if not self._queue:
            self._waiting.clear()
            return None
        plan = make_plan(
            self._queue,
            self._nodes.gpus(),
            now(),
            self._patience_s,
            nodes_known=len(self._nodes),
            promised=self._promised,
        )
        self._waiting, self._promised = plan.waiting, plan.promised
        for key, for_job in plan.evict.items():
            self._evict(key, for_job)
        placed = {job.id for job, _, _ in plan.placed}
        self._queue = [job for job in self._queue if job.id not in placed]
        self._placing |= placed
        self._reservations.spoken_for.update(
            decision.take_over for _, decision, _ in plan.placed if decision.take_over is not None
        )
        # Told of together, they share one commit.
        await asyncio.gather(
            *(self._reserve(job, decision, choices, attempts) for job, decision, choices in plan.placed),
            self._tell(plan),
        )
        self.on_planned()
        return plan.wake_at

    def _evict(self, key: AttemptKey, for_job: str) -> None:
        """Has an idle share taken back, because a job waits for the room."""
        held = self._reservations.get(key)
        if held is not None and held.is_warm:
            self._warm.evict(key, for_job)
            return
        self._reservations.mark_leaving(key, for_job)
        # Whoever drives it looks at that.
        self._feed.publish([key[0]])

    async def _reserve(
        self, queued: QueuedJob, decision: Decision, choices: list[ProfileChoice], attempts: Attempts
    ) -> None:
        try:
            if self._has_to_wait(queued, decision):
                return
            done: Change | None = None

            def decide(record: JobRecord, token: int) -> Change | None:
                nonlocal done
                done = reserve(record, token, queued, decision, choices)
                return done

            try:
                record = await self._store.change_job(queued.id, decide)
            except ShareTaken as error:
                # Somebody else was faster; what is known of the node will say so in a moment.
                _log.info("a share was taken meanwhile", job=queued.id, why=str(error))
                self._put(replace(queued, not_before=now() + retry_delay_s(0)))
                self.wake()
                return
            except BaseException:
                self._put(queued)
                raise
            self._take(record, done, attempts)
        finally:
            self._placing.discard(queued.id)
            if decision.take_over is not None:
                self._reservations.spoken_for.discard(decision.take_over)
                self._warm.wake()

    def _has_to_wait(self, queued: QueuedJob, decision: Decision) -> bool:
        """Returns whether an attempt's last share has to go first: an attempt has one."""
        own = self._reservations.get(self._keys.get(queued.id, ("", 0)))
        if own is None or decision.take_over == own.key or decision.move:
            return False
        if own.is_warm:
            self._evict(own.key, queued.id)
            self._put(queued)
        return True

    def _take(self, record: JobRecord, done: Change | None, attempts: Attempts) -> None:
        """Notes a reservation that is stored, and has the share made real."""
        if done is None or done.reserve is None:
            return
        if done.take_over is not None:
            self._reservations.release(done.take_over)
        self._reservations.hold(done.reserve)
        if record.state == job_pb2.JOB_STATE_STARTING:
            attempts.drive(record, done.reserve.attempt)
        # Whoever drives a living container looked before this was held.
        self._feed.publish([record.id])

    async def _tell(self, plan: Plan) -> None:
        """Stores, once for each wait of a job, that it waits and why."""
        fresh = [(job_id, why) for job_id, why in plan.waiting.items() if job_id not in self._told]
        self._told = set(plan.waiting)
        await asyncio.gather(*(self._store.change_job(job_id, _telling(why)) for job_id, why in fresh))


def _telling(why: str) -> Decide:
    def decide(record: JobRecord, _: int) -> Change | None:
        # After a restart of the control plane it has been told already.
        if record.state not in WAITING_STATES or record.job.reason == "WAITING_FOR_SLICE":
            return None
        after, event = transition(record, happenings.Waits(why), now())
        return Change(after, (event,))

    return decide
