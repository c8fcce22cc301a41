"""What becomes of a job when its command ends: results, release, the end. The part of `jobs` that is about that."""

from __future__ import annotations

from dataclasses import replace

from controlplane import happenings as h
from controlplane.draft import Draft, IllegalTransition, since_ms
from controlplane.endings import cancelled, ending_of
from controlplane.growing import next_size
from controlplane.observing import FEWEST_SAMPLES
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import job_pb2, node_pb2, prediction_pb2
from puhui.v1.job_pb2 import JOB_STATE_QUEUED, JOB_STATE_STOPPING

__all__ = [
    "command_ended",
    "container_removed",
    "ended",
    "grows",
    "not_started",
    "ran_out",
    "results_collected",
    "results_delayed",
    "results_lost",
    "slice_destroyed",
    "stopped",
]


def command_ended(draft: Draft, it: h.CommandEnded) -> None:
    """The command ended by itself, or its node ended it."""
    ending = ending_of(it.container)
    draft.record = replace(draft.record, ending=ending, reclaiming="")
    draft.job.state = JOB_STATE_STOPPING
    _note_exit(draft, it.container)
    draft.tell("COMMAND_ENDED", ending.message, **_exit_details(draft, it.container))


def not_started(draft: Draft, it: h.NotStarted) -> None:
    """It cannot start, or what it ran in is lost."""
    draft.record = replace(draft.record, ending=it.ending)
    draft.job.state = JOB_STATE_STOPPING
    draft.tell(it.ending.reason, it.ending.message)


def stopped(draft: Draft, it: h.Stopped) -> None:
    """The command was ended by request."""
    draft.record = replace(draft.record, ending=cancelled(draft.record.cancel_message, draft.record.cancel_reason))
    draft.job.state = JOB_STATE_STOPPING
    if it.container is None:
        draft.tell("COMMAND_ENDED", "it is being ended by request")
        return
    _note_exit(draft, it.container)
    draft.tell("COMMAND_ENDED", "the command was ended by request", **_exit_details(draft, it.container))


def results_collected(draft: Draft, it: h.ResultsCollected) -> None:
    """Log and artifacts are here."""
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


def results_delayed(draft: Draft, it: h.ResultsDelayed) -> None:
    """They cannot be had yet."""
    draft.tell("RESULTS_DELAYED", it.message)


def results_lost(draft: Draft, it: h.ResultsLost) -> None:
    """Not all of them can be had."""
    draft.record = replace(draft.record, results_collected=True, results_lost=it.why)
    draft.job.log_size_bytes = it.log_bytes
    draft.job.artifacts.CopyFrom(it.artifacts)
    if draft.record.job.HasField("end_time"):
        draft.job.message += f"; {it.why}"
    draft.tell(
        "RESULTS_LOST",
        it.why,
        log_bytes=it.log_bytes,
        artifact_files=it.artifacts.file_count,
        artifact_bytes=it.artifacts.size_bytes,
        artifact_digest=it.artifacts.digest,
    )


def ran_out(draft: Draft, it: h.RanOut) -> None:
    """Its command failed because the memory of its slice was not enough."""
    found = it.outgrown
    draft.record = replace(draft.record, ending=found.ending, ran_out_of_mib=found.slice_mib)
    details: dict[str, object] = {"profile": found.profile, "memory_mib": found.slice_mib}
    if found.sizing is not None:
        draft.record = replace(draft.record, grows=True, at_least_mib=found.sizing.required_mib)
        draft.job.sizing.CopyFrom(found.sizing)
        details |= _size_details(found.sizing)
    draft.tell(found.ending.reason, found.ending.message, **details)


