"""Joins the centre and stays in touch with its control plane."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog

from nodedaemon.inventory import Inventory
from puhui.rpc.channel import open_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import seconds
from puhui.v1.fleet_service_pb2 import HeartbeatRequest, RegisterNodeRequest
from puhui.v1.fleet_service_pb2_grpc import FleetServiceStub

if TYPE_CHECKING:
    from puhui.v1.fleet_service_pb2_grpc import FleetServiceAsyncStub

__all__ = ["Registration", "backoff_s"]

_log = structlog.get_logger(__name__)

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 15.0
_CALL_S = 10.0
_SETTLE_S = 0.05


def backoff_s(failures: int, jitter: float) -> float:
    """Returns how long to wait before the next try, in seconds.

    Args:
        failures: tries that have failed one after the other, from 1.
        jitter: 0 to 1; spreads nodes that all lost the same control plane.
    """
    longest = min(_FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16), _LONGEST_PAUSE_S)
    return longest * (0.5 + jitter / 2)


class Registration:
    """Keeps this node registered: joins, sends heartbeats, and joins again when it is no longer known.

    Args:
        control_plane: "host:port" of the control plane.
        join_token: file with the token that lets this node in; read for every try, so it may come later.
        address: "host:port" at which the control plane reaches this daemon.
        inventory: what this node has.
    """

    def __init__(self, control_plane: str, join_token: Path | None, address: str, inventory: Inventory) -> None:
        self._control_plane = control_plane
        self._join_token = join_token
        self._address = address
        self._inventory = inventory

    async def run(self) -> None:
        """Stays registered until cancelled."""
        failures = 0
        async with open_channel(self._control_plane) as channel:
            fleet = FleetServiceStub(channel)
            while True:
                try:
                    node_id, pause_s = await self._join(fleet)
                    failures = 0
                    await self._stay(fleet, node_id, pause_s)
                except (grpc.aio.AioRpcError, Refusal, OSError) as error:
                    failures += 1
                    refusal = Refusal.of(error) if isinstance(error, grpc.RpcError) else error
                    again_in_s = backoff_s(failures, random.random())  # noqa: S311 - not a secret
                    _log.warning(
                        "not in touch with the control plane",
                        control_plane=self._control_plane,
                        error=str(refusal),
                        reason=getattr(refusal, "reason", ""),
                        again_in_s=round(again_in_s, 2),
                    )
                    await asyncio.sleep(again_in_s)

    async def _join(self, fleet: FleetServiceAsyncStub) -> tuple[str, float]:
        self._inventory.revision.changed.clear()
        token = self._join_token.read_text().strip() if self._join_token is not None else ""
        response = await fleet.RegisterNode(
            RegisterNodeRequest(
                join_token=token,
                address=self._address,
                inventory=await self._inventory.read(),
                request_id=new_id("join"),
            ),
            timeout=_CALL_S,
        )
        _log.info("joined the centre", centre=response.centre, node_id=response.node_id)
        return response.node_id, seconds(response.heartbeat_interval)

    async def _stay(self, fleet: FleetServiceAsyncStub, node_id: str, pause_s: float) -> None:
        """Sends heartbeats; returns when the control plane no longer knows this node.

        Raises:
            grpc.aio.AioRpcError: it cannot be reached.
        """
        send_inventory = False
        while True:
            if send_inventory:
                await asyncio.sleep(_SETTLE_S)
            else:
                send_inventory = await self._changed_within(pause_s)
            self._inventory.revision.changed.clear()
            request = HeartbeatRequest(node_id=node_id, inventory_revision=self._inventory.revision.number)
            if send_inventory:
                request.inventory.CopyFrom(await self._inventory.read())
                request.inventory_revision = request.inventory.revision
            try:
                response = await fleet.Heartbeat(request, timeout=_CALL_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    _log.info("the control plane does not know this node any more; joining again")
                    return
                raise
            pause_s = seconds(response.heartbeat_interval) or pause_s
            send_inventory = response.send_inventory

    async def _changed_within(self, pause_s: float) -> bool:
        """Waits for the next heartbeat's time, or less when something changes. Says whether it did."""
        try:
            async with asyncio.timeout(max(pause_s, _SETTLE_S) * random.uniform(0.9, 1.0)):  # noqa: S311
                await self._inventory.revision.changed.wait()
        except TimeoutError:
            return False
        # A slice that comes is often followed by one that goes.
        await asyncio.sleep(_SETTLE_S)
        return True
