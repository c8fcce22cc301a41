"""What becomes of a living job when its share comes and goes, and when runs arrive (steps S6 to S8).

The part of the state machine in `jobs` that is about shares. Every function takes a draft and what happened.
"""

from __future__ import annotations

from dataclasses import replace

from controlplane import happenings as h
from controlplane.draft import Draft, IllegalTransition, current_share, since_ms
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import job_pb2
from puhui.v1.job_pb2 import JOB_STATE_IDLE, JOB_STATE_RESUMING, JOB_STATE_RUNNING, JOB_STATE_STARTING

__all__ = [
    "MOST_RUNS",
    "mode_name",
    "moves",
    "reclaim_begun",
    "reclaim_refused",
    "reclaimed",
    "resume_requested",
    "resume_retried",
    "resume_withdrawn",
    "resumed",
    "run_asked",
    "run_ended",
    "run_started",
    "share_reserved",
    "suspend_requested",
    "warm_slice_dropped",
    "workspace_carried",
]

MOST_RUNS = 10
"""So many of a job's runs are told of with it, the newest; all that are under way are."""

_NO_MODE = job_pb2.RECLAIM_MODE_UNSPECIFIED
_WHY_RECLAIM = {
    "IDLE": "it has not been used for as long as its idle policy says",
    "SUSPENDED": "somebody asked for it",
    "NEEDED": "it is idle, and another job waits for it",
}
_WHY_RESUME = {
    "RUN": "a run instruction arrived",
    "RESUME": "somebody asked for it",
    "WANTED": "a process that was checkpointed asks for its card",
    "ROOM": "there is room that nobody else waits for",
}


def mode_name(mode: job_pb2.ReclaimMode.ValueType) -> str:
    """Returns a rung of the reclaim ladder as it is written: "detach", "checkpoint", "stop"."""
    return job_pb2.ReclaimMode.Name(mode).removeprefix("RECLAIM_MODE_").lower()


def suspend_requested(draft: Draft, it: h.SuspendRequested) -> None:
    """Notes that somebody wants the share taken back."""
    if draft.job.state == JOB_STATE_IDLE:
        draft.record = replace(draft.record, parked=True)
        draft.tell("SUSPENDED", "it has no share, and gets none before somebody asks for one")
        return
    draft.record = replace(draft.record, suspend=it.hardest)
    draft.tell("SUSPEND_REQUESTED", "its share is to be taken back by request", hardest=mode_name(it.hardest))


def reclaim_begun(draft: Draft, it: h.ReclaimBegun) -> None:
    """Notes why, and how far it may go: a control plane after this one goes on with it."""
    share = current_share(draft.job.attempts[-1])
    draft.record = replace(
        draft.record, reclaiming=it.why, hardest=it.hardest, reclaims=draft.record.reclaims + 1, suspend=_NO_MODE
    )
    idle = it.idleness
    draft.tell(
        "RECLAIMING",
        f"its share is being taken back: {_WHY_RECLAIM[it.why]}",
        why=it.why,
        hardest=mode_name(it.hardest),
        slice_uuid=share.slice_uuid if share is not None else "",
        gpu_index=draft.job.attempts[-1].gpu_index,
        unused_since_s=moment(idle.unused_since) if idle is not None and idle.HasField("unused_since") else "",
        unused_ms=since_ms(idle.unused_since, draft.at) if idle is not None and idle.HasField("unused_since") else "",
        signal=idle.signal if idle is not None else "",
        signal_message=idle.message if idle is not None else "",
    )


def reclaimed(draft: Draft, it: h.Reclaimed) -> None:
    """The job lives on without a share, or its workspace does."""
    attempt = draft.job.attempts[-1]
    share = current_share(attempt)
    why, held_ms = draft.record.reclaiming, since_ms(share.hold_time, draft.at) if share is not None else ""
    counter_s = it.container.idleness.busy_seconds
    draft.end_share(attempt, it.mode, max(0.0, counter_s - draft.record.busy_counted_s))
    stopped = it.mode == job_pb2.RECLAIM_MODE_STOP and not it.container.pid
    draft.record = replace(
        draft.record,
        reclaiming="",
        hardest=_NO_MODE,
        idle_at=draft.at,
        restart=stopped,
        parked=why == "SUSPENDED",
        busy_counted_s=counter_s,
    )
    draft.job.state = JOB_STATE_IDLE
    draft.job.idleness.CopyFrom(it.container.idleness)
    how = {
        job_pb2.RECLAIM_MODE_DETACH: "no process held it, and it was detached",
        job_pb2.RECLAIM_MODE_CHECKPOINT: "what was on it was checkpointed to host memory and waits",
        job_pb2.RECLAIM_MODE_STOP: "what held it was ended",
    }[it.mode]
    lives = "its workspace is kept" if stopped else "its container lives on"
    draft.tell(
        "RECLAIMED",
        f"its share was taken back ({mode_name(it.mode)}): {how}; {lives}" + (f"; {it.warning}" if it.warning else ""),
        why=why,
        mode=mode_name(it.mode),
        slice_uuid=attempt.slice_uuid,
        gpu_index=attempt.gpu_index,
        gpu_uuid=attempt.gpu_uuid,
        profile=attempt.profile,
        container_id=attempt.container_id,
        pid=it.container.pid or "",
        kept_warm_s=round(it.warm_s, 3) or "",
        held_ms=held_ms,
        node_message=it.message,
    )


