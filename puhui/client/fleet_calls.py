"""What is asked about the nodes of a centre: FleetService."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from puhui.client.connection import CALL_S, Connection
from puhui.client.patience import Patience, Trouble
from puhui.rpc.moment import timestamp
from puhui.v1 import fleet_service_pb2
from puhui.v1.fleet_service_pb2_grpc import FleetServiceStub

__all__ = ["FleetCalls"]


class FleetCalls(Connection):
    """The calls of FleetService. `Centre` has them."""

    def __init__(
        self, address: str, patience: Patience | None = None, on_trouble: Callable[[Trouble], None] | None = None
    ) -> None:
        super().__init__(address, patience, on_trouble)
        self._fleet = FleetServiceStub(self._channel)

    def nodes(self, page_size: int = 100) -> Iterator[fleet_service_pb2.Node]:
        """Yields the nodes of the centre, by name.

        Raises:
            Refusal: the centre cannot be reached.
        """
        request = fleet_service_pb2.ListNodesRequest(page_size=page_size)
        while True:
            page = self._contact.call(lambda: self._fleet.ListNodes(request, timeout=CALL_S))
            yield from page.nodes
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def capacity(self) -> fleet_service_pb2.GetCapacityResponse:
        """Returns the capacity of the centre now.

        Raises:
            Refusal: the centre cannot be reached.
        """
        request = fleet_service_pb2.GetCapacityRequest()
        return self._contact.call(lambda: self._fleet.GetCapacity(request, timeout=CALL_S))

    def usage(
        self,
        start: float,
        end: float,
        *,
        group_by: fleet_service_pb2.UsageGroup.ValueType = fleet_service_pb2.USAGE_GROUP_TENANT,
        tenant: str = "",
        job_id: str = "",
        point_count: int = 0,
    ) -> fleet_service_pb2.GetUsageResponse:
        """Returns what tenants, jobs or runs have used.

        Args:
            start: the time that is told of, from, in seconds since the epoch.
            end: to.
            group_by: what a row is about.
            tenant: only this tenant; "" is all of them.
            job_id: only this job; "" is all of them.
            point_count: number of equal times to tell of.

        Raises:
            Refusal: the centre refuses it, or cannot be reached.
        """
        request = fleet_service_pb2.GetUsageRequest(
            start_time=timestamp(start),
            end_time=timestamp(end),
            group_by=group_by,
            tenant=tenant,
            job_id=job_id,
            point_count=point_count,
        )
        return self._contact.call(lambda: self._fleet.GetUsage(request, timeout=CALL_S))
