"""The life of a job: a pure state machine.

`transition` takes a job and something that happened, and returns the job afterwards with the event that
tells of it. What is not in the table below cannot happen; a final state is final.

    QUEUED    -> STARTING    a slice is reserved
    QUEUED    -> CANCELLED   somebody asked for it
    QUEUED    -> STARTING    it goes to a peer; there, `away` says what may follow
    STARTING  -> RUNNING     the container runs
    STARTING  -> QUEUED      the node could not do it; everything is rolled back
    STARTING  -> STOPPING    it cannot start, or somebody asked for its end
    RUNNING   -> IDLE        its share was taken back; the container lives on
    IDLE      -> RESUMING    a run instruction arrived, or it may go on
    RESUMING  -> RUNNING     it has a share again
    RESUMING  -> STARTING    it is made anew, elsewhere or because its command had to be ended
    RESUMING  -> IDLE        the run instruction was withdrawn
    RUNNING | IDLE | RESUMING -> STOPPING   the command ended, or somebody asked for its end
    STOPPING  -> QUEUED      it ran out of device memory, and is tried again on a larger slice
    STOPPING  -> SUCCEEDED | FAILED | CANCELLED   results are collected, everything is released
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from controlplane import away, finishing, sharing
from controlplane import happenings as h
from controlplane.away import AWAY_TRANSITIONS
from controlplane.draft import Draft, IllegalTransition, since_ms
from controlplane.happenings import Happening
from controlplane.records import JobRecord
from puhui.rpc.moment import timestamp
from puhui.v1 import job_pb2, node_pb2, prediction_pb2
from puhui.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_IDLE,
    JOB_STATE_QUEUED,
    JOB_STATE_RESUMING,
    JOB_STATE_RUNNING,
    JOB_STATE_STARTING,
    JOB_STATE_STOPPING,
    JOB_STATE_SUCCEEDED,
)

__all__ = ["FINAL_STATES", "LIVING_STATES", "PLACED_STATES", "TRANSITIONS", "IllegalTransition", "transition"]

State: TypeAlias = job_pb2.JobState.ValueType

FINAL_STATES = frozenset({JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED})
"""States that a job never leaves."""

LIVING_STATES = frozenset({JOB_STATE_RUNNING, JOB_STATE_IDLE, JOB_STATE_RESUMING})
"""States in which a container is there, or, after STOP, its workspace."""

PLACED_STATES = LIVING_STATES | {JOB_STATE_STARTING, JOB_STATE_STOPPING}
"""States in which an attempt is being driven."""

TRANSITIONS: Mapping[State, frozenset[State]] = {
    JOB_STATE_QUEUED: frozenset({JOB_STATE_QUEUED, JOB_STATE_STARTING, JOB_STATE_CANCELLED}),
    JOB_STATE_STARTING: frozenset({JOB_STATE_STARTING, JOB_STATE_RUNNING, JOB_STATE_QUEUED, JOB_STATE_STOPPING}),
    JOB_STATE_RUNNING: frozenset({JOB_STATE_RUNNING, JOB_STATE_IDLE, JOB_STATE_STOPPING}),
    JOB_STATE_IDLE: frozenset({JOB_STATE_IDLE, JOB_STATE_RESUMING, JOB_STATE_STOPPING}),
    JOB_STATE_RESUMING: frozenset(
        {JOB_STATE_RESUMING, JOB_STATE_RUNNING, JOB_STATE_STARTING, JOB_STATE_IDLE, JOB_STATE_STOPPING}
    ),
    JOB_STATE_STOPPING: frozenset({JOB_STATE_STOPPING, JOB_STATE_QUEUED, *FINAL_STATES}),
    # Results and shares may arrive after the end when a node could not be reached; the state stays.
    **{state: frozenset({state}) for state in FINAL_STATES},
}
"""Every state that may follow a state."""


def transition(record: JobRecord, happening: Happening, at: float) -> tuple[JobRecord, job_pb2.JobEvent]:
    """Returns the job after `happening`, and the event that tells of it.

    Args:
        record: the job before.
        happening: what happened to it.
        at: when, in seconds since the epoch.

    Raises:
        IllegalTransition: it cannot happen in this state.
    """
    job = job_pb2.Job()
    job.CopyFrom(record.job)
    draft = Draft(job, record, at, attempt=len(job.attempts))
    _require(record, happening)
    _APPLY[type(happening)](draft, happening)
    table = AWAY_TRANSITIONS if isinstance(happening, _AT_PEERS) else TRANSITIONS
    if job.state not in table[record.state]:
        raise IllegalTransition(_text(record, happening))
    # What a late release tells of is not why the job ended.
    if record.state not in FINAL_STATES and not isinstance(happening, _ASIDE):
        job.reason, job.message = draft.reason, draft.message
    event = job_pb2.JobEvent(
        time=timestamp(at),
        job_id=job.id,
        attempt=draft.attempt,
        state=job.state,
        reason=draft.reason,
        message=draft.message,
        details=draft.details,
        peer=draft.peer,
    )
    return replace(draft.record, job=job), event


_ALLOWED_IN: Mapping[type[Happening], frozenset[State]] = {
    h.Submitted: frozenset({JOB_STATE_QUEUED}),
    h.Predicted: frozenset({JOB_STATE_QUEUED}),
    h.Waits: frozenset({JOB_STATE_QUEUED, JOB_STATE_RESUMING}),
    h.Reserved: frozenset({JOB_STATE_QUEUED}),
    h.Adopted: PLACED_STATES | FINAL_STATES,
    h.SliceCreated: frozenset({JOB_STATE_STARTING}),
    h.ContainerStarted: frozenset({JOB_STATE_STARTING}),
    h.Requeued: frozenset({JOB_STATE_STARTING}),
    h.CancelRequested: frozenset({JOB_STATE_QUEUED}) | PLACED_STATES,
    h.CommandEnded: LIVING_STATES,
    h.NotStarted: LIVING_STATES | {JOB_STATE_STARTING},
    h.Stopped: LIVING_STATES | {JOB_STATE_STARTING},
    h.ResultsCollected: frozenset({JOB_STATE_STOPPING}) | FINAL_STATES,
    h.ResultsDelayed: frozenset({JOB_STATE_STOPPING}),
    h.ResultsLost: frozenset({JOB_STATE_STOPPING}) | FINAL_STATES,
    h.RanOut: frozenset({JOB_STATE_STOPPING}),
    h.Grows: frozenset({JOB_STATE_STOPPING}),
    # A former attempt may be released while the job goes on.
    h.ContainerRemoved: frozenset(job_pb2.JobState.values()),
    h.SliceDestroyed: frozenset(job_pb2.JobState.values()),
    h.Ended: frozenset({JOB_STATE_STOPPING}),
    h.SuspendRequested: LIVING_STATES,
    h.ReclaimBegun: frozenset({JOB_STATE_RUNNING}),
    h.Reclaimed: frozenset({JOB_STATE_RUNNING}),
    h.ReclaimRefused: frozenset({JOB_STATE_RUNNING}),
    h.WarmSliceDropped: frozenset(job_pb2.JobState.values()),
    h.ResumeRequested: frozenset({JOB_STATE_IDLE}),
    h.ResumeWithdrawn: frozenset({JOB_STATE_RESUMING}),
    h.ShareReserved: frozenset({JOB_STATE_RESUMING}),
    h.ResumeRetried: frozenset({JOB_STATE_RESUMING}),
    h.Resumed: frozenset({JOB_STATE_RESUMING}),
    h.Moves: frozenset({JOB_STATE_RESUMING}),
    h.WorkspaceCarried: LIVING_STATES,
    h.RunAsked: frozenset({JOB_STATE_QUEUED, JOB_STATE_STARTING}) | LIVING_STATES,
    h.RunStarted: LIVING_STATES,
    h.RunEnded: frozenset(job_pb2.JobState.values()),
    h.Forwarding: frozenset({JOB_STATE_QUEUED}),
    h.Forwarded: PLACED_STATES,
    h.PeerTold: PLACED_STATES,
    h.PeerEnded: PLACED_STATES,
    h.PeerAway: PLACED_STATES,
    h.BroughtBack: PLACED_STATES,
    h.CameLate: frozenset({JOB_STATE_QUEUED}),
    h.KeptLate: frozenset(job_pb2.JobState.values()),
}


_ASIDE = (
    h.WarmSliceDropped,
    h.ContainerRemoved,
    h.WorkspaceCarried,
    h.RunAsked,
    h.RunStarted,
    h.RunEnded,
    h.KeptLate,
)
"""What happens beside the job's own life: its state keeps its reason."""

