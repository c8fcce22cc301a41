"""What is learnt from an attempt that has ended: how much device memory its code needed. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.endings import Ending
from puhui.rpc.moment import moment
from puhui.v1 import job_pb2

__all__ = ["FEWEST_SAMPLES", "ObservedAttempt", "observe"]

FEWEST_SAMPLES = 3
"""A peak that was seen in fewer looks than this may be that of a program that had only begun, and is not believed."""


@dataclass(frozen=True)
class ObservedAttempt:
    """What an attempt showed of its code."""

    job_id: str
    attempt: int
    tenant: str
    fingerprint: str
    """Of the code and what it was asked to do."""
    at: float
    """When it ended, in seconds since the epoch."""
    peak_mib: int | None
    """Most device memory that it used, when it came to its end; None when that is not known."""
    at_least_mib: int | None
    """It would have used this much or more; None when it came to its end, or nothing is known."""
    duration_s: float
    """For how long its command ran."""
    utilization: float | None
    """Share of the time with its slice in which it used it, from 0 to 1; None when not known."""
    profile: str
    gpu_model: str
    emulated: bool
    peer: str
    """Peer at which it ran; "" for here."""


def observe(
    job: job_pb2.Job, fingerprint: str, ending: Ending | None, ran_out_of_mib: int, at: float
) -> ObservedAttempt | None:
    """Returns what is learnt from the newest attempt of a job; None when nothing is.

    Args:
        job: the job, when that attempt is over.
        fingerprint: of its code and what it was asked to do; "" for a job that nothing is to be learnt from.
        ending: how it ends; None when it is tried again.
        ran_out_of_mib: memory of the slice on which it ran out of it; 0 when it did not.
        at: now, in seconds since the epoch.
    """
    if not fingerprint or not job.attempts:
        return None
    attempt = job.attempts[-1]
    if any(run.attempt == attempt.number for run in job.runs):
        return None  # what other commands in its container used is not told apart
    if not attempt.HasField("start_time") or not attempt.HasField("end_time"):
        return None
    peak_mib = attempt.peak_memory_mib if attempt.HasField("peak_memory_mib") else None
    succeeded = ending is not None and ending.state == job_pb2.JOB_STATE_SUCCEEDED
    # What ended before its time might have gone on to use more.
    at_least_mib = None if succeeded else ran_out_of_mib or peak_mib
    if peak_mib is None and at_least_mib is None:
        return None
    return ObservedAttempt(
        job.id,
        attempt.number,
        job.spec.tenant,
        fingerprint,
        at,
        peak_mib if succeeded else None,
        at_least_mib,
        max(0.0, moment(attempt.end_time) - moment(attempt.start_time)),
        _utilization(attempt),
        attempt.profile,
        attempt.gpu_model,
        attempt.emulated,
        attempt.peer,
    )


def _utilization(attempt: job_pb2.Attempt) -> float | None:
    shares = [one for one in attempt.shares if one.HasField("release_time")]
    held_s = sum(moment(one.release_time) - moment(one.hold_time) for one in shares)
    busy_s = sum(one.busy_seconds for one in shares)
    # A node that did not count tells 0 as well.
    if held_s <= 0 or not busy_s:
        return None
    return min(1.0, busy_s / held_s)
