"""Speaks to a node daemon as a control plane does."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest

from puhui.rpc.bundle import pack_files
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration
from puhui.v1.card_pb2 import AttemptRef, Placement, Slice
from puhui.v1.idle_pb2 import IdleWatch
from puhui.v1.node_pb2 import Container, NodeEvent, NodeEventKind, NodeInventory
from puhui.v1.node_service_pb2 import (
    AttachSliceRequest,
    CreateContainerRequest,
    CreateSliceRequest,
    DestroySliceRequest,
    DetachSliceRequest,
    GetNodeRequest,
    GetWorkspaceRequest,
    ListContainersRequest,
    ListSlicesRequest,
    NodeServiceGetArtifactsRequest,
    NodeServicePutBundleRequest,
    NodeServicePutBundleResponse,
    NodeServiceReadLogsRequest,
    PutWorkspaceRequest,
    RemoveContainerRequest,
    StopContainerRequest,
    WatchEventsRequest,
    WorkspaceHeader,
)
from puhui.v1.node_service_pb2_grpc import NodeServiceStub
from puhui.v1.stream_pb2 import ArtifactManifest, BundleHeader, LogChunk

if TYPE_CHECKING:
    from puhui.v1.node_service_pb2_grpc import NodeServiceAsyncStub

_numbers = itertools.count(1)
_HIGHEST = 2**63 - 1


class Node:
    """A connection to a node daemon, with short words for what tests do again and again."""

    def __init__(self, channel: grpc.aio.Channel, centre: str) -> None:
        self.stub: NodeServiceAsyncStub = NodeServiceStub(channel)
        self.centre = centre

    def attempt(self, token: int = 1) -> AttemptRef:
        """Returns an attempt that nobody has used."""
        return AttemptRef(centre=self.centre, job_id=f"j-{next(_numbers)}", attempt=1, fencing_token=token)

    async def inventory(self) -> NodeInventory:
        return (await self.stub.GetNode(GetNodeRequest())).node

    async def slices(self) -> list[Slice]:
        return list((await self.stub.ListSlices(ListSlicesRequest(include_foreign=True))).slices)

    async def containers(self) -> list[Container]:
        return list((await self.stub.ListContainers(ListContainersRequest())).containers)

    async def put_archive(self, archive: bytes) -> NodeServicePutBundleResponse:
        digest = "sha256:" + hashlib.sha256(archive).hexdigest()

        async def parts() -> AsyncIterator[NodeServicePutBundleRequest]:
            yield NodeServicePutBundleRequest(header=BundleHeader(bundle_id=digest, size_bytes=len(archive)))
            for at in range(0, len(archive), 2**18):
                yield NodeServicePutBundleRequest(chunk=archive[at : at + 2**18])

        return await self.stub.PutBundle(parts())

    async def put_code(self, code: str) -> str:
        return (await self.put_archive(pack_files({"main.py": code.encode()}))).bundle.id

    async def cut(
        self, owner: AttemptRef, profile: str = "1g.10gb", start: int = 0, gpu: int = 0, name: str = "slice"
    ) -> Slice:
        """Cuts a slice; the same name for the same attempt is the same request."""
        inventory = await self.inventory()
        size = next(p for p in inventory.gpus[gpu].profiles if p.name == profile).placements[0].size
        request = CreateSliceRequest(
            owner=owner,
            gpu_uuid=inventory.gpus[gpu].uuid,
            profile=profile,
            placement=Placement(start=start, size=size),
            request_id=f"{owner.job_id}/{name}",
        )
        return (await self.stub.CreateSlice(request)).slice

    async def start(
        self,
        owner: AttemptRef,
        code: str = "",
        *,
        command: Sequence[str] = ("python3", "main.py"),
        slices: Sequence[Slice] = (),
        bundle_id: str = "",
        env: Mapping[str, str] | None = None,
        max_duration_s: float | None = None,
        stop_grace_s: float | None = None,
        image: str = "",
        bare: bool = False,
        workspace_of_attempt: int = 0,
        idle_watch: IdleWatch | None = None,
    ) -> Container:
        request = CreateContainerRequest(
            owner=owner,
            command=command,
            env=env or {},
            bundle_id="" if bare else bundle_id or await self.put_code(code),
            slice_uuids=[one.uuid for one in slices],
            max_duration=duration(max_duration_s) if max_duration_s is not None else None,
            stop_grace=duration(stop_grace_s) if stop_grace_s is not None else None,
            image=image,
            workspace_of_attempt=workspace_of_attempt,
            idle_watch=idle_watch,
        )
        return (await self.stub.CreateContainer(request)).container

    async def events(self, after: int = 0) -> AsyncIterator[NodeEvent]:
        async for response in self.stub.WatchEvents(WatchEventsRequest(after_cursor=after), timeout=30):
            yield response.event

    async def event(self, owner: AttemptRef, kind: NodeEventKind.ValueType) -> NodeEvent:
        """Waits for the first event of a kind about an attempt."""
        async for event in self.events():
            same = (event.owner.job_id, event.owner.attempt) == (owner.job_id, owner.attempt)
            if same and event.kind == kind:
                return event
        raise AssertionError("the event stream ended")

    async def exited(self, owner: AttemptRef) -> NodeEvent:
        """Waits for the end of an attempt's command."""
        return await self.event(owner, NodeEventKind.NODE_EVENT_KIND_CONTAINER_EXITED)

    async def run(self, code: str, **arguments: Any) -> tuple[AttemptRef, Container, bytes]:
        """Runs code to its end. Returns the attempt, the container as it ended, and all output."""
        owner = self.attempt()
        await self.start(owner, code, **arguments)
        ended = (await self.exited(owner)).container
        return owner, ended, await self.log(owner)

    async def chunks(self, owner: AttemptRef, **arguments: Any) -> list[LogChunk]:
        request = NodeServiceReadLogsRequest(owner=owner, **arguments)
        return [response.chunk async for response in self.stub.ReadLogs(request, timeout=30)]

    async def follow(self, owner: AttemptRef) -> AsyncIterator[LogChunk]:
        """Yields output as it is written."""
        request = NodeServiceReadLogsRequest(owner=owner, follow=True)
        async for response in self.stub.ReadLogs(request, timeout=30):
            yield response.chunk

    async def said(self, owner: AttemptRef, words: bytes) -> None:
        """Waits until the output begins with these words; it may arrive in pieces."""
        output = b""
        async for chunk in self.follow(owner):
            output += chunk.data
            if output.startswith(words):
                return
        raise AssertionError(f"the output ended with {output!r}")

    async def log(self, owner: AttemptRef, **arguments: Any) -> bytes:
        return b"".join(chunk.data for chunk in await self.chunks(owner, **arguments))

    async def artifacts(self, owner: AttemptRef) -> tuple[ArtifactManifest, bytes]:
        request = NodeServiceGetArtifactsRequest(owner=owner)
        responses = [response async for response in self.stub.GetArtifacts(request, timeout=30)]
        return responses[0].manifest, b"".join(response.chunk for response in responses[1:])

    async def workspace(self, owner: AttemptRef, offset: int = 0) -> tuple[ArtifactManifest, bytes]:
        request = GetWorkspaceRequest(owner=owner, offset=offset)
        responses = [response async for response in self.stub.GetWorkspace(request, timeout=60)]
        return responses[0].manifest, b"".join(response.chunk for response in responses[1:])

    async def put_workspace(self, owner: AttemptRef, archive: bytes, *, digest: str = "", sent: int = -1) -> None:
        """Uploads a workspace, or only so many bytes of it."""
        digest = digest or "sha256:" + hashlib.sha256(archive).hexdigest()
        header = WorkspaceHeader(owner=owner, digest=digest, size_bytes=len(archive))

        async def parts() -> AsyncIterator[PutWorkspaceRequest]:
            yield PutWorkspaceRequest(header=header)
            some = archive[:sent] if sent >= 0 else archive
            for at in range(0, len(some), 2**18):
                yield PutWorkspaceRequest(chunk=some[at : at + 2**18])

        await self.stub.PutWorkspace(parts(), timeout=60)

    async def stop(self, owner: AttemptRef, grace_s: float | None = None) -> Container:
        request = StopContainerRequest(owner=owner, grace=duration(grace_s) if grace_s is not None else None)
        return (await self.stub.StopContainer(request)).container

    async def remove(self, owner: AttemptRef, *, discard: bool = True) -> None:
        await self.stub.RemoveContainer(RemoveContainerRequest(owner=owner, discard_results=discard))

    async def destroy(self, owner: AttemptRef, one: Slice) -> None:
        await self.stub.DestroySlice(DestroySliceRequest(owner=owner, slice_uuid=one.uuid), timeout=30)

    async def attach(self, owner: AttemptRef, one: Slice, request_id: str = "") -> Container:
        request = AttachSliceRequest(owner=owner, slice_uuid=one.uuid, request_id=request_id)
        return (await self.stub.AttachSlice(request, timeout=30)).container

    async def detach(self, owner: AttemptRef, one: Slice, request_id: str = "") -> Container:
        request = DetachSliceRequest(owner=owner, slice_uuid=one.uuid, request_id=request_id)
        return (await self.stub.DetachSlice(request, timeout=30)).container

    async def clear(self) -> None:
        """Removes everything, as one that has taken command."""
        for container in await self.containers():
            container.owner.fencing_token = _HIGHEST
            if not container.HasField("exit_code"):
                await self.stop(container.owner, 0)
            await self.remove(container.owner)
        for one in await self.slices():
            if one.HasField("owner"):
                one.owner.fencing_token = _HIGHEST
                await self.destroy(one.owner, one)


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    """Returns the entries of an artifact archive by name."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {entry.name: entry for entry in tar}


class refused:  # noqa: N801 - reads as a word in a with statement
    """Expects a refusal.

    Usage::

        with refused(grpc.StatusCode.NOT_FOUND, "SLICE_NOT_FOUND") as refusal:
            await node.destroy(owner, one)
        assert "..." in refusal.message
    """

    message: str

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        self._expected = (code, reason)
        self._raises = pytest.raises(grpc.aio.AioRpcError)

    def __enter__(self) -> Self:
        self._caught = self._raises.__enter__()
        return self

    def __exit__(self, *details: object) -> bool:
        swallowed = bool(self._raises.__exit__(*details))  # type: ignore[arg-type]
        refusal = Refusal.of(self._caught.value)
        assert (refusal.code, refusal.reason) == self._expected, refusal.message
        self.message = refusal.message
        return swallowed
