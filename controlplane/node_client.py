"""How the control plane talks to a node: the seam, and gRPC behind it.

Everything raises `Refusal`. A node that cannot be reached, or does not answer in time, is a Refusal with code
UNAVAILABLE, DEADLINE_EXCEEDED or CANCELLED; see `is_unreachable`. Every mutation may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from puhui.rpc.channel import open_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import seconds
from puhui.rpc.transfer import read_chunks
from puhui.v1 import card_pb2, node_pb2, node_service_pb2, stream_pb2
from puhui.v1.node_service_pb2_grpc import NodeServiceStub

__all__ = ["ExecCall", "GrpcNodeClient", "NodeClient", "is_unreachable"]

_UNREACHABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})

_T = TypeVar("_T")

_READ_S = 10.0
_SLICE_S = 60.0
# The first container of an image may have to wait for the image.
_CONTAINER_S = 300.0
_UPLOAD_S = 600.0
_DEFAULT_GRACE_S = 10.0
# Warning, a command before the reclaim, moving device memory to host memory, ending what holds the card.
_RECLAIM_S = 900.0


def is_unreachable(refusal: Refusal) -> bool:
    """Returns whether nothing is known about what the node did, because no answer came."""
    return refusal.code in _UNREACHABLE and refusal.reason == "UNKNOWN"


class ExecCall(Protocol):
    """A command that runs in a container, as its caller sees it."""

    def answers(self) -> AsyncGenerator[node_service_pb2.ExecResponse, None]:
        """Yields output, and at last the exit code."""

    def close(self) -> None:
        """Goes away; what becomes of the command, its start has said."""


class NodeClient(Protocol):
    """One node, as the control plane commands it."""

    async def inventory(self) -> node_pb2.NodeInventory:
        """Returns what the node has."""

    async def put_bundle(self, header: stream_pb2.BundleHeader, archive: Path) -> None:
        """Gives the node a bundle, if it does not have it."""

    async def create_slice(self, request: node_service_pb2.CreateSliceRequest) -> card_pb2.Slice:
        """Cuts a slice."""

    async def destroy_slice(self, request: node_service_pb2.DestroySliceRequest) -> None:
        """Destroys a slice."""

    async def list_slices(self) -> list[card_pb2.Slice]:
        """Returns the node's slices, foreign ones too."""

    async def create_container(self, request: node_service_pb2.CreateContainerRequest) -> node_pb2.Container:
        """Makes a container and starts its command."""

    async def stop_container(self, request: node_service_pb2.StopContainerRequest) -> node_pb2.Container:
        """Ends a container's command."""

    async def remove_container(self, request: node_service_pb2.RemoveContainerRequest) -> None:
        """Removes a container."""

    async def list_containers(self) -> list[node_pb2.Container]:
        """Returns the node's containers."""

    async def attach_slice(self, request: node_service_pb2.AttachSliceRequest) -> node_pb2.Container:
        """Makes a slice appear in a living container."""

    async def detach_slice(self, request: node_service_pb2.DetachSliceRequest) -> node_pb2.Container:
        """Makes a slice vanish from a living container."""

    async def transfer_slice(self, request: node_service_pb2.TransferSliceRequest) -> card_pb2.Slice:
        """Gives a slice to another attempt."""

    async def reclaim_container(
        self, request: node_service_pb2.ReclaimContainerRequest
    ) -> node_service_pb2.ReclaimContainerResponse:
        """Takes the cards of a living container."""

    async def resume_container(self, request: node_service_pb2.ResumeContainerRequest) -> node_pb2.Container:
        """Thaws a container, and moves what was checkpointed in it to its slice."""

    async def renew_container_lease(
        self, request: node_service_pb2.RenewContainerLeaseRequest
    ) -> node_service_pb2.RenewContainerLeaseResponse:
        """Prolongs the lease of a container, or asks for the node's lease clock."""

    async def exec(self, requests: AsyncIterator[node_service_pb2.ExecRequest]) -> ExecCall:
        """Runs a command in a living container, and returns once it runs. Close what is returned."""

    def read_workspace(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.GetWorkspaceResponse, None]:
        """Yields the manifest of an attempt's workspace, then the archive in chunks."""

    async def put_workspace(self, header: node_service_pb2.WorkspaceHeader, archive: Path) -> None:
        """Gives the node the workspace that an attempt is to begin with."""

    def read_logs(
        self, owner: card_pb2.AttemptRef, offset: int, tail_lines: int, follow: bool
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        """Yields output of an attempt."""

    def read_artifacts(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.NodeServiceGetArtifactsResponse, None]:
        """Yields the manifest of an attempt's artifacts, then the archive in chunks."""

    def events(self, after_cursor: int) -> AsyncGenerator[node_pb2.NodeEvent, None]:
        """Yields the node's events, live, for ever."""

    async def close(self) -> None:
        """Ends the connection."""


class GrpcNodeClient:
    """A node behind its gRPC address."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub = NodeServiceStub(self._channel)
        self._closed = False

    async def close(self) -> None:
        """Ends the connection."""
        self._closed = True
        await self._channel.close(None)

    async def _stream(
        self, call: grpc.aio.UnaryStreamCall[Any, _T] | grpc.aio.StreamStreamCall[Any, _T]
    ) -> AsyncGenerator[_T, None]:
        with self._refusals():
            try:
                async for response in call:
                    yield response
            finally:
                # Whoever stops reading must not leave the node writing.
                call.cancel()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise Refusal.of(error) from error
        except grpc.aio.UsageError as error:
            raise _closed() from error
        except asyncio.CancelledError as error:
            # Closing a channel cancels its calls, which is not to cancel who made them.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise _closed() from error

    async def inventory(self) -> node_pb2.NodeInventory:
        """Returns what the node has."""
        with self._refusals():
            return (await self._stub.GetNode(node_service_pb2.GetNodeRequest(), timeout=_READ_S)).node

    async def put_bundle(self, header: stream_pb2.BundleHeader, archive: Path) -> None:
        """Gives the node a bundle, if it does not have it."""
        with self._refusals():
            await self._stub.PutBundle(_parts(header, archive), timeout=_UPLOAD_S)

    async def create_slice(self, request: node_service_pb2.CreateSliceRequest) -> card_pb2.Slice:
        """Cuts a slice."""
        with self._refusals():
            return (await self._stub.CreateSlice(request, timeout=_SLICE_S)).slice

    async def destroy_slice(self, request: node_service_pb2.DestroySliceRequest) -> None:
        """Destroys a slice."""
        with self._refusals():
            await self._stub.DestroySlice(request, timeout=_SLICE_S)

    async def list_slices(self) -> list[card_pb2.Slice]:
        """Returns the node's slices, foreign ones too."""
        with self._refusals():
            request = node_service_pb2.ListSlicesRequest(include_foreign=True)
            return list((await self._stub.ListSlices(request, timeout=_READ_S)).slices)

    async def create_container(self, request: node_service_pb2.CreateContainerRequest) -> node_pb2.Container:
        """Makes a container and starts its command."""
        with self._refusals():
            return (await self._stub.CreateContainer(request, timeout=_CONTAINER_S)).container

    async def stop_container(self, request: node_service_pb2.StopContainerRequest) -> node_pb2.Container:
        """Ends a container's command."""
        grace_s = seconds(request.grace) if request.HasField("grace") else _DEFAULT_GRACE_S
        with self._refusals():
            return (await self._stub.StopContainer(request, timeout=grace_s + _SLICE_S)).container

    async def remove_container(self, request: node_service_pb2.RemoveContainerRequest) -> None:
        """Removes a container."""
        with self._refusals():
            await self._stub.RemoveContainer(request, timeout=_SLICE_S)

    async def list_containers(self) -> list[node_pb2.Container]:
        """Returns the node's containers."""
        with self._refusals():
            request = node_service_pb2.ListContainersRequest()
            return list((await self._stub.ListContainers(request, timeout=_READ_S)).containers)

    async def attach_slice(self, request: node_service_pb2.AttachSliceRequest) -> node_pb2.Container:
        """Makes a slice appear in a living container."""
        with self._refusals():
            return (await self._stub.AttachSlice(request, timeout=_SLICE_S)).container

    async def detach_slice(self, request: node_service_pb2.DetachSliceRequest) -> node_pb2.Container:
        """Makes a slice vanish from a living container."""
        with self._refusals():
            return (await self._stub.DetachSlice(request, timeout=_SLICE_S)).container

    async def transfer_slice(self, request: node_service_pb2.TransferSliceRequest) -> card_pb2.Slice:
        """Gives a slice to another attempt."""
        with self._refusals():
            return (await self._stub.TransferSlice(request, timeout=_SLICE_S)).slice

    async def reclaim_container(
        self, request: node_service_pb2.ReclaimContainerRequest
    ) -> node_service_pb2.ReclaimContainerResponse:
        """Takes the cards of a living container."""
        with self._refusals():
            return await self._stub.ReclaimContainer(request, timeout=_RECLAIM_S)

    async def resume_container(self, request: node_service_pb2.ResumeContainerRequest) -> node_pb2.Container:
        """Thaws a container, and moves what was checkpointed in it to its slice."""
        with self._refusals():
            return (await self._stub.ResumeContainer(request, timeout=_CONTAINER_S)).container

    async def renew_container_lease(
        self, request: node_service_pb2.RenewContainerLeaseRequest
    ) -> node_service_pb2.RenewContainerLeaseResponse:
        """Prolongs the lease of a container, or asks for the node's lease clock."""
        with self._refusals():
            return await self._stub.RenewContainerLease(request, timeout=_READ_S)

    async def exec(self, requests: AsyncIterator[node_service_pb2.ExecRequest]) -> ExecCall:
        """Runs a command in a living container, and returns once it runs. Close what is returned."""
        running = asyncio.Event()
        call = self._stub.Exec(_held_back(requests, running))
        try:
            with self._refusals():
                # The start is sent at once. A refusal ends the call here, with nothing of the input on its way:
                # grpc.aio makes an INTERNAL of a refusal that meets a caller who is still writing.
                await call.initial_metadata()
                if call.done() and await call.code() != grpc.StatusCode.OK:
                    await call.read()
        except BaseException:
            call.cancel()
            raise
        running.set()
        return _GrpcExecCall(call, self._stream(call))

    async def read_workspace(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.GetWorkspaceResponse, None]:
        """Yields the manifest of an attempt's workspace, then the archive in chunks."""
        request = node_service_pb2.GetWorkspaceRequest(owner=owner, offset=offset)
        async with contextlib.aclosing(self._stream(self._stub.GetWorkspace(request))) as responses:
            async for response in responses:
                yield response

    async def put_workspace(self, header: node_service_pb2.WorkspaceHeader, archive: Path) -> None:
        """Gives the node the workspace that an attempt is to begin with."""
        with self._refusals():
            await self._stub.PutWorkspace(_workspace_parts(header, archive), timeout=_UPLOAD_S)

    async def read_logs(
        self, owner: card_pb2.AttemptRef, offset: int, tail_lines: int, follow: bool
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        """Yields output of an attempt."""
        request = node_service_pb2.NodeServiceReadLogsRequest(
            owner=owner, offset=offset, tail_lines=tail_lines, follow=follow
        )
        async with contextlib.aclosing(self._stream(self._stub.ReadLogs(request))) as responses:
            async for response in responses:
                yield response.chunk

    async def read_artifacts(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.NodeServiceGetArtifactsResponse, None]:
        """Yields the manifest of an attempt's artifacts, then the archive in chunks."""
        request = node_service_pb2.NodeServiceGetArtifactsRequest(owner=owner, offset=offset)
        async with contextlib.aclosing(self._stream(self._stub.GetArtifacts(request))) as responses:
            async for response in responses:
                yield response

    async def events(self, after_cursor: int) -> AsyncGenerator[node_pb2.NodeEvent, None]:
        """Yields the node's events, live, for ever."""
        request = node_service_pb2.WatchEventsRequest(after_cursor=after_cursor)
        async with contextlib.aclosing(self._stream(self._stub.WatchEvents(request))) as responses:
            async for response in responses:
                yield response.event


class _GrpcExecCall:
    def __init__(self, call: grpc.aio.Call, stream: AsyncGenerator[node_service_pb2.ExecResponse, None]) -> None:
        self._call = call
        self._stream = stream

    def answers(self) -> AsyncGenerator[node_service_pb2.ExecResponse, None]:
        """Yields output, and at last the exit code."""
        return self._stream

    def close(self) -> None:
        """Goes away."""
        self._call.cancel()


async def _parts(
    header: stream_pb2.BundleHeader, archive: Path
) -> AsyncIterator[node_service_pb2.NodeServicePutBundleRequest]:
    yield node_service_pb2.NodeServicePutBundleRequest(header=header)
    for chunk in read_chunks(archive):
        yield node_service_pb2.NodeServicePutBundleRequest(chunk=chunk)


async def _workspace_parts(
    header: node_service_pb2.WorkspaceHeader, archive: Path
) -> AsyncIterator[node_service_pb2.PutWorkspaceRequest]:
    yield node_service_pb2.PutWorkspaceRequest(header=header)
    for chunk in read_chunks(archive):
        yield node_service_pb2.PutWorkspaceRequest(chunk=chunk)


async def _held_back(
    requests: AsyncIterator[node_service_pb2.ExecRequest], running: asyncio.Event
) -> AsyncIterator[node_service_pb2.ExecRequest]:
    """Yields the first request at once, the others once the command runs."""
    async for request in requests:
        yield request
        await running.wait()


def _closed() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "the connection to the node was given up for a new one")