def grows(draft: Draft, _: h.Grows) -> None:
    """It waits for a larger slice."""
    attempt = draft.job.attempts[-1]
    draft.end_attempt(attempt)
    attempt.message = draft.record.ending.message if draft.record.ending is not None else ""
    # What was asked of the share that it had is not asked of the next.
    draft.record = replace(
        draft.record,
        ending=None,
        grows=False,
        suspend=job_pb2.RECLAIM_MODE_UNSPECIFIED,
        parked=False,
        idle_at=0.0,
        rests=0,
    )
    draft.job.state = JOB_STATE_QUEUED
    draft.job.executing_centre = draft.job.centre
    for name in ("exit_code", "artifacts", "log_size_bytes", "idleness"):
        draft.job.ClearField(name)
    size = next_size(draft.job.sizing) or f"{draft.job.sizing.required_mib} MiB at a peer"
    draft.tell(
        "GROWN",
        f"it waits for {size} in place of {attempt.profile or 'its last slice'} ({draft.record.ran_out_of_mib} MiB), "
        "on which it ran out of device memory",
        profile=attempt.profile,
        memory_mib=draft.record.ran_out_of_mib,
        **_size_details(draft.job.sizing),
    )


def container_removed(draft: Draft, it: h.ContainerRemoved) -> None:
    """The container of an attempt is gone."""
    draft.attempt = it.attempt
    draft.tell(
        "CONTAINER_REMOVED", "the container is gone", container_id=draft.job.attempts[it.attempt - 1].container_id
    )


def slice_destroyed(draft: Draft, it: h.SliceDestroyed) -> None:
    """The slice of an attempt is gone."""
    draft.attempt = it.attempt
    attempt = draft.job.attempts[it.attempt - 1]
    attempt.release_time.CopyFrom(timestamp(draft.at))
    draft.end_share(attempt, busy_s=it.busy_s)
    draft.tell(
        "SLICE_DESTROYED",
        "the slice is gone and its share is given back" if it.slice_uuid else "the share is given back",
        slice_uuid=it.slice_uuid,
        profile=attempt.profile,
        gpu_uuid=attempt.gpu_uuid,
        held_ms=since_ms(attempt.reserve_time, draft.at),
    )


def ended(draft: Draft, it: h.Ended) -> None:
    """Everything that can be done is done."""
    ending = draft.record.ending
    if draft.record.grows:
        # It was to go on, and its end was asked for meanwhile.
        ending = cancelled(draft.record.cancel_message, draft.record.cancel_reason)
    if ending is None:
        raise IllegalTransition(f"{draft.job.id}: how it ends was never decided")
    draft.job.state = ending.state
    draft.job.end_time.CopyFrom(timestamp(draft.at))
    draft.tell(
        ending.reason,
        "; ".join(part for part in (ending.message, draft.record.results_lost, it.unconfirmed) if part),
        exit_code=draft.job.exit_code if draft.job.HasField("exit_code") else "",
        share_held="true" if it.unconfirmed else "",
        elapsed_ms=since_ms(draft.job.create_time, draft.at),
    )


def _size_details(sizing: prediction_pb2.Sizing) -> dict[str, object]:
    if not sizing.choices:
        return {"next_required_mib": sizing.required_mib}
    return {"next_profile": sizing.choices[0].profile, "next_memory_mib": sizing.choices[0].memory_mib}


def _note_exit(draft: Draft, container: node_pb2.Container) -> None:
    attempt = draft.job.attempts[-1]
    attempt.end_time.CopyFrom(container.end_time if container.HasField("end_time") else timestamp(draft.at))
    if container.HasField("idleness"):
        draft.record = replace(draft.record, busy_seen_s=container.idleness.busy_seconds)
        if container.idleness.memory_samples >= FEWEST_SAMPLES and container.idleness.HasField("peak_memory_mib"):
            attempt.peak_memory_mib = container.idleness.peak_memory_mib
    if container.HasField("exit_code"):
        attempt.exit_code = container.exit_code
        draft.job.exit_code = container.exit_code


def _exit_details(draft: Draft, container: node_pb2.Container) -> dict[str, object]:
    attempt = draft.job.attempts[-1]
    return {
        "container_id": container.id,
        "exit_code": container.exit_code if container.HasField("exit_code") else "",
        "elapsed_ms": since_ms(attempt.start_time, moment(attempt.end_time)),
    }
