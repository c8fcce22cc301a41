"""Runs at a peer over real mutual TLS, whose connection is reset in the middle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2
from puhui.v1 import job_service_pb2 as wire
from tests.integration.cli.program import Puhui
from tests.integration.federation.cut_relay import CutRelay, free_port, relayed
from tests.integration.federation.neighbourhood import Neighbour, neighbour, pair
from tests.unit.controlplane.centres import eventually

BEFORE, MEANWHILE, AFTER = b"before\xff\n" * 2000, b"meanwhile\x00" * 2000, b"and after"


@contextlib.asynccontextmanager
async def session_at_peer(folder: Path) -> AsyncIterator[tuple[Neighbour, Neighbour, CutRelay, str]]:
    """A session of one centre at another, which is reached over a relay."""
    port = free_port()
    async with (
        relayed(port) as relay,
        neighbour("a", folder) as here,
        neighbour("b", folder, federation_listen=f"127.0.0.1:{port}", federation_address=relay.address) as there,
    ):
        await pair(there, here)
        await here.fill()
        job_id = await here.submit(name="desk", kind=job_pb2.JOB_KIND_SESSION)
        await here.until(job_id, job_pb2.JOB_STATE_RUNNING)
        yield here, there, relay, job_id


async def out_of_contact(here: Neighbour) -> None:
    (peer,) = here.centre._federation.peers.all()
    await eventually(lambda: not peer.in_contact)


async def to_its_end(call: Any) -> None:
    while True:
        await call.read()


async def test_a_command_goes_on_over_a_connection_that_was_reset(tmp_path: Path) -> None:
    async with session_at_peer(tmp_path) as (here, there, relay, _):
        puhui = Puhui.at(tmp_path / "user", here.centre.address)
        process = puhui.start("exec", "desk", "--", "train")
        await eventually(lambda: bool(there.node.commands))
        command = there.node.commands[0]
        await command.write(BEFORE)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.read, len(BEFORE)) == BEFORE
        relay.cut()
        await out_of_contact(here)
        await command.write(MEANWHILE)
        relay.mend()
        await command.write(AFTER)
        await command.end(5)
        out, err = await asyncio.to_thread(process.communicate, timeout=60)
        assert (process.returncode, out) == (5, MEANWHILE + AFTER), err.decode()
        assert "the connection to peer b broke" in err.decode()
        assert len(there.node.commands) == 1, "it was run once"
        told = (await asyncio.to_thread(puhui, "runs", "desk")).out
        assert "exit code 5" in told


async def test_a_command_that_nobody_can_come_back_to_is_hung_up(tmp_path: Path) -> None:
    async with session_at_peer(tmp_path) as (here, there, relay, job_id):
        run_job: Any = here.jobs.RunJob
        call = run_job(timeout=60)
        await call.write(wire.RunJobRequest(start=wire.RunStart(job_id=job_id, command=["train"])))
        await eventually(lambda: bool(there.node.commands))
        command = there.node.commands[0]
        await command.write(BEFORE)
        while not (await call.read()).HasField("output"):
            pass
        relay.cut()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await to_its_end(call)
        refusal = Refusal.of(error.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "RUN_HUNG_UP"), refusal
        guest = await there.guest("desk")
        told = await there.until_told(guest.id, "RUN_ENDED")
        assert told.message == "its caller went away, and it was hung up"
        assert not any(one.stdin_closed for one in command.input), "half of its input is not all of it"
        relay.mend()
        (peer,) = here.centre._federation.peers.all()
        await peer.contact()
        listed = await here.jobs.ListRuns(wire.ListRunsRequest(job_id=job_id), timeout=30)
        assert [run.message for run in listed.runs] == ["its caller went away, and it was hung up"]
