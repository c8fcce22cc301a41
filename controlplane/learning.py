"""What is learnt when something happens to a job. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane import happenings
from controlplane.happenings import Happening
from controlplane.observing import ObservedAttempt, observe
from controlplane.records import JobRecord

__all__ = ["learnt"]


def learnt(happened: Iterable[Happening], record: JobRecord, at: float) -> tuple[ObservedAttempt, ...]:
    """Returns what is learnt from the newest attempt of a job, if what happened is its end.

    Args:
        happened: what happened now.
        record: the job afterwards.
        at: now, in seconds since the epoch.
    """
    if not any(isinstance(one, happenings.Ended | happenings.Grows) for one in happened):
        return ()
    observed = observe(record.job, record.fingerprint, record.ending, record.ran_out_of_mib, at)
    return (observed,) if observed is not None else ()
