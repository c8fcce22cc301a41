"""Workspaces outlive their containers: the next attempt takes them over, here or on another node."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from puhui.rpc.channel import open_channel
from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef
from puhui.v1.node_service_pb2 import CreateContainerRequest, GetWorkspaceRequest, PutWorkspaceRequest, WorkspaceHeader
from tests.daemons import Daemon
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import Start

pytestmark = pytest.mark.podman

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION

_WRITE = """
import os
os.chdir('/workspace')
os.makedirs('names/empty')
for number, name in enumerate(('-rf', ' ', 'a\\nb', 'ünï')):
    open('names/' + name, 'w').write(str(number))
for mode in (0o400, 0o755, 0o666):
    open(f'mode-{mode:o}', 'w').write('x')
    os.chmod(f'mode-{mode:o}', mode)
os.symlink('names/ünï', 'near')
os.symlink('/workspace/names', 'outputs/whole')
os.symlink('/etc/passwd', 'out')
open('outputs/w', 'w').write('1')
os.chmod('names', 0o500)
"""
_TELL = """
import os
for folder, folders, files in os.walk('/workspace'):
    folders[:] = sorted(name for name in folders if name != 'code')
    for name in sorted(files + folders):
        path = os.path.join(folder, name)
        status = os.lstat(path)
        link = os.readlink(path) if os.path.islink(path) else ''
        print(repr(path[11:]), link or oct(status.st_mode & 0o777), status.st_uid, status.st_gid)
