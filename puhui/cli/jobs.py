"""`puhui ps`, `get`, `wait` and `cancel`."""

from __future__ import annotations

import difflib
import itertools
import shlex
from typing import Annotated

import grpc
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from puhui.cli.connection import connect
from puhui.cli.find_job import find_job
from puhui.cli.job_options import job_argument, json_flag, server_option
from puhui.cli.message_json import json_of
from puhui.cli.share_facts import share_facts
from puhui.cli.story import exit_code_of, tell_end
from puhui.cli.terminal import Mistake, table, terminal
from puhui.cli.words import (
    age,
    card_name,
    count,
    job_state,
    memory_slices,
    mib,
    overruled_line,
    prediction_line,
    readable,
    short_uuid,
    size,
    span,
)
from puhui.client import Refusal
from puhui.client.centre import FINAL_STATES
from puhui.rpc.moment import moment, now, seconds, timestamp
from puhui.rpc.quantities import parse_duration
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import JobFilter

__all__ = [
    "add_commands",
    "job_facts",
    "job_row",
    "peer_of",
    "show_jobs",
    "waits_at_peer",
    "where_it_is",
    "why_it_waits",
]

_TIMED_OUT = 124
_EXIT = 6
"""Place of the column of exit codes, which is left out where the line is short and nothing has ended."""
_LEAST_NAME = 8
"""Characters of a name that are shown at least."""
_COLOURS = {
    job_pb2.JOB_STATE_RUNNING: "green",
    job_pb2.JOB_STATE_FAILED: "red",
    job_pb2.JOB_STATE_QUEUED: "yellow",
    job_pb2.JOB_STATE_IDLE: "cyan",
    job_pb2.JOB_STATE_RESUMING: "yellow",
    job_pb2.JOB_STATE_CANCELLED: "dim",
}
_WITH_REASON = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_IDLE, job_pb2.JOB_STATE_RESUMING)
_STATES = {job_state(number): number for number in job_pb2.JobState.values() if number}

JobId = Annotated[str, job_argument]


def add_commands(app: typer.Typer) -> None:
    """Adds `ps`, `get`, `wait` and `cancel`."""
    app.command("ps")(_ps)
    app.command("get")(_get)
    app.command("wait")(_wait)
    app.command("cancel")(_cancel)


def _ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Jobs that have ended, too.")] = False,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    name: Annotated[str, typer.Option(help="Only with a name that begins so.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only with this label.")] = None,
    tenant: Annotated[str, typer.Option(help="Only of this tenant.")] = "",
    since: Annotated[str, typer.Option(metavar="TIME", help="Only submitted within, say, the last 2h.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 is all.")] = 50,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """List jobs, the newest first; those that have not ended, unless asked."""
    where = JobFilter(name_prefix=name, tenant=tenant, labels=dict(_label(pair) for pair in label or ()))
    if state:
        where.states.extend(_state(word) for word in state)
    elif not everything:
        where.states.extend(number for number in _STATES.values() if number not in FINAL_STATES)
    if since:
        try:
            where.created_since.CopyFrom(timestamp(now() - parse_duration(since)))
        except ValueError as error:
            raise Mistake("USAGE", f"--since: {error}") from error
    with connect(server) as centre:
        found = centre.jobs(where, page_size=min(limit, 500) or 500)
        jobs = list(itertools.islice(found, limit or None))
        more = limit and next(found, None) is not None
    if terminal().as_json:
        terminal().json({"jobs": [json_of(job) for job in jobs]})
    elif not jobs:
        terminal().note(
            "no jobs" if everything or state else "no job is waiting or running; `puhui ps --all` shows more"
        )
    else:
        show_jobs(jobs)
    if more:
        terminal().note(f"older jobs are left out; --limit {limit * 4} shows more, --limit 0 all")


