"""Starts a command in a container of Podman.

Podman's own exec attaches the command to one connection of its service: when the service ends, what the command writes
is lost. So this starts conmon for the command as Podman does, in the namespaces of the container's own conmon and with
the container's own hardening, but has it write the output to a file, as it does for containers.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from nodedaemon.exec_process import EXIT, KEEPER_PID, LOG, PID, ExecProcess, TiedSocket
from nodedaemon.podman_account import PodmanAccount
from nodedaemon.runtime import ExecSpec
from puhui.rpc.errors import Refusal

__all__ = ["ContainerPlace", "PodmanExecs", "process_spec", "start_refusal"]

_START_S = 60.0
_PROCESS = "process.json"
_SAID = "said"

# What the OCI runtimes say, runc first and crun second.
_REASONS = (
    (re.compile(r"chdir"), "WORKING_DIRECTORY"),
    (
        re.compile(r"(?i)executable file .*not found|no such file or directory|permission denied|exec format error"),
        "",
    ),
    (re.compile(r"paused"), "CONTAINER_SUSPENDED"),
    (re.compile(r"stopped|not running|does not exist|no such process", re.IGNORECASE), "CONTAINER_NOT_RUNNING"),
)


@dataclass(frozen=True)
class ContainerPlace:
    """Where a container is, for whoever wants to start something in it."""

    id: str
    init: int
    """Process id of its first process, on this host."""
    conmon: int
    """Process id of the container's conmon. It is in the user and mount namespaces that the container was made in."""
    process: Mapping[str, Any]
    """The container's own command, as the OCI runtime was told of it."""


def process_spec(process: Mapping[str, Any], spec: ExecSpec) -> dict[str, Any]:
    """Returns what the OCI runtime is to be told of a command.

    User, capabilities, limits, and that there are no new privileges, are those of the container's own command.

    Args:
        process: the container's own command (its OCI `process`).
        spec: the command.
    """
    env = dict(entry.split("=", 1) for entry in process["env"] if "=" in entry)
    env = {name: value for name, value in env.items() if name not in spec.without} | dict(spec.env)
    if spec.tty:
        env.setdefault("TERM", "xterm")
    made = {
        **process,
        "args": list(spec.command),
        "cwd": spec.working_directory or process["cwd"],
        "env": [f"{name}={value}" for name, value in env.items()],
        "terminal": spec.tty,
    }
    if spec.tty and spec.columns and spec.rows:
        made["consoleSize"] = {"width": spec.columns, "height": spec.rows}
    return made


def start_refusal(said: str, spec: ExecSpec) -> Refusal:
    """Returns the refusal for what an OCI runtime said when it could not start a command."""
    reason = next((reason for pattern, reason in _REASONS if pattern.search(said)), None)
    command = spec.command[0]
    said = said.strip()[-300:]
    if reason == "WORKING_DIRECTORY":
        return Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
            f"working_directory {spec.working_directory!r} cannot be entered in the container: {said}",
            field="working_directory",
        )
    if reason == "":
        return Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "COMMAND_NOT_FOUND",
            f"the container cannot run {command!r}: {said}; name a program that it has",
            command=command,
        )
    if reason is not None:
        return Refusal(
            grpc.StatusCode.FAILED_PRECONDITION, reason, f"nothing can be started in the container now: {said}"
        )
    return Refusal(grpc.StatusCode.INTERNAL, "RUNTIME_REFUSED", f"the command cannot be started: {said}")


class PodmanExecs:
    """Starts commands in containers of one user.

    Args:
        account: the user that owns the containers.
        conmon: path of conmon.
        oci_runtime: path of the OCI runtime that the containers were made with.
    """

    def __init__(self, account: PodmanAccount, conmon: str, oci_runtime: str) -> None:
        self._account = account
        self._conmon = conmon
        self._oci_runtime = oci_runtime

    async def start(self, place: ContainerPlace, spec: ExecSpec) -> ExecProcess | None:
        """Starts a command.

        Returns:
            The command; None when it has ended already.

        Raises:
            Refusal: INVALID_ARGUMENT with COMMAND_NOT_FOUND or SPEC_INVALID; FAILED_PRECONDITION with
                CONTAINER_NOT_RUNNING or CONTAINER_SUSPENDED; INTERNAL with RUNTIME_REFUSED.
        """
        if not _is_of(place.conmon, place.id):
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING", "the container has ended; start another"
            )
        told = spec.folder / _PROCESS
        self._write(told, json.dumps(process_spec(place.process, spec)))
        tie = TiedSocket()
        try:
            answer, said = await self._launch(place, spec, tie)
            if answer.get("data", -1) < 0:
                raise start_refusal(str(answer.get("message") or said or "no reason given"), spec)
            return ExecProcess.find(spec.folder, tty=spec.tty, tie=tie)
        finally:
            tie.close()
            told.unlink()  # what is secret in an environment does not stay

    async def _launch(self, place: ContainerPlace, spec: ExecSpec, tie: TiedSocket) -> tuple[dict[str, Any], str]:
        """Returns what conmon answered on its pipe, and what it said besides."""
        ours, conmons = os.pipe()
        tie.hold(ours)
        try:
            # A file, because conmon keeps it open, and a pipe would be waited for.
            with (spec.folder / _SAID).open("wb") as said:
                process = await asyncio.create_subprocess_exec(
                    *self._account.command(*self._arguments(place, spec)),
                    env={**self._account.environment(), "_OCI_SYNCPIPE": str(conmons)},
                    pass_fds=[conmons, tie.inherited],
                    cwd="/",
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(conmons)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
        )
        try:
            async with asyncio.timeout(_START_S):
                line = await reader.readline()
                await process.wait()
        except TimeoutError:
            raise Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "RUNTIME_REFUSED",
                f"the command did not start within {_START_S:g} s; try again",
            ) from None
        finally:
            transport.close()
        return json.loads(line) if line else {}, (spec.folder / _SAID).read_text(errors="replace")

    def _arguments(self, place: ContainerPlace, spec: ExecSpec) -> list[str]:
        folder = spec.folder
        return [
            *("nsenter", "--target", str(place.conmon), "--user", "--mount", "--preserve-credentials", "--"),
            *(self._conmon, "--api-version", "1", "--cid", place.id, "--cuuid", folder.name),
            *("--runtime", self._oci_runtime, "--bundle", str(folder), "--exec"),
            *("--exec-process-spec", str(folder / _PROCESS), "--exit-dir", str(folder / EXIT), "--full-attach"),
            *("--container-pidfile", str(folder / PID), "--conmon-pidfile", str(folder / KEEPER_PID)),
            # What a power cut takes of the output ends the command as well.
            *("--log-path", f"k8s-file:{folder / LOG}", "--no-sync-log", "--log-level", "error"),
            *("--runtime-arg", "--log-format=json", "--runtime-arg", f"--log={folder / 'oci-log'}"),
            "--terminal" if spec.tty else "--stdin",
        ]

    def _write(self, path: Path, text: str) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            if os.geteuid() == 0:
                os.fchown(descriptor, self._account.uid, self._account.gid)
            file.write(text)


def _is_of(conmon: int, container_id: str) -> bool:
    """Says whether a process is the conmon of a container, and not another that has its id now."""
    try:
        return container_id.encode() in Path(f"/proc/{conmon}/cmdline").read_bytes()
    except OSError:
        return False
