"""Whether a job uses its share, when that may be taken back, which shares it had and what was run in it."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator

from puhui.cli.words import age, memory_slices, plain_enum, run_end, run_length, short_uuid, span
from puhui.client.centre import FINAL_STATES
from puhui.rpc.moment import moment, seconds
from puhui.v1 import job_pb2
from puhui.v1.idle_pb2 import Idleness

__all__ = ["share_facts"]

_MOST_SHOWN = 5


def share_facts(job: job_pb2.Job, now_s: float) -> list[tuple[str, str]]:
    """Returns what is known of a job's shares and runs: lines, each a label and a text."""
    facts = []
    if job.state not in FINAL_STATES:
        if job.HasField("idleness"):
            facts.append(("use", _use(job, now_s)))
        if job.HasField("idle_policy"):
            facts.append(("taken back", _policy(job.idle_policy)))
    facts += _shares(job, now_s)
    facts += _runs(job, now_s)
    return facts


def _use(job: job_pb2.Job, now_s: float) -> str:
    idleness = job.idleness
    signal = idleness.signal.replace("_", " ")
    told = f" ({signal}: {idleness.message})" if signal and idleness.message else f" ({idleness.message or signal})"
    told = told if told != " ()" else ""
    if job.state in (job_pb2.JOB_STATE_IDLE, job_pb2.JOB_STATE_RESUMING):
        return f"it has no share{told}"
    if idleness.idle:
        return f"idle, unused for {_since(idleness, now_s)}{told}"
    if idleness.HasField("unused_since"):
        return f"unused for {_since(idleness, now_s)}, not yet idle{told}"
    return f"busy{told}"


def _since(idleness: Idleness, now_s: float) -> str:
    return span(max(now_s - moment(idleness.unused_since), 0))


def _policy(policy: job_pb2.IdlePolicy) -> str:
    mode = plain_enum(job_pb2.ReclaimMode.Name(policy.reclaim_mode), "RECLAIM_MODE_")
    if policy.reclaim_mode == job_pb2.RECLAIM_MODE_NEVER:
        return "never, but by `puhui suspend`"
    how = {
        "unspecified": "as mildly as the host can, ending no work",
        "detach": "only while no process holds the card",
        "checkpoint": "at most by checkpoint, ending no work",
        "stop": "by ending what runs, if need be and if somebody waits",
    }.get(mode, mode)
    text = f"after {span(seconds(policy.idle_after))} below {policy.idle_below_percent:g}%, {how}"
    if policy.HasField("start_grace"):
        text += f"; not in the first {span(seconds(policy.start_grace))} before it uses its card"
    if policy.warn_signal:
        text += "; SIGUSR1 first"
    if policy.on_reclaim:
        limit = f", at most {span(seconds(policy.on_reclaim_limit))}" if policy.HasField("on_reclaim_limit") else ""
        text += f"; {shlex.join(policy.on_reclaim)} first{limit}"
    return text


def _shares(job: job_pb2.Job, now_s: float) -> Iterator[tuple[str, str]]:
    shares = [share for attempt in job.attempts for share in attempt.shares]
    if len(shares) > _MOST_SHOWN:
        yield "shares", f"{len(shares)}; the newest {_MOST_SHOWN} are below"
    for share in shares[-_MOST_SHOWN:]:
        ended = share.HasField("release_time")
        held = span(max((moment(share.release_time) if ended else now_s) - moment(share.hold_time), 0))
        text = f"{share.profile} {short_uuid(share.slice_uuid)} on GPU {share.gpu_index}, "
        text += f"{memory_slices(share.placement)}, held {held}"
        if ended:
            text += f", used {span(share.busy_seconds)}"
            mode = plain_enum(job_pb2.ReclaimMode.Name(share.reclaim_mode), "RECLAIM_MODE_")
            text += f", taken back ({mode})" if share.reclaim_mode else ", given up"
        else:
            text += ", has it now"
        yield "share", text


def _runs(job: job_pb2.Job, now_s: float) -> Iterator[tuple[str, str]]:
    shown = job.runs[-_MOST_SHOWN:]
    if job.run_count > len(shown):
        yield "runs", f"{job.run_count}; the newest {len(shown)} are below, `puhui runs {job.id}` shows more"
    for run in shown:
        command = textwrap.shorten(shlex.join(run.command), 60, placeholder=" …")
        length = f", ran {run_length(run, now_s)}" if run.HasField("start_time") else ""
        why = f": {run.message}" if run.message else ""
        yield "run", f"{command}: {run_end(run)}{length}, {age(run.create_time, now_s)} ago{why} ({run.id})"