open('/workspace/more', 'w').write('x')
open('/workspace/outputs/w', 'a').write('2')
"""
_TOLD = b"""'mode-400' 0o400 0 0
'mode-666' 0o666 0 0
'mode-755' 0o755 0 0
'names' 0o500 0 0
'near' names/\xc3\xbcn\xc3\xaf 0 0
"""


def _next(owner: AttemptRef) -> AttemptRef:
    return AttemptRef(
        centre=owner.centre, job_id=owner.job_id, attempt=owner.attempt + 1, fencing_token=owner.fencing_token
    )


async def test_the_next_attempt_takes_the_workspace_over_with_all_in_it(node: Node) -> None:
    owner, _, _ = await node.run(_WRITE)
    heir = _next(owner)
    for _ in range(2):  # a repeated request finds it taken over
        await node.start(heir, _TELL, workspace_of_attempt=1)
    await node.exited(heir)
    told = await node.log(heir)
    for line in _TOLD.splitlines():
        assert line in told, told
    assert b"'out' /etc/passwd 0 0" in told  # it never left the node
    manifest, _ = await node.artifacts(heir)
    assert {file.path: file.size_bytes for file in manifest.files}["w"] == 2
    # It is not the first one's any more.
    with refused(_PRECONDITION, "WORKSPACE_NOT_FOUND"):
        await node.workspace(owner)
    with refused(_PRECONDITION, "WORKSPACE_NOT_FOUND"):
        await node.start(_next(heir), "", workspace_of_attempt=1)
    await node.remove(owner)
    assert (await node.workspace(heir))[0].size_bytes > 0


async def test_a_workspace_goes_to_another_attempt_by_upload(node: Node) -> None:
    owner, _, _ = await node.run(_WRITE)
    manifest, archive = await node.workspace(owner)
    assert manifest.digest == "sha256:" + hashlib.sha256(archive).hexdigest()
    assert manifest.size_bytes == len(archive)
    # A broken transfer goes on where it broke.
    assert (await node.workspace(owner, offset=100))[1] == archive[100:]
    other = node.attempt()
    await node.put_workspace(other, archive)
    await node.start(other, _TELL)
    await node.exited(other)
    told = await node.log(other)
    for line in _TOLD.splitlines():
        assert line in told, told
    assert b"'LEFT_OUT.txt'" in told
    assert b"'out'" not in told
    assert b"'outputs/whole' ../names 0 0" in told
    with refused(grpc.StatusCode.ALREADY_EXISTS, "CONTAINER_EXISTS"):
        await node.put_workspace(other, archive)


async def test_a_workspace_that_is_uploaded_twice_is_replaced(node: Node) -> None:
    first, _, _ = await node.run("open('/workspace/first', 'w')")
    second, _, _ = await node.run("open('/workspace/second', 'w')")
    owner = node.attempt()
    for one in (first, second):
        await node.put_workspace(owner, (await node.workspace(one))[1])
    await node.start(owner, "import os; print(sorted(os.listdir('/workspace')))")
    await node.exited(owner)
    assert await node.log(owner) == b"['code', 'outputs', 'second']\n"


async def test_nothing_is_kept_of_an_upload_that_does_not_arrive_whole(node: Node, state: Path) -> None:
    source, _, _ = await node.run("import os; open('/workspace/x', 'wb').write(os.urandom(100000))")
    _, archive = await node.workspace(source)
    owner = node.attempt()
    with refused(_INVALID, "UPLOAD_INCOMPLETE"):
        await node.put_workspace(owner, archive, sent=1000)
    with refused(_INVALID, "UPLOAD_DIGEST"):
        await node.put_workspace(owner, archive[:-1] + bytes([archive[-1] ^ 1]), digest="sha256:" + "0" * 64)
    with refused(_INVALID, "WORKSPACE_UNREADABLE"):
        await node.put_workspace(owner, archive[:1000])
    with refused(_INVALID, "UPLOAD_MALFORMED"):
        await node.put_workspace(owner, archive, digest="sha1:0")
    with refused(_INVALID, "OWNER_INVALID"):
        await node.put_workspace(AttemptRef(), archive)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "WORKSPACE_TOO_LARGE"):
        header = WorkspaceHeader(owner=owner, digest="sha256:" + "0" * 64, size_bytes=2**60)
        await node.stub.PutWorkspace(iter([PutWorkspaceRequest(header=header)]))
    low = AttemptRef()
    low.CopyFrom(source)
    low.fencing_token = 0
    with refused(_PRECONDITION, "STALE_FENCING_TOKEN"):
        await node.put_workspace(low, archive)

    async def leaves() -> None:
        sent, never = asyncio.Event(), asyncio.Event()

        async def parts() -> AsyncIterator[PutWorkspaceRequest]:
            digest = "sha256:" + hashlib.sha256(archive).hexdigest()
            header = WorkspaceHeader(owner=owner, digest=digest, size_bytes=len(archive))
            yield PutWorkspaceRequest(header=header)
            yield PutWorkspaceRequest(chunk=archive[:1000])
            sent.set()
            await never.wait()

        call = node.stub.PutWorkspace(parts())
        await sent.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    await leaves()
    await node.put_workspace(owner, archive)  # what was left of the others is gone by the time this one is in place
    assert list((state / "uploads").iterdir()) == []
    await node.remove(owner)  # discards what was uploaded and never used
    assert not (state / "attempts" / node.centre / owner.job_id).exists()


async def test_a_container_that_cannot_be_made_leaves_the_workspace_where_it_was(node: Node) -> None:
    owner, _, _ = await node.run("open('/workspace/kept', 'w')")
    heir = _next(owner)
    with refused(_PRECONDITION, "IMAGE_NOT_FOUND"):
        await node.start(heir, "", workspace_of_attempt=1, image="localhost/none")
    _, archive = await node.workspace(owner)
    await node.put_workspace(heir, archive)
    with refused(_PRECONDITION, "WORKSPACE_UPLOADED"):
        await node.start(heir, "", workspace_of_attempt=1)
    with refused(_PRECONDITION, "IMAGE_NOT_FOUND"):
        await node.start(heir, "", image="localhost/none")
    await node.start(heir, "import os; print(os.listdir('/workspace'))")
    await node.exited(heir)
    assert b"kept" in await node.log(heir)


async def test_a_workspace_in_use_is_not_given_away(node: Node) -> None:
    owner = node.attempt()
    await node.start(owner, "import time; time.sleep(600)")
    with refused(_PRECONDITION, "NOT_FINISHED"):
        await node.workspace(owner)
    with refused(_PRECONDITION, "NOT_FINISHED"):
        await node.start(_next(owner), "", workspace_of_attempt=1)
    with refused(_INVALID, "SPEC_INVALID"):
        await node.start(node.attempt(), "", workspace_of_attempt=1)
    with refused(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND"):
        await node.workspace(node.attempt())


async def test_code_that_put_something_else_where_its_outputs_are_harms_nobody(node: Node) -> None:
    owner, _, _ = await node.run(
        "import os; os.rmdir('/workspace/outputs'); os.symlink('/etc', '/workspace/outputs'); os.chmod('/workspace', 0)"
    )
    heir = _next(owner)
    await node.start(heir, "import os; print(os.readlink('/workspace/outputs'))", workspace_of_attempt=1)
    await node.exited(heir)
    assert await node.log(heir) == b"/etc\n"
    assert list((await node.artifacts(heir))[0].files) == []


async def test_a_large_workspace_takes_little_memory(node: Node, serving: Daemon) -> None:
    megabytes = 100
    owner, _, _ = await node.run(
        f"import os\nfile = open('/workspace/large', 'wb')\nfor _ in range({megabytes}): file.write(os.urandom(2**20))"
    )
    status = Path(f"/proc/{serving.process.pid}/status")
    Path(f"/proc/{serving.process.pid}/clear_refs").write_text("5")  # the highest so far counts from here
    before = _highest_kib(status)
    other, digest = node.attempt(), hashlib.sha256()

    async def carried() -> AsyncIterator[PutWorkspaceRequest]:
        call = node.stub.GetWorkspace(GetWorkspaceRequest(owner=owner), timeout=120)
        async for response in call:
            if response.HasField("manifest"):
                size = response.manifest.size_bytes
                header = WorkspaceHeader(owner=other, digest=response.manifest.digest, size_bytes=size)
                yield PutWorkspaceRequest(header=header)
            else:
                digest.update(response.chunk)
                yield PutWorkspaceRequest(chunk=response.chunk)

    await node.stub.PutWorkspace(carried(), timeout=120)
    assert _highest_kib(status) - before < 40 * 2**10
    await node.start(other, "import os; print(os.path.getsize('/workspace/large'))")
    await node.exited(other)
    assert await node.log(other) == f"{megabytes * 2**20}\n".encode()


def _highest_kib(status: Path) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


@pytest.mark.parametrize("moved", [False, True], ids=["before it is taken", "after it is taken"])
async def test_a_daemon_that_dies_as_it_takes_a_workspace_over_loses_nothing(
    start: Start, home: Path, moved: bool
) -> None:
    with start() as first:
        async with open_channel(first.address) as channel:
            node = Node(channel, new_id("centre"))
            owner, _, _ = await node.run("open('/workspace/kept', 'w').write('x')")
            bundle_id = await node.put_code("import os; print(os.listdir('/workspace'))")
        first.kill()
        heir = _next(owner)
        attempts = home / "node/attempts" / owner.centre / owner.job_id
        # What the journal and the disk say when it dies in between.
        with sqlite3.connect(home / "node/node.db") as journal:
            names = [row[1] for row in journal.execute("PRAGMA table_info(containers)")]
            row = dict(zip(names, journal.execute("SELECT * FROM containers").fetchone(), strict=True))
            row |= {"attempt": 2, "stage": "creating", "container_id": "", "workspace_of": 1, "digest": ""}
            marks = ", ".join("?" * len(row))
            journal.execute(f"INSERT INTO containers ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
        journal.close()
        if moved:
            (attempts / "2").mkdir()
            os.rename(attempts / "1/workspace", attempts / "2/workspace")  # noqa: PTH104 - as the daemon does
    with start() as second:
        async with open_channel(second.address) as channel:
            node = Node(channel, owner.centre)
            assert (attempts / "1/workspace/kept").read_text() == "x"
            request = CreateContainerRequest(
                owner=heir, command=["python3", "main.py"], bundle_id=bundle_id, workspace_of_attempt=1
            )
            await node.stub.CreateContainer(request)
            await node.exited(heir)
            assert b"kept" in await node.log(heir)
            await node.clear()
