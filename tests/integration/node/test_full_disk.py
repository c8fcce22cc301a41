"""The disk of the daemon's state is full: it refuses in words, does nothing by halves, and goes on with new room.

The commands run as plain processes: rootless Podman would look for the disk in a namespace that is older than it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from puhui.rpc.bundle import pack_files
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef, Slice
from puhui.v1.node_service_pb2 import ResumeContainerRequest, SuspendContainerRequest
from tests.daemons import daemon
from tests.integration.node.client import Node
from tests.integration.node.conftest import CARDS
from tests.integration.node.exec_call import Exec
from tests.integration.node.hands import all_slices, driver_of
from tests.integration.node.watched import WATCHING, Watched, caps, connected

_FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
_TOLD = {(_FULL, "DISK_FULL"), (_FULL, "WORKSPACE_UNAVAILABLE")}
# Ends when it is told to, by something that takes no room.
_WAITING = """
import os, sys, time
while not os.path.lexists(os.environ['PUHUI_OUTPUTS'] + '/end'):
    time.sleep(.01)
sys.exit(3)
"""


@pytest.fixture
def disk(home: Path) -> Iterator[Path]:
    """A small disk for the daemon's state."""
    state = home / "node"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0710", "tmpfs", str(state)], check=True)
    # The emulated cards are silicon, which knows of no disk.
    (home / "silicon").mkdir()
    (state / "emulation").symlink_to(home / "silicon")
    try:
        yield state
    finally:
        subprocess.run(["umount", "--lazy", str(state)], check=True)


class _Ballast:
    """A file that takes all the room there is."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "ballast"

    def fill(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            while True:
                os.write(descriptor, bytes(512))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(descriptor)

    def free(self) -> None:
        self._path.unlink(missing_ok=True)


async def _upload(node: Node) -> object:
    while True:
        try:
            return await node.put_archive(pack_files({"big": os.urandom(2**18)}))
        except grpc.aio.AioRpcError as error:
            # gRPC's own client loses the server's answer now and then, when it comes while the client still writes.
            if error.details() != "Internal error from Core":
                raise
        except asyncio.InvalidStateError:
            continue  # for the same reason


async def _run_true(node: Node, owner: AttemptRef) -> bytes:
    async with Exec(node, owner, ["true"], request_id="exec") as call:
        return await call.rest()


def _mutations(
    node: Node, owner: AttemptRef, one: Slice, spare: Slice, bundle_id: str
) -> list[Callable[[], Awaitable[object]]]:
    """Returns one of each kind."""
    return [
        lambda: _upload(node),
        lambda: node.cut(owner, start=4, name="another"),
        lambda: node.cut(node.attempt(), start=5),
        lambda: node.start(node.attempt(), bundle_id=bundle_id),
        lambda: _run_true(node, owner),
        lambda: node.attach(owner, spare),
        lambda: node.detach(owner, one),
        lambda: node.stub.SuspendContainer(SuspendContainerRequest(owner=owner)),
    ]


def _seen(disk: Path, owner: AttemptRef) -> set[str]:
    """Returns the names of the cap nodes that an attempt's command sees."""
    folder = disk / "attempts" / owner.centre / owner.job_id / str(owner.attempt) / "caps"
    return {entry.name for entry in folder.iterdir()}


@contextlib.asynccontextmanager
async def _cleared(node: Node, ballast: _Ballast) -> AsyncIterator[None]:
    """Leaves nothing running, whatever comes of the block."""
    try:
        yield
    finally:
        ballast.free()
        await node.clear()


async def test_a_full_disk_is_told_and_nothing_is_done_by_halves(disk: Path) -> None:
    centre, ballast = new_id("centre"), _Ballast(disk)
    arguments = ["--listen", "127.0.0.1:0", "--state", str(disk), "--emulate", CARDS, "--runtime", "process"]
    with daemon("nodedaemon", arguments, disk.parent / "node.log") as running:
        async with connected(running, centre) as node, _cleared(node, ballast):
            owner, ending = node.attempt(), node.attempt()
            one, spare = await node.cut(owner, start=0), await node.cut(owner, start=2, name="spare")
            await node.start(owner, WATCHING, slices=[one])
            end = os.pidfd_open((await node.start(ending, _WAITING)).pid)
            bundle_id = await node.put_code("print('done')")
            await Watched(node, owner).sees(caps(one))
            before = await node.slices(), await node.containers()

            for mutation in _mutations(node, owner, one, spare, bundle_id):
                ballast.fill()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await mutation()
                refusal = Refusal.of(caught.value)
                assert (refusal.code, refusal.reason) in _TOLD, refusal
                assert "full" in refusal.message or "No space left" in refusal.message
                assert (await node.slices(), await node.containers()) == before
                assert _seen(disk, owner) == set(caps(one).split())
                with driver_of(disk) as driver:
                    assert {uuid for _, _, uuid in all_slices(driver)} == {one.uuid, spare.uuid}
            # What ends meanwhile is not lost, it is told later.
            ballast.fill()
            (disk / "attempts" / centre / ending.job_id / "1" / "workspace" / "outputs" / "end").symlink_to("/")
            assert await asyncio.to_thread(select.select, [end], [], [], 20) == ([end], [], [])
            os.close(end)
            assert running.process.poll() is None

            ballast.free()
            assert (await node.exited(ending)).container.exit_code == 3
            for mutation in _mutations(node, owner, one, spare, bundle_id):
                await mutation()
            await node.stub.ResumeContainer(ResumeContainerRequest(owner=owner))
            await node.clear()
            assert list((disk / "attempts").iterdir()) == []
        assert running.stop() == 0


async def test_a_command_that_writes_and_ends_on_a_full_disk_loses_nothing(disk: Path) -> None:
    centre, ballast = new_id("centre"), _Ballast(disk)
    arguments = ["--listen", "127.0.0.1:0", "--state", str(disk), "--emulate", CARDS, "--runtime", "process"]
    # It writes less than a pipe takes, and tells that it is about to end by something that takes no room.
    write = 'echo runs; read word; head -c 40000 /dev/zero | tr "\\0" a; ln -s / "$PUHUI_OUTPUTS/written"; exit 7'
    with daemon("nodedaemon", arguments, disk.parent / "node.log") as running:
        async with connected(running, centre) as node, _cleared(node, ballast):
            owner = node.attempt()
            await node.start(owner, WATCHING)
            attempt = disk / "attempts" / centre / owner.job_id / "1"
            async with Exec(node, owner, ["sh", "-c", write], request_id="writes") as call:
                await call.until(b"runs\n")
                (folder,) = (attempt / "execs").iterdir()
                end = os.pidfd_open(int((folder / "pid").read_text()))
                ballast.fill()
                await call.send(stdin=b"go\n")
                assert await asyncio.to_thread(select.select, [end], [], [], 20) == ([end], [], [])
                os.close(end)
                assert (attempt / "workspace/outputs/written").is_symlink()
                keeper = int((folder / "conmon.pid").read_text())
                assert Path(f"/proc/{keeper}").exists()
                ballast.free()
                assert await call.rest() == b"runs\n" + b"a" * 40000
                assert call.exit_code == 7
