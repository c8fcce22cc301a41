"""The client's end of a connection."""

from __future__ import annotations

import json

import grpc

from puhui.rpc.address import require_private_address
from puhui.rpc.errors import Refusal
from puhui.rpc.tls import Pinned

__all__ = ["MAX_MESSAGE_BYTES", "open_blocking_channel", "open_channel", "open_pinned_channel"]

MAX_MESSAGE_BYTES = 8 * 2**20
"""Largest message either end accepts. Chunks are 1 MiB at most, so only lists come near it."""

# Reads may be tried again by themselves when the server could not be reached; a mutation is tried again
# only by a caller that gave it a request_id.
_READS = {
    "JobService": ["GetJob", "ListJobs", "PredictJob", "ExplainJob"],
    "FleetService": ["ListNodes", "GetCapacity", "GetUsage", "Heartbeat"],
    "NodeService": ["GetNode", "ListSlices", "ListContainers"],
}
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": f"puhui.v1.{service}", "method": method}
                    for service, methods in _READS.items()
                    for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
# A dead peer is noticed within 40 s even on a stream that says nothing; servers permit these pings.
_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A centre comes back within seconds of a restart; clients should notice as soon.
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # One attempt to connect lasts so long at most: those that it sends again come ever more rarely, and after a cut a
    # new attempt is sooner there. Three round trips of the slowest network fit in.
    ("grpc.min_reconnect_backoff_ms", 12_000),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """Opens an asyncio channel to "host:port" or "unix:/path".

    Raises:
        Refusal: FAILED_PRECONDITION with PLAINTEXT_REFUSED: others could read what is said.
    """
    _require_private(address)
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def open_pinned_channel(address: str, pinned: Pinned) -> grpc.aio.Channel:
    """Opens an asyncio channel to a peer, over mutual TLS.

    Args:
        address: "host:port".
        pinned: who we are, and whom alone it is opened to.
    """
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", pinned.server_name), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(address, pinned.credentials(), options=options)


def open_blocking_channel(address: str) -> grpc.Channel:
    """Opens a channel to "host:port" or "unix:/path" for a program without an event loop.

    Raises:
        Refusal: as `open_channel` does.
    """
    _require_private(address)
    return grpc.insecure_channel(address, options=_OPTIONS)


def _require_private(address: str) -> None:
    try:
        require_private_address(address)
    except ValueError as error:
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "PLAINTEXT_REFUSED", str(error), address=address) from error
