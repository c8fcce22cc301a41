"""`puhui run` and `puhui submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puhui.cli.attached import follow
from puhui.cli.connection import connect
from puhui.cli.job_options import JobOptions, Request, json_flag, json_lines_flag, server_option, takes_job_options
from puhui.cli.progress import transfer_bar
from puhui.cli.story import exit_code_of
from puhui.cli.terminal import Mistake, terminal
from puhui.cli.words import count, readable, size
from puhui.client import Centre, Refusal
from puhui.rpc.bundle import BundleLimits, survey
from puhui.v1 import job_pb2

__all__ = ["add_commands", "note_code", "note_folder", "upload"]

_NOT_STARTED = 125
_INTERRUPTED = 130
# The script's own options are the script's.
_SCRIPT_TAKES_THE_REST = {"allow_interspersed_args": False}


def add_commands(app: typer.Typer) -> None:
    """Adds `run` and `submit`."""
    app.command("run", context_settings=_SCRIPT_TAKES_THE_REST)(takes_job_options(_run))
    app.command("submit", context_settings=_SCRIPT_TAKES_THE_REST)(takes_job_options(_submit))


def _run(
    options: JobOptions,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not stay: print the job's id and end.")] = False,
    json: Annotated[bool, json_lines_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Run a script on a virtual card and stay with it: its output, and its exit code.

    The code's folder, the working directory, is read-only. What the script writes to
    /workspace/outputs ($PUHUI_OUTPUTS) comes back with `puhui pull`.

    Ctrl-C leaves the job running. The exit code is the script's own; 125 when it never started.
    """
    with connect(server) as centre:
        job_id = ""
        try:
            job = upload(centre, options)
            job_id = job.id
            _note_unplaceable(centre, job)
            if detach:
                _print_id(job)
                return
            code = exit_code_of(follow(centre, job_id))
        except KeyboardInterrupt:
            terminal().note("")
            if job_id:
                terminal().note(
                    f"{job_id} goes on; `puhui logs -f {job_id}` comes back to it, `puhui cancel {job_id}` ends it",
                    "detached",
                )
            else:
                terminal().note("no job was accepted yet, as far as is known; `puhui ps` shows", "stopped")
            raise typer.Exit(_INTERRUPTED) from None
        except Mistake:
            raise
        except Refusal as refusal:
            terminal().fail(refusal)
            if job_id:
                terminal().note(f"{job_id} was accepted and may go on; `puhui get {job_id}` shows", "job")
            raise typer.Exit(_NOT_STARTED) from None
    raise typer.Exit(code)


def _submit(
    options: JobOptions,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Submit a script and print the job's id.

    What the script writes to /workspace/outputs ($PUHUI_OUTPUTS) comes back with `puhui pull`; the code's folder is
    read-only.
    """
    with connect(server) as centre:
        job = upload(centre, options)
        _note_unplaceable(centre, job)
        _print_id(job)


def upload(centre: Centre, options: JobOptions) -> job_pb2.Job:
    """Uploads the code that the options name, submits the job and returns it.

    Raises:
        Refusal: the options make no request, or the centre refuses it.
        OSError: the code cannot be read.
    """
    request = options.request()
    note_code(request, options)
    with transfer_bar("uploading") as progress:
        return centre.submit(request.spec, request.directory, progress=progress)


def _note_unplaceable(centre: Centre, job: job_pb2.Job) -> None:
    """Says so when no card of the centre is large enough for a job."""
    if job.sizing.reason and not job.sizing.choices and centre.capacity().profiles:
        terminal().note(
            f"{job.id} fits on no card of this centre ({readable(job.sizing.reason)}); it starts at a peer that has a "
            "larger one, if any does, or once one joins; "
            f"`puhui cancel {job.id}` ends it",
            "note",
        )


def note_code(request: Request, options: JobOptions) -> None:
    """Says what will be uploaded, before it is.

    Raises:
        Refusal: it is too much, or cannot be a bundle.
        OSError: it cannot be looked at.
    """
    misplaced = options.misplaced()
    if misplaced is not None:
        terminal().note(f"{misplaced} stands behind the script and goes to it; Puhui's options come before", "note")
    note_folder(request.directory)


def note_folder(directory: Path) -> None:
    """Says how much of a folder will be uploaded.

    Raises:
        Refusal: it is too much, or cannot be a bundle.
        OSError: it cannot be looked at.
    """
    contents = survey(directory, BundleLimits())
    terminal().note(f"{directory}: {count(contents.file_count, 'file')}, {size(contents.unpacked_bytes)}", "code")


def _print_id(job: job_pb2.Job) -> None:
    if terminal().as_json:
        terminal().json(job)
    else:
        terminal().text(job.id + "\n")
