"""What something that happens to a job means for its usage. Pure."""

from __future__ import annotations

from controlplane import happenings as h
from controlplane.happenings import Happening
from controlplane.metering import AllEnded, HoldBegun, HoldEnded, ReclaimedBegun, UsageChange
from controlplane.records import Reservation
from puhui.v1 import job_pb2

__all__ = ["usage_of"]


def usage_of(
    happening: Happening,
    attempt: job_pb2.Attempt,
    held: Reservation | None,
    gpu_slices: int,
    at: float,
    counter_s: float | None,
) -> tuple[UsageChange, ...]:
    """Returns what is to be counted from now on, and what no longer.

    Args:
        happening: what happened to the job.
        attempt: its newest attempt, before that.
        held: the share that the attempt holds.
        gpu_slices: compute slices of the whole GPU, where a share begins to be held.
        at: when, in seconds since the epoch.
        counter_s: for how long the container has used its cards, in seconds; None where that is not known.
    """
    if isinstance(happening, h.SliceCreated | h.Resumed):
        begun = HoldBegun(
            at,
            attempt.number,
            happening.slice.profile,
            attempt.gpu_model,
            held.compute_slices if held is not None else 0,
            gpu_slices,
            happening.slice.emulated,
            # A new container has used nothing; of a living one it may not be known.
            0.0 if isinstance(happening, h.SliceCreated) else counter_s,
        )
        return (begun,)
    if isinstance(happening, h.Reclaimed):
        counter_s = happening.container.idleness.busy_seconds
        return HoldEnded(at, counter_s, happening.mode), ReclaimedBegun(at)
    if isinstance(happening, h.ResumeRetried):
        return HoldEnded(at, counter_s), ReclaimedBegun(at)
    if isinstance(happening, h.SliceDestroyed | h.Requeued | h.Ended):
        return (AllEnded(at, counter_s),)
    return ()
