"""Keeps a `podman system service` running for the daemon, as the user that owns the containers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import structlog
from podman.api.client import APIClient

from nodedaemon.podman_account import PodmanAccount, PodmanUnusableError

__all__ = ["API_VERSION", "PodmanService"]

_log = structlog.get_logger(__name__)

API_VERSION = "4.0.0"
"""Version of the libpod API that is spoken: the oldest that has all we use, so that any Podman from 4.0 on will do."""

_START_S = 30.0
_PREDECESSOR_S = 5.0
_LONGEST_PAUSE_S = 30.0


class PodmanService:
    """A podman service of this daemon alone.

    It ends with the daemon, however that ends; containers do not. When it dies by itself it is started again.

    Args:
        account: the user that it runs as.
        name: distinguishes this daemon's socket from others'.
    """

    def __init__(self, account: PodmanAccount, name: str) -> None:
        self._account = account
        self.socket = account.runtime_dir / f"{name}.sock"
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the service listens, for podman-py."""
        return f"unix://{self.socket}"

    async def start(self) -> None:
        """Starts the service and waits until it answers.

        Raises:
            PodmanUnusableError: it does not; the text has what it said.
        """
        await asyncio.to_thread(self._await_predecessor)
        await self._launch()
        self._keeper = asyncio.create_task(self._keep())

    def _await_predecessor(self) -> None:
        """Waits for the service of a daemon that was killed: it is ending, and may still be making a container."""
        for pid in _processes_with(self.url, self._account.uid):
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    signal.pidfd_send_signal(descriptor, number)
                    if select.select([descriptor], [], [], _PREDECESSOR_S)[0]:
                        break
            except ProcessLookupError:
                continue
            finally:
                os.close(descriptor)

    async def _launch(self) -> None:
        # First: the service, and so all that it starts, joins the user namespace that is made or found here.
        await asyncio.to_thread(self._account.forbid_nested_namespaces)
        self.socket.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            *self._account.command(
                "podman", "--log-level", "error", "system", "service", "--time", "0", self.url, dies_with_parent=True
            ),
            env=self._account.environment(),
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # A Ctrl-C at the daemon's terminal is the daemon's to handle.
            start_new_session=True,
        )
        self._process = process
        deadline = time.monotonic() + _START_S
        pause = 0.01
        # Nothing tells when the socket is there; it takes a tenth of a second.
        while not await asyncio.to_thread(_answers, self.url, self.socket):
            if process.returncode is not None or time.monotonic() > deadline:
                said = await self._end(process)
                raise PodmanUnusableError(
                    f"podman does not run as user {self._account.name}: {said or 'no reason given'}"
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        _log.info("podman service runs", user=self._account.name, socket=str(self.socket), pid=process.pid)

    async def _end(self, process: asyncio.subprocess.Process) -> str:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        _, said = await process.communicate()
        return (said or b"").decode(errors="replace").strip()[-2000:]

    async def _keep(self) -> None:
        """Starts the service again whenever it dies."""
        pause = 0.1
        while True:
            process = self._process
            if process is not None:
                _, said = await process.communicate()
                _log.warning(
                    "podman service died; starting it again",
                    code=process.returncode,
                    said=(said or b"").decode(errors="replace")[-500:],
                )
            try:
                await self._launch()
                pause = 0.1
            except (PodmanUnusableError, OSError, subprocess.SubprocessError) as error:
                self._process = None
                _log.error("podman service cannot be started", error=str(error), again_in_s=pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)

    async def stop(self) -> None:
        """Stops the service. Containers live on."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await self._process.wait()
        self.socket.unlink(missing_ok=True)


def _processes_with(word: str, uid: int) -> list[int]:
    """Returns the ids of a user's processes that have a word on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == uid and word.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def _answers(url: str, socket: Path) -> bool:
    if not socket.exists():
        return False
    client = APIClient(url, version=API_VERSION, timeout=5)
    try:
        return bool(client.get("/_ping").status_code == 200)
    except OSError:
        return False
    finally:
        client.close()
