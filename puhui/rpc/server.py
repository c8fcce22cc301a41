"""The server's end of a connection: health, reflection, refusals, and a shutdown that loses nothing."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from puhui.rpc.address import require_address, require_private_address
from puhui.rpc.channel import MAX_MESSAGE_BYTES
from puhui.rpc.errors import Refusal
from puhui.rpc.tls import MutualTls

__all__ = ["MOST_STREAMS_OF_A_CONNECTION", "RpcServer"]

MOST_STREAMS_OF_A_CONNECTION = 2048
"""Calls that a peer may have open over one connection. One more waits until another has ended."""

_log = structlog.get_logger(__name__)

# Full, over the user's quota, or over the limit for one file.
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Clients ping every 30 s on quiet streams; without these a server cuts them off.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two daemons on one port would share its calls at random; the second must fail instead.
    ("grpc.so_reuseport", 0),
]


def _to_strangers(tls: MutualTls) -> list[tuple[str, int]]:
    """Returns the options of a server that is called from other centres, by whoever finds the way."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A header is 1 MiB at most, and so is a chunk.
        ("grpc.max_receive_message_length", 2 * 2**20),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.max_concurrent_streams", MOST_STREAMS_OF_A_CONNECTION),
        # Those that have not shown a certificate yet are counted, too, and have 10 s for it.
        ("grpc.max_allowed_incoming_connections", tls.most_connections),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 600_000),
        # A peer that is gone without a word is noticed, whoever of the two speaks.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.so_reuseport", 0),
    ]


class RpcServer:
    """One gRPC server with health v1 and reflection for its services.

    Usage::

        server = RpcServer("127.0.0.1:7070")
        server.add("puhui.v1.JobService", add_JobServiceServicer_to_server, servicer)
        port = await server.start()
        ...
        await server.stop(grace_s=5)
    """

    def __init__(self, address: str, tls: MutualTls | None = None) -> None:
        """Makes a server.

        Args:
            address: "host:port" or "unix:/path"; on loopback, where plaintext is spoken.
            tls: who it is, and whom it lets in; None speaks plaintext.

        Raises:
            ValueError: it is no address, or none that may be spoken plaintext at.
        """
        if tls is None:
            require_private_address(address)
        else:
            require_address(address)
        self._address = address
        self._tls = tls
        options = _OPTIONS if tls is None else _to_strangers(tls)
        self._server = grpc.aio.server(interceptors=[_Refusals()], options=options)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._names: list[str] = []

    def add(self, name: str, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: object) -> None:
        """Adds a service by its full name, with the generated function that registers it."""
        add_to_server(servicer, self._server)
        self._names.append(name)

    async def start(self) -> int:
        """Binds and serves. Returns the port (0 for a unix socket).

        Raises:
            OSError: the address is taken or not ours.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        # What a server can do is told to whoever may see all of it.
        if self._tls is None:
            self._reflect()
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._tls.credentials())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: is another daemon running there?") from error
        await self._server.start()
        for name in ["", *self._names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return 0 if self._address.startswith("unix:") else port

    def _reflect(self) -> None:
        reflection.enable_server_reflection(
            [
                *self._names,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ],
            self._server,
        )

    async def stop(self, grace_s: float) -> None:
        """Tells health watchers, takes no more calls, and gives running ones `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class _Refusals(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns a Refusal into a google.rpc.Status, and anything unforeseen into INTERNAL with a log entry."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/puhui."):
            return handler
        method = details.method
        if handler.response_streaming:
            inner: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                started = time.monotonic()
                try:
                    async for response in inner(request, context):
                        yield response
                except Exception as error:  # noqa: BLE001 - the last line before the wire
                    await _abort(context, method, error, started)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def single(request: Any, context: Any) -> Any:
            started = time.monotonic()
            try:
                return await inner(request, context)
            except Exception as error:  # noqa: BLE001 - the last line before the wire
                await _abort(context, method, error, started)

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(single, handler.request_deserializer, handler.response_serializer)


async def _abort(context: Any, method: str, error: Exception, started: float) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if context.done():
        # Nobody is left to be told: the client went away while its answer was being sent.
        _log.debug("client went away", method=method, error=repr(error))
        raise asyncio.CancelledError from error
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        error = Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "DISK_FULL",
            "the server's disk is full, so nothing was stored; make room there and try again",
            retry_after_s=30.0,
        )
    if not isinstance(error, Refusal):
        _log.error("rpc failed unforeseen", method=method, exc_info=error)
        error = Refusal(
            grpc.StatusCode.INTERNAL,
            "INTERNAL",
            f"{method} failed unforeseen ({type(error).__name__}); the server's log has the details",
        )
    _log.debug(
        "rpc refused",
        method=method,
        code=error.code.name,
        reason=error.reason,
        elapsed_ms=round((time.monotonic() - started) * 1000, 1),
    )
    await context.abort_with_status(rpc_status.to_status(error.status()))
