"""Commands in living containers: input, output, signals, terminals, and callers that come and go."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef
from puhui.v1.node_pb2 import NodeEvent, NodeEventKind
from puhui.v1.node_service_pb2 import ExecRequest
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import Start
from tests.integration.node.exec_call import Exec, request_id, run
from tests.integration.node.test_restart import connected

pytestmark = pytest.mark.podman

_LIVING = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"


async def living(node: Node, **arguments: object) -> AttemptRef:
    owner = node.attempt()
    await node.start(owner, _LIVING, stop_grace_s=0.2, **arguments)  # type: ignore[arg-type]
    await node.said(owner, b"up\n")
    return owner


async def ended(node: Node, owner: AttemptRef) -> NodeEvent:
    return await node.event(owner, NodeEventKind.NODE_EVENT_KIND_EXEC_ENDED)


async def test_a_command_runs_where_the_container_does_and_as_confined(node: Node) -> None:
    owner = await living(node, env={"COLOUR": "red", "SHAPE": "round"})
    script = (
        "import json, os\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "status = dict(line.split(':\\t', 1) for line in lines if ':\\t' in line)\n"
        "print(json.dumps({'cwd': os.getcwd(), 'uid': os.getuid(), 'cap': status['CapEff'], 'bound': status['CapBnd'],"
        "'new': status['NoNewPrivs'], 'env': dict(os.environ), 'fds': len(os.listdir('/proc/self/fd')),"
        "'ns': os.readlink('/proc/self/ns/pid') == os.readlink('/proc/1/ns/pid')}))"
    )
    call = await run(node, owner, "python3", "-c", script, env={"COLOUR": "blue"})
    assert call.exit_code == 0, call.errors
    seen = json.loads(call.output)
    assert (seen["cwd"], seen["uid"], seen["new"], seen["ns"]) == ("/workspace/code", 0, "1", True)
    assert int(seen["cap"], 16) == int(seen["bound"], 16) == 0
    assert seen["fds"] == 4  # the three, and the one that lists them
    assert (seen["env"]["COLOUR"], seen["env"]["SHAPE"]) == ("blue", "round")
    assert (seen["env"]["CUDA_VISIBLE_DEVICES"], seen["env"]["PUHUI_JOB_ID"]) == ("", owner.job_id)
    assert (await run(node, owner, "pwd", working_directory="/tmp")).output == b"/tmp\n"


async def test_a_command_is_given_the_slices_that_are_attached_when_it_starts(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    await node.start(owner, _LIVING, slices=[one], stop_grace_s=0.2)
    show = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES,$PUHUI_SLICE_PROFILE; ls /dev/nvidia-caps | wc -l")
    assert (await run(node, owner, *show)).output.decode() == f"{one.uuid},1g.10gb\n2\n"
    await node.detach(owner, one)
    assert (await run(node, owner, *show)).output == b",\n0\n"
    await node.attach(owner, one)
    assert (await run(node, owner, *show)).output.decode() == f"{one.uuid},1g.10gb\n2\n"


async def test_streams_are_apart_and_exit_codes_are_the_commands_own(node: Node) -> None:
    owner = await living(node)
    call = await run(node, owner, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (call.output, call.errors, call.exit_code) == (b"out\n", b"err\n", 7)
    # A command's own 127 is no COMMAND_NOT_FOUND.
    assert (await run(node, owner, "sh", "-c", "nosuch")).exit_code == 127
    assert (await run(node, owner, "sh", "-c", "kill -KILL $$")).exit_code == 128 + signal.SIGKILL


async def test_input_reaches_the_command_and_its_end_too(node: Node) -> None:
    owner = await living(node)
    async with Exec(node, owner, ["cat"]) as call:
        await call.send(stdin=b"one\n")
        await call.until(b"one\n")
        await call.send(stdin=b"two")
        await call.send(stdin_closed=True)
        assert await call.rest() == b"one\ntwo"
        assert call.exit_code == 0


async def test_a_hundred_megabytes_go_in_and_come_out_unchanged(node: Node) -> None:
    owner = await living(node)
    data = os.urandom(10**6)
    async with Exec(node, owner, ["cat"], timeout_s=100) as call:

        async def feed() -> None:
            for _ in range(100):
                await call.send(stdin=data)
            await call.send(stdin_closed=True)

        digest = hashlib.sha256()
        feeding = asyncio.create_task(feed())
        async for response in call.responses():
            digest.update(response.output.data)
            call.output = b""
        await feeding
    expected = hashlib.sha256()
    for _ in range(100):
        expected.update(data)
    assert digest.digest() == expected.digest()
    assert call.exit_code == 0


async def test_a_signal_reaches_the_process_group_and_nobody_else(node: Node) -> None:
    owner = await living(node)
    script = "trap 'echo caught; exit 3' INT; sleep 600 & echo ready; wait"
    async with Exec(node, owner, ["sh", "-c", script]) as call:
        await call.until(b"ready\n")
        await call.send(signal=signal.SIGINT)
        assert await call.rest() == b"ready\ncaught\n"
        assert call.exit_code == 3
    async with Exec(node, owner, ["sleep", "600"]) as call:
        await call.send(signal=signal.SIGKILL)
        await call.rest()
        assert call.exit_code == 128 + signal.SIGKILL
    (container,) = await node.containers()
    assert not container.HasField("exit_code")


async def test_a_terminal_has_its_size_and_its_controls(node: Node) -> None:
    owner = await living(node)
    script = "trap 'stty size' WINCH; stty -echo; stty size; echo ready; read line; echo got $line; cat"
    async with Exec(node, owner, ["bash", "-c", script], tty=True, size=(132, 43)) as call:
        await call.until(b"43 132\r\nready\r\n")
        await call.send(terminal_size={"columns": 80, "rows": 24})
        await call.send(stdin=b"word\n")
        await call.until(b"got word\r\n")
        assert b"24 80\r\n" in call.output
        await call.send(stdin_closed=True)
        await call.rest()
        assert call.exit_code == 0
    async with Exec(node, owner, ["sh", "-c", "echo ready; sleep 600"], tty=True) as call:
        await call.until(b"ready\r\n")
        await call.send(stdin=b"\x03")
        await call.rest()
        assert call.exit_code == 128 + signal.SIGINT


async def test_who_comes_back_takes_the_output_up_where_it_was(node: Node) -> None:
    owner = await living(node)
    script = "echo first; read line; echo second $line; exit 5"
    name = request_id()
    async with Exec(node, owner, ["sh", "-c", script], request_id=name) as call:
        await call.until(b"first\n")
        call.leave()
    async with Exec(node, owner, ["sh", "-c", script], request_id=name, output_offset=6) as call:
        await call.send(stdin=b"word\n")
        assert await call.rest() == b"second word\n"
        assert call.exit_code == 5
    # And once more, when it has long ended; all of it this time.
    assert (await run(node, owner, "sh", "-c", script, request_id=name)).output == b"first\nsecond word\n"
    with refused(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"):
        await run(node, owner, "true", request_id=name)


async def test_a_command_that_nobody_can_come_back_to_is_hung_up(node: Node) -> None:
    owner = await living(node)
    async with Exec(node, owner, ["sh", "-c", "echo up; sleep 600"]) as call:
        await call.until(b"up\n")
        call.leave()
    assert f"exit code {128 + signal.SIGHUP}" in (await ended(node, owner)).message


async def test_one_that_ignores_the_hang_up_is_killed(node: Node) -> None:
    owner = await living(node)
    async with Exec(node, owner, ["sh", "-c", "trap '' HUP; echo up; while :; do sleep 600; done"]) as call:
        await call.until(b"up\n")
        call.leave()
    assert f"exit code {128 + signal.SIGKILL}" in (await ended(node, owner)).message


async def test_a_caller_that_does_not_read_costs_no_memory(node: Node, serving_memory: Path) -> None:
    owner = await living(node)
    before = _resident_kib(serving_memory)
    name, command = request_id(), ["sh", "-c", "head -c 300000000 /dev/zero; exit 0"]
    async with Exec(node, owner, command, request_id=name) as call:
        await ended(node, owner)
        assert _resident_kib(serving_memory) - before < 60_000
        call.leave()
    async with Exec(node, owner, command, request_id=name, output_offset=299_999_990) as call:
        assert await call.rest() == bytes(10)
        assert call.exit_code == 0


async def test_removing_a_container_ends_what_runs_in_it_and_leaves_no_process(node: Node, state: Path) -> None:
    owner = await living(node)
    name = request_id()
    async with Exec(node, owner, ["sh", "-c", "trap '' TERM HUP; echo up; sleep 600"], request_id=name) as call:
        await call.until(b"up\n")
        began = time.monotonic()
        await node.stop(owner)
        await node.remove(owner, discard=False)
        assert time.monotonic() - began < 3
        await call.rest()
        assert call.exit_code == 128 + signal.SIGKILL
    assert _processes_below(state) == []
    # Its output is there until the results are discarded.
    assert (
        await run(node, owner, "sh", "-c", "trap '' TERM HUP; echo up; sleep 600", request_id=name)
    ).output == b"up\n"
    await node.remove(owner)
    with refused(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND"):
        await run(node, owner, "true")


async def test_refusals_say_what_is_wrong(node: Node) -> None:
    nobody = node.attempt()
    with refused(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND"):
        await run(node, nobody, "true")
    owner = await living(node)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "COMMAND_NOT_FOUND") as refusal:
        await run(node, owner, "nosuch")
    assert "nosuch" in refusal.message
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "COMMAND_NOT_FOUND"):
        await run(node, owner, "/etc/passwd")
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        ("a\0b", {}),
        ("true", {"env": {"A=B": "c"}}),
        ("true", {"working_directory": "here"}),
        ("true", {"working_directory": "/nosuch"}),
        ("true", {"size": (10, 10)}),
    ]
    for command, arguments in wrong:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"):
            await run(node, owner, command, **arguments)
    parts: list[dict[str, Any]] = [{"start": {}}, {"stdin": bytes(2**20 + 1)}, {"signal": 0}, {"terminal_size": {}}, {}]
    for part in parts:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"):
            async with Exec(node, owner, ["sleep", "600"]) as call:
                await call.send(**part)
                await call.rest()
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"):
        stream = node.stub.Exec(timeout=10)  # type: ignore[call-arg]  # it may be written to instead
        await stream.write(ExecRequest(stdin=b"early"))
        await stream.read()
    stale = AttemptRef()
    stale.CopyFrom(owner)
    stale.fencing_token = 0
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
        await run(node, stale, "true")
    await node.stop(owner)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING"):
        await run(node, owner, "true")


async def test_a_container_has_room_for_so_many_commands(node: Node) -> None:
    owner = await living(node)
    calls = [Exec(node, owner, ["sleep", "600"], request_id=request_id()) for _ in range(64)]
    for call in calls:
        await call.__aenter__()
    started = 0
    async for event in node.events():
        started += event.owner.job_id == owner.job_id and event.kind == NodeEventKind.NODE_EVENT_KIND_EXEC_STARTED
        if started == 64:
            break
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "EXEC_LIMIT"):
        await run(node, owner, "true")
    await calls[0].send(signal=signal.SIGKILL)
    await calls[0].rest()
    assert (await run(node, owner, "true")).exit_code == 0
    for call in calls:
        call.leave()


async def test_a_command_outlives_a_killed_daemon_with_its_input_and_all_its_output(start: Start) -> None:
    centre = new_id("centre")
    code = (
        "import sys\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    n = int(line)\n"
        "    for i in range(n):\n"
        "        print(i, flush=True)\n"
        "print('end of input', flush=True)\n"
        "sys.exit(9)\n"
    )
    command, name = ["python3", "-c", code], request_id()
    with start() as first:
        async with connected(first, centre) as node:
            owner = await living(node)
            async with Exec(node, owner, command, request_id=name) as call:
                await call.until(b"ready\n")
                await call.send(stdin=b"20000\n")
                await call.until(b"\n")  # it writes on while nobody is there
                first.kill()
    with start() as second:
        async with connected(second, centre) as node:
            async with Exec(node, owner, command, request_id=name, output_offset=len(call.output)) as again:
                await again.send(stdin=b"3\n")
                await again.send(stdin_closed=True)
                rest = await again.rest()
                assert again.exit_code == 9
            lines = [*range(20000), *range(3)]
            assert call.output + rest == b"ready\n" + b"".join(b"%d\n" % n for n in lines) + b"end of input\n"
            await node.clear()


async def test_a_command_runs_once_however_often_the_daemon_is_killed_as_it_starts(start: Start) -> None:
    centre, chance = new_id("centre"), random.Random(7)
    owner: AttemptRef | None = None
    names: list[str] = []
    for life in range(7):
        with start() as running:
            async with connected(running, centre) as node:
                owner = owner or await living(node)
                for name in names:
                    script = f"echo {name} >> /workspace/ran; echo {name}; exit 3"
                    call = await run(node, owner, "sh", "-c", script, request_id=name)
                    assert (call.output.decode(), call.exit_code) == (f"{name}\n", 3), call.errors
                if life == 6:
                    break
                names = [f"{life}-{number}" for number in range(4)]
                scripts = [f"echo {name} >> /workspace/ran; echo {name}; exit 3" for name in names]
                calls = [
                    asyncio.create_task(run(node, owner, "sh", "-c", script, request_id=name))
                    for name, script in zip(names, scripts, strict=True)
                ]
                await asyncio.wait(calls, timeout=chance.uniform(0, 0.16))
                running.kill()
                await asyncio.gather(*calls, return_exceptions=True)
    with start() as running:
        async with connected(running, centre) as node:
            assert owner is not None
            ran = (await run(node, owner, "cat", "/workspace/ran")).output.decode().split()
            assert sorted(ran) == [f"{life}-{number}" for life in range(6) for number in range(4)]
            await node.clear()


async def test_whoever_went_away_with_the_daemon_and_cannot_come_back_is_hung_up(start: Start) -> None:
    centre, command, name = new_id("centre"), ["sh", "-c", "echo a; read line; echo b; exit 4"], request_id()
    with start() as first:
        async with connected(first, centre) as node:
            owner = await living(node)
            async with Exec(node, owner, command, request_id=name) as call:
                await call.until(b"a\n")
            async with Exec(node, owner, ["sh", "-c", "echo up; sleep 600"]) as lonely:
                await lonely.until(b"up\n")
                first.kill()
    with start() as second:
        async with connected(second, centre) as node:
            # Whoever started this one went away with the daemon, and could not come back.
            assert f"exit code {128 + signal.SIGHUP}" in (await ended(node, owner)).message
            async with Exec(node, owner, command, request_id=name, output_offset=2) as call:
                await call.send(stdin=b"\n")
                assert await call.rest() == b"b\n"
                assert call.exit_code == 4
            await node.clear()


def _resident_kib(process: Path) -> int:
    status = (process / "status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def _processes_below(state: Path) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = place.read_bytes()
        except OSError:
            continue
        if str(state).encode() in arguments and b"--log-path" in arguments and b"--exec" in arguments:
            found.append(arguments.decode())
    return found


@pytest.fixture
def serving_memory(serving: object) -> Path:
    return Path(f"/proc/{serving.process.pid}")  # type: ignore[attr-defined]
