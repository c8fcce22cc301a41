"""FleetService: what nodes and operators ask of a centre."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc

from controlplane.capacity import gpu_capacity, profile_capacity
from controlplane.nodes import Nodes
from controlplane.pages import Page, Pages, page_size
from controlplane.scheduler import Scheduler
from controlplane.store import Store
from controlplane.usage import added_up, interval_of
from puhui.rpc.address import require_private_address
from puhui.rpc.errors import Refusal, unimplemented
from puhui.rpc.moment import duration, now, timestamp
from puhui.v1 import fleet_service_pb2 as wire
from puhui.v1.fleet_service_pb2_grpc import FleetServiceServicer

__all__ = ["FleetService"]

_Context = grpc.aio.ServicerContext[Any, Any]


class FleetService(FleetServiceServicer):
    """Serves FleetService for one centre."""

    def __init__(self, centre: str, store: Store, nodes: Nodes, scheduler: Scheduler, pages: Pages) -> None:
        self._centre = centre
        self._store = store
        self._nodes = nodes
        self._scheduler = scheduler
        self._pages = pages

    async def RegisterNode(self, request: wire.RegisterNodeRequest, context: _Context) -> wire.RegisterNodeResponse:  # noqa: N802 - named by the contract
        """A daemon joins."""
        if request.certificate_request_pem:
            raise Refusal(
                grpc.StatusCode.UNIMPLEMENTED,
                "CERTIFICATES_NOT_IMPLEMENTED",
                "node certificates are part of the contract, but this version does not serve them yet; leave "
                "certificate_request_pem out: nodes are reached over loopback or a private address only",
            )
        try:
            require_private_address(request.address)
        except ValueError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "NODE_INVALID", str(error)) from error
        node_id, lease = await self._nodes.register(request.join_token, request.address, request.inventory)
        return wire.RegisterNodeResponse(
            node_id=node_id,
            centre=self._centre,
            lease=duration(lease.length_s),
            heartbeat_interval=duration(lease.heartbeat_interval_s),
        )

    async def Heartbeat(self, request: wire.HeartbeatRequest, context: _Context) -> wire.HeartbeatResponse:  # noqa: N802
        """A daemon is alive."""
        inventory = request.inventory if request.HasField("inventory") else None
        lease, send = await self._nodes.heartbeat(request.node_id, request.inventory_revision, inventory)
        return wire.HeartbeatResponse(
            lease=duration(lease.length_s),
            heartbeat_interval=duration(lease.heartbeat_interval_s),
            send_inventory=send,
        )

    async def ListNodes(self, request: wire.ListNodesRequest, context: _Context) -> wire.ListNodesResponse:  # noqa: N802
        """Returns a page of nodes."""
        after = self._pages.after(b"nodes", request.page_token) if request.page_token else ""
        room = Page(page_size(request.page_size))
        rest = [node for node in self._nodes.all() if node.inventory.name > after]
        page = list(itertools.takewhile(room.takes, rest))
        return wire.ListNodesResponse(
            nodes=page,
            next_page_token=self._pages.token(b"nodes", page[-1].inventory.name) if len(rest) > len(page) else "",
        )

    async def GetCapacity(self, request: wire.GetCapacityRequest, context: _Context) -> wire.GetCapacityResponse:  # noqa: N802
        """Returns the capacity of the centre now."""
        gpus = self._nodes.gpus()
        return wire.GetCapacityResponse(
            centre=self._centre,
            profiles=profile_capacity(gpus),
            gpus=gpu_capacity(gpus),
            queued_jobs=self._scheduler.queued,
            time=timestamp(now()),
        )

    async def DrainNode(self, request: wire.DrainNodeRequest, context: _Context) -> wire.DrainNodeResponse:  # noqa: N802
        """Not served yet."""
        raise unimplemented("DrainNode")

    async def UndrainNode(self, request: wire.UndrainNodeRequest, context: _Context) -> wire.UndrainNodeResponse:  # noqa: N802
        """Not served yet."""
        raise unimplemented("UndrainNode")

    def WatchFleet(  # noqa: N802
        self, request: wire.WatchFleetRequest, context: _Context
    ) -> AsyncIterator[wire.WatchFleetResponse]:
        """Not served yet."""
        raise unimplemented("WatchFleet")

    async def GetUsage(self, request: wire.GetUsageRequest, context: _Context) -> wire.GetUsageResponse:  # noqa: N802
        """Returns what tenants, jobs or runs have used."""
        now_s = now()
        interval = interval_of(request, now_s)
        stretches = await self._store.usage(interval.start, interval.end, request.tenant, request.job_id)
        at_peers = await self._store.attempts_at_peers(interval.start, interval.end)
        return added_up(stretches, interval, request.group_by, request.point_count, now_s, at_peers)