_BEFORE_PLACEMENT = (
    h.Submitted,
    h.Predicted,
    h.Waits,
    h.Reserved,
    h.CancelRequested,
    h.RunAsked,
    h.RunEnded,
    h.Forwarding,
)
_AT_PEERS = (h.Forwarding, h.Forwarded, h.PeerTold, h.PeerEnded, h.PeerAway, h.BroughtBack, h.CameLate)


def _require(record: JobRecord, happening: Happening) -> None:
    if record.state not in _ALLOWED_IN[type(happening)]:
        raise IllegalTransition(_text(record, happening))
    about = h.ContainerRemoved | h.SliceDestroyed | h.WarmSliceDropped | h.CameLate | h.KeptLate
    number = happening.attempt if isinstance(happening, about) else 1
    if not isinstance(happening, _BEFORE_PLACEMENT) and not 1 <= number <= len(record.job.attempts):
        raise IllegalTransition(f"{record.id}: it has no such attempt")
    if isinstance(happening, h.Ended) and record.ending is None:
        raise IllegalTransition(f"{record.id}: how it ends was never decided")
    if isinstance(happening, _AT_PEERS[1:-1]) and not record.attempt.peer:
        raise IllegalTransition(f"{record.id}: its newest attempt is at no peer")
    if isinstance(happening, h.RanOut) and (record.ran_out_of_mib or not _failed(record)):
        raise IllegalTransition(f"{record.id}: it did not fail, or is known to have run out of memory")
    if isinstance(happening, h.Grows) and not record.grows:
        raise IllegalTransition(f"{record.id}: it did not run out of memory, or keeps its size")
    begins = h.Reserved | h.ShareReserved | h.Moves | h.Forwarding | h.RanOut | h.Grows
    if isinstance(happening, begins) and record.cancel_requested:
        raise IllegalTransition(f"{record.id}: it is cancelled")


