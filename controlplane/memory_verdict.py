"""Looks whether an attempt that has failed ran out of device memory, and says what becomes of its job then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping

from controlplane.device_memory import TAIL_BYTES, ran_out
from controlplane.fleet import Geometry
from controlplane.growing import Outgrown, outgrown
from controlplane.records import JobRecord
from controlplane.results import Results
from puhui.v1 import job_pb2

__all__ = ["look_at_memory"]

# How an attempt ends that may have run out: by itself, with an exit code that is not 0. A peer may have looked already.
_REASONS = frozenset({"EXIT_CODE", "DEVICE_OUT_OF_MEMORY"})


async def look_at_memory(
    record: JobRecord,
    log_bytes: int,
    slice_mib: int,
    results: Results,
    geometries: Callable[[], Iterable[Geometry]],
    offered: Callable[[], Mapping[str, Collection[str]]],
) -> Outgrown | None:
    """Returns what becomes of a job whose newest attempt ran out of device memory; None when it did not.

    Args:
        record: the job, whose newest attempt has ended.
        log_bytes: size of that attempt's output, which is in the results.
        slice_mib: memory of its slice, in MiB; 0 when that is not known.
        results: where its output is.
        geometries: returns what the GPUs of this centre can be cut into.
        offered: returns the peers there are, by name, each with the profiles that it has.
    """
    ending, job = record.ending, record.job
    if ending is None or ending.reason not in _REASONS or record.ran_out_of_mib or not slice_mib:
        return None
    if job.spec.kind == job_pb2.JOB_KIND_SESSION:
        return None  # what people run in it runs out for itself, and they see it
    number = len(job.attempts)
    tail = await asyncio.to_thread(results.end_of_log, job.id, number, log_bytes, TAIL_BYTES)
    if not ran_out(tail):
        return None
    elsewhere = {profile for has in offered().values() for profile in has}
    return outgrown(job, slice_mib, geometries(), elsewhere)
