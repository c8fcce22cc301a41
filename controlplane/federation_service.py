"""FederationService: what peers ask of a centre. Each call is let in by the caller's certificate, and counted."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol, TypeVar

import grpc

from controlplane.hosting import Hosting
from controlplane.pairing import Pairing
from controlplane.peer_identity import caller, certificate_of, unknown_peer
from controlplane.peer_limits import PeerLimits
from controlplane.peers import Peer, Peers
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.federation_service_pb2_grpc import FederationServiceServicer

__all__ = ["Carrier", "FederationService", "Offers"]

_Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")
_LEAST_BYTES = 1024


class Offers(Protocol):
    """Who gives offers; `OfferDesk` is one."""

    def give(self, request: wire.GetOfferRequest, peer: Peer) -> wire.GetOfferResponse:
        """Returns an offer, or why there is none."""


class Carrier(Protocol):
    """Who carries calls to jobs of peers; `CallCarrier` is one."""

    def serve(
        self, peer: str, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncGenerator[wire.CallForwardedJobResponse, None]:
        """Carries one call."""


class FederationService(FederationServiceServicer):
    """Serves FederationService for one centre.

    Args:
        peers: who may call.
        limits: how often.
        pairing: who becomes a peer.
        offers: says what this centre would do.
        hosting: what peers have run here.
        carrier: carries calls to it.
    """

    def __init__(
        self,
        peers: Peers,
        limits: PeerLimits,
        pairing: Pairing,
        offers: Offers,
        hosting: Hosting,
        carrier: Carrier,
    ) -> None:
        self._peers = peers
        self._limits = limits
        self._pairing = pairing
        self._offers = offers
        self._hosting = hosting
        self._carrier = carrier

    def _let_in(self, context: _Context) -> Peer:
        peer = caller(context, self._peers)
        self._limits.call(peer.record)
        return peer

    async def _stream(self, peer: Peer, responses: AsyncGenerator[_T, None]) -> AsyncIterator[_T]:
        with self._limits.stream(peer.record):
            async with contextlib.aclosing(responses):
                async for response in responses:
                    self._require_still(peer)
                    yield response

    def _require_still(self, peer: Peer) -> None:
        """Refuses a peer with which work was ended meanwhile, also when it was paired anew since."""
        now = self._peers.by_certificate(peer.record.certificate)
        if now is None or (now.record.name, now.record.create_time) != (peer.record.name, peer.record.create_time):
            raise unknown_peer()

    async def GetOffer(self, request: wire.GetOfferRequest, context: _Context) -> wire.GetOfferResponse:  # noqa: N802 - named by the contract
        """Says what this centre would do."""
        return self._offers.give(request, self._let_in(context))

    async def ForwardJob(  # noqa: N802
        self, request_iterator: AsyncIterator[wire.ForwardJobRequest], context: _Context
    ) -> wire.ForwardJobResponse:
        """Binds an attempt."""
        peer = self._let_in(context)
        with self._limits.stream(peer.record):
            return await self._hosting.bind(
                peer,
                request_iterator,
                lambda count: self._limits.bytes(peer.record, count),
                lambda: self._require_still(peer),
            )

    async def WatchForwardedJob(  # noqa: N802
        self, request: wire.WatchForwardedJobRequest, context: _Context
    ) -> AsyncIterator[wire.WatchForwardedJobResponse]:
        """Tells what happens to an attempt."""
        peer = self._let_in(context)
        async for response in self._stream(peer, self._hosting.watch(peer, request)):
            yield response

    async def RenewLease(self, request: wire.RenewLeaseRequest, context: _Context) -> wire.RenewLeaseResponse:  # noqa: N802
        """Prolongs a lease."""
        return await self._hosting.renew(self._let_in(context), request)

    async def CancelForwardedJob(  # noqa: N802
        self, request: wire.CancelForwardedJobRequest, context: _Context
    ) -> wire.CancelForwardedJobResponse:
        """Ends an attempt."""
        peer = self._let_in(context)
        with self._limits.stream(peer.record):
            return await self._hosting.cancel(peer, request)

    async def ReadForwardedLogs(  # noqa: N802
        self, request: wire.ReadForwardedLogsRequest, context: _Context
    ) -> AsyncIterator[wire.ReadForwardedLogsResponse]:
        """Yields output of an attempt."""
        peer = self._let_in(context)
        async for response in self._stream(peer, self._hosting.read_logs(peer, request)):
            yield response

    async def GetForwardedArtifacts(  # noqa: N802
        self, request: wire.GetForwardedArtifactsRequest, context: _Context
    ) -> AsyncIterator[wire.GetForwardedArtifactsResponse]:
        """Yields artifacts of an attempt."""
        peer = self._let_in(context)
        async for response in self._stream(peer, self._hosting.artifacts(peer, request)):
            yield response

    async def CallForwardedJob(  # noqa: N802
        self, request_iterator: AsyncIterator[wire.CallForwardedJobRequest], context: _Context
    ) -> AsyncIterator[wire.CallForwardedJobResponse]:
        """Carries a call to an attempt's job."""
        peer = self._let_in(context)
        requests = self._counted(peer, request_iterator)
        async for response in self._stream(peer, self._carrier.serve(peer.record.name, requests)):
            yield response

    async def _counted(
        self, peer: Peer, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncIterator[wire.CallForwardedJobRequest]:
        async for request in requests:
            # Nothing costs something, too.
            self._limits.bytes(peer.record, max(_LEAST_BYTES, request.ByteSize()))
            yield request

    async def ExchangeCapacity(  # noqa: N802
        self, request_iterator: AsyncIterator[wire.ExchangeCapacityRequest], context: _Context
    ) -> AsyncIterator[wire.ExchangeCapacityResponse]:
        """Tells capacity, and hears of it."""
        peer = self._let_in(context)
        async for response in self._stream(peer, self._peers.exchange(peer, request_iterator)):
            yield response

    async def Pair(self, request: wire.PairRequest, context: _Context) -> wire.PairResponse:  # noqa: N802
        """Makes the caller a peer."""
        known = self._peers.by_certificate(certificate_of(context))
        if known is not None:
            self._limits.call(known.record)
        return await self._pairing.pair(request, context)

    async def Unpair(self, request: wire.UnpairRequest, context: _Context) -> wire.UnpairResponse:  # noqa: N802
        """The caller is a peer no longer."""
        await self._pairing.unpair(self._let_in(context))
        return wire.UnpairResponse()
