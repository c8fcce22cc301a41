"""A node at the `NodeClient` seam: keeps slices and containers in memory, and does what a test tells it to."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc

from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, node_pb2, node_service_pb2, stream_pb2
from tests.unit.controlplane.samples import inventory

Key = tuple[str, int]


def away() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "connection refused")


class FakeNode:
    """The node itself; every client that `connect` returns talks to it."""

    def __init__(self, name: str = "node-1", gpus: int = 1) -> None:
        self.has = inventory(name, gpus)
        self.slices: dict[str, card_pb2.Slice] = {}
        self.containers: dict[Key, node_pb2.Container] = {}
        self.output: dict[Key, bytes] = {}
        self.artifacts: dict[Key, bytes] = {}
        self.tokens: dict[Key, int] = {}
        self.started: list[Key] = []
        self.calls: list[str] = []
        self.refusals: dict[str, list[Refusal]] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.reachable = True
        self.exits_at_once: int | None = 0
        self._made = 0
        self._events: list[node_pb2.NodeEvent] = []
        self._news = asyncio.Condition()

    def connect(self, address: str) -> FakeNode:
        return self

    async def close(self) -> None:
        return None

    # -- what tests do to it

    def refuse(self, call: str, refusal: Refusal) -> None:
        """The next such call is refused."""
        self.refusals.setdefault(call, []).append(refusal)

    def hold(self, call: str) -> asyncio.Event:
        """Such calls wait until the event is set."""
        self.held[call] = asyncio.Event()
        return self.held[call]

    async def set_reachable(self, reachable: bool) -> None:
        self.reachable = reachable
        async with self._news:
            self._news.notify_all()

    async def exit(self, job_id: str, code: int, attempt: int = 1) -> None:
        """The command of a job ends."""
        container = self.containers[job_id, attempt]
        container.state = node_pb2.CONTAINER_STATE_EXITED
        container.exit_code = code
        await self._tell(node_pb2.NODE_EVENT_KIND_CONTAINER_EXITED, container=container)

    async def write(self, job_id: str, data: bytes, attempt: int = 1) -> None:
        """The command of a job writes."""
        self.output[job_id, attempt] = self.output.get((job_id, attempt), b"") + data
        async with self._news:
            self._news.notify_all()

    @property
    def empty(self) -> bool:
        return not self.slices and not self.containers

    # -- the seam

    async def _called(self, call: str, owner: card_pb2.AttemptRef | None = None) -> None:
        self.calls.append(call)
        held = self.held.get(call)
        if held is not None:
            await held.wait()
        if not self.reachable:
            raise away()
        if self.refusals.get(call):
            raise self.refusals[call].pop(0)
        if owner is not None:
            key = (owner.job_id, owner.attempt)
            if owner.fencing_token < self.tokens.get(key, 0):
                raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN", "stale")
            self.tokens[key] = owner.fencing_token

    async def _tell(self, kind: node_pb2.NodeEventKind.ValueType, **what: object) -> None:
        event = node_pb2.NodeEvent(cursor=len(self._events) + 1, kind=kind, **what)  # type: ignore[arg-type]
        event.owner.CopyFrom((event.container if event.HasField("container") else event.slice).owner)
        self._events.append(event)
        async with self._news:
            self._news.notify_all()

    async def inventory(self) -> node_pb2.NodeInventory:
        await self._called("inventory")
        del self.has.slices[:]
        self.has.slices.extend(self.slices.values())
        return self.has

    async def put_bundle(self, header: stream_pb2.BundleHeader, archive: Path) -> None:
        await self._called("put_bundle")
        assert archive.stat().st_size == header.size_bytes

    async def create_slice(self, request: node_service_pb2.CreateSliceRequest) -> card_pb2.Slice:
        await self._called("create_slice", request.owner)
        for piece in self.slices.values():
            if (piece.owner.job_id, piece.owner.attempt) == (request.owner.job_id, request.owner.attempt):
                return piece
            mine, theirs = request.placement, piece.placement
            overlap = mine.start < theirs.start + theirs.size and theirs.start < mine.start + mine.size
            assert piece.gpu_uuid != request.gpu_uuid or not overlap, "double booked"
        self._made += 1
        piece = card_pb2.Slice(
            uuid=f"MIG-{self._made}",
            gpu_uuid=request.gpu_uuid,
            profile=request.profile,
            placement=request.placement,
            memory_mib=9984,
            owner=request.owner,
            emulated=True,
        )
        self.slices[piece.uuid] = piece
        await self._tell(node_pb2.NODE_EVENT_KIND_SLICE_CREATED, slice=piece)
        return piece

    async def destroy_slice(self, request: node_service_pb2.DestroySliceRequest) -> None:
        await self._called("destroy_slice", request.owner)
        piece = self.slices.pop(request.slice_uuid, None)
        if piece is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "SLICE_NOT_FOUND", "no such slice")
        assert (piece.owner.job_id, piece.owner.attempt) not in self.containers, "destroyed under a container"
        await self._tell(node_pb2.NODE_EVENT_KIND_SLICE_DESTROYED, slice=piece)

    async def list_slices(self) -> list[card_pb2.Slice]:
        await self._called("list_slices")
        return list(self.slices.values())

    async def create_container(self, request: node_service_pb2.CreateContainerRequest) -> node_pb2.Container:
        await self._called("create_container", request.owner)
        key = (request.owner.job_id, request.owner.attempt)
        if key not in self.containers:
            assert request.slice_uuids[0] in self.slices
            self.started.append(key)
            container = node_pb2.Container(
                id=f"c-{len(self.started)}",
                owner=request.owner,
                state=node_pb2.CONTAINER_STATE_RUNNING,
                runtime=node_pb2.RUNTIME_KIND_PROCESS,
            )
            self.containers[key] = container
            await self._tell(node_pb2.NODE_EVENT_KIND_CONTAINER_STARTED, container=container)
            if self.exits_at_once is not None:
                await self.exit(*key[:1], self.exits_at_once, key[1])
        return self.containers[key]

    async def stop_container(self, request: node_service_pb2.StopContainerRequest) -> node_pb2.Container:
        await self._called("stop_container", request.owner)
        key = (request.owner.job_id, request.owner.attempt)
        if key not in self.containers:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND", "no such container")
        if self.containers[key].state != node_pb2.CONTAINER_STATE_EXITED:
            await self.exit(key[0], 143, key[1])
        return self.containers[key]

    async def remove_container(self, request: node_service_pb2.RemoveContainerRequest) -> None:
        await self._called("remove_container", request.owner)
        key = (request.owner.job_id, request.owner.attempt)
        if request.discard_results:
            self.output.pop(key, None)
            self.artifacts.pop(key, None)
        container = self.containers.pop(key, None)
        if container is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND", "no such container")
        await self._tell(node_pb2.NODE_EVENT_KIND_CONTAINER_REMOVED, container=container)

    async def list_containers(self) -> list[node_pb2.Container]:
        await self._called("list_containers")
        return list(self.containers.values())

    async def read_logs(
        self, owner: card_pb2.AttemptRef, offset: int, tail_lines: int, follow: bool
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        await self._called("read_logs")
        key = (owner.job_id, owner.attempt)
        while True:
            if not self.reachable:
                raise away()
            if key not in self.containers:
                raise Refusal(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND", "no such container")
            over = self.containers[key].state == node_pb2.CONTAINER_STATE_EXITED
            data = self.output.get(key, b"")[offset:]
            if data:
                yield stream_pb2.LogChunk(offset=offset, data=data, stream=stream_pb2.LOG_STREAM_STDOUT)
                offset += len(data)
            elif over or not follow:
                return
            else:
                async with self._news:
                    await self._news.wait()

    async def read_artifacts(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.NodeServiceGetArtifactsResponse, None]:
        await self._called("read_artifacts")
        archive = self.artifacts.get((owner.job_id, owner.attempt), b"")
        manifest = stream_pb2.ArtifactManifest(
            digest="sha256:" + hashlib.sha256(archive).hexdigest(), size_bytes=len(archive)
        )
        if archive:
            manifest.files.add(path="model.bin", size_bytes=1)
        yield node_service_pb2.NodeServiceGetArtifactsResponse(manifest=manifest)
        if archive:
            yield node_service_pb2.NodeServiceGetArtifactsResponse(chunk=archive[offset:])

    async def events(self, after_cursor: int) -> AsyncGenerator[node_pb2.NodeEvent, None]:
        await self._called("events")
        while True:
            if not self.reachable:
                raise away()
            for event in self._events[after_cursor:]:
                yield event
                after_cursor = event.cursor
            async with self._news:
                if after_cursor == len(self._events) and self.reachable:
                    await self._news.wait()
