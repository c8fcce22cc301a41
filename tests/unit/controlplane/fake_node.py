"""A node at the `NodeClient` seam: keeps slices and containers in memory, and does what a test tells it to."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import grpc

from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import card_pb2, job_pb2, node_pb2, node_service_pb2, stream_pb2
from tests.unit.controlplane.samples import inventory

Key = tuple[str, int]


def away() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "connection refused")


class ExecCommand:
    """A command in a container; the test says what it does."""

    def __init__(self, node: FakeNode, start: node_service_pb2.ExecStart, slice_uuids: list[str]) -> None:
        self.node = node
        self.start = start
        self.slice_uuids = slice_uuids
        """What its container saw when it began."""
        self.output = b""
        self.input: list[node_service_pb2.ExecRequest] = []
        """What it was given after its start, over all connections."""
        self.exit_code: int | None = None
        self._news = asyncio.Condition()

    async def write(self, data: bytes) -> None:
        self.output += data
        async with self._news:
            self._news.notify_all()

    async def end(self, exit_code: int) -> None:
        self.exit_code = exit_code
        async with self._news:
            self._news.notify_all()

    async def changed(self) -> None:
        async with self._news:
            await self._news.wait()


class ExecConnection:
    """One call about a command."""

    def __init__(self, command: ExecCommand, offset: int, given: AsyncIterator[node_service_pb2.ExecRequest]) -> None:
        self._command = command
        self._offset = offset
        self._reader = asyncio.create_task(self._read(given))

    async def _read(self, given: AsyncIterator[node_service_pb2.ExecRequest]) -> None:
        async for request in given:
            self._command.input.append(request)

    async def answers(self) -> AsyncGenerator[node_service_pb2.ExecResponse, None]:
        command = self._command
        while True:
            if not command.node.reachable:
                raise away()
            data = command.output[self._offset :]
            if data:
                chunk = stream_pb2.LogChunk(offset=self._offset, data=data, stream=stream_pb2.LOG_STREAM_STDOUT)
                self._offset += len(data)
                yield node_service_pb2.ExecResponse(output=chunk)
            elif command.exit_code is not None:
                yield node_service_pb2.ExecResponse(exit_code=command.exit_code)
                return
            else:
                await command.changed()

    def close(self) -> None:
        self._reader.cancel()


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
        self.workspaces: dict[Key, bytes] = {}
        self.reclaim_mode = job_pb2.RECLAIM_MODE_DETACH
        self.commands: list[ExecCommand] = []
        self.clock_s = 7000.0
        """Its lease clock, which the test moves."""
        self.leases: dict[Key, float] = {}
        """Until when containers may run, on that clock."""
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
        for command in self.commands:
            await command.write(b"")

    async def exit(self, job_id: str, code: int, attempt: int = 1) -> None:
        """The command of a job ends."""
        container = self.containers[job_id, attempt]
        container.state = node_pb2.CONTAINER_STATE_EXITED
        container.exit_code, container.pid = code, 0
        del container.slice_uuids[:]
        await self._tell(node_pb2.NODE_EVENT_KIND_CONTAINER_EXITED, container=container)

    async def idle(self, job_id: str, attempt: int = 1, *, idle: bool = True, busy_s: float = 3.0) -> None:
        """The container of a job is seen not to use its card, or to use it again."""
        container = self.containers[job_id, attempt]
        container.idleness.Clear()
        container.idleness.idle, container.idleness.signal = idle, "multiprocessors"
        container.idleness.busy_seconds = busy_s
        if idle:
            container.idleness.unused_since.GetCurrentTime()
        busy, quiet = node_pb2.NODE_EVENT_KIND_CONTAINER_BUSY, node_pb2.NODE_EVENT_KIND_CONTAINER_IDLE
        await self._tell(quiet if idle else busy, container=container)

    async def want_card(self, job_id: str, attempt: int = 1) -> None:
        """A checkpointed process asks for its card."""
        await self._tell(node_pb2.NODE_EVENT_KIND_CARD_WANTED, container=self.containers[job_id, attempt])

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
                same = (piece.gpu_uuid, piece.placement) == (request.gpu_uuid, request.placement)
                assert same, "an attempt has one slice"
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
        container = self.containers.get((piece.owner.job_id, piece.owner.attempt))
        seen = container is not None and piece.uuid in container.slice_uuids
        assert not seen, "destroyed under a container"
        await self._tell(node_pb2.NODE_EVENT_KIND_SLICE_DESTROYED, slice=piece)

    async def list_slices(self) -> list[card_pb2.Slice]:
        await self._called("list_slices")
        return list(self.slices.values())

    async def create_container(self, request: node_service_pb2.CreateContainerRequest) -> node_pb2.Container:
        await self._called("create_container", request.owner)
        key = (request.owner.job_id, request.owner.attempt)
        if key not in self.containers:
            assert all(uuid in self.slices for uuid in request.slice_uuids)
            self.started.append(key)
            container = node_pb2.Container(
                id=f"c-{len(self.started)}",
                owner=request.owner,
                state=node_pb2.CONTAINER_STATE_RUNNING,
                runtime=node_pb2.RUNTIME_KIND_PROCESS,
                slice_uuids=request.slice_uuids,
                pid=1000 + len(self.started),
            )
            if request.HasField("lease_expire_time"):
                self.leases[key] = max(moment(request.lease_expire_time), self.leases.get(key, 0.0))
            if request.workspace_of_attempt:
                former = (request.owner.job_id, request.workspace_of_attempt)
                self.workspaces[key] = self.workspaces[former]
            self.workspaces.setdefault(key, b"")
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
            self.workspaces.pop(key, None)
        container = self.containers.pop(key, None)
        if container is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND", "no such container")
        await self._tell(node_pb2.NODE_EVENT_KIND_CONTAINER_REMOVED, container=container)

    async def list_containers(self) -> list[node_pb2.Container]:
        await self._called("list_containers")
        return list(self.containers.values())

    async def attach_slice(self, request: node_service_pb2.AttachSliceRequest) -> node_pb2.Container:
        await self._called("attach_slice", request.owner)
        container = self.containers[request.owner.job_id, request.owner.attempt]
        assert self.slices[request.slice_uuid].owner.job_id == request.owner.job_id
        if request.slice_uuid not in container.slice_uuids:
            container.slice_uuids.append(request.slice_uuid)
        return container

    async def detach_slice(self, request: node_service_pb2.DetachSliceRequest) -> node_pb2.Container:
        await self._called("detach_slice", request.owner)
        container = self.containers[request.owner.job_id, request.owner.attempt]
        if request.slice_uuid in container.slice_uuids:
            container.slice_uuids.remove(request.slice_uuid)
        return container

    async def transfer_slice(self, request: node_service_pb2.TransferSliceRequest) -> card_pb2.Slice:
        await self._called("transfer_slice", request.owner)
        piece = self.slices.get(request.slice_uuid)
        if piece is None:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "SLICE_NOT_FOUND", "no such slice")
        former = self.containers.get((piece.owner.job_id, piece.owner.attempt))
        assert former is None or piece.uuid not in former.slice_uuids
        piece.owner.CopyFrom(request.new_owner)
        await self._tell(node_pb2.NODE_EVENT_KIND_SLICE_TRANSFERRED, slice=piece)
        return piece

    async def reclaim_container(
        self, request: node_service_pb2.ReclaimContainerRequest
    ) -> node_service_pb2.ReclaimContainerResponse:
        await self._called("reclaim_container", request.owner)
        key = (request.owner.job_id, request.owner.attempt)
        container = self.containers[key]
        if request.only_if_idle and not container.idleness.idle:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "NOT_IDLE", "its card has come into use")
        if self.reclaim_mode > request.hardest:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "RECLAIM_IMPOSSIBLE", "python (42) holds the card")
        uuids = list(container.slice_uuids)
        del container.slice_uuids[:]
        container.idleness.idle = False
        container.checkpointed = self.reclaim_mode == job_pb2.RECLAIM_MODE_CHECKPOINT
        if self.reclaim_mode == job_pb2.RECLAIM_MODE_STOP:
            await self.exit(key[0], 143, key[1])
        elif request.freeze:
            container.state = node_pb2.CONTAINER_STATE_SUSPENDED
        await self._tell(node_pb2.NODE_EVENT_KIND_RECLAIMED, container=container)
        return node_service_pb2.ReclaimContainerResponse(
            container=container, mode=self.reclaim_mode, slice_uuids=uuids, message="done"
        )

    async def resume_container(self, request: node_service_pb2.ResumeContainerRequest) -> node_pb2.Container:
        await self._called("resume_container", request.owner)
        container = self.containers[request.owner.job_id, request.owner.attempt]
        assert container.slice_uuids or not container.checkpointed
        container.checkpointed, container.state = False, node_pb2.CONTAINER_STATE_RUNNING
        return container

    async def renew_container_lease(
        self, request: node_service_pb2.RenewContainerLeaseRequest
    ) -> node_service_pb2.RenewContainerLeaseResponse:
        await self._called("renew_container_lease", request.owner)
        key = (request.owner.job_id, request.owner.attempt)
        if request.HasField("lease_expire_time"):
            self.leases[key] = max(moment(request.lease_expire_time), self.leases.get(key, 0.0))
        until = timestamp(self.leases[key]) if key in self.leases else None
        return node_service_pb2.RenewContainerLeaseResponse(time=timestamp(self.clock_s), lease_expire_time=until)

    async def exec(self, requests: AsyncIterator[node_service_pb2.ExecRequest]) -> ExecConnection:
        start = (await anext(requests)).start
        await self._called("exec", start.owner)
        known = [one for one in self.commands if start.request_id and one.start.request_id == start.request_id]
        if known:
            return ExecConnection(known[0], start.output_offset, requests)
        container = self.containers[start.owner.job_id, start.owner.attempt]
        command = ExecCommand(self, start, list(container.slice_uuids))
        self.commands.append(command)
        return ExecConnection(command, start.output_offset, requests)

    async def read_workspace(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.GetWorkspaceResponse, None]:
        await self._called("read_workspace")
        archive = self.workspaces[owner.job_id, owner.attempt]
        digest = "sha256:" + hashlib.sha256(archive).hexdigest()
        manifest = stream_pb2.ArtifactManifest(digest=digest, size_bytes=len(archive))
        yield node_service_pb2.GetWorkspaceResponse(manifest=manifest)
        yield node_service_pb2.GetWorkspaceResponse(chunk=archive[offset:])

    async def put_workspace(self, header: node_service_pb2.WorkspaceHeader, archive: Path) -> None:
        await self._called("put_workspace", header.owner)
        content = await asyncio.to_thread(archive.read_bytes)
        assert header.digest == "sha256:" + hashlib.sha256(content).hexdigest()
        self.workspaces[header.owner.job_id, header.owner.attempt] = content

    async def read_logs(
        self, owner: card_pb2.AttemptRef, offset: int, tail_lines: int, follow: bool
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        await self._called("read_logs")
        key = (owner.job_id, owner.attempt)
        if tail_lines:
            output = self.output.get(key, b"")
            offset = len(output) - len(b"".join(output.splitlines(keepends=True)[-tail_lines:]))
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