def reclaim_refused(draft: Draft, it: h.ReclaimRefused) -> None:
    """The share stays with the job."""
    draft.record = replace(draft.record, reclaiming="", hardest=_NO_MODE)
    draft.tell("RECLAIM_REFUSED", f"its share was not taken back: {it.message}", node_reason=it.reason)


def warm_slice_dropped(draft: Draft, it: h.WarmSliceDropped) -> None:
    """The slice is kept no longer; the job has had nothing of it since it was taken back."""
    draft.attempt = it.attempt
    why = f"job {it.for_job} needs the room" if it.for_job else "it was kept for its tenant long enough"
    draft.tell("WARM_SLICE_DROPPED", f"the slice is destroyed: {why}", slice_uuid=it.slice_uuid, for_job=it.for_job)


def resume_requested(draft: Draft, it: h.ResumeRequested) -> None:
    """The job re-enters the scheduler (S8)."""
    draft.record = replace(draft.record, wake=it.why, suspend=_NO_MODE, parked=False)
    draft.job.state = JOB_STATE_RESUMING
    draft.tell("RESUMING", f"a share is being scheduled for it: {_WHY_RESUME[it.why]}", why=it.why)


def resume_withdrawn(draft: Draft, _: h.ResumeWithdrawn) -> None:
    """The job waits for nothing any longer."""
    draft.record = replace(draft.record, wake="", parked=draft.record.suspend != _NO_MODE, suspend=_NO_MODE)
    draft.job.state = JOB_STATE_IDLE
    draft.tell("RESUME_WITHDRAWN", "nobody waits any longer for it to have a share")


def share_reserved(draft: Draft, it: h.ShareReserved) -> None:
    """A share on the container's own node is reserved; which GPU it is on does not matter."""
    attempt = draft.job.attempts[-1]
    before = attempt.gpu_index
    attempt.gpu_uuid, attempt.gpu_index = it.attempt.gpu_uuid, it.attempt.gpu_index
    attempt.gpu_model, attempt.profile = it.attempt.gpu_model, it.attempt.profile
    attempt.emulated, attempt.slice_uuid = it.attempt.emulated, ""
    attempt.placement.CopyFrom(it.attempt.placement)
    draft.record = replace(draft.record, take_over=it.take_over, resumes=draft.record.resumes + 1)
    draft.tell(
        "SHARE_RESERVED",
        f"{attempt.profile} reserved on GPU {attempt.gpu_index} of {it.node_name}"
        + (", a warm slice" if it.take_over is not None else ""),
        node_id=attempt.node_id,
        node_name=it.node_name,
        gpu_uuid=attempt.gpu_uuid,
        gpu_index=attempt.gpu_index,
        gpu_index_before=before,
        profile=attempt.profile,
        placement_start=attempt.placement.start,
        placement_size=attempt.placement.size,
        slice_uuid=it.take_over.slice_uuid if it.take_over is not None else "",
        warm=str(it.take_over is not None).lower(),
    )


def resume_retried(draft: Draft, it: h.ResumeRetried) -> None:
    """The share that was reserved is given back."""
    draft.end_share(draft.job.attempts[-1])
    draft.record = replace(draft.record, take_over=None, failed_resumes=draft.record.failed_resumes + 1)
    draft.tell(
        "RESUME_RETRIED",
        f"the node could not give it the share, so it waits for another: {it.message}",
        node_reason=it.reason,
    )


def resumed(draft: Draft, it: h.Resumed) -> None:
    """The job runs on a share again."""
    attempt = draft.job.attempts[-1]
    draft.begin_share(it.slice)
    idle_ms = round((draft.at - draft.record.idle_at) * 1000)
    rests = draft.record.rests + 1 if draft.record.wake == "ROOM" else 0
    why = draft.record.wake
    draft.record = replace(draft.record, take_over=None, wake="", rests=rests, idle_at=0.0, failed_resumes=0)
    draft.job.state = JOB_STATE_RUNNING
    draft.tell(
        "RESUMED",
        f"it has a share again: slice {it.slice.uuid} of GPU {it.slice.gpu_index}"
        + ("; what was checkpointed is on it" if it.restored else ""),
        why=why,
        slice_uuid=it.slice.uuid,
        gpu_uuid=it.slice.gpu_uuid,
        gpu_index=it.slice.gpu_index,
        profile=it.slice.profile,
        container_id=attempt.container_id,
        restored=str(it.restored).lower(),
        without_share_ms=idle_ms,
    )


