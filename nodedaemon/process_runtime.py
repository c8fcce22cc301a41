"""Runs plain processes behind the seam of containers, without any isolation.

For hosts that cannot run rootless containers, and for fast tests. It is refused on every node with a real GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from nodedaemon.exec_process import ExecProcess, TiedSocket, live_command
from nodedaemon.frozen import continue_all, processes_in_sessions, stop_all
from nodedaemon.process_user import ProcessUser
from nodedaemon.runtime import ContainerExit, ContainerGone, ContainerPhase, ContainerSpec, ContainerStatus, ExecSpec
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.v1.node_pb2 import Runtime, RuntimeKind

__all__ = ["ProcessRuntime"]

_LOST = 137


class ProcessRuntime:
    """Plain processes, each with a keeper of its own.

    Args:
        folder: where the keepers write.
        user: whom the processes run as.
        why: what this host lacks for containers, in a sentence; empty when processes were asked for.
    """

    def __init__(self, folder: Path, user: ProcessUser, why: str) -> None:
        self._folder = folder
        self._user = user
        self._why = why
        self._exits: asyncio.Queue[ContainerExit | None] = asyncio.Queue()
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}
        self._watched: dict[str, int] = {}
        folder.mkdir(mode=0o700, exist_ok=True)
        for place in folder.iterdir():
            self._watch(place.name)

    async def create(self, spec: ContainerSpec) -> str:  # noqa: D102 - see ContainerRuntime
        process_id = new_id("process")
        place = self._folder / process_id
        env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            **spec.env,
            "HOME": str(spec.workspace),
            "PUHUI_OUTPUTS": str(spec.workspace / "outputs"),
        }
        command = spec.command[0]
        found = shutil.which(command if "/" not in command else str(spec.code / command), path=env["PATH"])
        if found is None:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "COMMAND_NOT_FOUND",
                f"this node has no program {command!r}; name one that it has, or an executable file of the code",
                command=command,
            )
        place.mkdir(mode=0o700)
        facts = {
            "name": spec.name,
            "command": [found, *spec.command[1:]],
            "env": env,
            "cwd": str(spec.code),
            "log": str(spec.log),
            "labels": dict(spec.labels),
            "uid": self._user.uid,
            "gid": self._user.gid,
        }
        (place / "spec.json").write_text(json.dumps(facts))
        return process_id

    async def initialize(self, container_id: str) -> int:  # noqa: D102
        return 0

    async def start(self, container_id: str) -> ContainerStatus:  # noqa: D102
        keeper = await asyncio.to_thread(_launch, self._folder / container_id)
        assert keeper.stdout is not None  # noqa: S101 - it is a pipe
        with keeper.stdout as pipe:
            line = await asyncio.to_thread(pipe.readline)
        answer: dict[str, Any] = json.loads(line or b'{"error": "its keeper did not start"}')
        if "pid" not in answer:
            keeper.wait()
            raise Refusal(
                grpc.StatusCode.INTERNAL, "RUNTIME_REFUSED", f"the process cannot be started: {answer['error']}"
            )
        self._keepers[container_id] = keeper
        self._watch(container_id)
        return self._status(container_id)

    def _watch(self, process_id: str) -> None:
        """Tells of the end of a process when its keeper ends."""
        keeper = self._keeper_pid(process_id)
        if keeper is None or process_id in self._watched:
            return
        try:
            descriptor = os.pidfd_open(keeper)
        except ProcessLookupError:
            self._exits.put_nowait(None)
            return
        self._watched[process_id] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._ended, process_id)

    def _unwatch(self, process_id: str) -> None:
        descriptor = self._watched.pop(process_id, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    def _ended(self, process_id: str) -> None:
        self._unwatch(process_id)
        keeper = self._keepers.pop(process_id, None)
        if keeper is not None:
            keeper.wait()
        self._kill_execs(process_id)
        status = self._status(process_id)
        if status.exit_code is not None and status.end_time is not None:
            self._exits.put_nowait(ContainerExit(process_id, status.exit_code, False, status.end_time))

    def _keeper_pid(self, process_id: str) -> int | None:
        """Returns the keeper's process id, when that process still is this keeper."""
        facts = _read(self._folder / process_id / "keeper.json")
        if facts is None:
            return None
        try:
            command = Path(f"/proc/{facts['pid']}/cmdline").read_bytes()
        except OSError:
            return None
        return int(facts["pid"]) if process_id.encode() in command else None

    def _status(self, process_id: str) -> ContainerStatus:
        place = self._folder / process_id
        labels = (_read(place / "spec.json") or {}).get("labels", {})
        running = _read(place / "running.json")
        ended = _read(place / "exit.json")
        start_time = running["start_time"] if running else None
        if ended is not None:
            return ContainerStatus(
                process_id,
                labels,
                ContainerPhase.EXITED,
                exit_code=ended["exit_code"],
                start_time=start_time,
                end_time=ended["end_time"],
            )
        if running is None and self._keeper_pid(process_id) is None:
            return ContainerStatus(process_id, labels, ContainerPhase.CREATED)
        if self._keeper_pid(process_id) is None:
            # The keeper was killed; whatever it kept is not watched any more.
            end_time = place.stat().st_mtime
            return ContainerStatus(
                process_id, labels, ContainerPhase.EXITED, exit_code=_LOST, start_time=start_time, end_time=end_time
            )
        pid = running["pid"] if running else 0
        return ContainerStatus(process_id, labels, ContainerPhase.RUNNING, pid=pid, start_time=start_time)

    async def signal(self, container_id: str, signal: int) -> None:  # noqa: D102
        self._send(container_id, signal)

    def _send(self, process_id: str, number: int) -> None:
        status = self._status(process_id)
        if status.phase is ContainerPhase.RUNNING and status.pid:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(status.pid, number)
                else:
                    os.kill(status.pid, number)

    async def start_exec(self, container_id: str, spec: ExecSpec) -> ExecProcess | None:  # noqa: D102
        status = self._status(container_id)
        if status.phase is not ContainerPhase.RUNNING:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING", "the process has ended")
        facts = _read(self._folder / container_id / "spec.json") or {}
        env = {name: value for name, value in facts["env"].items() if name not in spec.without} | dict(spec.env)
        told = {
            "command": list(spec.command),
            "env": env,
            "cwd": spec.working_directory or facts["cwd"],
            "tty": spec.tty,
            "rows": spec.rows,
            "columns": spec.columns,
            "uid": self._user.uid,
            "gid": self._user.gid,
        }
        # Before it begins: whoever ends the process ends this too.
        known = self._folder / container_id / "execs"
        known.mkdir(exist_ok=True)
        (known / spec.folder.name).symlink_to(spec.folder)
        with contextlib.closing(TiedSocket()) as tie:
            answer = await asyncio.to_thread(_launch_exec, spec.folder, told, tie.inherited)
            if "pid" not in answer:
                raise _exec_refusal(answer, spec)
            return ExecProcess.find(spec.folder, tty=spec.tty, tie=tie)

    def _sessions(self, container_id: str) -> list[int]:
        """Returns the session ids of a process and of what `start_exec` started beside it."""
        leaders = [self._status(container_id).pid]
        leaders += [live_command(folder) for folder in (self._folder / container_id).glob("execs/*")]
        return [leader for leader in leaders if leader]

    def _kill_execs(self, container_id: str) -> None:
        for leader in self._sessions(container_id):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)

    async def suspend(self, container_id: str) -> None:  # noqa: D102
        leaders = frozenset(self._sessions(container_id))
        await stop_all(functools.partial(processes_in_sessions, leaders))

    async def resume(self, container_id: str) -> None:  # noqa: D102
        leaders = frozenset(self._sessions(container_id))
        continue_all(await asyncio.to_thread(processes_in_sessions, leaders))

    async def remove(self, container_id: str) -> None:  # noqa: D102
        place = self._folder / container_id
        if not place.exists():
            named = [
                one for one in self._folder.iterdir() if (_read(one / "spec.json") or {}).get("name") == container_id
            ]
            for one in named:
                await self.remove(one.name)
            return
        self._kill_execs(container_id)
        self._send(container_id, signal.SIGKILL)
        keeper = self._keeper_pid(container_id)
        if keeper is not None:
            with contextlib.suppress(ProcessLookupError):
                await _gone(keeper)
        self._unwatch(container_id)
        process = self._keepers.pop(container_id, None)
        if process is not None:
            process.wait()
        shutil.rmtree(place)

    async def containers(self) -> list[ContainerStatus]:  # noqa: D102
        return [self._status(place.name) for place in sorted(self._folder.iterdir())]

    async def exits(self) -> AsyncIterator[ContainerExit | ContainerGone | None]:  # noqa: D102
        yield None
        while True:
            yield await self._exits.get()

    async def make_removable(self, folder: Path) -> None:  # noqa: D102
        done = await asyncio.to_thread(
            subprocess.run, ["chmod", "-R", "u+rwX", "--", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Refusal(
                grpc.StatusCode.INTERNAL,
                "WORKSPACE_STUCK",
                f"what the process left in {folder} cannot be made readable: {done.stderr.strip()[-300:]}",
            )

    def describe(self) -> Runtime:  # noqa: D102
        notice = "commands run as plain processes, without isolation, on emulated cards only"
        notices = [f"{notice}: {self._why}" if self._why else notice]
        if self._user.uid == 0:
            notices.append("submitted code runs AS ROOT, because --allow-root-processes was given; for tests only")
        return Runtime(kind=RuntimeKind.RUNTIME_KIND_PROCESS, user=self._user.name, notices=notices)

    async def close(self) -> None:  # noqa: D102
        for process_id in list(self._watched):
            self._unwatch(process_id)
        # The keepers outlive the daemon; Python would complain of children left behind.
        for keeper in self._keepers.values():
            keeper.returncode = 0


def _launch(place: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "nodedaemon.process_keeper", str(place)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )


def _launch_exec(folder: Path, told: dict[str, Any], inherited: int) -> dict[str, Any]:
    """Starts a keeper for a command, and returns what it answers."""
    descriptor = os.open(folder / "spec.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(told, file)
    # In between, so that the keeper is nobody's child and outlives the daemon without a word.
    command = 'setsid -f "$@"'
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "nodedaemon.exec_keeper", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[inherited],
        cwd=Path(__file__).parents[1],
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout or b'{"error": "its keeper did not start"}')
    return answer


def _exec_refusal(answer: dict[str, Any], spec: ExecSpec) -> Refusal:
    if answer.get("directory"):
        return Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
            f"working_directory {spec.working_directory!r} cannot be entered: {answer['error']}",
            field="working_directory",
        )
    if "directory" in answer:
        return Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "COMMAND_NOT_FOUND",
            f"this node cannot run {spec.command[0]!r}: {answer['error']}; name a program that it has",
            command=spec.command[0],
        )
    return Refusal(grpc.StatusCode.INTERNAL, "RUNTIME_REFUSED", f"the command cannot be started: {answer['error']}")


async def _gone(pid: int) -> None:
    """Waits until a process has ended."""
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return facts
