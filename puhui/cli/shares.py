"""`puhui suspend`, `resume`, `runs` and `explain`."""

from __future__ import annotations

import enum
import itertools
import shlex
from typing import Annotated

import typer

from puhui.cli.connection import connect
from puhui.cli.find_job import find_job
from puhui.cli.job_options import json_flag, server_option
from puhui.cli.jobs import peer_of, waits_at_peer
from puhui.cli.message_json import json_of
from puhui.cli.spec_options import reclaim_mode
from puhui.cli.terminal import Mistake, table, terminal
from puhui.cli.words import age, job_state, readable, run_end, run_length, short_uuid, span
from puhui.client.centre import FINAL_STATES
from puhui.rpc.moment import now, seconds
from puhui.v1 import job_pb2

__all__ = ["add_commands"]


def _some(word: str) -> str:
    if not word.strip():
        raise Mistake("USAGE", "give a job, as `puhui ps` shows it")
    return word


Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, its beginning, or its name.", callback=_some)]


class Rung(enum.StrEnum):
    """How hard a share may be taken."""

    DETACH = "detach"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


def add_commands(app: typer.Typer) -> None:
    """Adds `suspend`, `resume`, `runs` and `explain`."""
    app.command("suspend")(_suspend)
    app.command("resume")(_resume)
    app.command("runs")(_runs)
    app.command("explain")(_explain)


def _suspend(
    word: Job,
    hardest: Annotated[
        Rung,
        typer.Option(help="How hard its share may be taken: this way or a milder one. stop ends what holds it."),
    ] = Rung.CHECKPOINT,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Take a job's share back now, and wait until it is. Its container lives on."""
    with connect(server) as centre:
        job = centre.suspend(find_job(centre, word).id, reclaim_mode(hardest))
    if terminal().as_json:
        terminal().json(job)
    elif job.state == job_pb2.JOB_STATE_IDLE:
        terminal().note(f"{job.id} has no share now; `puhui resume {job.id}` has one scheduled for it ({job.message})")
    else:
        terminal().note(f"{job.id} is {job_state(job.state)}: {readable(job.message)}")


def _resume(
    word: Job,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Have a share scheduled for a job that has none. Waits for nothing: `puhui explain` says how it stands."""
    with connect(server) as centre:
        job = centre.resume(find_job(centre, word).id)
    if terminal().as_json:
        terminal().json(job)
    elif job.state == job_pb2.JOB_STATE_RUNNING:
        terminal().note(f"{job.id} has a share and runs")
    else:
        terminal().note(f"{job.id} is {job_state(job.state)}; `puhui explain {job.id}` says how it stands")


def _runs(
    word: Job,
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 is all.")] = 20,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """List the commands that were run in a job, the newest first."""
    with connect(server) as centre:
        job = find_job(centre, word)
        found = centre.runs(job.id, page_size=min(limit, 500) or 500)
        runs = list(itertools.islice(found, limit or None))
        more = limit and next(found, None) is not None
    if terminal().as_json:
        terminal().json({"runs": [json_of(run) for run in runs]})
        return
    if not runs:
        terminal().note(f"nothing was run in {job.id}; `puhui exec {job.id} -- COMMAND` runs something")
        return
    moment_s = now()
    shown = table("RUN", "COMMAND", "ENDED", "SLICE", "AGE", "TIME", right=("AGE", "TIME"))
    for column in shown.columns:
        column.no_wrap = True
    if terminal().cuts:
        shown.columns[1].overflow, shown.columns[1].max_width = "ellipsis", max(terminal().out.width - 60, 10)
    for run in runs:
        slice_name = f"{short_uuid(run.slice_uuid)}" if run.slice_uuid else "-"
        shown.add_row(
            run.id,
            shlex.join(run.command),
            run_end(run),
            slice_name,
            age(run.create_time, moment_s),
            run_length(run, moment_s),
        )
    terminal().show(shown)
    if more:
        terminal().note(f"older runs are left out; --limit {limit * 4} shows more, --limit 0 all")


def _explain(
    word: Job,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Say why a job waits, and for how long."""
    with connect(server) as centre:
        job = find_job(centre, word)
        answer = centre.explain(job.id)
    if terminal().as_json:
        named = {"job_id": job.id, "state": job_pb2.JobState.Name(job.state), "peer": peer_of(job) or None}
        terminal().json({**named, **json_of(answer)})
        return
    terminal().show(f"{job.id}  {job_state(job.state)}")
    if answer.queue_position:
        whose = f" of peer {waits_at_peer(job)}" if waits_at_peer(job) else ""
        terminal().show(f"place      {answer.queue_position} in the queue{whose}")
    if answer.message:
        terminal().show(f"reason     {readable(answer.message)}")
    if answer.HasField("expected_wait") and job.state not in FINAL_STATES:
        terminal().show(f"expected   in about {span(seconds(answer.expected_wait))}")