def _failed(record: JobRecord) -> bool:
    return record.ending is not None and record.ending.state == JOB_STATE_FAILED


def _text(record: JobRecord, happening: Happening) -> str:
    return f"{record.id}: {type(happening).__name__} cannot happen in {job_pb2.JobState.Name(record.state)}"


def _submitted(draft: Draft, _: h.Submitted) -> None:
    draft.tell("SUBMITTED", "accepted and stored", bundle_id=draft.job.bundle_id)


def _predicted(draft: Draft, it: h.Predicted) -> None:
    draft.job.sizing.CopyFrom(it.sizing)
    details: dict[str, object] = {
        "origin": prediction_pb2.SizingOrigin.Name(it.sizing.origin).removeprefix("SIZING_ORIGIN_").lower(),
        "profile": it.sizing.choices[0].profile if it.sizing.choices else "",
        "required_mib": it.sizing.required_mib or "",
    }
    if it.prediction is not None:
        draft.job.prediction.CopyFrom(it.prediction)
        tier = prediction_pb2.PredictionTier.Name(it.prediction.tier).removeprefix("PREDICTION_TIER_").lower()
        elapsed_ms = round(it.prediction.elapsed.ToNanoseconds() / 1e6, 1)
        details |= {
            "tier": tier,
            "predicted_mib": it.prediction.required_mib,
            "model_version": it.prediction.model_version,
            "elapsed_ms": elapsed_ms,
        }
    draft.tell("PREDICTED", it.sizing.reason, **details)


def _waits(draft: Draft, it: h.Waits) -> None:
    draft.tell("WAITING_FOR_SLICE", it.message)


def _reserved(draft: Draft, it: h.Reserved) -> None:
    draft.begin_attempt(it.attempt)
    attempt = draft.job.attempts[-1]
    draft.job.sizing.CopyFrom(it.sizing)
    draft.job.state = JOB_STATE_STARTING
    draft.job.executing_centre = draft.job.centre
    draft.record = replace(draft.record, take_over=it.take_over)
    start, size = attempt.placement.start, attempt.placement.size
    where = f"memory slices {start}–{start + size - 1}" if size > 1 else f"memory slice {start}"
    draft.tell(
        "RESERVED",
        f"{attempt.profile} reserved on GPU {attempt.gpu_index} of {it.node_name}, {where}",
        node_id=attempt.node_id,
        node_name=it.node_name,
        gpu_uuid=attempt.gpu_uuid,
        gpu_index=attempt.gpu_index,
        gpu_model=attempt.gpu_model,
        profile=attempt.profile,
        placement_start=attempt.placement.start,
        placement_size=attempt.placement.size,
        fencing_token=attempt.fencing_token,
        emulated=str(attempt.emulated).lower(),
        waited_ms=since_ms(draft.job.create_time, draft.at),
    )


def _adopted(draft: Draft, it: h.Adopted) -> None:
    attempt = draft.job.attempts[-1]
    if it.fencing_token <= attempt.fencing_token:
        raise IllegalTransition(f"{draft.job.id}: a fencing token only grows")
    attempt.fencing_token = it.fencing_token
    draft.tell(
        "ADOPTED",
        "the control plane started again and goes on with this attempt",
        fencing_token=it.fencing_token,
    )


def _slice_created(draft: Draft, it: h.SliceCreated) -> None:
    attempt = draft.job.attempts[-1]
    warm = draft.record.take_over is not None
    draft.begin_share(it.slice)
    draft.record = replace(draft.record, take_over=None)
    draft.tell(
        "SLICE_TAKEN_OVER" if warm else "SLICE_CREATED",
        f"warm slice {it.slice.uuid} of GPU {it.slice.gpu_index} taken over"
        if warm
        else f"slice {it.slice.uuid} cut from GPU {it.slice.gpu_index}",
        slice_uuid=it.slice.uuid,
        gpu_uuid=it.slice.gpu_uuid,
        gpu_index=it.slice.gpu_index,
        profile=it.slice.profile,
        placement_start=it.slice.placement.start,
        placement_size=it.slice.placement.size,
        memory_mib=it.slice.memory_mib,
        emulated=str(it.slice.emulated).lower(),
        elapsed_ms=since_ms(attempt.reserve_time, draft.at),
    )


