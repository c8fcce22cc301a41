"""The options that `run`, `submit` and `predict` share, and the request that they make together."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from puhui.cli.job_file import read_job_file
from puhui.cli.spec_options import SpecOptions, takes_options
from puhui.cli.terminal import Mistake, terminal
from puhui.v1 import job_pb2

__all__ = [
    "JobOptions",
    "Request",
    "job_argument",
    "json_flag",
    "json_lines_flag",
    "server_option",
    "takes_job_options",
    "uploadable",
]

T = TypeVar("T")


def _set_json(value: bool) -> bool:
    terminal().as_json = terminal().as_json or value
    return value


def _set_job(value: str) -> str:
    if not value.strip():
        raise Mistake("USAGE", "give a job id or a name, as `puhui ps` shows it")
    return value


job_argument = typer.Argument(metavar="JOB", help="Id of a job, its beginning, or its name.", callback=_set_job)
json_flag = typer.Option("--json", help="Answer with JSON.", is_eager=True, callback=_set_json)
json_lines_flag = typer.Option(
    "--json", help="Answer with JSON: one object per line.", is_eager=True, callback=_set_json
)
server_option = typer.Option(
    "--server",
    metavar="HOST:PORT",
    show_default=False,
    help="Control plane, or a name of `puhui centres`; else $PUHUI_SERVER, else the settings, else 127.0.0.1:7070.",
)


@dataclass(frozen=True)
class Request:
    """What a centre is to be asked for, and where the code is."""

    spec: job_pb2.JobSpec
    """What is asked for."""
    directory: Path
    """Folder that is uploaded."""


@dataclass(frozen=True)
class JobOptions(SpecOptions):
    """What was written on the command line of a job; None is not said."""

    script: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCRIPT [ARGS]",
            show_default=False,
            help="Script to run, and its arguments. x.py is run by python3, x.sh by sh. "
            "Everything after the script goes to the script, so Puhui's options come before it.",
        ),
    ] = None
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Job file (YAML) instead of a script.")] = None
    directory: Annotated[
        Path | None, typer.Option("--directory", "-C", help="Folder to upload; default: the script's own.")
    ] = None

    def request(self) -> Request:
        """Returns the request that these options make.

        Raises:
            Mistake: they do not make one.
        """
        if self.file is not None:
            if self.script:
                raise Mistake("USAGE", "name a script or a job file, not both; a job file says its own `command`")
            job_file = read_job_file(self.file)
            spec = job_file.spec()
            directory = self.directory or self.file.parent / job_file.directory
        elif self.script:
            command, directory = _command(self.script, self.directory)
            spec = job_pb2.JobSpec(kind=job_pb2.JOB_KIND_BATCH, command=command, name=_name_of(command, directory))
        else:
            raise Mistake("USAGE", "say what to run: a script, such as train.py, or a job file with -f")
        self.apply(spec)
        return Request(spec, uploadable(directory))

    def misplaced(self) -> str | None:
        """Returns an option of Puhui's own that stands behind the script, where it goes to the script."""
        own = {"--" + field.name.replace("_", "-") for field in fields(self)} | {"--detach", "--server"}
        return next((word for word in (self.script or [])[1:] if word.partition("=")[0] in own), None)


def takes_job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, whose first parameter is a JobOptions, all of these options on the command line."""
    return takes_options(JobOptions, command)


def _command(words: list[str], directory: Path | None) -> tuple[list[str], Path]:
    first, *arguments = words
    script = Path(first)
    if directory is None:
        if not script.is_file():
            what = "is a folder" if script.is_dir() else "is not there"
            raise Mistake(
                "SCRIPT_NOT_FOUND",
                f"{first} {what}; name a script, or a folder with --directory and a command in it",
                path=first,
            )
        directory, inside = script.parent, Path(script.name)
    else:
        uploadable(directory)
        found = next((path for path in (directory / script, script) if path.is_file()), None)
        if found is None:
            return words, directory  # a program of the image, such as python3 -m package
        try:
            inside = found.resolve().relative_to(directory.resolve())
        except ValueError:
            raise Mistake(
                "SCRIPT_OUTSIDE", f"{first} is not in {directory}, so it would not be uploaded", path=first
            ) from None
    runner = {".py": ["python3"], ".sh": ["sh"]}.get(inside.suffix, [])
    return [*runner, inside.as_posix() if runner else f"./{inside.as_posix()}", *arguments], directory


def _name_of(command: list[str], directory: Path) -> str:
    """Returns a name made from the script's folder and its own name, as far as a job's name may hold them."""
    script = next((word for word in command if "." in word), command[0])
    plain = re.sub(r"[^a-z0-9._-]+", "-", f"{directory.resolve().name}-{Path(script).stem}".lower())
    return plain.strip("-._")[:63].rstrip("-._")


def uploadable(directory: Path) -> Path:
    """Returns a folder that may be uploaded, resolved.

    Raises:
        Mistake: DIRECTORY_NOT_FOUND; DIRECTORY_TOO_WIDE for all of the disk or a home.
    """
    where = directory.resolve()
    if not where.is_dir():
        raise Mistake("DIRECTORY_NOT_FOUND", f"{directory} is no folder", path=str(directory))
    if where in (Path("/"), Path.home().resolve()):
        raise Mistake(
            "DIRECTORY_TOO_WIDE",
            f"all of {where} would be uploaded; put the code into a folder of its own, or name one with --directory",
            path=str(where),
        )
    return where
