"""What a control plane asks of a peer: the seam, and the real thing over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from puhui.rpc.errors import Refusal
from puhui.rpc.transfer import read_chunks
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import stream_pb2
from puhui.v1.federation_service_pb2_grpc import FederationServiceStub

__all__ = ["GrpcPeerClient", "PeerClient", "is_away"]

_OFFER_S = 5.0
_ASK_S = 10.0
_CANCEL_S = 60.0
_UPLOAD_S = 600.0


_AWAY = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}
)
_BUSY = frozenset({"PEER_RATE", "PEER_STREAMS", "PEER_BYTES"})


def is_away(refusal: Refusal) -> bool:
    """Returns whether the peer gave no answer to what it was asked, or asks for patience: it may be asked again.

    One that knows us no longer gives no answers either, and may know us again. INTERNAL without a reason of ours is
    gRPC's own word for a connection that broke under a message.
    """
    broke = refusal.code == grpc.StatusCode.INTERNAL and refusal.reason == "UNKNOWN"
    unknown = refusal.code == grpc.StatusCode.UNAUTHENTICATED
    return refusal.code in _AWAY or broke or unknown or refusal.reason in _BUSY


class PeerClient(Protocol):
    """A peer. Every method raises a Refusal, UNAVAILABLE when the peer cannot be reached."""

    async def get_offer(self, request: wire.GetOfferRequest) -> wire.GetOfferResponse:
        """Asks what it would do."""

    async def forward(self, header: wire.ForwardHeader, archive: Path | None) -> wire.ForwardJobResponse:
        """Has it bind an attempt.

        Args:
            header: what is forwarded.
            archive: the bundle; None when there is none, or the peer has it.
        """

    def watch(self, request: wire.WatchForwardedJobRequest) -> AsyncGenerator[wire.WatchForwardedJobResponse, None]:
        """Yields events of a forwarded attempt until it has ended."""

    async def renew(self, request: wire.RenewLeaseRequest) -> wire.RenewLeaseResponse:
        """Prolongs a lease."""

    async def cancel(self, request: wire.CancelForwardedJobRequest) -> wire.CancelForwardedJobResponse:
        """Has an attempt ended; answers when it has."""

    def read_logs(self, request: wire.ReadForwardedLogsRequest) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        """Yields output of a forwarded attempt."""

    def read_artifacts(
        self, request: wire.GetForwardedArtifactsRequest
    ) -> AsyncGenerator[wire.GetForwardedArtifactsResponse, None]:
        """Yields artifacts of a forwarded attempt."""

    def call(
        self, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncGenerator[wire.CallForwardedJobResponse, None]:
        """Carries a call of JobService to a forwarded job."""

    def exchange(
        self, summaries: AsyncIterator[wire.ExchangeCapacityRequest]
    ) -> AsyncGenerator[wire.ExchangeCapacityResponse, None]:
        """Tells it this centre's capacity, and yields its own."""

    async def ping(self) -> None:
        """Asks for nothing, to see how long that takes."""

    async def pair(self, request: wire.PairRequest) -> wire.PairResponse:
        """Becomes its peer."""

    async def unpair(self) -> None:
        """Is its peer no longer."""

    async def close(self) -> None:
        """Closes the connection."""


