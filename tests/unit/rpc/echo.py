"""A servicer that refuses, fails and receives as a test tells it to, behind the real server."""

# ruff: noqa: N802 - gRPC names methods so

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from puhui.rpc.channel import open_channel
from puhui.rpc.server import RpcServer
from puhui.rpc.transfer import receive
from puhui.v1 import job_pb2, job_service_pb2, stream_pb2
from puhui.v1.job_service_pb2_grpc import JobServiceServicer, JobServiceStub, add_JobServiceServicer_to_server


class Echo(JobServiceServicer):
    """Does in every RPC what `act` does.

    Attributes:
        act: is called once in every RPC; what it raises is what the RPC raises.
        folder: where uploads are received.
        most_bytes: the largest upload.
        ended: is set when an upload has ended, however it did.
        received: digests of the uploads that arrived whole.
    """

    def __init__(self, folder: Path) -> None:
        self.act: Callable[[], None] = lambda: None
        self.folder = folder
        self.most_bytes = 5 * 10**6
        self.ended = asyncio.Event()
        self.begun = asyncio.Event()
        self.received: list[str] = []

    async def GetJob(self, request: Any, context: Any) -> Any:
        self.act()
        return job_service_pb2.GetJobResponse(job=job_pb2.Job(id=request.job_id))

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield job_service_pb2.WatchJobResponse()
        self.act()
        await self.begun.wait()

    async def PutBundle(self, request_iterator: Any, context: Any) -> Any:
        try:
            async with receive(aiter(request_iterator), self.folder, self.most_bytes) as upload:
                self.begun.set()
                self.act()
                await upload.finish()
                self.received.append(upload.bundle_id)
                return job_service_pb2.PutBundleResponse(bundle=stream_pb2.Bundle(id=upload.bundle_id))
        finally:
            self.ended.set()

    async def RunJob(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for _ in request_iterator:
            yield job_service_pb2.RunJobResponse(exit_code=0)
            self.act()


def echo_in(folder: Path) -> Echo:
    """Returns an Echo. The RPCs that it lacks answer UNIMPLEMENTED."""
    return Echo(folder)  # type: ignore[abstract]


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Echo, Any, grpc.aio.Channel]]:
    """Serves an Echo until the block ends, and yields it with a stub and the channel."""
    echo = echo_in(folder)
    server = RpcServer("127.0.0.1:0")
    server.add("puhui.v1.JobService", add_JobServiceServicer_to_server, echo)
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            yield echo, JobServiceStub(channel), channel
    finally:
        await server.stop(0)
