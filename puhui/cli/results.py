"""`puhui logs` and `puhui pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puhui.cli.attached import ChunkJson
from puhui.cli.connection import connect
from puhui.cli.find_job import find_job
from puhui.cli.job_options import job_argument, json_flag, json_lines_flag, server_option
from puhui.cli.message_json import json_of
from puhui.cli.progress import transfer_bar
from puhui.cli.terminal import terminal
from puhui.cli.words import count, size
from puhui.v1.stream_pb2 import LOG_STREAM_STDERR

__all__ = ["add_commands"]

JobId = Annotated[str, job_argument]
Attempt = Annotated[int, typer.Option(min=0, help="Which attempt; 0 is the newest.")]


def add_commands(app: typer.Typer) -> None:
    """Adds `logs` and `pull`."""
    app.command("logs")(_logs)
    app.command("pull")(_pull)


def _logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the command has ended.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Begin at most this many lines before the end; 0 is all.")] = 0,
    attempt: Attempt = 0,
    json: Annotated[bool, json_lines_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Show the output of a job: its stdout on stdout, its stderr on stderr."""
    as_json = ChunkJson()
    with connect(server) as centre:
        job_id = find_job(centre, job_id).id
        for chunk in centre.logs(job_id, attempt=attempt, tail_lines=tail, follow=follow):
            if terminal().as_json:
                terminal().json(as_json.of(chunk))
            else:
                terminal().write(chunk.data, to_stderr=chunk.stream == LOG_STREAM_STDERR)


def _pull(
    job_id: JobId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", show_default=False, help="New folder; default: ./JOB.")
    ] = None,
    attempt: Attempt = 0,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
) -> None:
    """Fetch what a job left in /workspace/outputs ($PUHUI_OUTPUTS)."""
    with connect(server) as centre, transfer_bar("fetching") as progress:
        job_id = find_job(centre, job_id).id
        pulled = centre.pull(job_id, output or Path(job_id), attempt=attempt, progress=progress)
    if terminal().as_json:
        terminal().json({"folder": str(pulled.folder), "manifest": json_of(pulled.manifest)})
        return
    for file in pulled.manifest.files:
        terminal().text(f"{pulled.folder / file.path}\n")
    total = sum(file.size_bytes for file in pulled.manifest.files)
    terminal().note(f"{count(len(pulled.manifest.files), 'file')}, {size(total)} in {pulled.folder}")