def moves(draft: Draft, it: h.Moves) -> None:
    """A new attempt begins, with the workspace of the one before."""
    before = len(draft.job.attempts)
    old = draft.job.attempts[-1]
    old.release_time.CopyFrom(timestamp(draft.at))
    same = old.node_id == it.attempt.node_id
    attempt = draft.job.attempts.add()
    attempt.CopyFrom(it.attempt)
    attempt.number = draft.attempt = before + 1
    attempt.reserve_time.CopyFrom(timestamp(draft.at))
    draft.record = replace(
        draft.record,
        take_over=it.take_over,
        carry_from=before,
        restart=False,
        wake="",
        idle_at=0.0,
        rests=0,
        busy_counted_s=0.0,
        busy_seen_s=None,
        results_collected=False,
        results_lost="",
        ending=None,
    )
    draft.job.state = JOB_STATE_STARTING
    session = draft.job.spec.kind == job_pb2.JOB_KIND_SESSION
    what = "the session" if session else "the job"
    said = (
        f"{what} is started again with its workspace on GPU {attempt.gpu_index} of {it.node_name}"
        if same
        else f"its node has no room, so {what} moves to {it.node_name}: its workspace goes with it, and what still "
        "runs in its container is ended first"
    )
    draft.tell(
        "RESTARTS" if same else ("SESSION_MOVES" if session else "MOVES"),
        said,
        node_id=attempt.node_id,
        node_name=it.node_name,
        from_node_id=old.node_id,
        gpu_uuid=attempt.gpu_uuid,
        gpu_index=attempt.gpu_index,
        profile=attempt.profile,
        placement_start=attempt.placement.start,
        placement_size=attempt.placement.size,
        fencing_token=attempt.fencing_token,
    )


def workspace_carried(draft: Draft, it: h.WorkspaceCarried) -> None:
    """The new attempt begins with the workspace."""
    draft.record = replace(draft.record, carry_from=0)
    draft.tell("WORKSPACE_CARRIED", "its workspace has come with it", size_bytes=it.size_bytes or "")


def run_asked(draft: Draft, it: h.RunAsked) -> None:
    """A run is noted before anything is done for it."""
    run = draft.job.runs.add()
    run.CopyFrom(it.run)
    run.create_time.CopyFrom(timestamp(draft.at))
    over = [run for run in draft.job.runs if run.HasField("end_time")][: max(0, len(draft.job.runs) - MOST_RUNS)]
    for run_over in over:
        draft.job.runs.remove(run_over)
    draft.job.run_count += 1
    draft.record = replace(draft.record, rests=0)
    command = " ".join(run.command)
    draft.tell("RUN_ASKED", f"run instruction: {command[:200]}", run_id=run.id)


def run_started(draft: Draft, it: h.RunStarted) -> None:
    """The command of a run has started on what the job has now."""
    run = _run(draft, it.run_id)
    if run is None:
        raise IllegalTransition(f"{draft.job.id}: it has no run {it.run_id} that could start")
    attempt = draft.job.attempts[-1]
    share = current_share(attempt)
    run.attempt = attempt.number
    run.start_time.CopyFrom(timestamp(draft.at))
    # It may have been given up for lost after a restart of the control plane, and its caller came back.
    run.ClearField("end_time")
    run.message = ""
    if share is not None:
        run.slice_uuid, run.gpu_index = share.slice_uuid, share.gpu_index
    draft.tell(
        "RUN_STARTED",
        "the command of the run has started",
        run_id=it.run_id,
        slice_uuid=run.slice_uuid,
        gpu_index=run.gpu_index if share is not None else "",
        container_id=attempt.container_id,
        elapsed_ms=since_ms(run.create_time, draft.at),
    )


def run_ended(draft: Draft, it: h.RunEnded) -> None:
    """A run is over, however it ended."""
    run = _run(draft, it.run_id)
    details: dict[str, object] = {"run_id": it.run_id, "busy_s": round(it.busy_s, 3) or ""}
    if it.exit_code is not None:
        details["exit_code"] = it.exit_code
    if run is not None:
        run.end_time.CopyFrom(timestamp(draft.at))
        run.busy_seconds, run.message = it.busy_s, it.message
        if it.exit_code is not None:
            run.exit_code = it.exit_code
        if run.HasField("start_time"):
            details["elapsed_ms"] = since_ms(run.start_time, draft.at)
    said = it.message or (
        f"the command of the run ended with exit code {it.exit_code}" if it.exit_code is not None else "the run is over"
    )
    draft.tell("RUN_ENDED", said, **details)


def _run(draft: Draft, run_id: str) -> job_pb2.Run | None:
    return next((run for run in draft.job.runs if run.id == run_id), None)
