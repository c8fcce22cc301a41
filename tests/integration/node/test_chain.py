"""A slice, a container on it, what it leaves, and nothing after it: on real rootless Podman."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import grpc
import pytest

from puhui.rpc.identity import request_digest
from puhui.v1.card_pb2 import MigMode, Placement, SliceState
from puhui.v1.node_pb2 import ContainerState, NodeEventKind, RuntimeKind
from puhui.v1.node_service_pb2 import (
    CreateContainerRequest,
    CreateSliceRequest,
    NodeServiceGetArtifactsRequest,
)
from tests.integration.node.client import Node, members, refused
from tests.integration.node.conftest import containers_of

pytestmark = pytest.mark.podman

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
_NOT_FOUND = grpc.StatusCode.NOT_FOUND


async def test_code_runs_on_a_slice_and_everything_is_given_back(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner, "3g.40gb", start=4)
    assert one.state == SliceState.SLICE_STATE_IDLE
    assert one.uuid.startswith("MIG-")
    assert one.emulated

    container = await node.start(
        owner, "import os; print('learning'); open(os.environ['PUHUI_OUTPUTS'] + '/w', 'w').write('1')", slices=[one]
    )
    assert container.runtime == RuntimeKind.RUNTIME_KIND_PODMAN
    assert containers_of(node.centre) == [container.id[:12]]
    ended = (await node.exited(owner)).container
    assert (ended.exit_code, ended.state) == (0, ContainerState.CONTAINER_STATE_EXITED)
    assert ended.start_time.ToNanoseconds() <= ended.end_time.ToNanoseconds()

    await node.remove(owner, discard=False)
    assert containers_of(node.centre) == []
    assert await node.log(owner) == b"learning\n"
    manifest, archive = await node.artifacts(owner)
    assert [(file.path, file.size_bytes) for file in manifest.files] == [("w", 1)]
    assert members(archive)["w"].size == 1

    await node.destroy(owner, one)
    assert await node.slices() == []
    await node.remove(owner)
    assert list((state / "attempts").iterdir()) == []
    with refused(_NOT_FOUND, "CONTAINER_NOT_FOUND"):
        await node.log(owner)


async def test_a_container_is_shut_in(node: Node) -> None:
    _, ended, output = await node.run(
        """
import json, os, socket
def write(path):
    try:
        open(path, 'w').write('x')
        return True
    except OSError:
        return False
