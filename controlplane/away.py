"""A job whose newest attempt is at a peer. The part of `jobs` that is about that.

What a peer tells is taken over as it tells it, but for what is this centre's own: ids of the job, states that a peer
cannot bring about, and nodes, whose names mean nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from controlplane import happenings as h
from controlplane.draft import MOST_SHARES, Draft, IllegalTransition, since_ms
from controlplane.endings import Ending, cancelled
from controlplane.growing import credible_mib
from puhui.rpc.moment import moment, timestamp
from puhui.rpc.plain_text import plain_text
from puhui.v1 import job_pb2
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

__all__ = [
    "AWAY_TRANSITIONS",
    "brought_back",
    "came_late",
    "ending_there",
    "forwarded",
    "forwarding",
    "kept_late",
    "peer_away",
    "peer_ended",
    "peer_told",
    "waits_there",
]

_LIVING = frozenset({JOB_STATE_STARTING, JOB_STATE_RUNNING, JOB_STATE_IDLE, JOB_STATE_RESUMING})

AWAY_TRANSITIONS: Mapping[job_pb2.JobState.ValueType, frozenset[job_pb2.JobState.ValueType]] = {
    JOB_STATE_QUEUED: frozenset({JOB_STATE_STARTING, JOB_STATE_STOPPING, JOB_STATE_QUEUED}),
    # A peer may have to begin again, elsewhere among its nodes or at a peer of its own.
    **{state: _LIVING | {JOB_STATE_STOPPING, JOB_STATE_QUEUED} for state in _LIVING},
    JOB_STATE_STOPPING: _LIVING | {JOB_STATE_STOPPING, JOB_STATE_QUEUED},
}
"""Every state that may follow a state by what happens at a peer."""

# What the peer's states are here. What has ended there is not over before its results are here.
_STATES = {
    JOB_STATE_QUEUED: JOB_STATE_STARTING,
    JOB_STATE_STARTING: JOB_STATE_STARTING,
    JOB_STATE_RUNNING: JOB_STATE_RUNNING,
    JOB_STATE_IDLE: JOB_STATE_IDLE,
    JOB_STATE_RESUMING: JOB_STATE_RESUMING,
    JOB_STATE_STOPPING: JOB_STATE_STOPPING,
}
_MOST_RUNS = 10
_MOST_DETAILS = 32
_MOST_TEXT = 1000
_REASON_LENGTH = 64
_MOST_NAME = 128
_MOST_RUN_BYTES = 8192
_RUN_ID = re.compile(r"r-[a-z0-9]{12}")


def ending_there(record_cancelled: bool, message: str, job: job_pb2.Job) -> Ending | None:
    """Returns how a job ends that has ended so at its peer; None when it has to be tried elsewhere.

    Args:
        record_cancelled: whether its end was asked for here.
        message: what was said about that.
        job: the job as the peer knows it, in a final state.
    """
    text = plain_text(job.message, _MOST_TEXT)
    if job.state == JOB_STATE_SUCCEEDED:
        return Ending(JOB_STATE_SUCCEEDED, "SUCCEEDED", text)
    if job.state == JOB_STATE_CANCELLED:
        # Nobody here has asked for it: its lease ran out, or that centre's operator ended it.
        return cancelled(message) if record_cancelled else None
    if not any(attempt.HasField("start_time") for attempt in job.attempts):
        return cancelled(message) if record_cancelled else None
    return Ending(JOB_STATE_FAILED, plain_text(job.reason, _REASON_LENGTH) or "FAILED", text)


def waits_there(job: job_pb2.Job) -> str:
    """Returns what a job waits for in the queue of its peer, as told last; "" when it does not wait there.

    Its state here is STARTING all the same: this centre has found it a place, and looks for no other.
    """
    if job.state != JOB_STATE_STARTING or job.reason != "WAITING_FOR_SLICE" or not job.attempts:
        return ""
    peer = job.attempts[-1].peer
    return f"in the queue of peer {peer}: {job.message}" if peer else ""


def forwarding(draft: Draft, it: h.Forwarding) -> None:
    """It goes to a peer."""
    draft.begin_attempt(it.attempt)
    attempt = draft.job.attempts[-1]
    draft.job.state = JOB_STATE_STARTING
    draft.job.executing_centre = attempt.peer
    _end_runs(draft, f"the session went to peer {attempt.peer} before it began, and it with it")
    card = f", {attempt.profile} of a {attempt.gpu_model}" if attempt.profile else ""
    draft.tell(
        "FORWARDING",
        f"no share is free here soon enough; peer {attempt.peer} offers to begin in "
        f"{it.promised_wait_s + it.transfer_s:.1f} s{card}",
        peer=attempt.peer,
        offer_id=it.offer_id,
        profile=attempt.profile,
        gpu_model=attempt.gpu_model,
        promised_wait_s=f"{it.promised_wait_s:.3f}",
        transfer_s=f"{it.transfer_s:.3f}",
        fencing_token=attempt.fencing_token,
        waited_ms=since_ms(draft.job.create_time, draft.at),
    )


def forwarded(draft: Draft, it: h.Forwarded) -> None:
    """The peer has bound it."""
    attempt = draft.job.attempts[-1]
    attempt.peer_job_id = it.peer_job_id
    draft.tell(
        "FORWARDED",
        f"peer {attempt.peer} has it, as job {it.peer_job_id}",
        peer=attempt.peer,
        peer_job_id=it.peer_job_id,
        bundle_bytes=it.bundle_bytes,
        elapsed_ms=since_ms(attempt.reserve_time, draft.at),
    )


def peer_told(draft: Draft, it: h.PeerTold) -> None:
    """Something happened to it at its peer."""
    state = _STATES.get(it.event.state)
    if state is None:
        raise IllegalTransition(f"{draft.job.id}: its peer tells of a state that is none")
    if draft.job.state != JOB_STATE_STOPPING or not draft.record.cancel_requested:
        draft.job.state = state
    _take_over(draft, it.job)
    _tell_of(draft, it.event)


def peer_ended(draft: Draft, it: h.PeerEnded) -> None:
    """It has ended at its peer."""
    _take_over(draft, it.job)
    draft.job.ClearField("idleness")
    _end_runs(draft, "it ended with its session")
    _end(draft, it.job, it.ending)
    peer = draft.job.attempts[-1].peer
    draft.tell(
        "PEER_ENDED",
        f"it has ended at peer {peer}: {plain_text(it.job.message, _MOST_TEXT)}; its results come here now",
        peer=peer,
        exit_code=it.job.exit_code if it.job.HasField("exit_code") else "",
        peer_reason=plain_text(it.job.reason, _REASON_LENGTH),
    )


def peer_away(draft: Draft, it: h.PeerAway) -> None:
    """Its peer is out of contact, or back."""
    draft.tell(it.reason, it.message, peer=draft.job.attempts[-1].peer)


def brought_back(draft: Draft, it: h.BroughtBack) -> None:
    """It waits again."""
    attempt = draft.job.attempts[-1]
    draft.end_attempt(attempt)
    attempt.message = plain_text(it.message, _MOST_TEXT)
    _end_runs(draft, f"the session is no longer at peer {attempt.peer}, where it was; what became of it is not known")
    shunned = (*draft.record.not_at, attempt.peer) if it.shun else draft.record.not_at
    draft.record = replace(draft.record, not_at=shunned, ending=None)
    draft.job.state = JOB_STATE_QUEUED
    draft.job.ClearField("idleness")
    draft.job.ClearField("exit_code")
    draft.job.executing_centre = draft.job.centre
    draft.tell("BROUGHT_BACK", it.message, peer=attempt.peer, peer_reason=it.reason)


def came_late(draft: Draft, it: h.CameLate) -> None:
    """Its result is there after all, and nothing else has begun."""
    draft.attempt = it.attempt
    draft.job.executing_centre = draft.job.attempts[it.attempt - 1].peer
    _take_over(draft, it.job)
    _end(draft, it.job, it.ending)
    draft.tell(
        "LATE_RESULT",
        f"peer {draft.job.attempts[it.attempt - 1].peer} is in contact again and has its result: it had ended before "
        "its lease did",
        peer=draft.job.attempts[it.attempt - 1].peer,
    )


def kept_late(draft: Draft, it: h.KeptLate) -> None:
    """What an attempt that was given up for lost has left is kept."""
    draft.attempt = it.attempt
    peer = draft.job.attempts[it.attempt - 1].peer
    draft.tell(
        "LATE_RESULT_KEPT",
        f"peer {peer} is in contact again: attempt {it.attempt} had ended there before its lease did; its log and "
        f"artifacts are kept beside those of the newest attempt (--attempt {it.attempt})",
        peer=peer,
        log_bytes=it.log_bytes,
        artifact_files=it.artifacts.file_count,
        artifact_digest=it.artifacts.digest,
        exit_code=it.job.exit_code if it.job.HasField("exit_code") else "",
    )


def _end(draft: Draft, job: job_pb2.Job, ending: Ending) -> None:
    draft.record = replace(draft.record, ending=ending)
    draft.job.state = JOB_STATE_STOPPING
    if job.HasField("exit_code"):
        draft.job.exit_code = job.exit_code
        draft.job.attempts[draft.attempt - 1].exit_code = job.exit_code


def _take_over(draft: Draft, job: job_pb2.Job) -> None:
    """Takes over what the peer tells of the job as a whole."""
    attempt = draft.job.attempts[draft.attempt - 1]
    if job.HasField("idleness") and job.idleness.ByteSize() <= _MOST_TEXT:
        draft.job.idleness.CopyFrom(job.idleness)
    else:
        draft.job.ClearField("idleness")
    _take_over_runs(draft, job)
    if not job.attempts:
        return
    there = job.attempts[-1]
    for name in ("gpu_uuid", "gpu_index", "gpu_model", "profile", "slice_uuid", "container_id", "runtime", "emulated"):
        value = getattr(there, name)
        if value:
            setattr(attempt, name, plain_text(value, _MOST_NAME) if isinstance(value, str) else value)
    attempt.placement.CopyFrom(there.placement)
    if there.HasField("start_time"):
        attempt.start_time.CopyFrom(there.start_time)
    if there.HasField("end_time"):
        attempt.end_time.CopyFrom(there.end_time)
    if there.HasField("release_time"):
        attempt.release_time.CopyFrom(there.release_time)
    if there.HasField("exit_code"):
        attempt.exit_code = there.exit_code
    if there.HasField("peak_memory_mib") and credible_mib(attempt.profile, there.peak_memory_mib):
        attempt.peak_memory_mib = there.peak_memory_mib
    del attempt.shares[:]
    attempt.shares.extend(one for one in there.shares[-MOST_SHARES:] if one.ByteSize() <= _MOST_TEXT)
    if there.HasField("start_time") and not draft.job.HasField("start_time"):
        draft.job.start_time.CopyFrom(there.start_time)


def _take_over_runs(draft: Draft, job: job_pb2.Job) -> None:
    """Takes over the runs that the peer tells of. Those of other attempts stay as they are."""
    elsewhere = {run.id for run in draft.job.runs if run.attempt != draft.attempt}
    known = {run.id for run in draft.job.runs}
    told = [
        run
        for run in job.runs[-_MOST_RUNS:]
        if _RUN_ID.fullmatch(run.id) and run.ByteSize() <= _MOST_RUN_BYTES and run.id not in elsewhere
    ]
    for run in [run for run in draft.job.runs if run.id not in elsewhere]:
        draft.job.runs.remove(run)
    for run in told:
        mine = draft.job.runs.add()
        mine.CopyFrom(run)
        mine.DiscardUnknownFields()
        mine.message = plain_text(run.message, _MOST_TEXT)
        mine.job_id, mine.attempt = draft.job.id, draft.attempt
    del draft.job.runs[:-_MOST_RUNS]
    draft.job.run_count += len({run.id for run in told} - known)


def _end_runs(draft: Draft, why: str) -> None:
    """Whatever was being run in it is not any longer."""
    for run in draft.job.runs:
        if not run.HasField("end_time"):
            run.end_time.CopyFrom(timestamp(draft.at))
            run.message = why


def _tell_of(draft: Draft, event: job_pb2.JobEvent) -> None:
    """Tells of what the peer told of, within bounds."""
    details = dict(sorted(event.details.items())[:_MOST_DETAILS])
    details = {plain_text(key, _REASON_LENGTH): plain_text(value, _MOST_TEXT) for key, value in details.items()}
    details["peer_time_ms"] = str(round(moment(event.time) * 1000))
    draft.peer = draft.job.attempts[-1].peer
    reason = plain_text(event.reason, _REASON_LENGTH) or "PEER_TOLD"
    draft.tell(reason, plain_text(event.message, _MOST_TEXT), **details)
