"""Commands beside a container's own, over the process runtime."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodedaemon.answers import Mutations
from nodedaemon.exec_process import exit_code, live_command
from nodedaemon.exec_request import identity, require_sound_input, require_sound_start
from nodedaemon.podman_exec import process_spec, start_refusal
from nodedaemon.records import ExecStage
from nodedaemon.runtime import ExecSpec
from puhui.rpc.errors import Refusal
from puhui.v1.node_service_pb2 import ExecRequest, ExecResponse, ExecStart, ExecTerminalSize
from tests.unit.node.test_containers import _OWNER, Bench, opened

_DAY_S = 24 * 3600


class Call:
    """One caller of `Execs.serve`, that sends when it is told to."""

    def __init__(self, bench: Bench, *command: str, **start: Any) -> None:
        self._requests: asyncio.Queue[ExecRequest | None] = asyncio.Queue()
        self._requests.put_nowait(ExecRequest(start=ExecStart(owner=_OWNER.ref(1), command=command, **start)))
        self.responses = bench.containers.execs.serve(self._sent(), Mutations(bench.journal))
        self.output = b""

    async def _sent(self) -> AsyncIterator[ExecRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    def send(self, **part: Any) -> None:
        self._requests.put_nowait(ExecRequest(**part))

    def half_close(self) -> None:
        self._requests.put_nowait(None)

    async def until(self, words: bytes) -> None:
        async for response in self.responses:
            self.output += response.output.data
            if self.output.endswith(words):
                return
        raise AssertionError(f"the output was {self.output!r}")

    async def end(self) -> int:
        last = ExecResponse()
        async for last in self.responses:
            self.output += last.output.data
        assert last.WhichOneof("part") == "exit_code"
        return last.exit_code

    async def leave(self) -> None:
        await self.responses.aclose()


async def until_ended(bench: Bench, exec_id: str) -> None:
    """Waits until a command's end is in the journal."""
    async for _ in bench.events.watch(0):
        record = bench.journal.exec(exec_id)
        if record is None or record.stage is ExecStage.ENDED:
            return


@contextlib.asynccontextmanager
async def living(folder: Path) -> AsyncIterator[Bench]:
    async with opened(folder) as bench:
        await bench.create("python3", "wait.py")
        try:
            yield bench
        finally:
            await bench.containers.stop(_OWNER, 0)
            await bench.containers.remove(_OWNER, discard_results=True)
            await bench.containers.execs.close()
            assert bench.journal.execs() == []