def show_jobs(jobs: list[job_pb2.Job]) -> None:
    """Writes a table of jobs, with why they wait below those that do."""
    moment_s = now()
    headings: tuple[str, ...] = ("JOB", "NAME", "STATE", "SLICE", "AGE", "TIME", "EXIT")
    rows = [job_row(job, moment_s) for job in jobs]
    if any(map(where_it_is, jobs)):
        headings = (*headings, "PEER")
        rows = [(*row, where_it_is(job)) for row, job in zip(rows, jobs, strict=True)]
    width = terminal().out.width
    if terminal().cuts and _width_of(headings, rows) > width and not any(job.HasField("exit_code") for job in jobs):
        headings, *rows = [(*row[:_EXIT], *row[_EXIT + 1 :]) for row in (headings, *rows)]
    # A name may be longer than the line; everything else is short, and must not be cut: two peers would look alike.
    least = _width_of(headings, rows)
    name_width = max(width - least, 0) + _LEAST_NAME
    shown = table(*headings, right=("AGE", "TIME", "EXIT"))
    for column in shown.columns:
        column.no_wrap = True
    if terminal().cuts:
        shown.columns[1].overflow, shown.columns[1].max_width = "ellipsis", name_width
    for job, (job_id, name, state, *rest) in zip(jobs, rows, strict=True):
        shown.add_row(job_id, name, Text(state, style=_COLOURS.get(job.state, "")), *rest)
    terminal().show(_WithRemarks(shown, ["", *map(why_it_waits, jobs)]), least)


