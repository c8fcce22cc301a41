"""What it is to a waiting job that a share was found for it. Pure."""

from __future__ import annotations

from controlplane import happenings
from controlplane.happenings import Happening
from controlplane.jobs import transition
from controlplane.placement import Decision
from controlplane.records import Change, JobRecord, Reservation, TakeOver
from controlplane.schedule import QueuedJob
from controlplane.sizing import sizing_for
from puhui.rpc.moment import now
from puhui.v1 import job_pb2
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["WAITING_STATES", "reserve"]

WAITING_STATES = frozenset({job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RESUMING})
"""States of a job that somebody waits for to have a share."""


def reserve(
    record: JobRecord, token: int, queued: QueuedJob, decision: Decision, choices: list[ProfileChoice]
) -> Change | None:
    """Returns the change that gives a job its share; None when it waits for none any longer.

    Args:
        record: the job, as it is stored now.
        token: the next fencing token.
        queued: the job, as it was in the queue.
        decision: which share.
        choices: the profiles that would do.
    """
    rests = queued.rest and record.state == job_pb2.JOB_STATE_IDLE and not record.parked
    if record.cancel_requested or not (rests or record.state in WAITING_STATES):
        return None
    take_over = TakeOver(*decision.take_over, decision.slice_uuid) if decision.take_over is not None else None
    events = []
    if rests:
        record, event = transition(record, happenings.ResumeRequested("ROOM"), now())
        events.append(event)
    after, event = transition(record, _happening(record, token, decision, choices, take_over), now())
    gpu, shape = decision.gpu, decision.shape
    made = Reservation(
        queued.id,
        len(after.job.attempts),
        gpu.node_id,
        gpu.gpu_uuid,
        shape.profile,
        decision.start,
        shape.size,
        shape.compute_slices,
        shape.memory_mib,
        queued.tenant,
    )
    return Change(after, (*events, event), reserve=made, take_over=decision.take_over, token_taken=True)


def _happening(
    record: JobRecord, token: int, decision: Decision, choices: list[ProfileChoice], take_over: TakeOver | None
) -> Happening:
    attempt, name = _attempt_on(decision, token), decision.gpu.node_name
    if record.state == job_pb2.JOB_STATE_QUEUED:
        return happenings.Reserved(attempt, sizing_for(record.job, choices), name, take_over)
    if decision.move or record.restart:
        return happenings.Moves(attempt, name, take_over)
    return happenings.ShareReserved(attempt, name, take_over)


def _attempt_on(decision: Decision, token: int) -> job_pb2.Attempt:
    """Returns an attempt with the share that was decided upon."""
    gpu, shape = decision.gpu, decision.shape
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
    return attempt