async def test_output_exit_code_and_input(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        call = Call(bench, "sh", "-c", "cat; echo $A; exit 3", env={"A": "b"})
        call.send(stdin=b"hello ")
        call.send(stdin_closed=True)
        assert await call.end() == 3
        assert call.output == b"hello b\n"
        # Nobody could come back to it, so nothing is kept of it.
        assert bench.journal.execs() == []


async def test_without_a_request_id_the_end_of_the_requests_is_the_end_of_the_input(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        call = Call(bench, "cat")
        call.send(stdin=b"x" * 300_000)
        call.half_close()
        assert await call.end() == 0
        assert call.output == b"x" * 300_000


async def test_a_terminal(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        size = ExecTerminalSize(columns=100, rows=30)
        call = Call(bench, "sh", "-c", "stty -echo; stty size; read a; stty size", tty=True, terminal_size=size)
        await call.until(b"30 100\r\n")
        call.send(terminal_size=ExecTerminalSize(columns=90, rows=20))
        call.send(stdin=b"\n")
        assert await call.end() == 0
        assert call.output == b"30 100\r\n20 90\r\n"


async def test_who_comes_back(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        command = ("sh", "-c", "echo one; read a; echo two $a; exit 6")
        first = Call(bench, *command, request_id="r")
        await first.until(b"one\n")
        await first.leave()
        second = Call(bench, *command, request_id="r", output_offset=4)
        second.send(stdin=b"x\n")
        assert (await second.end(), second.output) == (6, b"two x\n")
        third = Call(bench, *command, request_id="r")
        assert (await third.end(), third.output) == (6, b"one\ntwo x\n")
        with pytest.raises(Refusal) as caught:
            await Call(bench, "true", request_id="r").end()
        assert caught.value.reason == "REQUEST_ID_REUSED"
        (record,) = bench.journal.execs()
        assert record.end_time is not None
        bench.containers.execs.prune(record.end_time + _DAY_S - 1)
        assert bench.journal.execs() == [record]
        bench.containers.execs.prune(record.end_time + _DAY_S + 1)
        assert bench.journal.execs() == []


async def test_who_leaves_for_good_is_hung_up_on(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        call = Call(bench, "sh", "-c", "echo up; sleep 600")
        await call.until(b"up\n")
        (record,) = bench.journal.execs()
        await call.leave()
        await until_ended(bench, record.id)


async def test_a_keeper_that_is_killed_takes_its_command_along_and_it_is_said(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        call = Call(bench, "sh", "-c", "echo up; sleep 600", request_id="r")
        await call.until(b"up\n")
        (record,) = bench.journal.execs()
        folder = bench.containers._attempts.exec_folder(_OWNER, record.id)
        command = os.pidfd_open(live_command(folder))
        os.kill(int((folder / "conmon.pid").read_text()), signal.SIGKILL)
        with pytest.raises(Refusal) as caught:
            await call.end()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DATA_LOSS, "EXEC_LOST")
        assert exit_code(folder) is None
        assert select.select([command], [], [], 10)[0]
        os.close(command)


async def test_the_end_of_the_container_is_the_end_of_what_runs_in_it(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        call = Call(bench, "sh", "-c", "trap '' TERM HUP; echo up; sleep 600", request_id="r")
        await call.until(b"up\n")
        await bench.containers.stop(_OWNER, 0)
        assert await call.end() == 128 + signal.SIGKILL
        with pytest.raises(Refusal) as caught:
            await Call(bench, "true").end()
        assert caught.value.reason == "CONTAINER_NOT_RUNNING"


async def test_a_stopping_daemon_ends_calls_and_not_commands(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        call = Call(bench, "sh", "-c", "echo up; sleep 600", request_id="r")
        await call.until(b"up\n")
        bench.containers.execs.stop()
        with pytest.raises(Refusal) as caught:
            await call.end()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "DAEMON_STOPPING")
        (record,) = bench.journal.execs()
        assert record.stage is ExecStage.RUNNING


@pytest.mark.parametrize(
    ("command", "arguments", "reason"),
    [
        ("nosuch", {}, "COMMAND_NOT_FOUND"),
        ("true", {"working_directory": "/nosuch"}, "SPEC_INVALID"),
        ("", {}, "SPEC_INVALID"),
        ("a\0b", {}, "SPEC_INVALID"),
    ],
)
async def test_what_cannot_run_leaves_nothing(
    tmp_path: Path, command: str, arguments: dict[str, Any], reason: str
) -> None:
    async with living(tmp_path) as bench:
        with pytest.raises(Refusal) as caught:
            await Call(bench, command, **arguments).end()
        assert caught.value.reason == reason
        assert bench.journal.execs() == []


async def test_a_frozen_container_takes_no_commands_and_freezes_those_it_has(tmp_path: Path) -> None:
    async with living(tmp_path) as bench:
        call = Call(bench, "sh", "-c", "echo up; read a; echo on", request_id="r")
        await call.until(b"up\n")
        await bench.containers.suspension.suspend(_OWNER)
        (record,) = bench.journal.execs()
        pid = live_command(bench.containers._attempts.exec_folder(_OWNER, record.id))
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        with pytest.raises(Refusal) as caught:
            await Call(bench, "true").end()
        assert caught.value.reason == "CONTAINER_SUSPENDED"
        await bench.containers.suspension.resume(_OWNER)
        call.send(stdin=b"\n")
        assert (await call.end(), call.output) == (0, b"up\non\n")


def test_what_may_differ_when_a_start_is_repeated() -> None:
    size = ExecTerminalSize(columns=1, rows=1)
    one = ExecStart(command=["a"], request_id="r", tty=True)
    other = ExecStart(command=["a"], request_id="r", tty=True, output_offset=7, terminal_size=size)
    assert identity(one) == identity(other)
    assert identity(ExecStart(command=["b"], request_id="r")) != identity(one)


def test_every_unsound_message_names_its_field() -> None:
    size = ExecTerminalSize(columns=2000, rows=1)
    for start, field in (
        (ExecStart(), "command"),
        (ExecStart(command=["a"], env={"": "x"}), "env"),
        (ExecStart(command=["a"], working_directory="relative"), "working_directory"),
        (ExecStart(command=["a"], tty=True, terminal_size=size), "terminal_size"),
    ):
        with pytest.raises(Refusal) as caught:
            require_sound_start(start)
        assert caught.value.metadata == {"field": field}
    for request, field in (
        (ExecRequest(), "part"),
        (ExecRequest(start=ExecStart()), "start"),
        (ExecRequest(signal=99), "signal"),
        (ExecRequest(stdin=bytes(2**20 + 1)), "stdin"),
        (ExecRequest(terminal_size=size), "terminal_size"),
    ):
        with pytest.raises(Refusal) as caught:
            require_sound_input(request, tty=False)
        assert caught.value.metadata == {"field": field}


def test_a_command_is_as_confined_as_the_container() -> None:
    own = {
        "args": ["init"],
        "cwd": "/workspace/code",
        "env": ["PATH=/bin", "A=1", "OLD=x"],
        "capabilities": {},
        "noNewPrivileges": True,
        "user": {"uid": 0, "gid": 0},
        "terminal": False,
    }
    spec = ExecSpec(Path("/f"), ["sh"], {"A": "2"}, without=["OLD"], tty=True, columns=80, rows=24)
    made = process_spec(own, spec)
    assert {name: made[name] for name in ("capabilities", "noNewPrivileges", "user", "cwd")} == {
        name: own[name] for name in ("capabilities", "noNewPrivileges", "user", "cwd")
    }
    assert made["args"] == ["sh"]
    assert made["env"] == ["PATH=/bin", "A=2", "TERM=xterm"]
    assert made["consoleSize"] == {"width": 80, "height": 24}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            'exec failed: unable to start container process: exec: "x": executable file not found in $PATH',
            "COMMAND_NOT_FOUND",
        ),
        ('exec failed: unable to start container process: exec: "/etc/passwd": permission denied', "COMMAND_NOT_FOUND"),
        ("executable file `x` not found in $PATH: No such file or directory", "COMMAND_NOT_FOUND"),
        ('chdir to cwd ("/x") set in config.json failed: no such file or directory', "SPEC_INVALID"),
        ("cannot exec in a stopped container", "CONTAINER_NOT_RUNNING"),
        ("the container `c` is not running", "CONTAINER_NOT_RUNNING"),
        ("cannot exec in a paused container", "CONTAINER_SUSPENDED"),
        ("something else", "RUNTIME_REFUSED"),
    ],
)
def test_what_oci_runtimes_say_becomes_a_reason(said: str, reason: str) -> None:
    assert start_refusal(said, ExecSpec(Path("/f"), ["x"], {})).reason == reason
