"""Servers for other centres: who gets in changes while they serve, and those who do not use up little."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from controlplane.certificates import CentreIdentity, key_from_secret, name_of, new_secret
from puhui.rpc.address import require_reachable_address
from puhui.rpc.channel import open_pinned_channel
from puhui.rpc.server import RpcServer
from puhui.rpc.tls import MutualTls, Pinned

SERVER, ONE, OTHER = (CentreIdentity.of_key(key_from_secret(new_secret()), digit * 32) for digit in "abc")


@contextlib.asynccontextmanager
async def serving(pins: list[bytes], most_connections: int = 16) -> AsyncIterator[str]:
    tls = MutualTls(SERVER.key_pem, SERVER.certificate_pem, lambda: pins, most_connections)
    server = RpcServer("127.0.0.1:0", tls)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def opened(
    address: str, who: CentreIdentity, server_name: str = name_of("a" * 32)
) -> AsyncIterator[grpc.aio.Channel]:
    channel = open_pinned_channel(
        address, Pinned(who.key_pem, who.certificate_pem, SERVER.certificate_pem, server_name)
    )
    try:
        yield channel
    finally:
        await channel.close(None)


async def answers(channel: grpc.aio.Channel, service: str = "") -> grpc.StatusCode:
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE


async def test_who_is_pinned_while_it_serves_gets_in_and_who_is_not_any_longer_does_not() -> None:
    pins: list[bytes] = []
    async with serving(pins) as address:
        for pinned, expected in (
            ([], UNAVAILABLE),
            ([ONE], OK),
            ([OTHER], UNAVAILABLE),
            ([OTHER, ONE], OK),
            ([], UNAVAILABLE),
        ):
            pins[:] = [one.certificate_pem for one in pinned]
            async with opened(address, ONE) as channel:
                assert await answers(channel) is expected


async def test_a_server_with_another_name_is_not_the_one() -> None:
    async with serving([ONE.certificate_pem]) as address, opened(address, ONE, name_of("b" * 32)) as channel:
        assert await answers(channel) is UNAVAILABLE


async def test_strangers_may_not_ask_what_there_is_nor_send_much() -> None:
    async with serving([ONE.certificate_pem]) as address, opened(address, ONE) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await answers(channel, "x" * (3 * 2**20)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await answers(channel) is OK


async def test_only_who_speaks_tls_may_listen_for_other_machines() -> None:
    with pytest.raises(ValueError, match="plaintext"):
        RpcServer("0.0.0.0:7443")
    RpcServer("0.0.0.0:7443", MutualTls(SERVER.key_pem, SERVER.certificate_pem, list))
    with pytest.raises(ValueError, match="no address"):
        RpcServer("7443", MutualTls(SERVER.key_pem, SERVER.certificate_pem, list))


async def test_connections_that_are_too_many_are_closed() -> None:
    async with serving([ONE.certificate_pem], most_connections=2) as address, contextlib.AsyncExitStack() as stack:
        for expected in (OK, OK, UNAVAILABLE):
            assert await answers(await stack.enter_async_context(opened(address, ONE))) is expected
    async with serving([ONE.certificate_pem], most_connections=1) as address, opened(address, ONE) as channel:
        # One that shows no certificate counts, too.
        host, _, port = address.rpartition(":")
        _, silent = await asyncio.open_connection(host, int(port))
        assert await answers(channel) is UNAVAILABLE
        silent.close()
        await silent.wait_closed()


@pytest.mark.parametrize("address", ["gpu.example.org:7443", "10.0.0.1:1", "[2001:db8::1]:7443", "127.0.0.1:7443"])
def test_others_can_come_to_hosts_with_ports(address: str) -> None:
    require_reachable_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:0",
        "0.0.0.0:1",
        "[::]:1",
        "unix:/run/x",
        "host:99999",
        "a b:1",
        "a\n:1",
        "hö:1",
        "x" * 400 + ":1",
    ],
)
def test_others_cannot_come_to_anything_else(address: str) -> None:
    with pytest.raises(ValueError, match="write HOST:PORT"):
        require_reachable_address(address)