def _width_of(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> int:
    """Returns the columns that a table of jobs takes at least: names are cut, and nothing else."""
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    widths[1] = min(widths[1], _LEAST_NAME)
    return sum(widths) + 2 * (len(headings) - 1)


def why_it_waits(job: job_pb2.Job) -> str:
    """Returns what a job waits for, in one line; "" when it does not wait."""
    waits = job.state in _WITH_REASON or waits_at_peer(job)
    return " ".join(readable(job.message).split()) if waits else ""


class _WithRemarks:
    """A table of one line per row, with a remark below each row that has one."""

    def __init__(self, shown: Table, remarks: list[str]) -> None:
        self._shown = shown
        self._remarks = remarks

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._shown, options, pad=False)
        for line, remark in zip(lines, self._remarks, strict=True):
            yield Segments([*line, Segment.line()])
            if remark:
                yield Text(f"  {remark}", style="dim", no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        shown = Measurement.get(console, options, self._shown)
        remarks = max(2 + cell_len(remark) for remark in self._remarks)
        return Measurement(shown.minimum, max(shown.maximum, remarks))


def waits_at_peer(job: job_pb2.Job) -> str:
    """Returns the peer in whose queue a job waits, which is STARTING here; "" when it is in none."""
    waits = job.state == job_pb2.JOB_STATE_STARTING and job.reason == "WAITING_FOR_SLICE" and job.attempts
    return job.attempts[-1].peer if waits else ""


def job_row(job: job_pb2.Job, now_s: float) -> tuple[str, ...]:
    """Returns the cells of a job in a table: id, name, state, slice, age, time and exit code."""
    return (
        job.id,
        job.spec.name or "-",
        job_state(job.state),
        _slice(job),
        age(job.create_time, now_s),
        _ran(job, now_s),
        str(job.exit_code) if job.HasField("exit_code") else "-",
    )


def where_it_is(job: job_pb2.Job) -> str:
    """Returns at which peer a job is, or from which it came; "" for one that is this centre's own business."""
    came = f"of {job.guest.peer}" if job.HasField("guest") else ""
    return ", ".join(filter(None, (came, peer_of(job))))


def peer_of(job: job_pb2.Job) -> str:
    """Returns the peer at which a job is, or where it ended; "" when that is here, or nowhere yet."""
    attempt = _attempt_of(job)
    return attempt.peer if attempt is not None else ""


def _attempt_of(job: job_pb2.Job) -> job_pb2.Attempt | None:
    """Returns the attempt that a job is at, or ended with; None while it waits, when those that it had are over."""
    if not job.attempts or job.state == job_pb2.JOB_STATE_QUEUED:
        return None
    last = job.attempts[-1]
    # It had come back from there, and ended while it waited here.
    return None if last.peer and job.executing_centre == job.centre != "" else last


def _slice(job: job_pb2.Job) -> str:
    attempt = _attempt_of(job)
    if attempt is None:
        wanted = job.sizing.choices[0].profile if job.sizing.choices else job.spec.resources.profile
        return f"{wanted}?" if wanted else "-"
    doubt = "?" if waits_at_peer(job) else ""
    return f"{attempt.profile}{doubt}{' (emulated)' if attempt.emulated else ''}"


def _ran(job: job_pb2.Job, now_s: float) -> str:
    attempt = _attempt_of(job)
    if attempt is None or not job.HasField("start_time"):
        return "-"
    if not attempt.HasField("start_time") and job.state == job_pb2.JOB_STATE_STARTING:
        return "-"
    start = attempt.start_time if attempt.HasField("start_time") else job.start_time
    # A peer's job may have ended long before that was heard here.
    end = attempt if attempt.HasField("end_time") else job
    end_s = moment(end.end_time) if end.HasField("end_time") else now_s
    # The start is by the node's clock; a job never ran longer than it has been there.
    return span(max(min(end_s - moment(start), now_s - moment(job.create_time)), 0))


def _get(
    job_id: JobId,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Show one job."""
    with connect(server) as centre:
        job = centre.get(find_job(centre, job_id).id)
    if terminal().as_json:
        terminal().json(job)
        return
    shown = table("", "")
    shown.show_header = False
    for key, value in job_facts(job, now()):
        shown.add_row(Text(key, style="bold"), value)
    terminal().show(shown)


def job_facts(job: job_pb2.Job, now_s: float) -> list[tuple[str, str]]:
    """Returns what is known of a job: lines, each a label and a text.

    Args:
        job: the job.
        now_s: now, in seconds since the epoch.
    """
    facts = [
        ("job", f"{job.id} at centre {job.centre}"),
        ("name", job.spec.name or "-"),
        (
            "state",
            tell_end(job) if job.state in FINAL_STATES else f"{job_state(job.state)} ({job.reason}): {job.message}",
        ),
        ("command", shlex.join(job.spec.command) or "none: a session that waits for runs"),
        ("submitted", f"{age(job.create_time, now_s)} ago"),
        ("ran", _ran(job, now_s)),
    ]
    if job.prediction.tier:
        facts.append(
            ("predicted", overruled_line(job.prediction, job.sizing.origin) or prediction_line(job.prediction))
        )
    if job.sizing.reason:
        facts.append(("slice", readable(job.sizing.reason)))
    if job.HasField("guest"):
        facts.append(("sent by", _sender(job.guest, now_s)))
    if job.spec.HasField("peers"):
        facts.append(("peers", _peer_policy(job.spec.peers)))
    facts += [(f"attempt {attempt.number}", _attempt(attempt, now_s)) for attempt in job.attempts]
    facts += share_facts(job, now_s)
    if job.state in FINAL_STATES:
        facts.append(("output", size(job.log_size_bytes)))
    return facts


def _sender(guest: job_pb2.Guest, now_s: float) -> str:
    """Returns who sent a job here, and on what terms."""
    parts = [f"peer {guest.peer}, where it is attempt {guest.attempt} of job {guest.job_id}"]
    if guest.HasField("lease_expire_time"):
        parts.append(f"under a lease for {_left(guest.lease_expire_time, now_s)} more")
    onward = f"may be sent on {count(guest.hops_left, 'time')}" if guest.hops_left else "may not be sent on"
    return ", ".join([*parts, onward])


def _left(until: Timestamp, now_s: float) -> str:
    return span(max(moment(until) - now_s, 0))


def _peer_policy(policy: job_pb2.PeerPolicy) -> str:
    """Returns where a job may run, as its user has said."""
    if policy.here_only:
        return "none: here only"
    parts = []
    if policy.preferred_peers:
        parts.append(f"{', '.join(policy.preferred_peers)} first")
    if policy.HasField("max_wait"):
        parts.append(f"when the wait here is longer than {span(seconds(policy.max_wait))}")
    parts += [f"only with {key}={value}" for key, value in sorted(policy.required_labels.items())]
    parts += [f"not with {key}={value}" for key, value in sorted(policy.forbidden_labels.items())]
    return ", ".join(parts) or "any"


def _attempt(attempt: job_pb2.Attempt, now_s: float) -> str:
    """Returns where an attempt was, and what became of it."""
    where = f"node {attempt.node_id}" if not attempt.peer else f"peer {attempt.peer}"
    if attempt.peer_job_id:
        where += f" (job {attempt.peer_job_id} there)"
    if attempt.HasField("lease_expire_time"):
        where += f", under a lease for {_left(attempt.lease_expire_time, now_s)} more"
    parts = [where]
    if attempt.slice_uuid:
        card = card_name(attempt.gpu_model, attempt.emulated)
        place = memory_slices(attempt.placement)
        share = f"{attempt.profile} {short_uuid(attempt.slice_uuid)} on GPU {attempt.gpu_index}"
        parts = [share, card, place, where]
    elif attempt.profile:
        card = card_name(attempt.gpu_model, attempt.emulated) if attempt.gpu_model else ""
        parts = [part for part in (attempt.profile, card, where) if part]
    if attempt.container_id:
        parts.append(f"{attempt.runtime} {attempt.container_id[:12]}")
    if attempt.HasField("exit_code"):
        parts.append(f"exit code {attempt.exit_code}")
    if attempt.HasField("peak_memory_mib"):
        parts.append(f"used up to {mib(attempt.peak_memory_mib)} of device memory")
    if attempt.HasField("release_time"):
        parts.append("released")
    return ", ".join(parts) + (f": {readable(attempt.message)}" if attempt.message else "")


def _wait(
    job_id: JobId,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Longest wait, such as 10m; then code 124.")] = "",
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Wait until a job has ended, and end with its exit code."""
    try:
        timeout_s = parse_duration(timeout) if timeout else None
    except ValueError as error:
        raise Mistake("USAGE", f"--timeout: {error}") from error
    with connect(server) as centre:
        try:
            job = centre.wait(find_job(centre, job_id).id, timeout_s)
        except Refusal as refusal:
            if refusal.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            terminal().fail(refusal)
            raise typer.Exit(_TIMED_OUT) from None
    if terminal().as_json:
        terminal().json(job)
    else:
        terminal().note(tell_end(job), "ended")
    raise typer.Exit(exit_code_of(job))


def _cancel(
    job_id: JobId,
    message: Annotated[str, typer.Option("--message", "-m", help="Why, for people.")] = "",
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """End a job. One that has ended stays as it is."""
    with connect(server) as centre:
        job = centre.cancel(find_job(centre, job_id).id, message)
    if terminal().as_json:
        terminal().json(job)
    elif job.state in FINAL_STATES:
        terminal().note(f"{job.id} has ended: {tell_end(job)}")
    else:
        terminal().note(f"{job.id} is being ended; `puhui wait {job.id}` waits for it")


def _state(word: str) -> job_pb2.JobState.ValueType:
    number = _STATES.get(word.lower().removeprefix("job_state_"))
    if number is None:
        close = difflib.get_close_matches(word.lower(), _STATES, n=1)
        advice = f"did you mean {close[0]}?" if close else "there are: " + ", ".join(_STATES)
        raise Mistake("USAGE", f"--state {word}: no such state; {advice}")
    return number


def _label(pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if not key or not equals:
        raise Mistake("USAGE", f"--label {pair}: write it as KEY=VALUE")
    return key, value