status = dict(line.split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)
print(json.dumps({
    'cwd': os.getcwd(), 'code': write('/workspace/code/x'), 'root': write('/etc/x'), 'tmp': write('/tmp/x'),
    'workspace': write('/workspace/x'), 'outputs': write('/workspace/outputs/x'),
    'caps': status['CapEff'].strip(), 'privileges': status['NoNewPrivs'].strip(),
    'interfaces': [name for _, name in socket.if_nameindex()],
    'env': {name: os.environ.get(name) for name in (
        'HOME', 'PUHUI_OUTPUTS', 'PUHUI_CENTRE', 'PUHUI_EMULATED', 'CUDA_VISIBLE_DEVICES', 'EPOCHS')},
    'cards': os.listdir('/dev/nvidia-caps'), 'card': write('/dev/nvidia-caps/x'),
}))
""",
        env={"EPOCHS": "3"},
    )
    assert ended.exit_code == 0, output
    seen = json.loads(output)
    assert seen == {
        "cwd": "/workspace/code",
        "code": False,
        "root": False,
        "tmp": True,
        "workspace": True,
        "outputs": True,
        "caps": "0000000000000000",
        "privileges": "1",
        "interfaces": ["lo"],
        "env": {
            "HOME": "/workspace",
            "PUHUI_OUTPUTS": "/workspace/outputs",
            "PUHUI_CENTRE": node.centre,
            "PUHUI_EMULATED": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "EPOCHS": "3",
        },
        "cards": [],
        "card": False,
    }


async def test_a_container_sees_its_own_slice_and_no_other(node: Node, state: Path) -> None:
    look = "import os; print(sorted(os.listdir('/dev/nvidia-caps')), os.environ['CUDA_VISIBLE_DEVICES'])"
    seen = {}
    for start in (0, 4):
        owner = node.attempt()
        one = await node.cut(owner, "2g.20gb", start=start)
        await node.start(owner, look, slices=[one])
        await node.exited(owner)
        nodes, uuid = (await node.log(owner)).decode().strip().rsplit(" ", 1)
        assert uuid == one.uuid
        gi, ci = one.gpu_instance_id, one.compute_instance_id
        base = 3 + 9 * gi
        assert nodes == str(sorted([f"nvidia-cap{base}", f"nvidia-cap{base + 1 + ci}"]))
        seen[start] = nodes
    assert seen[0] != seen[4]
    assert len(list((state / "emulation" / "caps").glob("nvidia-cap*"))) == 2 + 4


async def test_output_comes_back_byte_for_byte(node: Node) -> None:
    out = bytes(range(256)) * 40 + b"\r\nlong " + b"x" * 20_000 + b"\n\n\nno line break at the end"
    owner, _, output = await node.run(
        "import os; os.write(1, bytes(range(256)) * 40 + b'\\r\\nlong ' + b'x' * 20_000)\n"
        "os.write(1, b'\\n\\n\\nno line break at the end')"
    )
    assert output == out
    for offset in (0, 1, 255, 10_245, len(out) - 3, len(out), len(out) + 7):
        chunks = await node.chunks(owner, offset=offset)
        assert b"".join(chunk.data for chunk in chunks) == out[offset:]
        assert not chunks or chunks[0].offset == offset
    assert await node.log(owner, tail_lines=1) == b"no line break at the end"
    assert await node.log(owner, tail_lines=3) == b"\n\nno line break at the end"
    assert await node.log(owner, tail_lines=100_000) == out


async def test_both_streams_are_told_apart_and_counted_together(node: Node) -> None:
    owner, _, _ = await node.run(
        "import sys, time\n"
        "for n in range(3):\n"
        "    print('out', n, flush=True); time.sleep(.05)\n"
        "    print('err', n, file=sys.stderr, flush=True); time.sleep(.05)"
    )
    chunks = await node.chunks(owner)
    assert [(chunk.stream, chunk.data) for chunk in chunks] == [
        (1 + of, f"{'err' if of else 'out'} {n}\n".encode()) for n in range(3) for of in range(2)
    ]
    assert [chunk.offset for chunk in chunks] == list(range(0, 36, 6))
    times = [chunk.time.ToNanoseconds() for chunk in chunks]
    assert times == sorted(times)


async def test_output_is_followed_while_it_is_written(node: Node) -> None:
    owner = node.attempt()
    await node.start(owner, "print('one', flush=True)\nimport time; time.sleep(1.5)\nprint('two', end='')")
    output = node.follow(owner)
    seen = b""
    while seen != b"one\n":
        seen += (await anext(output)).data
    (running,) = await node.containers()
    assert running.state == ContainerState.CONTAINER_STATE_RUNNING
    assert [chunk.data async for chunk in output] == [b"two"]


async def test_artifacts_hold_what_is_inside_and_nothing_else(node: Node) -> None:
    owner, ended, output = await node.run(
        """
