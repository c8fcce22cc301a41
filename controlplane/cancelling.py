"""Ends jobs by request: of their users, of peers, and of leases that have run out."""

from __future__ import annotations

from controlplane import happenings
from controlplane.attempts import Attempts
from controlplane.jobs import FINAL_STATES, transition
from controlplane.records import Change, JobRecord, Request
from controlplane.scheduler import Scheduler
from controlplane.store import Store
from puhui.rpc.moment import now

__all__ = ["Cancelling"]

_MOST_MESSAGE = 1000


class Cancelling:
    """Ends jobs.

    Args:
        store: where they are.
        scheduler: where they wait.
        attempts: who drives them.
    """

    def __init__(self, store: Store, scheduler: Scheduler, attempts: Attempts) -> None:
        self._store = store
        self._scheduler = scheduler
        self._attempts = attempts

    async def end(
        self, job_id: str, message: str, *, reason: str = "CANCELLED", noted: Request | None = None
    ) -> JobRecord:
        """Has a job ended, unless it has ended or that was asked for before. Use it inside `Lasting.do`.

        Args:
            job_id: the job.
            message: why, for people.
            reason: why, for programs.
            noted: the request that says so, if it had an id.

        Raises:
            KeyError: there is no such job.
            RequestReused: the request id came with another body before.
        """

        def decide(record: JobRecord, _: int) -> Change | None:
            if record.state in FINAL_STATES or record.cancel_requested:
                return Change(record, request=noted) if noted is not None else None
            asked = happenings.CancelRequested(message[:_MOST_MESSAGE], reason)
            after, event = transition(record, asked, now())
            return Change(after, (event,), request=noted)

        record = await self._store.change_job(job_id, decide)
        if record.state in FINAL_STATES:
            self._scheduler.remove(record.id)
        else:
            self._attempts.cancel(record.id)
        return record
