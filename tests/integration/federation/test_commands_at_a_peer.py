"""Every command about one job, as a shell runs it, for a job that is at a peer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from puhui.v1 import job_pb2
from tests.integration.cli.program import Ended, Puhui
from tests.integration.federation.neighbourhood import Neighbour, neighbour, pair
from tests.unit.cli.small_centre import archive_of
from tests.unit.controlplane.centres import eventually

ANY_BYTES = bytes(range(256)) * 1000


class Shell:
    """Somebody at the command line of a centre."""

    def __init__(self, of: Neighbour, home: Path) -> None:
        self._puhui = Puhui.at(home, of.centre.address)

    async def __call__(self, *arguments: str, given: bytes = b"") -> Ended:
        return await asyncio.to_thread(self._puhui, *arguments, given=given)

    async def bytes_of(self, *arguments: str) -> tuple[int, bytes]:
        """Returns the exit code of a command, and what it writes."""
        process = self._puhui.start(*arguments)
        out, _ = await asyncio.to_thread(process.communicate, timeout=60)
        return process.returncode, out

    async def right(self, *arguments: str) -> str:
        """Returns all that a command says, in one line."""
        ended = await self(*arguments)
        assert ended.code == 0, ended.err
        return " ".join((ended.out + ended.err).split())


@contextlib.asynccontextmanager
async def full(folder: Path) -> AsyncIterator[tuple[Neighbour, Neighbour]]:
    """Two peers, of which the first has no room."""
    async with neighbour("a", folder) as here, neighbour("b", folder) as there:
        await pair(here, there)
        await here.fill()
        yield here, there


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "train.py").write_text("print('hello')\n")
    return folder


async def test_a_job_at_a_peer_is_run_shown_read_awaited_and_fetched_as_any(tmp_path: Path, code: Path) -> None:
    async with full(tmp_path) as (here, there):
        user, operator = Shell(here, tmp_path / "user"), Shell(there, tmp_path / "operator")
        attached = asyncio.create_task(user("run", "--name", "far", str(code / "train.py")))
        guest = await there.guest("far")
        await there.until(guest.id, job_pb2.JOB_STATE_RUNNING)
        await there.node.write(guest.id, b"one\ntwo\n")
        await here.until(guest.guest.job_id, job_pb2.JOB_STATE_RUNNING)

        listed = await user.right("ps")
        assert "PEER" in listed
        assert f"{guest.guest.job_id} far running" in listed
        assert "of a" in await operator.right("ps")
        shown = await user.right("get", "far")
        assert f"peer b (job {guest.id} there), under a lease for 1" in shown
        sent = await operator.right("get", guest.id)
        assert f"sent by peer a, where it is attempt 1 of job {guest.guest.job_id}, under a lease for 1" in sent
        assert "may not be sent on" in sent
        assert (await user("logs", "far", "--tail", "1")).out == "two\n"
        assert "at peer b: " in await user.right("explain", "far")
        job = (await user("get", "far", "--json")).json
        assert job["executing_centre"] == "b"
        assert job["attempts"][0]["lease_expire_time"]

        there.node.artifacts[guest.id, 1] = archive_of({"model.bin": b"x"})
        await there.node.exit(guest.id, 3)
        ended = await attached
        assert (ended.code, ended.out) == (3, "one\ntwo\n"), ended.err
        told = ended.err
        for word in ("forwarding", "peer b offers to begin in", f"peer b has it, as job {guest.id}", "[b] ", "coming"):
            assert word in told, told
        assert (await user("wait", "far")).code == 3
        assert (await user("logs", "far")).out == "one\ntwo\n"
        pulled = await user("pull", "far", "-o", str(tmp_path / "pulled"))
        assert pulled.code == 0, pulled.err
        assert (tmp_path / "pulled" / "model.bin").read_bytes() == b"x"
        shown = await user.right("get", "far")
        assert "under a lease" not in shown
        assert "exit code 3" in shown


async def test_a_session_at_a_peer_is_used_as_any(tmp_path: Path) -> None:
    async with full(tmp_path) as (here, there):
        user = Shell(here, tmp_path / "user")
        started = await user("session", "start", "--name", "desk")
        assert started.code == 0, started.err
        assert "peer b" in started.err
        guest = await there.guest("desk")
        assert "PEER" in await user.right("session", "ls")

        run = asyncio.create_task(user.bytes_of("exec", "-i", "desk", "--", "python3", "-c", "x"))
        await eventually(lambda: bool(there.node.commands))
        command = there.node.commands[0]
        await command.write(ANY_BYTES)
        await command.end(7)
        assert await run == (7, ANY_BYTES)
        assert "exit code 7" in await user.right("runs", "desk")

        assert "has no share now" in await user.right("suspend", "desk")
        await there.until(guest.id, job_pb2.JOB_STATE_IDLE)
        await user.right("resume", "desk")
        await there.until(guest.id, job_pb2.JOB_STATE_RUNNING)

        assert "is stopped" in await user.right("session", "stop", "desk")
        assert (await there.job(guest.id)).state == job_pb2.JOB_STATE_CANCELLED
        assert there.node.empty
        assert "exit code 7" in await user.right("runs", "desk"), "also when the peer is asked no longer"


async def test_a_job_at_a_peer_is_cancelled_as_any(tmp_path: Path, code: Path) -> None:
    async with full(tmp_path) as (here, there):
        user = Shell(here, tmp_path / "user")
        sent = await user("run", "-d", "--name", "far", str(code / "train.py"))
        assert sent.code == 0, sent.err
        guest = await there.guest("far")
        await here.until(guest.guest.job_id, job_pb2.JOB_STATE_RUNNING)
        await user.right("cancel", "far", "-m", "not needed")
        assert (await user("wait", guest.guest.job_id)).code == 143
        gone = await there.ended(guest.id)
        assert "not needed" in gone.message
        assert there.node.empty
        assert "cancelled" in await user.right("get", guest.guest.job_id)


async def test_who_asks_beforehand_is_told_what_peers_have_free(tmp_path: Path, code: Path) -> None:
    async with full(tmp_path) as (here, there):
        user = Shell(here, tmp_path / "home")
        await eventually(lambda: bool(here.centre._federation.peers.all()[0].profiles))
        said = await user.right("predict", "--profile", "7g.80gb", str(code / "train.py"))
        free = "as far as is known, peer b has 7g.80gb (emulated) for it now: 1 free"
        assert f"7g.80gb is not free now; the job would wait; {free}" in said
        assert not (await user("predict", "--json", "--profile", "7g.80gb", str(code / "train.py"))).json["fits_now"]
        assert "peer" not in await user.right("predict", "--here-only", str(code / "train.py"))
        assert there.node.has.slices == []
