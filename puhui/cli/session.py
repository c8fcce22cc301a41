"""`puhui session`: containers that live until they are stopped, and get a share of a GPU when something is run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from puhui.cli.attached import show_update
from puhui.cli.connection import connect
from puhui.cli.find_job import find_session
from puhui.cli.job_options import json_flag, server_option, uploadable
from puhui.cli.jobs import show_jobs
from puhui.cli.message_json import json_of
from puhui.cli.progress import transfer_bar
from puhui.cli.run import note_folder
from puhui.cli.spec_options import SpecOptions, takes_options
from puhui.cli.split_command import SplitCommand, command_of
from puhui.cli.story import exit_code_of, tell_end
from puhui.cli.terminal import Mistake, terminal
from puhui.client import Centre, Refusal
from puhui.client.centre import FINAL_STATES
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import JobFilter

__all__ = ["add_commands"]

_NOT_STARTED = 125
_INTERRUPTED = 130
_EXAMPLE = "puhui session start . -- jupyter lab"
_UNDER_WAY = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_STARTING)


def add_commands(app: typer.Typer) -> None:
    """Adds `session`, with `start`, `ls` and `stop`."""
    family = typer.Typer(help="Containers that live until they are stopped; `puhui exec` runs commands in them.")
    family.command("start", cls=SplitCommand)(takes_options(SessionOptions, _start))
    family.command("ls")(_ls)
    family.command("stop")(_stop)
    app.add_typer(family, name="session", no_args_is_help=True)


@dataclass(frozen=True)
class SessionOptions(SpecOptions):
    """What was written on the command line of a session; None is not said."""

    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", show_default=False, help="Folder of code to bring in.")
    ] = None
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND [ARGS]",
            show_default=False,
            help="A server that the session keeps running, such as Jupyter; default: nothing, it waits for runs.",
        ),
    ] = None

    def spec(self, command: list[str]) -> job_pb2.JobSpec:
        """Returns what a centre is asked for.

        Raises:
            Mistake: an option cannot be meant.
        """
        spec = job_pb2.JobSpec(kind=job_pb2.JOB_KIND_SESSION, command=command)
        self.apply(spec)
        return spec


def _start(
    options: SessionOptions,
    context: typer.Context,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not wait until it runs.")] = False,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Start a session, wait until it runs, and print its id.

    Runs get a share of a GPU; unused for as long as its idle policy says, the share goes back to work elsewhere, and
    the session lives on without one until the next run.
    """
    spec = options.spec(command_of(context, options.words, _EXAMPLE))
    folder = uploadable(options.path) if options.path is not None else None
    with connect(server) as centre:
        job: job_pb2.Job | None = None
        try:
            if folder is not None:
                note_folder(folder)
            with transfer_bar("uploading") as progress:
                job = centre.submit(spec, folder, progress=progress)
            if not detach:
                job = _wait_until_it_runs(centre, job)
        except KeyboardInterrupt:
            if job is None:
                terminal().note("no session was accepted yet, as far as is known; `puhui session ls` shows", "stopped")
            else:
                terminal().note(f"{job.id} goes on starting; `puhui session stop {job.id}` ends it", "detached")
            raise typer.Exit(_INTERRUPTED) from None
        except Mistake:
            raise
        except Refusal as refusal:
            terminal().fail(refusal)
            if job is not None:
                terminal().note(f"{job.id} was accepted and may go on; `puhui get {job.id}` shows", "session")
            raise typer.Exit(_NOT_STARTED) from None
    if terminal().as_json:
        terminal().json(job)
    else:
        terminal().text(job.id + "\n")
    if job.state in FINAL_STATES:
        terminal().note(tell_end(job), "ended")
        raise typer.Exit(exit_code_of(job) or _NOT_STARTED)
    if not terminal().as_json:
        name = job.spec.name or job.id
        terminal().note(
            f"puhui exec {name} -- COMMAND runs something in it; puhui session stop {name} ends it", "session"
        )


def _wait_until_it_runs(centre: Centre, job: job_pb2.Job) -> job_pb2.Job:
    for update in centre.updates(job.id):
        job = update.job
        if not terminal().as_json:
            show_update(update)
        if update.event.state not in _UNDER_WAY and job.state not in _UNDER_WAY:
            break
    return job


def _ls(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Sessions that have ended, too.")] = False,
    tenant: Annotated[str, typer.Option(help="Only of this tenant.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most this many; 0 is all.")] = 50,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """List sessions, the newest first; those that have not ended, unless asked."""
    where = JobFilter(tenant=tenant)
    if not everything:
        where.states.extend(state for state in job_pb2.JobState.values() if state and state not in FINAL_STATES)
    with connect(server) as centre:
        sessions = (job for job in centre.jobs(where, page_size=500) if job.spec.kind == job_pb2.JOB_KIND_SESSION)
        jobs = list(itertools.islice(sessions, limit or None))
        more = limit and next(sessions, None) is not None
    if terminal().as_json:
        terminal().json({"jobs": [json_of(job) for job in jobs]})
    elif not jobs:
        terminal().note("no sessions" if everything else "no session lives; `puhui session start` starts one")
    else:
        show_jobs(jobs)
    if more:
        terminal().note(f"older sessions are left out; --limit {limit * 4} shows more, --limit 0 all")


def _stop(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Id of a session, its beginning, or its name.")],
    message: Annotated[str, typer.Option("--message", "-m", help="Why, for people.")] = "",
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """End a session, and wait until it has. What is in /workspace/outputs is kept for `puhui pull`.

    Its state is then `cancelled`, which is how every session ends.
    """
    with connect(server) as centre:
        job = find_session(centre, session)
        ended_before = job.state in FINAL_STATES
        if not ended_before:
            centre.cancel(job.id, message or "the session was stopped")
            job = centre.wait(job.id)
    if terminal().as_json:
        terminal().json(job)
    elif ended_before:
        terminal().note(f"{job.id} had ended before: {tell_end(job)}")
    elif job.state == job_pb2.JOB_STATE_CANCELLED:
        left = f"; its files are kept: puhui pull {job.id}" if job.artifacts.file_count else ""
        terminal().note(f"session {job.id} is stopped (its state is `cancelled`, as that of every one){left}")
    else:
        terminal().note(f"session {job.id} had ended by itself: {tell_end(job)}")
