"""What every Puhui server does by itself."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from puhui.rpc.address import require_private_address
from puhui.rpc.channel import open_channel
from puhui.rpc.server import RpcServer
from puhui.v1.job_service_pb2 import GetJobRequest, WatchJobRequest
from puhui.v1.job_service_pb2_grpc import JobServiceStub, add_JobServiceServicer_to_server
from tests.unit.rpc.echo import echo_in, serving

EOF: Any = vars(grpc.aio)["EOF"]  # the stubs lack it
SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_health_is_told_for_the_whole_and_for_each_service(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, _, channel):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "puhui.v1.JobService"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="puhui.v1.NodeService"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_says_when_a_server_stops(tmp_path: Path) -> None:
    server = RpcServer("127.0.0.1:0")
    server.add("puhui.v1.JobService", add_JobServiceServicer_to_server, echo_in(tmp_path))
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="puhui.v1.JobService"))
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(server.stop(5))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await stopping


async def test_services_are_listed_by_reflection(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, _, channel):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        call.cancel()
    assert names == {
        "puhui.v1.JobService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:7070", "[::]:7070", "192.168.1.4:7070", "example.org:7070", "127.0.0.1.nip.io:1"],
)
def test_plaintext_for_others_to_read_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="SSH tunnel"):
        RpcServer(address)


@pytest.mark.parametrize(
    "address",
    [":7070", "7070", "nonsense", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:http", "unix:relative", "unix:"],
)
def test_what_is_no_address_is_told_in_a_sentence(address: str) -> None:
    with pytest.raises(ValueError, match=r"write (HOST:PORT|unix:/PATH)"):
        require_private_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.8.8:1", "[::1]:7070", "localhost:7070", "unix:/run/x"])
def test_loopback_and_unix_sockets_are_private(address: str) -> None:
    require_private_address(address)


async def test_two_servers_cannot_share_a_port(tmp_path: Path) -> None:
    first = RpcServer("127.0.0.1:0")
    port = await first.start()
    try:
        with pytest.raises(OSError, match="another daemon"):
            await RpcServer(f"127.0.0.1:{port}").start()
    finally:
        await first.stop(0)


async def test_a_unix_socket_serves_too(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    server = RpcServer(address)
    server.add("puhui.v1.JobService", add_JobServiceServicer_to_server, echo_in(tmp_path))
    assert await server.start() == 0
    try:
        async with open_channel(address) as channel:
            answer = await JobServiceStub(channel).GetJob(GetJobRequest(job_id="j-1"))
            assert answer.job.id == "j-1"
    finally:
        await server.stop(0)


async def test_running_calls_are_given_time_to_end(tmp_path: Path) -> None:
    echo = echo_in(tmp_path)
    server = RpcServer("127.0.0.1:0")
    server.add("puhui.v1.JobService", add_JobServiceServicer_to_server, echo)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call: Any = JobServiceStub(channel).WatchJob(WatchJobRequest())
        await call.read()
        stopping = asyncio.create_task(server.stop(30))
        echo.begun.set()
        assert await call.read() == EOF
        assert await call.code() is grpc.StatusCode.OK
        await stopping
