"""Freezes containers and thaws them.

The journal says SUSPENDED from before anything is frozen until everything is thawed, so a start after a crash only has
to freeze what it says is suspended.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from nodedaemon.descriptions import IdlenessOf, describe_container
from nodedaemon.events import EventLog
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.results import known_container
from nodedaemon.runtime import ContainerRuntime
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["Suspension", "living_container"]


def living_container(journal: Journal, owner: Owner) -> ContainerRecord:
    """Returns the container of an attempt whose command has begun and has not ended.

    Raises:
        Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with CONTAINER_NOT_RUNNING, or LEASE_EXPIRED
            while it is being killed for that.
    """
    record = known_container(journal, owner)
    if record.stage.is_alive and record.lease_expired:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "LEASE_EXPIRED",
            f"the lease of {owner} has run out, and its container is being killed; a retry is a new attempt",
        )
    if not record.stage.is_alive:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "CONTAINER_NOT_RUNNING",
            f"the container of {owner} is {record.stage}: its command must be running; a retry is a new attempt",
        )
    return record


class Suspension:
    """Freezes and thaws the containers of this node.

    A suspended container keeps its slices, its memory and its place. Its `max_duration` goes on counting: it is time on
    the clock, not time that the command ran.

    Args:
        runtime: what runs them.
        journal: where what is intended is kept.
        events: where what happens is told.
        idleness: whether they use their cards.
    """

    def __init__(self, runtime: ContainerRuntime, journal: Journal, events: EventLog, idleness: IdlenessOf) -> None:
        self._runtime = runtime
        self._journal = journal
        self._events = events
        self._idleness = idleness
        self._kind = runtime.describe().kind

    async def suspend(self, owner: Owner) -> ContainerRecord:
        """Freezes a container, with all that Exec started in it. One that is suspended already stays so.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with CONTAINER_NOT_RUNNING;
                DEADLINE_EXCEEDED with SUSPEND_STUCK, and it runs on; INTERNAL with RUNTIME_REFUSED.
        """
        record = living_container(self._journal, owner)
        if record.stage is ContainerStage.SUSPENDED:
            return record
        record = self._journal.put_container(replace(record, stage=ContainerStage.SUSPENDED))
        try:
            await self._runtime.suspend(record.container_id)
        except Refusal:
            await self._thaw(record)
            raise
        record = living_container(self._journal, owner)  # it may have ended before it was frozen
        self._tell(
            record, NodeEventKind.NODE_EVENT_KIND_CONTAINER_SUSPENDED, "CONTAINER_SUSPENDED", "suspended container"
        )
        return record

    async def resume(self, owner: Owner) -> ContainerRecord:
        """Thaws a container. One that is not suspended runs on.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with CONTAINER_NOT_RUNNING; INTERNAL with
                RUNTIME_REFUSED.
        """
        record = living_container(self._journal, owner)
        if record.stage is not ContainerStage.SUSPENDED:
            return record
        await self.thaw(record)
        return living_container(self._journal, owner)  # it may have ended as soon as it could

    async def thaw(self, record: ContainerRecord) -> None:
        """Thaws a suspended container, and tells of it.

        Raises:
            Refusal: INTERNAL with RUNTIME_REFUSED.
        """
        await self._thaw(record)
        known = self._journal.container(record.owner)
        if known is not None and known.stage.is_alive:
            kind = NodeEventKind.NODE_EVENT_KIND_CONTAINER_RESUMED
            self._tell(known, kind, "CONTAINER_RESUMED", "resumed container")

    async def _thaw(self, record: ContainerRecord) -> None:
        await self._runtime.resume(record.container_id)
        now_known = self._journal.container(record.owner)
        if now_known is not None and now_known.stage is ContainerStage.SUSPENDED:
            self._journal.put_container(replace(now_known, stage=ContainerStage.RUNNING))

    @contextlib.asynccontextmanager
    async def awake(self, record: ContainerRecord) -> AsyncIterator[None]:
        """Lets a frozen container run for as long as the block lasts: what is frozen cannot be moved.

        Raises:
            Refusal: as the runtime does.
        """
        if record.stage is not ContainerStage.SUSPENDED:
            yield
            return
        await self._runtime.resume(record.container_id)
        try:
            yield
        finally:
            await self._runtime.suspend(record.container_id)

    async def restore(self, record: ContainerRecord) -> None:
        """Freezes again what the journal says is suspended: the daemon may have ended in between.

        Raises:
            Refusal: as `suspend`; the container then runs.
        """
        if record.stage is ContainerStage.SUSPENDED:
            try:
                await self._runtime.suspend(record.container_id)
            except Refusal:
                await self._thaw(record)
                raise

    def _tell(self, record: ContainerRecord, kind: NodeEventKind.ValueType, reason: str, message: str) -> None:
        self._events.add(
            kind,
            reason,
            f"{message} {record.container_id[:12]}",
            owner=record.owner.ref(record.token),
            container=describe_container(record, self._kind, self._idleness(record)),
        )
