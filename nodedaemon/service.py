"""The node daemon's face: NodeService over what the other modules do."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc

from nodedaemon.answers import Beside, Mutations
from nodedaemon.attachments import Attachments
from nodedaemon.bundles import Bundles
from nodedaemon.carrying import Carrying
from nodedaemon.container_request import duration_problem
from nodedaemon.containers import Containers
from nodedaemon.driver_facts import Span
from nodedaemon.events import EventLog
from nodedaemon.inventory import Inventory
from nodedaemon.owner import Owner
from nodedaemon.reclaim import Reclaim, Terms
from nodedaemon.results import Results
from nodedaemon.slice_transfers import SliceTransfers
from nodedaemon.slices import Slices
from nodedaemon.telemetry import Telemetry
from nodedaemon.utilization import DEFAULT_INTERVAL_S
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import seconds
from puhui.rpc.transfer import UploadPart, read_chunks
from puhui.v1.node_service_pb2 import (
    AttachSliceRequest,
    AttachSliceResponse,
    CreateContainerRequest,
    CreateContainerResponse,
    CreateSliceRequest,
    CreateSliceResponse,
    DestroySliceRequest,
    DestroySliceResponse,
    DetachSliceRequest,
    DetachSliceResponse,
    ExecRequest,
    ExecResponse,
    GetNodeRequest,
    GetNodeResponse,
    GetWorkspaceRequest,
    GetWorkspaceResponse,
    ListContainersRequest,
    ListContainersResponse,
    ListSlicesRequest,
    ListSlicesResponse,
    NodeServiceGetArtifactsRequest,
    NodeServiceGetArtifactsResponse,
    NodeServicePutBundleRequest,
    NodeServicePutBundleResponse,
    NodeServiceReadLogsRequest,
    NodeServiceReadLogsResponse,
    PutWorkspaceRequest,
    PutWorkspaceResponse,
    ReclaimContainerRequest,
    ReclaimContainerResponse,
    RemoveContainerRequest,
    RemoveContainerResponse,
    RenewContainerLeaseRequest,
    RenewContainerLeaseResponse,
    ResumeContainerRequest,
    ResumeContainerResponse,
    StopContainerRequest,
    StopContainerResponse,
    SuspendContainerRequest,
    SuspendContainerResponse,
    TransferSliceRequest,
    TransferSliceResponse,
    WatchEventsRequest,
    WatchEventsResponse,
    WatchUtilizationRequest,
    WatchUtilizationResponse,
)
from puhui.v1.node_service_pb2_grpc import NodeServiceServicer

__all__ = ["NodeService"]

_ON_RECLAIM_S = 10.0
_MOST_ON_RECLAIM_S = 300.0


class NodeService(NodeServiceServicer):
    """Serves puhui.v1.NodeService."""

    def __init__(
        self,
        inventory: Inventory,
        mutations: Mutations,
        slices: Slices,
        containers: Containers,
        attachments: Attachments,
        results: Results,
        bundles: Bundles,
        events: EventLog,
        telemetry: Telemetry,
        transfers: SliceTransfers,
        carrying: Carrying,
        reclaim: Reclaim,
    ) -> None:
        self._inventory = inventory
        self._mutations = mutations
        self._slices = slices
        self._containers = containers
        self._attachments = attachments
        self._results = results
        self._bundles = bundles
        self._events = events
        self._telemetry = telemetry
        self._transfers = transfers
        self._carrying = carrying
        self._reclaim = reclaim

    async def GetNode(self, request: GetNodeRequest, context: Any) -> GetNodeResponse:  # noqa: D102, N802
        return GetNodeResponse(node=await self._inventory.read())

    # Slices

    async def CreateSlice(self, request: CreateSliceRequest, context: Any) -> CreateSliceResponse:  # noqa: D102, N802
        async def act(owner: Owner, token: int) -> CreateSliceResponse:
            span = Span(request.placement.start, request.placement.size)
            return CreateSliceResponse(
                slice=await self._slices.create(owner, token, request.gpu_uuid, request.profile, span)
            )

        return await self._mutations.carry_out(request, CreateSliceResponse, act)

    async def DestroySlice(self, request: DestroySliceRequest, context: Any) -> DestroySliceResponse:  # noqa: D102, N802
        async def act(owner: Owner, token: int) -> DestroySliceResponse:
            await self._slices.destroy(owner, request.slice_uuid, self._containers.holder_of)
            return DestroySliceResponse()

        return await self._mutations.carry_out(request, DestroySliceResponse, act)

    async def ListSlices(self, request: ListSlicesRequest, context: Any) -> ListSlicesResponse:  # noqa: D102, N802
        return ListSlicesResponse(slices=await self._slices.book.describe_all(foreign=request.include_foreign))

    async def TransferSlice(self, request: TransferSliceRequest, context: Any) -> TransferSliceResponse:  # noqa: D102, N802
        new_owner, new_token = Owner.of(request.new_owner, "new_owner"), request.new_owner.fencing_token

        async def act(owner: Owner, token: int) -> TransferSliceResponse:
            return TransferSliceResponse(
                slice=await self._transfers.transfer(owner, request.slice_uuid, new_owner, new_token)
            )

        beside = [Beside(new_owner, new_token)]
        return await self._mutations.carry_out(request, TransferSliceResponse, act, beside=beside)

    # Containers

    async def CreateContainer(  # noqa: D102, N802
        self, request: CreateContainerRequest, context: Any
    ) -> CreateContainerResponse:
        async def act(owner: Owner, token: int) -> CreateContainerResponse:
            return CreateContainerResponse(container=await self._containers.create(owner, token, request))

        earlier = Owner.of(request.owner).of_attempt(request.workspace_of_attempt)
        beside = [Beside(earlier)] if request.workspace_of_attempt else []
        return await self._mutations.carry_out(request, CreateContainerResponse, act, beside=beside)

    async def StopContainer(self, request: StopContainerRequest, context: Any) -> StopContainerResponse:  # noqa: D102, N802
        async def act(owner: Owner, token: int) -> StopContainerResponse:
            problem = duration_problem(request, "grace")
            if problem:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"grace {problem}", field="grace")
            grace_s = seconds(request.grace) if request.HasField("grace") else None
            return StopContainerResponse(container=await self._containers.stop(owner, grace_s))

        return await self._mutations.carry_out(request, StopContainerResponse, act)

    async def RemoveContainer(  # noqa: D102, N802
        self, request: RemoveContainerRequest, context: Any
    ) -> RemoveContainerResponse:
        async def act(owner: Owner, token: int) -> RemoveContainerResponse:
            await self._containers.remove(owner, discard_results=request.discard_results)
            return RemoveContainerResponse()

        return await self._mutations.carry_out(request, RemoveContainerResponse, act)

    async def ListContainers(  # noqa: D102, N802
        self, request: ListContainersRequest, context: Any
    ) -> ListContainersResponse:
        return ListContainersResponse(containers=self._containers.describe_all())

    async def AttachSlice(self, request: AttachSliceRequest, context: Any) -> AttachSliceResponse:  # noqa: D102, N802
        async def act(owner: Owner, token: int) -> AttachSliceResponse:
            return AttachSliceResponse(container=await self._attachments.attach(owner, request.slice_uuid))

        return await self._mutations.carry_out(request, AttachSliceResponse, act)

    async def DetachSlice(self, request: DetachSliceRequest, context: Any) -> DetachSliceResponse:  # noqa: D102, N802
        async def act(owner: Owner, token: int) -> DetachSliceResponse:
            return DetachSliceResponse(container=await self._attachments.detach(owner, request.slice_uuid))

        return await self._mutations.carry_out(request, DetachSliceResponse, act)

    async def ReclaimContainer(  # noqa: D102, N802
        self, request: ReclaimContainerRequest, context: Any
    ) -> ReclaimContainerResponse:
        async def act(owner: Owner, token: int) -> ReclaimContainerResponse:
            done = await self._reclaim.reclaim(owner, token, _terms(request))
            return ReclaimContainerResponse(
                container=done.container,
                mode=done.mode,
                slice_uuids=done.slice_uuids,
                message=done.message,
                warning=done.warning,
            )

        return await self._mutations.carry_out(request, ReclaimContainerResponse, act)

    async def SuspendContainer(  # noqa: D102, N802
        self, request: SuspendContainerRequest, context: Any
    ) -> SuspendContainerResponse:
        async def act(owner: Owner, token: int) -> SuspendContainerResponse:
            record = await self._containers.suspension.suspend(owner)
            return SuspendContainerResponse(container=self._containers.describe(record))

        return await self._mutations.carry_out(request, SuspendContainerResponse, act)

    async def ResumeContainer(  # noqa: D102, N802
        self, request: ResumeContainerRequest, context: Any
    ) -> ResumeContainerResponse:
        async def act(owner: Owner, token: int) -> ResumeContainerResponse:
            record = await self._reclaim.resume(owner)
            return ResumeContainerResponse(container=self._containers.describe(record))

        return await self._mutations.carry_out(request, ResumeContainerResponse, act)

    async def RenewContainerLease(  # noqa: D102, N802
        self, request: RenewContainerLeaseRequest, context: Any
    ) -> RenewContainerLeaseResponse:
        return self._containers.leases.renew(request, self._mutations)

    async def Exec(  # noqa: D102, N802
        self, request_iterator: AsyncIterator[ExecRequest], context: Any
    ) -> AsyncIterator[ExecResponse]:
        async def accepted() -> None:
            # A caller that waits for this before it sends input never sends to a command that was refused.
            await context.send_initial_metadata(())

        serving = self._containers.execs.serve(request_iterator, self._mutations, accepted)
        async with contextlib.aclosing(serving) as responses:
            async for response in responses:
                yield response

    # Code, output, results

    async def PutBundle(  # noqa: D102, N802
        self, request_iterator: AsyncIterator[NodeServicePutBundleRequest], context: Any
    ) -> NodeServicePutBundleResponse:
        bundle, already = await self._bundles.put(
            cast("AsyncIterator[UploadPart]", request_iterator), self._containers.bundles_in_use
        )
        return NodeServicePutBundleResponse(bundle=bundle, already_present=already)

    async def ReadLogs(  # noqa: D102, N802
        self, request: NodeServiceReadLogsRequest, context: Any
    ) -> AsyncIterator[NodeServiceReadLogsResponse]:
        chunks = self._results.read_log(
            Owner.of(request.owner), offset=request.offset, tail_lines=request.tail_lines, follow=request.follow
        )
        async for chunk in chunks:
            yield NodeServiceReadLogsResponse(chunk=chunk)

    async def GetArtifacts(  # noqa: D102, N802
        self, request: NodeServiceGetArtifactsRequest, context: Any
    ) -> AsyncIterator[NodeServiceGetArtifactsResponse]:
        manifest, archive = await self._results.artifacts(Owner.of(request.owner))
        yield NodeServiceGetArtifactsResponse(manifest=manifest)
        for chunk in read_chunks(archive, request.offset):
            yield NodeServiceGetArtifactsResponse(chunk=chunk)

    async def GetWorkspace(  # noqa: D102, N802
        self, request: GetWorkspaceRequest, context: Any
    ) -> AsyncIterator[GetWorkspaceResponse]:
        manifest, archive = await self._carrying.give(Owner.of(request.owner))
        yield GetWorkspaceResponse(manifest=manifest)
        for chunk in read_chunks(archive, request.offset):
            yield GetWorkspaceResponse(chunk=chunk)

    async def PutWorkspace(  # noqa: D102, N802
        self, request_iterator: AsyncIterator[PutWorkspaceRequest], context: Any
    ) -> PutWorkspaceResponse:
        await self._carrying.take_in(request_iterator, self._mutations)
        return PutWorkspaceResponse()

    # Watching

    async def WatchEvents(  # noqa: D102, N802
        self, request: WatchEventsRequest, context: Any
    ) -> AsyncIterator[WatchEventsResponse]:
        async for event in self._events.watch(request.after_cursor):
            yield WatchEventsResponse(event=event)

    async def WatchUtilization(  # noqa: D102, N802
        self, request: WatchUtilizationRequest, context: Any
    ) -> AsyncIterator[WatchUtilizationResponse]:
        interval_s = seconds(request.interval) if request.HasField("interval") else DEFAULT_INTERVAL_S
        async with contextlib.aclosing(self._telemetry.watch(interval_s, request.uuids)) as responses:
            async for response in responses:
                yield response


def _terms(request: ReclaimContainerRequest) -> Terms:
    """Returns how cards may be taken.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID.
    """
    problem = duration_problem(request, "on_reclaim_limit")
    limit_s = seconds(request.on_reclaim_limit) if request.HasField("on_reclaim_limit") else _ON_RECLAIM_S
    if not problem and not 0 < limit_s <= _MOST_ON_RECLAIM_S:
        problem = f"must be more than 0 and at most {_MOST_ON_RECLAIM_S:g} s"
    if problem:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
            f"on_reclaim_limit {problem}",
            field="on_reclaim_limit",
        )
    return Terms(
        hardest=request.hardest,
        only_if_idle=request.only_if_idle,
        freeze=request.freeze,
        warn_signal=request.warn_signal,
        on_reclaim=tuple(request.on_reclaim),
        on_reclaim_limit_s=limit_s,
    )
