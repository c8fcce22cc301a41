"""`puhui version` and `puhui schema`."""

from __future__ import annotations

import json as json_text
import platform
from typing import Annotated

import grpc
import typer

import puhui
from puhui.cli.job_file import JobFile
from puhui.cli.job_options import json_flag
from puhui.cli.terminal import terminal

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds `version` and `schema`."""
    app.command("version")(_version)
    app.command("schema")(_schema)


def _version(json: Annotated[bool, json_flag] = False) -> None:
    """Print the version."""
    versions = {"puhui": puhui.__version__, "python": platform.python_version(), "grpc": grpc.__version__}
    if terminal().as_json:
        terminal().json(versions)
    else:
        terminal().show("  ".join(f"{name} {version}" for name, version in versions.items()))


def _schema(json: Annotated[bool, json_flag] = False) -> None:
    """Print the JSON schema of job files."""
    terminal().text(json_text.dumps(JobFile.model_json_schema(), indent=None if json else 2) + "\n")
