"""The daemon joins, stays in touch, and joins again when it is forgotten."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc

from nodedaemon.driver import Driver
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.inventory import Inventory, Revision
from nodedaemon.journal import Journal
from nodedaemon.process_runtime import ProcessRuntime
from nodedaemon.process_user import ProcessUser
from nodedaemon.registration import Registration
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration
from puhui.rpc.server import RpcServer
from puhui.v1.fleet_service_pb2 import (
    HeartbeatRequest,
    HeartbeatResponse,
    RegisterNodeRequest,
    RegisterNodeResponse,
)
from puhui.v1.fleet_service_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server


class Fleet(FleetServiceServicer):
    """A control plane that notes who calls, and forgets or fails when told."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[RegisterNodeRequest | HeartbeatRequest] = asyncio.Queue()
        self.refusals: list[Refusal] = []
        self.send_inventory = False

    async def RegisterNode(self, request: RegisterNodeRequest, context: Any) -> RegisterNodeResponse:  # noqa: N802
        self.calls.put_nowait(request)
        if self.refusals:
            raise self.refusals.pop()
        return RegisterNodeResponse(node_id="n-1", centre="c", heartbeat_interval=duration(0.1))

    async def Heartbeat(self, request: HeartbeatRequest, context: Any) -> HeartbeatResponse:  # noqa: N802
        self.calls.put_nowait(request)
        if self.refusals:
            raise self.refusals.pop()
        return HeartbeatResponse(heartbeat_interval=duration(0.1), send_inventory=self.send_inventory)

    async def heartbeat(self) -> HeartbeatRequest:
        call = await self.calls.get()
        assert isinstance(call, HeartbeatRequest)
        return call

    async def join(self) -> RegisterNodeRequest:
        while not isinstance(call := await self.calls.get(), RegisterNodeRequest):
            pass
        return call


async def test_a_node_joins_and_stays_in_touch(tmp_path: Path) -> None:
    with installed(EmulatedDriver(tmp_path / "emulation", parse_cards("A30-24GB:2"))):
        journal = Journal(tmp_path / "node.db")
        gpus = Gpus(Driver(), emulated=True)
        revision = Revision()
        slices = Slices(gpus, journal, EventLog(journal), changed=revision.grow)
        runtime = ProcessRuntime(tmp_path / "processes", ProcessUser("me", os.geteuid(), os.getegid()), "")
        inventory = Inventory("node-1", "n-abc", gpus, slices, runtime, revision)
        fleet = Fleet()  # type: ignore[abstract]
        server = RpcServer("127.0.0.1:0")
        server.add("puhui.v1.FleetService", add_FleetServiceServicer_to_server, fleet)
        port = await server.start()
        token = tmp_path / "token"
        token.write_text("secret\n")
        fleet.refusals = [Refusal(grpc.StatusCode.UNAVAILABLE, "NOT_LEADER", "ask again")]
        registration = Registration(f"127.0.0.1:{port}", token, "127.0.0.1:7071", inventory)
        running = asyncio.create_task(registration.run())
        try:
            for _ in range(2):  # the first is refused, and tried again
                joined = await fleet.join()
                assert (joined.join_token, joined.address) == ("secret", "127.0.0.1:7071")
                assert (joined.inventory.name, joined.inventory.daemon_id) == ("node-1", "n-abc")
                assert [gpu.emulated for gpu in joined.inventory.gpus] == [True, True]
            beat = await fleet.heartbeat()
            assert (beat.node_id, beat.HasField("inventory")) == ("n-1", False)
            # A change is told at once, with the inventory.
            revision.grow()
            while not (beat := await fleet.heartbeat()).HasField("inventory"):
                pass
            assert beat.inventory_revision == beat.inventory.revision == revision.number
            # A control plane that wants it gets it.
            fleet.send_inventory = True
            while not (beat := await fleet.heartbeat()).HasField("inventory"):
                pass
            # One that has forgotten the node is joined again, and so is one that is in trouble.
            for code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL):
                fleet.refusals = [Refusal(code, "NODE_NOT_FOUND", "who?")]
                await fleet.join()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await server.stop(0)
            await runtime.close()
            journal.close()
