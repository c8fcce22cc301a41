"""The life of a job: a pure state machine.

`transition` takes a job and something that happened, and returns the job afterwards with the event that
tells of it. What is not in the table below cannot happen; a final state is final.

    QUEUED    -> STARTING    a slice is reserved
    QUEUED    -> CANCELLED   somebody asked for it
    STARTING  -> RUNNING     the container runs
    STARTING  -> QUEUED      the node could not do it; everything is rolled back
    STARTING  -> STOPPING    it cannot start, or somebody asked for its end
    RUNNING   -> STOPPING    the command ended, or somebody asked for its end
    STOPPING  -> SUCCEEDED | FAILED | CANCELLED   results are collected, everything is released
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from controlplane import happenings as h
from controlplane.endings import cancelled, ending_of
from controlplane.happenings import Happening
from controlplane.records import JobRecord
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import job_pb2, node_pb2, prediction_pb2
from puhui.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_STARTING,
    JOB_STATE_STOPPING,
    JOB_STATE_SUCCEEDED,
)

__all__ = ["FINAL_STATES", "PLACED_STATES", "TRANSITIONS", "IllegalTransition", "transition"]

State: TypeAlias = job_pb2.JobState.ValueType

FINAL_STATES = frozenset({JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED})
"""States that a job never leaves."""

PLACED_STATES = frozenset({JOB_STATE_STARTING, JOB_STATE_RUNNING, JOB_STATE_STOPPING})
"""States in which an attempt is being driven."""

TRANSITIONS: Mapping[State, frozenset[State]] = {
    JOB_STATE_QUEUED: frozenset({JOB_STATE_QUEUED, JOB_STATE_STARTING, JOB_STATE_CANCELLED}),
    JOB_STATE_STARTING: frozenset({JOB_STATE_STARTING, JOB_STATE_RUNNING, JOB_STATE_QUEUED, JOB_STATE_STOPPING}),
    JOB_STATE_RUNNING: frozenset({JOB_STATE_RUNNING, JOB_STATE_STOPPING}),
    JOB_STATE_STOPPING: frozenset({JOB_STATE_STOPPING, *FINAL_STATES}),
    # Results and shares may arrive after the end when a node could not be reached; the state stays.
    **{state: frozenset({state}) for state in FINAL_STATES},
}
"""Every state that may follow a state."""


class IllegalTransition(Exception):  # noqa: N818 - a name for what it is
    """Something was to happen to a job that cannot happen to it in its state."""


@dataclass
class _Draft:
    """A job in the middle of a transition."""

    job: job_pb2.Job
    record: JobRecord
    at: float
    reason: str = ""
    message: str = ""
    details: dict[str, str] = field(default_factory=dict)
    attempt: int = 0

    def tell(self, reason: str, message: str, **details: object) -> None:
        self.reason, self.message = reason, message
        self.details.update({key: str(value) for key, value in details.items() if value not in ("", None)})


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
    draft = _Draft(job, record, at, attempt=len(job.attempts))
    _require(record, happening)
    _APPLY[type(happening)](draft, happening)
    if job.state not in TRANSITIONS[record.state]:
        raise IllegalTransition(_text(record, happening))
    # What a late release tells of is not why the job ended.
    if record.state not in FINAL_STATES:
        job.reason, job.message = draft.reason, draft.message
    event = job_pb2.JobEvent(
        time=timestamp(at),
        job_id=job.id,
        attempt=draft.attempt,
        state=job.state,
        reason=draft.reason,
        message=draft.message,
        details=draft.details,
    )
    return replace(draft.record, job=job), event


_ALLOWED_IN: Mapping[type[Happening], frozenset[State]] = {
    h.Submitted: frozenset({JOB_STATE_QUEUED}),
    h.Predicted: frozenset({JOB_STATE_QUEUED}),
    h.Waits: frozenset({JOB_STATE_QUEUED}),
    h.Reserved: frozenset({JOB_STATE_QUEUED}),
    h.Adopted: PLACED_STATES | FINAL_STATES,
    h.SliceCreated: frozenset({JOB_STATE_STARTING}),
    h.ContainerStarted: frozenset({JOB_STATE_STARTING}),
    h.Requeued: frozenset({JOB_STATE_STARTING}),
    h.CancelRequested: frozenset({JOB_STATE_QUEUED}) | PLACED_STATES,
    h.CommandEnded: frozenset({JOB_STATE_RUNNING}),
    h.NotStarted: frozenset({JOB_STATE_STARTING, JOB_STATE_RUNNING}),
    h.Stopped: frozenset({JOB_STATE_STARTING, JOB_STATE_RUNNING}),
    h.ResultsCollected: frozenset({JOB_STATE_STOPPING}) | FINAL_STATES,
    h.ResultsDelayed: frozenset({JOB_STATE_STOPPING}),
    h.ResultsLost: frozenset({JOB_STATE_STOPPING}) | FINAL_STATES,
    h.ContainerRemoved: frozenset({JOB_STATE_STARTING, JOB_STATE_STOPPING}) | FINAL_STATES,
    h.SliceDestroyed: frozenset({JOB_STATE_STARTING, JOB_STATE_STOPPING}) | FINAL_STATES,
    h.Ended: frozenset({JOB_STATE_STOPPING}),
}


_BEFORE_PLACEMENT = (h.Submitted, h.Predicted, h.Waits, h.Reserved, h.CancelRequested)


def _require(record: JobRecord, happening: Happening) -> None:
    if record.state not in _ALLOWED_IN[type(happening)]:
        raise IllegalTransition(_text(record, happening))
    number = happening.attempt if isinstance(happening, h.ContainerRemoved | h.SliceDestroyed) else 1
    if not isinstance(happening, _BEFORE_PLACEMENT) and not 1 <= number <= len(record.job.attempts):
        raise IllegalTransition(f"{record.id}: it has no such attempt")
    if isinstance(happening, h.Ended) and record.ending is None:
        raise IllegalTransition(f"{record.id}: how it ends was never decided")
    if isinstance(happening, h.Reserved) and record.cancel_requested:
        raise IllegalTransition(f"{record.id}: it is cancelled")


def _text(record: JobRecord, happening: Happening) -> str:
    return f"{record.id}: {type(happening).__name__} cannot happen in {job_pb2.JobState.Name(record.state)}"


def _submitted(draft: _Draft, _: h.Submitted) -> None:
    draft.tell("SUBMITTED", "accepted and stored", bundle_id=draft.job.bundle_id)


def _predicted(draft: _Draft, it: h.Predicted) -> None:
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


def _waits(draft: _Draft, it: h.Waits) -> None:
    draft.tell("WAITING_FOR_SLICE", it.message)


def _reserved(draft: _Draft, it: h.Reserved) -> None:
    attempt = draft.job.attempts.add()
    attempt.CopyFrom(it.attempt)
    attempt.number = draft.attempt = len(draft.job.attempts)
    attempt.reserve_time.CopyFrom(timestamp(draft.at))
    draft.job.sizing.CopyFrom(it.sizing)
    draft.job.state = JOB_STATE_STARTING
    draft.job.executing_centre = draft.job.centre
    draft.record = replace(draft.record, ending=None, results_collected=False, results_lost="")
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
        waited_ms=_since(draft.job.create_time, draft.at),
    )


def _adopted(draft: _Draft, it: h.Adopted) -> None:
    attempt = draft.job.attempts[-1]
    if it.fencing_token <= attempt.fencing_token:
        raise IllegalTransition(f"{draft.job.id}: a fencing token only grows")
    attempt.fencing_token = it.fencing_token
    draft.tell(
        "ADOPTED",
        "the control plane started again and goes on with this attempt",
        fencing_token=it.fencing_token,
    )


def _slice_created(draft: _Draft, it: h.SliceCreated) -> None:
    attempt = draft.job.attempts[-1]
    attempt.slice_uuid = it.slice.uuid
    attempt.gpu_index = it.slice.gpu_index
    attempt.emulated = it.slice.emulated
    draft.tell(
        "SLICE_CREATED",
        f"slice {it.slice.uuid} cut from GPU {it.slice.gpu_index}",
        slice_uuid=it.slice.uuid,
        gpu_uuid=it.slice.gpu_uuid,
        gpu_index=it.slice.gpu_index,
        profile=it.slice.profile,
        placement_start=it.slice.placement.start,
        placement_size=it.slice.placement.size,
        memory_mib=it.slice.memory_mib,
        emulated=str(it.slice.emulated).lower(),
        elapsed_ms=_since(attempt.reserve_time, draft.at),
    )


def _container_started(draft: _Draft, it: h.ContainerStarted) -> None:
    attempt = draft.job.attempts[-1]
    attempt.container_id = it.container.id
    started = it.container.start_time if it.container.HasField("start_time") else timestamp(draft.at)
    attempt.start_time.CopyFrom(started)
    if not draft.job.HasField("start_time"):
        draft.job.start_time.CopyFrom(started)
    attempt.runtime = node_pb2.RuntimeKind.Name(it.container.runtime).removeprefix("RUNTIME_KIND_").lower()
    draft.job.state = JOB_STATE_RUNNING
    draft.tell(
        "CONTAINER_STARTED",
        f"{attempt.runtime} container {it.container.id[:12]} runs the command",
        container_id=it.container.id,
        image=it.container.image,
        runtime=attempt.runtime,
        slice_uuid=attempt.slice_uuid,
        elapsed_ms=_since(attempt.reserve_time, draft.at),
    )


def _requeued(draft: _Draft, it: h.Requeued) -> None:
    draft.job.attempts[-1].release_time.CopyFrom(timestamp(draft.at))
    draft.job.state = JOB_STATE_QUEUED
    draft.tell(
        "REQUEUED", f"the node could not start it, so it waits for another slice: {it.message}", node_reason=it.reason
    )


def _cancel_requested(draft: _Draft, it: h.CancelRequested) -> None:
    draft.record = replace(draft.record, cancel_requested=True, cancel_message=it.message)
    said = f": {it.message}" if it.message else ""
    if draft.job.state == JOB_STATE_QUEUED:
        draft.job.state = JOB_STATE_CANCELLED
        draft.job.end_time.CopyFrom(timestamp(draft.at))
        draft.tell("CANCELLED", f"cancelled before it started{said}")
        return
    draft.tell("CANCEL_REQUESTED", f"its end was asked for{said}")


def _command_ended(draft: _Draft, it: h.CommandEnded) -> None:
    ending = ending_of(it.container)
    draft.record = replace(draft.record, ending=ending)
    draft.job.state = JOB_STATE_STOPPING
    _note_exit(draft, it.container)
    draft.tell("COMMAND_ENDED", ending.message, **_exit_details(draft, it.container))


def _not_started(draft: _Draft, it: h.NotStarted) -> None:
    draft.record = replace(draft.record, ending=it.ending)
    draft.job.state = JOB_STATE_STOPPING
    draft.tell(it.ending.reason, it.ending.message)


def _stopped(draft: _Draft, it: h.Stopped) -> None:
    draft.record = replace(draft.record, ending=cancelled(draft.record.cancel_message))
    draft.job.state = JOB_STATE_STOPPING
    if it.container is None:
        draft.tell("COMMAND_ENDED", "it is being ended by request")
        return
    _note_exit(draft, it.container)
    draft.tell("COMMAND_ENDED", "the command was ended by request", **_exit_details(draft, it.container))


def _results_collected(draft: _Draft, it: h.ResultsCollected) -> None:
    draft.record = replace(draft.record, results_collected=True)
    draft.job.log_size_bytes = it.log_bytes
    draft.job.artifacts.CopyFrom(it.artifacts)
    draft.tell(
        "RESULTS_COLLECTED",
        f"log ({it.log_bytes} bytes) and {it.artifacts.file_count} artifact files are kept",
        log_bytes=it.log_bytes,
        artifact_files=it.artifacts.file_count,
        artifact_bytes=it.artifacts.size_bytes,
        artifact_digest=it.artifacts.digest,
    )


def _results_delayed(draft: _Draft, it: h.ResultsDelayed) -> None:
    draft.tell("RESULTS_DELAYED", it.message)


def _results_lost(draft: _Draft, it: h.ResultsLost) -> None:
    draft.record = replace(draft.record, results_collected=True, results_lost=it.why)
    draft.job.log_size_bytes = it.log_bytes
    draft.job.artifacts.CopyFrom(it.artifacts)
    if draft.record.state in FINAL_STATES:
        draft.job.message += f"; {it.why}"
    draft.tell(
        "RESULTS_LOST",
        it.why,
        log_bytes=it.log_bytes,
        artifact_files=it.artifacts.file_count,
        artifact_bytes=it.artifacts.size_bytes,
        artifact_digest=it.artifacts.digest,
    )


def _container_removed(draft: _Draft, it: h.ContainerRemoved) -> None:
    draft.attempt = it.attempt
    draft.tell(
        "CONTAINER_REMOVED", "the container is gone", container_id=draft.job.attempts[it.attempt - 1].container_id
    )


def _slice_destroyed(draft: _Draft, it: h.SliceDestroyed) -> None:
    draft.attempt = it.attempt
    attempt = draft.job.attempts[it.attempt - 1]
    attempt.release_time.CopyFrom(timestamp(draft.at))
    draft.tell(
        "SLICE_DESTROYED",
        "the slice is gone and its share is given back" if it.slice_uuid else "the share is given back",
        slice_uuid=it.slice_uuid,
        profile=attempt.profile,
        gpu_uuid=attempt.gpu_uuid,
        held_ms=_since(attempt.reserve_time, draft.at),
    )


def _ended(draft: _Draft, it: h.Ended) -> None:
    ending = draft.record.ending
    if ending is None:
        raise IllegalTransition(f"{draft.job.id}: how it ends was never decided")
    draft.job.state = ending.state
    draft.job.end_time.CopyFrom(timestamp(draft.at))
    draft.tell(
        ending.reason,
        "; ".join(part for part in (ending.message, draft.record.results_lost, it.unconfirmed) if part),
        exit_code=draft.job.exit_code if draft.job.HasField("exit_code") else "",
        share_held="true" if it.unconfirmed else "",
        elapsed_ms=_since(draft.job.create_time, draft.at),
    )


def _note_exit(draft: _Draft, container: node_pb2.Container) -> None:
    attempt = draft.job.attempts[-1]
    attempt.end_time.CopyFrom(container.end_time if container.HasField("end_time") else timestamp(draft.at))
    if container.HasField("exit_code"):
        attempt.exit_code = container.exit_code
        draft.job.exit_code = container.exit_code


def _exit_details(draft: _Draft, container: node_pb2.Container) -> dict[str, object]:
    attempt = draft.job.attempts[-1]
    return {
        "container_id": container.id,
        "exit_code": container.exit_code if container.HasField("exit_code") else "",
        "elapsed_ms": _since(attempt.start_time, moment(attempt.end_time)),
    }


def _since(start: Timestamp, end_s: float) -> str:
    return str(max(0, round((end_s - moment(start)) * 1000)))


# Each function takes a draft and the happening that it is listed under.
_APPLY: Mapping[type[Happening], Callable[[_Draft, Any], None]] = {
    h.Submitted: _submitted,
    h.Predicted: _predicted,
    h.Waits: _waits,
    h.Reserved: _reserved,
    h.Adopted: _adopted,
    h.SliceCreated: _slice_created,
    h.ContainerStarted: _container_started,
    h.Requeued: _requeued,
    h.CancelRequested: _cancel_requested,
    h.CommandEnded: _command_ended,
    h.NotStarted: _not_started,
    h.Stopped: _stopped,
    h.ResultsCollected: _results_collected,
    h.ResultsDelayed: _results_delayed,
    h.ResultsLost: _results_lost,
    h.ContainerRemoved: _container_removed,
    h.SliceDestroyed: _slice_destroyed,
    h.Ended: _ended,
}
