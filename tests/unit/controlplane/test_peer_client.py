"""The connection to a peer, over real gRPC: what is left at the end of a call, and what its failures mean."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from controlplane.peer_client import GrpcPeerClient, is_away
from puhui.rpc.channel import open_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.server import RpcServer
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.federation_service_pb2_grpc import FederationServiceServicer, add_FederationServiceServicer_to_server
from tests.unit.controlplane.centres import eventually


class Peer(FederationServiceServicer):
    """Takes one message of a call, and ends it; or refuses it."""

    def __init__(self) -> None:
        self.refuses: Refusal | None = None
        self.ends = True
        self.heard: list[wire.CallForwardedJobRequest] = []

    async def CallForwardedJob(  # noqa: N802 - named by the contract
        self, request_iterator: AsyncIterator[wire.CallForwardedJobRequest], context: object
    ) -> AsyncIterator[wire.CallForwardedJobResponse]:
        self.heard.append(await anext(request_iterator))
        if self.refuses is not None:
            raise self.refuses
        yield wire.CallForwardedJobResponse(message=b"all")
        if not self.ends:
            await asyncio.Event().wait()


def _peer() -> Peer:
    """Returns a peer that serves no other call."""
    kind: Any = Peer
    peer: Peer = kind()
    return peer


class Given:
    """Requests that never end."""

    def __init__(self) -> None:
        self.closed = False

    async def requests(self) -> AsyncIterator[wire.CallForwardedJobRequest]:
        try:
            yield wire.CallForwardedJobRequest(end=True)
            await asyncio.Event().wait()
        finally:
            self.closed = True


@contextlib.asynccontextmanager
async def connected(peer: Peer) -> AsyncIterator[GrpcPeerClient]:
    server = RpcServer("127.0.0.1:0")
    server.add("puhui.v1.FederationService", add_FederationServiceServicer_to_server, peer)
    client = GrpcPeerClient(open_channel(f"127.0.0.1:{await server.start()}"))
    try:
        yield client
    finally:
        await client.close()
        await server.stop(0)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No task outlives the block, but those of gRPC's server."""
    before = asyncio.all_tasks()
    yield
    left = [task for task in asyncio.all_tasks() - before if "_consume" in repr(task) or "_sent" in repr(task)]
    assert left == []


async def test_nobody_reads_on_in_the_requests_of_a_call_that_has_ended() -> None:
    peer, given = _peer(), Given()
    async with connected(peer) as client:
        with nothing_left():
            assert [answer.message async for answer in client.call(given.requests())] == [b"all"]
            assert given.closed
        assert [request.end for request in peer.heard] == [True]


async def test_nor_of_one_that_was_refused() -> None:
    peer, given = _peer(), Given()
    peer.refuses = Refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND", "no such guest")
    async with connected(peer) as client:
        with nothing_left():
            with pytest.raises(Refusal) as error:
                await anext(client.call(given.requests()))
            assert error.value.reason == "GUEST_NOT_FOUND"
            await eventually(lambda: given.closed)


async def test_nor_of_one_that_nobody_listens_to() -> None:
    given = Given()
    async with connected(_peer()) as client:
        with nothing_left():
            call = client.call(given.requests())
            await anext(call)
            await call.aclose()
            assert given.closed


async def test_what_a_call_cannot_send_is_not_hidden() -> None:
    async def broken() -> AsyncIterator[wire.CallForwardedJobRequest]:
        yield wire.CallForwardedJobRequest()
        raise RuntimeError("a fault of ours")

    peer = _peer()
    peer.ends = False
    async with connected(peer) as client:
        with pytest.raises(RuntimeError, match="a fault of ours"):
            async for _ in client.call(broken()):
                pass


@pytest.mark.parametrize(
    ("code", "reason", "away"),
    [
        (grpc.StatusCode.UNAVAILABLE, "UNKNOWN", True),
        (grpc.StatusCode.UNKNOWN, "UNKNOWN", True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "UNKNOWN", True),
        (grpc.StatusCode.INTERNAL, "UNKNOWN", True),
        (grpc.StatusCode.INTERNAL, "INTERNAL", False),
        (grpc.StatusCode.UNAUTHENTICATED, "PEER_UNKNOWN", True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "PEER_RATE", True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL", False),
        (grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND", False),
        (grpc.StatusCode.DATA_LOSS, "PEER_ANSWER_INVALID", False),
    ],
)
def test_which_failures_are_no_answers(code: grpc.StatusCode, reason: str, away: bool) -> None:
    assert is_away(Refusal(code, reason, "why")) == away
