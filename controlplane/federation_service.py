"""FederationService: what peers ask of a centre. In the contract, not served yet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from puhui.rpc.errors import unimplemented
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.federation_service_pb2_grpc import FederationServiceServicer

__all__ = ["FederationService"]

_Context = grpc.aio.ServicerContext[Any, Any]


class FederationService(FederationServiceServicer):
    """Refuses every call of a peer, with the reason."""

    async def GetOffer(self, request: wire.GetOfferRequest, context: _Context) -> wire.GetOfferResponse:  # noqa: N802 - named by the contract
        """Not served yet."""
        raise unimplemented("GetOffer")

    async def ForwardJob(  # noqa: N802
        self, request_iterator: AsyncIterator[wire.ForwardJobRequest], context: _Context
    ) -> wire.ForwardJobResponse:
        """Not served yet."""
        raise unimplemented("ForwardJob")

    def WatchForwardedJob(  # noqa: N802
        self, request: wire.WatchForwardedJobRequest, context: _Context
    ) -> AsyncIterator[wire.WatchForwardedJobResponse]:
        """Not served yet."""
        raise unimplemented("WatchForwardedJob")

    async def RenewLease(self, request: wire.RenewLeaseRequest, context: _Context) -> wire.RenewLeaseResponse:  # noqa: N802
        """Not served yet."""
        raise unimplemented("RenewLease")

    async def CancelForwardedJob(  # noqa: N802
        self, request: wire.CancelForwardedJobRequest, context: _Context
    ) -> wire.CancelForwardedJobResponse:
        """Not served yet."""
        raise unimplemented("CancelForwardedJob")

    def ReadForwardedLogs(  # noqa: N802
        self, request: wire.ReadForwardedLogsRequest, context: _Context
    ) -> AsyncIterator[wire.ReadForwardedLogsResponse]:
        """Not served yet."""
        raise unimplemented("ReadForwardedLogs")

    def GetForwardedArtifacts(  # noqa: N802
        self, request: wire.GetForwardedArtifactsRequest, context: _Context
    ) -> AsyncIterator[wire.GetForwardedArtifactsResponse]:
        """Not served yet."""
        raise unimplemented("GetForwardedArtifacts")

    def CallForwardedJob(  # noqa: N802
        self, request_iterator: AsyncIterator[wire.CallForwardedJobRequest], context: _Context
    ) -> AsyncIterator[wire.CallForwardedJobResponse]:
        """Not served yet."""
        raise unimplemented("CallForwardedJob")

    async def Pair(self, request: wire.PairRequest, context: _Context) -> wire.PairResponse:  # noqa: N802
        """Not served yet."""
        raise unimplemented("Pair")

    async def Unpair(self, request: wire.UnpairRequest, context: _Context) -> wire.UnpairResponse:  # noqa: N802
        """Not served yet."""
        raise unimplemented("Unpair")

    def ExchangeCapacity(  # noqa: N802
        self, request_iterator: AsyncIterator[wire.ExchangeCapacityRequest], context: _Context
    ) -> AsyncIterator[wire.ExchangeCapacityResponse]:
        """Not served yet."""
        raise unimplemented("ExchangeCapacity")