import os
os.chdir('/workspace/outputs')
os.makedirs('deep/er')
open('deep/er/model.bin', 'wb').write(b'w' * 100_000)
open('empty', 'w').close()
open('ünï', 'w').write('u')
open(b'raw\\xff', 'w').write('r')
open('closed', 'w').write('c'); os.chmod('closed', 0)
os.mkdir('shut'); open('shut/in', 'w').write('s'); os.chmod('shut', 0)
os.symlink('deep/er/model.bin', 'inside')
os.symlink('/etc/passwd', 'absolute'); os.symlink('../../../../etc/shadow', 'outside'); os.symlink('..', 'up')
os.mkfifo('pipe')
open('script.sh', 'w').write('#'); os.chmod('script.sh', 0o755)
"""
    )
    assert ended.exit_code == 0, output
    manifest, archive = await node.artifacts(owner)
    entries = members(archive)
    assert {name for name, entry in entries.items() if entry.isreg()} == {
        *("deep/er/model.bin", "empty", "ünï", "closed", "shut/in", "script.sh", "LEFT_OUT.txt")
    }
    assert {name: entry.linkname for name, entry in entries.items() if entry.issym()} == {"inside": "deep/er/model.bin"}
    assert {file.path for file in manifest.files} >= {"deep/er/model.bin", "LEFT_OUT.txt"}
    assert entries["script.sh"].mode & 0o111
    assert manifest.size_bytes == len(archive)
    # A broken transfer goes on where it stopped.
    responses = [
        response async for response in node.stub.GetArtifacts(NodeServiceGetArtifactsRequest(owner=owner, offset=100))
    ]
    assert responses[0].manifest == manifest
    assert b"".join(response.chunk for response in responses[1:]) == archive[100:]


async def test_replaced_outputs_lead_nowhere(node: Node) -> None:
    owner, _, _ = await node.run("import os; os.rmdir('/workspace/outputs'); os.symlink('/etc', '/workspace/outputs')")
    manifest, archive = await node.artifacts(owner)
    assert list(manifest.files) == []
    assert members(archive) == {}


async def test_artifacts_of_a_running_command_are_refused(node: Node) -> None:
    owner = node.attempt()
    await node.start(owner, "import time; time.sleep(60)")
    with refused(_PRECONDITION, "NOT_FINISHED"):
        await node.artifacts(owner)


_POLITE = """
import signal, sys, time
def leave(*_):
    print('leaving'); sys.exit(7)
