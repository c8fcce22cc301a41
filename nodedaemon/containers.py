"""Containers: one per attempt, made on its slices, watched to its end, removed without a trace."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace

import grpc
import structlog

from nodedaemon.attachments import Attachments
from nodedaemon.bundles import Bundles
from nodedaemon.carrying import choose_workspace
from nodedaemon.container_ends import ContainerEnds
from nodedaemon.container_leases import ContainerLeases
from nodedaemon.container_request import container_name, environment, identity, require_sound
from nodedaemon.descriptions import IdlenessOf, describe_container, unwatched
from nodedaemon.devices import CardDevices
from nodedaemon.events import EventLog
from nodedaemon.execs import Execs
from nodedaemon.idle import policy_of
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage, IdleRecord, SliceRecord
from nodedaemon.results import known_container
from nodedaemon.runtime import ContainerRuntime, ContainerSpec, ContainerStatus
from nodedaemon.slices import Slices
from nodedaemon.suspension import Suspension
from nodedaemon.workspace import Attempts
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, seconds
from puhui.v1.node_pb2 import Container, NodeEventKind
from puhui.v1.node_service_pb2 import CreateContainerRequest

__all__ = ["Containers"]

_log = structlog.get_logger(__name__)

_DEFAULT_GRACE_S = 10.0


class Containers:
    """The containers of this node.

    Args:
        runtime: what runs them.
        journal: where what is intended is kept.
        events: where what happens is told.
        slices: the slices that they run on.
        bundles: the code that they run.
        attempts: where their things are.
        cards: where the driver keeps its device files.
        default_image: image of a container that asks for none.
        attachments: what they see of their slices.
        leases: until when they may run.
        idleness: whether they use their cards.
    """

    def __init__(
        self,
        runtime: ContainerRuntime,
        journal: Journal,
        events: EventLog,
        slices: Slices,
        bundles: Bundles,
        attempts: Attempts,
        cards: CardDevices,
        default_image: str,
        attachments: Attachments,
        leases: ContainerLeases,
        idleness: IdlenessOf = unwatched,
    ) -> None:
        self._runtime = runtime
        self._journal = journal
        self._events = events
        self._slices = slices
        self._bundles = bundles
        self._attempts = attempts
        self._cards = cards
        self._default_image = default_image
        self._attachments = attachments
        self.leases = leases
        """Until when they may run."""
        self._idleness = idleness
        self._node_id = journal.fact("node_id", "")
        self._kind = runtime.describe().kind
        self.suspension = Suspension(runtime, journal, events, idleness)
        """How they are frozen and thawed."""
        self.ends = ContainerEnds(runtime, journal, events, self.suspension, leases, idleness)
        """How they end."""
        self.execs = Execs(runtime, journal, events, attempts, self._current_environment)
        """What runs in them beside their own commands."""

    # Making one -------------------------------------------------------------------------------------------

    async def create(self, owner: Owner, token: int, request: CreateContainerRequest) -> Container:
        """Makes a container and starts its command. Whatever fails, nothing is left behind.

        Raises:
            Refusal: INVALID_ARGUMENT with SPEC_INVALID, IDLE_AFTER_TOO_SHORT or COMMAND_NOT_FOUND;
                FAILED_PRECONDITION with SLICE_NOT_FOUND, BUNDLE_NOT_FOUND, IMAGE_NOT_FOUND, NOT_FINISHED,
                WORKSPACE_NOT_FOUND, WORKSPACE_UPLOADED or LEASE_EXPIRED; ALREADY_EXISTS with CONTAINER_EXISTS or
                CONTAINER_DIFFERS; UNAVAILABLE with RUNTIME_UNAVAILABLE; INTERNAL with RUNTIME_REFUSED or
                LEASE_NOT_KEPT.
        """
        known = self._journal.container(owner)
        if known is not None and known.stage is not ContainerStage.CREATING:
            _require_same(known, request)
            return self.describe(known)  # made before a crash that swallowed the answer
        require_sound(request)
        lease_end = self.leases.of_new(owner, request)
        policy = policy_of(request.idle_watch) if request.HasField("idle_watch") else None
        slices = [self._slices.book.owned(owner, uuid) for uuid in request.slice_uuids]
        code = self._bundles.code(request.bundle_id) if request.bundle_id else None
        nodes = self._attachments.nodes.require(slices)
        begins_with = choose_workspace(self._journal, self._attempts, owner, request.workspace_of_attempt, known)
        with self._journal.atomic():
            if lease_end is not None:
                self._journal.leases.extend(owner, lease_end)
            if policy is not None:
                self._journal.put_idle(
                    IdleRecord(owner, policy.idle_after_s, policy.idle_below_percent, policy.start_grace_s)
                )
            record = self._journal.put_container(
                ContainerRecord(
                    owner=owner,
                    token=token,
                    stage=ContainerStage.CREATING,
                    image=request.image or self._default_image,
                    bundle_id=request.bundle_id,
                    slice_uuids=tuple(request.slice_uuids),
                    stop_grace_s=seconds(request.stop_grace) if request.HasField("stop_grace") else _DEFAULT_GRACE_S,
                    create_time=now(),
                    max_duration_s=seconds(request.max_duration) if request.HasField("max_duration") else None,
                    digest=identity(request),
                    workspace_of=begins_with,
                )
            )
        try:
            if begins_with:
                async with self._attempts.lock(owner.of_attempt(begins_with)):
                    self._attempts.take_workspace(owner, begins_with)
            folder = self._attempts.make(owner)
            spec = ContainerSpec(
                name=self._name(owner),
                image=record.image,
                command=list(request.command),
                env={**request.env, **self._environment(owner, [one for one, _ in slices])},
                labels={
                    "puhui.centre": owner.centre,
                    "puhui.job": owner.job_id,
                    "puhui.attempt": str(owner.attempt),
                    "puhui.token": str(token),
                },
                code=code or self._attempts.make_empty_code(owner),
                workspace=folder.workspace,
                log=folder.log,
                mounts=await self._attachments.prepare(owner, nodes),
                network=request.network,
                cpus=request.limits.cpus,
                host_memory_mib=request.limits.host_memory_mib,
                pids=request.limits.pids,
            )
            record = await self._launch(record, spec)
        except OSError as error:
            await self._roll_back(record)
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "WORKSPACE_UNAVAILABLE",
                f"the workspace cannot be made on this node: {error.strerror}",
            ) from error
        except BaseException:
            await self._roll_back(record)
            raise
        described = self.describe(record)
        self.ends.note_early(record)
        return described

    async def _launch(self, record: ContainerRecord, spec: ContainerSpec) -> ContainerRecord:
        container_id = await self._runtime.create(spec)
        # Before the start: an end that is quicker than the answer must find its container.
        record = self._journal.put_container(replace(record, container_id=container_id))
        leased = self._journal.leases.get(record.owner) is not None
        # Where it can be, it is held to its lease before its command begins.
        first = await self._runtime.initialize(container_id) if leased else 0
        if first:
            await self.leases.hold(record, first)
        asked = now()  # Podman itself tells the start in whole seconds
        status = await self._runtime.start(container_id)
        if leased and not first:
            await self.leases.hold(record, status.pid)
        record = replace(record, stage=ContainerStage.RUNNING, pid=status.pid, start_time=asked)
        self._keep_started(record, "CONTAINER_STARTED", f"started container {container_id[:12]}")
        self.ends.begin(record)
        return record

    def _keep_started(self, record: ContainerRecord, reason: str, message: str) -> None:
        """Writes a container that began down together with the event that tells of it."""
        with self._journal.atomic():
            self._journal.put_container(record)
            self._events.add(
                NodeEventKind.NODE_EVENT_KIND_CONTAINER_STARTED,
                reason,
                message,
                owner=record.owner.ref(record.token),
                container=self.describe(record),
            )

    def _name(self, owner: Owner) -> str:
        return container_name(self._node_id, owner)

    def _environment(self, owner: Owner, slices: list[SliceRecord]) -> dict[str, str]:
        return environment(owner, slices, emulated=self._cards.emulated, caps=self._attachments.place(owner))

    def _current_environment(self, record: ContainerRecord) -> dict[str, str]:
        attached = (self._journal.slice(uuid) for uuid in record.slice_uuids)
        return self._environment(record.owner, [one for one in attached if one is not None])

    async def _roll_back(self, record: ContainerRecord) -> None:
        record = self._journal.container(record.owner) or record
        try:
            await self._remove_from_runtime(record)
            if record.workspace_of:
                self._attempts.return_workspace(record.owner, record.workspace_of)
            await self._discard(record.owner, but_carried=True)
        except Refusal as error:
            # Still CREATING in the journal: the next start finds it.
            _log.error("a half-made container could not be rolled back", owner=str(record.owner), error=error.message)
            return
        self._journal.delete_container(record.owner)

    async def _remove_from_runtime(self, record: ContainerRecord) -> None:
        # By name where it may have been made without our learning its id.
        await self._runtime.remove(record.container_id or self._name(record.owner))
        self.ends.removed(record.container_id)
        self.leases.let_go(record)

    # Its end and its removal ------------------------------------------------------------------------------

    async def stop(self, owner: Owner, grace_s: float | None) -> Container:
        """Ends a container's command and waits for it: SIGTERM, grace, SIGKILL.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; DEADLINE_EXCEEDED with CONTAINER_STUCK.
        """
        record = self._known(owner)
        return self.describe(await self.ends.end(record, record.stop_grace_s if grace_s is None else grace_s))

    async def remove(self, owner: Owner, *, discard_results: bool) -> None:
        """Removes a container, stopping it first if need be. What is gone already is gone.

        Raises:
            Refusal: DEADLINE_EXCEEDED with CONTAINER_STUCK; INTERNAL with RUNTIME_REFUSED or WORKSPACE_STUCK.
        """
        record = self._journal.container(owner)
        if record is None:
            if discard_results and self._attempts.folder(owner).path.exists():
                await self._discard(owner)  # a workspace that was uploaded for it
            return
        if record.stage.is_alive:
            record = await self.ends.end(record, record.stop_grace_s)
        if record.stage is not ContainerStage.REMOVED:
            await self._remove_from_runtime(record)
            with self._journal.atomic():
                record = self._journal.put_container(replace(record, stage=ContainerStage.REMOVED))
                self._events.add(
                    NodeEventKind.NODE_EVENT_KIND_CONTAINER_REMOVED,
                    "CONTAINER_REMOVED",
                    f"removed container {record.container_id[:12]}",
                    owner=owner.ref(record.token),
                    container=self.describe(record),
                )
        if discard_results:
            await self.execs.settle(owner)
            await self._discard(owner)
            self._journal.delete_container(owner)
            self.ends.forget(owner)

    async def _discard(self, owner: Owner, *, but_carried: bool = False) -> None:
        remove = functools.partial(self._attempts.remove, owner, but_carried=but_carried)
        try:
            await asyncio.to_thread(remove)
        except PermissionError:
            await self._runtime.make_removable(self._attempts.folder(owner).path)
            try:
                await asyncio.to_thread(remove)
            except PermissionError as error:
                raise Refusal(
                    grpc.StatusCode.INTERNAL,
                    "WORKSPACE_STUCK",
                    f"what {owner} left on this node cannot be removed: {error}",
                ) from error

    # Reading ----------------------------------------------------------------------------------------------

    def adopt(self, record: ContainerRecord, status: ContainerStatus) -> ContainerRecord:
        """Takes a container that outlived the daemon back. One whose start was not told yet is told of now."""
        new = not record.stage.is_alive
        record = replace(
            record,
            stage=ContainerStage.RUNNING if new else record.stage,
            container_id=status.id,
            pid=status.pid,
            start_time=record.start_time or status.start_time or now(),
        )
        if new:
            self._keep_started(
                record, "CONTAINER_COMPLETED", f"container {status.id[:12]} had begun when the daemon ended"
            )
        else:
            self._journal.put_container(record)
        self.ends.begin(record)
        return record

    async def forget(self, record: ContainerRecord) -> None:
        """Removes every trace of a container that never came to be."""
        await self._roll_back(record)

    def describe_all(self) -> list[Container]:
        """Returns the containers that are there for the wire, the oldest first."""
        return [
            self.describe(record) for record in self._journal.containers() if record.stage is not ContainerStage.REMOVED
        ]

    def holder_of(self, slice_uuid: str) -> str | None:
        """Returns the id of the living container that runs on a slice, if any."""
        for record in self._journal.containers():
            alive = record.stage is ContainerStage.CREATING or record.stage.is_alive
            if alive and slice_uuid in record.slice_uuids:
                return record.container_id or self._name(record.owner)
        return None

    def bundles_in_use(self) -> set[str]:
        """Returns the ids of the bundles that containers have mounted."""
        return {record.bundle_id for record in self._journal.containers() if record.stage is not ContainerStage.REMOVED}

    def _known(self, owner: Owner) -> ContainerRecord:
        return known_container(self._journal, owner)

    def describe(self, record: ContainerRecord) -> Container:
        """Returns a container for the wire."""
        return describe_container(record, self._kind, self._idleness(record))


def _require_same(known: ContainerRecord, request: CreateContainerRequest) -> None:
    """Refuses to make an attempt's container anew, or another one.

    Raises:
        Refusal: ALREADY_EXISTS with CONTAINER_EXISTS or CONTAINER_DIFFERS.
    """
    if known.stage is ContainerStage.REMOVED:
        raise Refusal(
            grpc.StatusCode.ALREADY_EXISTS,
            "CONTAINER_EXISTS",
            f"{known.owner} had its container already; a retry is a new attempt",
        )
    if known.digest != identity(request) if known.digest else known.bundle_id != request.bundle_id:
        raise Refusal(
            grpc.StatusCode.ALREADY_EXISTS,
            "CONTAINER_DIFFERS",
            f"{known.owner} has a container that was made by another request: its command, image, environment or "
            "limits differ; what is to run otherwise is a new attempt",
            container_id=known.container_id,
        )
