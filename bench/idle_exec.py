"""The baseline of a run: a bare exec through the Podman API, in a container of the same image and the same user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from nodedaemon.podman_account import PodmanAccount
from nodedaemon.podman_service import API_VERSION, PodmanService

__all__ = ["BareExec", "bare_exec"]

_STDOUT = 1
_FRAME_BYTES = 8


class BareExec:
    """Runs commands in a container that lives already.

    Args:
        socket: of the Podman service.
        container: id of the container.
    """

    def __init__(self, socket: Path, container: str) -> None:
        self._socket = socket
        self._container = container

    async def run(self, command: Sequence[str]) -> float:
        """Runs a command to its end; returns how long its first byte of output took to come, in milliseconds.

        Raises:
            RuntimeError: Podman refused it, or it wrote nothing.
        """
        begun = time.perf_counter()
        wanted = {"Cmd": list(command), "AttachStdout": True, "AttachStderr": True}
        made = json.loads(await self._post(f"containers/{self._container}/exec", wanted))
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            await _send(writer, f"exec/{made['Id']}/start", {"Detach": False, "Tty": False}, upgrade=True)
            status, _ = await _head(reader)
            if status not in (101, 200):
                raise RuntimeError(f"podman did not start an exec: {status}")
            frame = await reader.readexactly(_FRAME_BYTES + 1)
            came = time.perf_counter()
            if frame[0] != _STDOUT:
                raise RuntimeError(f"the bare exec failed: {await reader.read()!r}")
            await reader.read()
        except asyncio.IncompleteReadError as error:
            raise RuntimeError(f"the bare exec of {command} wrote nothing") from error
        finally:
            writer.close()
            await writer.wait_closed()
            _end_conmon(made["Id"])
        return (came - begun) * 1000

    async def _post(self, path: str, body: object) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            await _send(writer, path, body)
            status, length = await _head(reader)
            content = await reader.readexactly(length)
        finally:
            writer.close()
            await writer.wait_closed()
        if status >= 300:
            raise RuntimeError(f"podman refused {path}: {status} {content!r}")
        return content


def _end_conmon(exec_id: str) -> None:
    """Ends the conmon of an exec that is over.

    It would linger for 300 s. Hundreds of them would slow down whoever looks over the processes of this machine, and
    so be held against what is measured beside the baseline.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if Path(words[0].decode()).name == "conmon" and exec_id.encode() in words:
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, UnicodeDecodeError):
            continue  # it has ended meanwhile, or is another's


async def _send(writer: asyncio.StreamWriter, path: str, body: object, *, upgrade: bool = False) -> None:
    content = json.dumps(body).encode()
    head = [
        f"POST /v{API_VERSION}/libpod/{path} HTTP/1.1",
        "Host: podman",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *(["Connection: Upgrade", "Upgrade: tcp"] if upgrade else []),
    ]
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + content)
    await writer.drain()


async def _head(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Returns the status of an answer, and how many bytes follow."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split(" ")[1]), int(fields.get("content-length", "0"))


@contextlib.asynccontextmanager
async def bare_exec(user: str, image: str) -> AsyncIterator[BareExec]:
    """Yields what runs commands with Podman alone, until the block ends.

    Args:
        user: whose containers.
        image: of the container.

    Raises:
        subprocess.CalledProcessError: the container does not start.
    """
    account = PodmanAccount.find(user)
    service = PodmanService(account, f"puhui-bench-{os.getpid()}")
    await service.start()
    try:
        container = await _podman(account, "run", "--detach", "--init", "--network", "none", image, "sleep", "3600")
        try:
            yield BareExec(service.socket, container)
        finally:
            await _podman(account, "rm", "--force", "--time", "0", container)
    finally:
        await service.stop()


async def _podman(account: PodmanAccount, *arguments: str) -> str:
    done = await asyncio.to_thread(account.run, "podman", *arguments)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, arguments, done.stdout, done.stderr)
    return done.stdout.strip()
