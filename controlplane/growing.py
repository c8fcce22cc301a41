"""What becomes of a job that ran out of device memory: the next size up, or its end. Pure.

A size that was outgrown is never tried again, so each is tried once at the most. What somebody asked for by name or by
amount is kept: they know their budget, and are told what to ask for instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from controlplane.endings import Ending
from controlplane.fleet import Geometry
from controlplane.sizing import EQUAL_MEMORY, largest, size_outgrown
from puhui.v1 import job_pb2, prediction_pb2
from puhui.v1.job_pb2 import JOB_STATE_FAILED

__all__ = ["Outgrown", "credible_mib", "next_size", "nominal_mib", "outgrown"]

_PROFILE = re.compile(r"\d+g\.(\d{1,5})gb")
_MIB_PER_GB = 1024
_LARGEST_CARD_MIB = 512 * 1024
"""More than any card has."""


@dataclass(frozen=True)
class Outgrown:
    """A job that ran out of device memory."""

    profile: str
    """Profile of the slice that was too small; "" when that is not known."""
    slice_mib: int
    """Its memory."""
    ending: Ending
    """How the attempt ended, and the job if it is not tried again."""
    sizing: prediction_pb2.Sizing | None
    """What it is tried again on; None when it is not."""


def outgrown(
    job: job_pb2.Job, slice_mib: int, geometries: Iterable[Geometry], elsewhere: Collection[str] = ()
) -> Outgrown:
    """Returns what becomes of a job whose newest attempt ran out of device memory.

    Args:
        job: the job.
        slice_mib: memory of the slice on which it did.
        geometries: what the GPUs of this centre can be cut into.
        elsewhere: names of the profiles that peers have, to which it may go when no card here is larger.
    """
    known = list(geometries)
    profile = job.attempts[-1].profile
    sizing = size_outgrown(int(slice_mib * EQUAL_MEMORY) + 1, known)
    next_up = next_size(sizing)
    if not sizing.choices and not job.spec.peers.here_only:
        next_up = _at_peers(sizing.required_mib, elsewhere)
    message = f"it ran out of device memory on {profile or 'its slice'} ({slice_mib} MiB)"
    keeps = _why_it_keeps_its_size(job, next_up)
    if keeps or not next_up:
        return Outgrown(profile, slice_mib, _ending(message + (keeps or _why_nothing_is_larger(known))), None)
    message += f"; it is tried again from its beginning on the next size up, {next_up}"
    return Outgrown(profile, slice_mib, _ending(message), sizing)


def next_size(sizing: prediction_pb2.Sizing) -> str:
    """Returns the size that a job goes on with, for people; "" when no card here has it."""
    return f"{sizing.choices[0].profile} ({sizing.choices[0].memory_mib} MiB)" if sizing.choices else ""


def nominal_mib(profile: str) -> int:
    """Returns the memory that a profile's name tells of, in MiB; 0 when it tells of none."""
    size = _PROFILE.match(profile)
    return int(size[1]) * _MIB_PER_GB if size is not None else 0


def credible_mib(profile: str, told_mib: int) -> bool:
    """Says whether a peer's word about memory on one of its slices can be true: none has more than its name says."""
    most = min(nominal_mib(profile) or _LARGEST_CARD_MIB, _LARGEST_CARD_MIB)
    return 0 < told_mib <= most * EQUAL_MEMORY


def _at_peers(required_mib: int, elsewhere: Collection[str]) -> str:
    enough = [(nominal_mib(name), name) for name in elsewhere if nominal_mib(name) >= required_mib]
    return f"{min(enough)[1]} at a peer" if enough else ""


def _why_nothing_is_larger(known: list[Geometry]) -> str:
    top = largest(known)
    most = f"the largest slice here has {top.memory_mib} MiB" if top is not None else "no larger slice is known here"
    return f", and {most}; have it need less: a smaller batch, lower precision, gradient checkpointing"


def _why_it_keeps_its_size(job: job_pb2.Job, next_up: str) -> str:
    """Returns why a job is not tried on a larger slice, as the end of a sentence; "" when it is."""
    resources = job.spec.resources
    if job.HasField("guest"):
        return ", and the centre that sent it decides how it goes on"
    more = f"ask for {next_up.partition(' ')[0]}" if next_up else "there is no larger one"
    if resources.profile:
        return f", the profile that was asked for, which is kept; {more}, or leave --profile out and it grows by itself"
    if resources.memory_mib:
        return (
            f", cut for the {resources.memory_mib} MiB that were asked for, which is kept; {more}, or leave --memory "
            "out and it grows by itself"
        )
    return ""


def _ending(message: str) -> Ending:
    return Ending(JOB_STATE_FAILED, "DEVICE_OUT_OF_MEMORY", message)