def _container_started(draft: Draft, it: h.ContainerStarted) -> None:
    attempt = draft.job.attempts[-1]
    attempt.container_id = it.container.id
    started = it.container.start_time if it.container.HasField("start_time") else timestamp(draft.at)
    attempt.start_time.CopyFrom(started)
    if not draft.job.HasField("start_time"):
        draft.job.start_time.CopyFrom(started)
    attempt.runtime = node_pb2.RuntimeKind.Name(it.container.runtime).removeprefix("RUNTIME_KIND_").lower()
    draft.job.state = JOB_STATE_RUNNING
    draft.record = replace(draft.record, failed_starts=0)
    draft.tell(
        "CONTAINER_STARTED",
        f"{attempt.runtime} container {it.container.id[:12]} runs the command",
        container_id=it.container.id,
        image=it.container.image,
        runtime=attempt.runtime,
        slice_uuid=attempt.slice_uuid,
        elapsed_ms=since_ms(attempt.reserve_time, draft.at),
    )


def _requeued(draft: Draft, it: h.Requeued) -> None:
    draft.job.attempts[-1].release_time.CopyFrom(timestamp(draft.at))
    draft.end_share(draft.job.attempts[-1])
    draft.record = replace(draft.record, take_over=None, failed_starts=draft.record.failed_starts + 1)
    draft.job.state = JOB_STATE_QUEUED
    draft.tell(
        "REQUEUED", f"the node could not start it, so it waits for another slice: {it.message}", node_reason=it.reason
    )


def _cancel_requested(draft: Draft, it: h.CancelRequested) -> None:
    draft.record = replace(draft.record, cancel_requested=True, cancel_message=it.message, cancel_reason=it.reason)
    said = f": {it.message}" if it.message else ""
    if draft.job.state == JOB_STATE_QUEUED:
        draft.job.state = JOB_STATE_CANCELLED
        draft.job.end_time.CopyFrom(timestamp(draft.at))
        draft.tell(it.reason, f"cancelled before it started{said}")
        return
    draft.tell("CANCEL_REQUESTED", f"its end was asked for{said}")


# Each function takes a draft and the happening that it is listed under.
_APPLY: Mapping[type[Happening], Callable[[Draft, Any], None]] = {
    h.Submitted: _submitted,
    h.Predicted: _predicted,
    h.Waits: _waits,
    h.Reserved: _reserved,
    h.Adopted: _adopted,
    h.SliceCreated: _slice_created,
    h.ContainerStarted: _container_started,
    h.Requeued: _requeued,
    h.CancelRequested: _cancel_requested,
    h.CommandEnded: finishing.command_ended,
    h.NotStarted: finishing.not_started,
    h.Stopped: finishing.stopped,
    h.ResultsCollected: finishing.results_collected,
    h.ResultsDelayed: finishing.results_delayed,
    h.ResultsLost: finishing.results_lost,
    h.RanOut: finishing.ran_out,
    h.Grows: finishing.grows,
    h.ContainerRemoved: finishing.container_removed,
    h.SliceDestroyed: finishing.slice_destroyed,
    h.Ended: finishing.ended,
    h.SuspendRequested: sharing.suspend_requested,
    h.ReclaimBegun: sharing.reclaim_begun,
    h.Reclaimed: sharing.reclaimed,
    h.ReclaimRefused: sharing.reclaim_refused,
    h.WarmSliceDropped: sharing.warm_slice_dropped,
    h.ResumeRequested: sharing.resume_requested,
    h.ResumeWithdrawn: sharing.resume_withdrawn,
    h.ShareReserved: sharing.share_reserved,
    h.ResumeRetried: sharing.resume_retried,
    h.Resumed: sharing.resumed,
    h.Moves: sharing.moves,
    h.WorkspaceCarried: sharing.workspace_carried,
    h.RunAsked: sharing.run_asked,
    h.RunStarted: sharing.run_started,
    h.RunEnded: sharing.run_ended,
    h.Forwarding: away.forwarding,
    h.Forwarded: away.forwarded,
    h.PeerTold: away.peer_told,
    h.PeerEnded: away.peer_ended,
    h.PeerAway: away.peer_away,
    h.BroughtBack: away.brought_back,
    h.CameLate: away.came_late,
    h.KeptLate: away.kept_late,
}