signal.signal(signal.SIGTERM, leave)
print('ready', flush=True)
time.sleep(60)
"""


async def test_a_command_may_end_by_itself_when_stopped(node: Node) -> None:
    owner = node.attempt()
    await node.start(owner, _POLITE)
    await node.said(owner, b"ready\n")
    stopped = await node.stop(owner)
    assert stopped.exit_code == 7
    assert not stopped.timed_out
    assert await node.log(owner) == b"ready\nleaving\n"
    assert (await node.stop(owner)).exit_code == 7


async def test_a_command_that_will_not_end_is_killed_after_its_grace(node: Node) -> None:
    owner = node.attempt()
    await node.start(
        owner,
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(60)",
        stop_grace_s=0.2,
    )
    await node.said(owner, b"ready\n")
    assert (await node.stop(owner)).exit_code == 137


async def test_a_command_that_dies_of_a_signal_says_which(node: Node) -> None:
    _, ended, _ = await node.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert ended.exit_code == 128 + 11


async def test_a_command_is_ended_when_it_has_run_too_long(node: Node) -> None:
    owner = node.attempt()
    await node.start(owner, "import time; time.sleep(60)", max_duration_s=0.5, stop_grace_s=1)
    event = await node.exited(owner)
    assert event.reason == "TIMED_OUT"
    assert event.container.timed_out
    assert event.container.exit_code == 128 + 15


@pytest.mark.parametrize(
    ("arguments", "code", "reason", "words"),
    [
        ({"command": ["pyhton3", "main.py"]}, _INVALID, "COMMAND_NOT_FOUND", "pyhton3"),
        ({"command": ["/opt/nope"]}, _INVALID, "COMMAND_NOT_FOUND", "/opt/nope"),
        ({"command": ["./absent.sh"]}, _INVALID, "COMMAND_NOT_FOUND", "absent.sh"),
        ({"command": ["./main.py"]}, _INVALID, "COMMAND_NOT_FOUND", "python3 ./main.py"),
        ({"command": []}, _INVALID, "SPEC_INVALID", "command"),
        ({"command": ["a\0b"]}, _INVALID, "SPEC_INVALID", "NUL"),
        ({"env": {"A=B": "c"}}, _INVALID, "SPEC_INVALID", "env"),
        ({"max_duration_s": 0}, _INVALID, "SPEC_INVALID", "max_duration"),
        ({"image": "localhost/puhui/absent:1"}, _PRECONDITION, "IMAGE_NOT_FOUND", "podman -- pull"),
        ({"bundle_id": "sha256:" + "0" * 64}, _PRECONDITION, "BUNDLE_NOT_FOUND", "PutBundle"),
        ({"bundle_id": "../../etc"}, _PRECONDITION, "BUNDLE_NOT_FOUND", "PutBundle"),
    ],
)
async def test_a_container_that_cannot_be_leaves_no_trace(
    node: Node, state: Path, arguments: dict[str, object], code: grpc.StatusCode, reason: str, words: str
) -> None:
    owner = node.attempt()
    with refused(code, reason) as refusal:
        await node.start(owner, "print(1)", **arguments)  # type: ignore[arg-type]
    assert words in refusal.message
    assert await node.containers() == []
    assert containers_of(node.centre) == []
    assert list((state / "attempts").iterdir()) == []
    # And the attempt is as free as before.
    assert (await node.start(owner, "print(2)")).id
    await node.exited(owner)


async def test_a_slice_that_is_not_its_own_is_refused(node: Node) -> None:
    owner, other = node.attempt(), node.attempt()
    one = await node.cut(owner)
    with refused(_PRECONDITION, "SLICE_NOT_FOUND"):
        await node.start(other, "print(1)", slices=[one])
    with refused(_NOT_FOUND, "SLICE_NOT_FOUND"):
        await node.destroy(other, one)
    assert [s.uuid for s in await node.slices()] == [one.uuid]


async def test_a_slice_under_a_living_container_is_not_destroyed(node: Node) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    container = await node.start(owner, "import time; time.sleep(60)", slices=[one])
    with refused(_PRECONDITION, "SLICE_IN_USE") as refusal:
        await node.destroy(owner, one)
    assert container.id[:12] in refusal.message
    await node.stop(owner, 0)
    await node.destroy(owner, one)


async def test_a_destroy_waits_for_a_lingering_process(node: Node, state: Path) -> None:
    owner = node.attempt()
    one = await node.cut(owner)
    held = os.open(state / "emulation" / "caps" / f"nvidia-cap{3 + 9 * one.gpu_instance_id}", os.O_RDONLY)
    destroying = asyncio.create_task(node.destroy(owner, one))
    try:
        while (await node.slices())[0].state != SliceState.SLICE_STATE_DESTROYING:
            assert not destroying.done()
    finally:
        os.close(held)
    await destroying
    assert await node.slices() == []


async def test_places_are_taken_once(node: Node) -> None:
    owner, other = node.attempt(), node.attempt()
    one = await node.cut(owner, "3g.40gb", start=0)
    with refused(_PRECONDITION, "PLACEMENT_TAKEN") as refusal:
        await node.cut(other, "1g.10gb", start=3)
    assert owner.job_id in refusal.message
    with refused(_INVALID, "PLACEMENT_INVALID"):
        await node.cut(other, "3g.40gb", start=2)
    request = CreateSliceRequest(
        owner=other, gpu_uuid=one.gpu_uuid, profile="9g.90gb", placement=Placement(start=0, size=1)
    )
    with refused(_NOT_FOUND, "PROFILE_NOT_FOUND") as refusal:
        await node.stub.CreateSlice(request)
    assert "1g.10gb" in refusal.message
    request.gpu_uuid = "GPU-none"
    with refused(_NOT_FOUND, "GPU_NOT_FOUND"):
        await node.stub.CreateSlice(request)
    # Many at once on the free half: each place goes to exactly one.
    outcomes = await asyncio.gather(
        *(node.cut(node.attempt(), "1g.10gb", start=start) for start in (4, 5, 6) for _ in range(3)),
        return_exceptions=True,
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 3
    inventory = await node.inventory()
    assert {p.name: p.remaining_instances for p in inventory.gpus[0].profiles}["1g.10gb"] == 0
    assert inventory.gpus[1].mig_mode == MigMode.MIG_MODE_ENABLED


async def test_repeating_a_request_changes_nothing(node: Node) -> None:
    owner = node.attempt()
    first, second = await asyncio.gather(node.cut(owner), node.cut(owner))
    assert first == second
    assert len(await node.slices()) == 1
    with refused(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"):
        await node.cut(owner, start=1)
    bundle_id = await node.put_code("print('once')")
    request = CreateContainerRequest(
        owner=owner, command=["python3", "main.py"], bundle_id=bundle_id, request_id=f"{owner.job_id}/container"
    )
    answers = [await node.stub.CreateContainer(request) for _ in range(2)]
    assert answers[0] == answers[1]
    await node.exited(owner)
    assert await node.stub.CreateContainer(request) == answers[0]
    assert await node.log(owner) == b"once\n"
    await node.remove(owner)
    await node.remove(owner)
    await node.destroy(owner, first)
    await node.destroy(owner, first)


async def test_a_lower_token_is_refused_everywhere(node: Node) -> None:
    owner = node.attempt(token=5)
    one = await node.cut(owner)
    stale = node.attempt()
    stale.CopyFrom(owner)
    stale.fencing_token = 4
    stale_calls = (
        node.cut(stale),
        node.start(stale, "print(1)"),
        node.stop(stale),
        node.remove(stale),
        node.destroy(stale, one),
    )
    for call in stale_calls:
        with refused(_PRECONDITION, "STALE_FENCING_TOKEN"):
            await call
    # Whoever takes over repeats the request with a token of its own, and gets the same answer.
    owner.fencing_token = 6
    assert (await node.cut(owner)).uuid == one.uuid


async def test_owners_that_could_leave_their_place_are_refused(node: Node) -> None:
    for centre, job_id in (("../x", "j"), ("c", ".."), ("", "j"), ("c", "a/b"), ("c", "j" * 64)):
        owner = node.attempt()
        owner.centre, owner.job_id = centre, job_id
        with refused(_INVALID, "OWNER_INVALID"):
            await node.start(owner, "print(1)")
        with refused(_INVALID, "OWNER_INVALID"):
            await node.log(owner)


async def test_a_bundle_is_kept_once_and_a_bad_one_never(node: Node, state: Path) -> None:
    kept = sorted((state / "bundles").iterdir())
    evil = io.BytesIO()
    with gzip.open(evil, "wb") as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    with refused(_INVALID, "BUNDLE_PATH_OUTSIDE"):
        await node.put_archive(evil.getvalue())
    assert sorted((state / "bundles").iterdir()) == kept
    code = f"print({request_digest(node.centre.encode())!r})"
    first = await node.put_code(code)
    assert await node.put_code(code) == first
    assert len(list((state / "bundles").iterdir())) == len(kept) + 1


async def test_events_are_told_in_order_from_any_cursor(node: Node) -> None:
    owner, _, _ = await node.run("print(1)")
    await node.remove(owner)
    seen = []
    async for event in node.events():
        if event.owner.job_id == owner.job_id:
            seen.append(event)
            if event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_REMOVED:
                break
    assert [event.reason for event in seen] == ["CONTAINER_STARTED", "COMMAND_ENDED", "CONTAINER_REMOVED"]
    async for event in node.events(after=seen[0].cursor):
        assert event.cursor == seen[0].cursor + 1
        break
    with refused(grpc.StatusCode.OUT_OF_RANGE, "CURSOR_UNKNOWN"):
        await anext(node.events(after=10**9))