class GrpcPeerClient:
    """A peer at the other end of a channel, which it then owns."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub = FederationServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._closed = False

    async def close(self) -> None:
        """Closes the connection."""
        self._closed = True
        await self._channel.close(None)

    async def _stream(self, call: grpc.aio.Call) -> AsyncGenerator[Any, None]:
        with self._refusals():
            try:
                async for response in call:  # type: ignore[attr-defined]
                    yield response
            finally:
                # Whoever stops reading must not leave the peer writing.
                call.cancel()

    async def _both_ways(
        self, call: grpc.aio.StreamStreamCall[Any, Any], requests: AsyncIterator[Any]
    ) -> AsyncGenerator[Any, None]:
        """Sends requests and yields responses. gRPC itself would read on in `requests` when the call has ended."""
        sending = asyncio.create_task(_sent(call, requests))
        try:
            async with contextlib.aclosing(self._stream(call)) as responses:
                async for response in responses:
                    yield response
        except Refusal:
            if sending.done() and not sending.cancelled() and (fault := sending.exception()) is not None:
                raise fault from None  # which has ended the call
            raise
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise Refusal.of(error) from error
        except grpc.aio.UsageError as error:
            raise _closed() from error
        except asyncio.CancelledError as error:
            # Closing a channel cancels its calls, and so does a request that cannot be read on: neither is to cancel
            # who made them.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _closed() from error

    async def get_offer(self, request: wire.GetOfferRequest) -> wire.GetOfferResponse:
        """Asks what it would do."""
        with self._refusals():
            return await self._stub.GetOffer(request, timeout=_OFFER_S)

    async def forward(self, header: wire.ForwardHeader, archive: Path | None) -> wire.ForwardJobResponse:
        """Has it bind an attempt."""
        with self._refusals():
            return await self._stub.ForwardJob(_parts(header, archive), timeout=_UPLOAD_S)

    async def watch(
        self, request: wire.WatchForwardedJobRequest
    ) -> AsyncGenerator[wire.WatchForwardedJobResponse, None]:
        """Yields events of a forwarded attempt until it has ended."""
        async with contextlib.aclosing(self._stream(self._stub.WatchForwardedJob(request))) as responses:
            async for response in responses:
                yield response

    async def renew(self, request: wire.RenewLeaseRequest) -> wire.RenewLeaseResponse:
        """Prolongs a lease."""
        with self._refusals():
            return await self._stub.RenewLease(request, timeout=_ASK_S)

    async def cancel(self, request: wire.CancelForwardedJobRequest) -> wire.CancelForwardedJobResponse:
        """Has an attempt ended; answers when it has."""
        with self._refusals():
            return await self._stub.CancelForwardedJob(request, timeout=_CANCEL_S)

    async def read_logs(self, request: wire.ReadForwardedLogsRequest) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        """Yields output of a forwarded attempt."""
        async with contextlib.aclosing(self._stream(self._stub.ReadForwardedLogs(request))) as responses:
            async for response in responses:
                yield response.chunk

    async def read_artifacts(
        self, request: wire.GetForwardedArtifactsRequest
    ) -> AsyncGenerator[wire.GetForwardedArtifactsResponse, None]:
        """Yields artifacts of a forwarded attempt."""
        async with contextlib.aclosing(self._stream(self._stub.GetForwardedArtifacts(request))) as responses:
            async for response in responses:
                yield response

    async def call(
        self, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncGenerator[wire.CallForwardedJobResponse, None]:
        """Carries a call of JobService to a forwarded job."""
        start: Any = self._stub.CallForwardedJob
        async with contextlib.aclosing(self._both_ways(start(), requests)) as responses:
            async for response in responses:
                yield response

    async def exchange(
        self, summaries: AsyncIterator[wire.ExchangeCapacityRequest]
    ) -> AsyncGenerator[wire.ExchangeCapacityResponse, None]:
        """Tells it this centre's capacity, and yields its own."""
        start: Any = self._stub.ExchangeCapacity
        async with contextlib.aclosing(self._both_ways(start(), summaries)) as responses:
            async for response in responses:
                yield response

    async def ping(self) -> None:
        """Asks for nothing, to see how long that takes."""
        with self._refusals():
            await self._health.Check(health_pb2.HealthCheckRequest(), timeout=_ASK_S)

    async def pair(self, request: wire.PairRequest) -> wire.PairResponse:
        """Becomes its peer."""
        with self._refusals():
            return await self._stub.Pair(request, timeout=_ASK_S)

    async def unpair(self) -> None:
        """Is its peer no longer."""
        with self._refusals():
            await self._stub.Unpair(wire.UnpairRequest(), timeout=_ASK_S)


async def _sent(call: grpc.aio.StreamStreamCall[Any, Any], requests: AsyncIterator[Any]) -> None:
    """Sends requests until there are no more, or the call has ended; whoever reads is told how."""
    try:
        async for request in requests:
            await call.write(request)
        await call.done_writing()
    except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
        return
    except BaseException:
        call.cancel()
        raise
    finally:
        close = getattr(requests, "aclose", None)
        if close is not None:
            await close()


async def _parts(header: wire.ForwardHeader, archive: Path | None) -> AsyncIterator[wire.ForwardJobRequest]:
    yield wire.ForwardJobRequest(header=header)
    if archive is not None:
        for chunk in read_chunks(archive):
            yield wire.ForwardJobRequest(chunk=chunk)


def _closed() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "CLOSED", "the call to the peer was ended at this side")
