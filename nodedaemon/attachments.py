"""Which slices living containers see: attached and detached while their commands run.

The journal says what is meant. A slice is attached in the journal before it is shown, and hidden before it is detached
in the journal, so that after a crash at any moment showing what the journal says makes both agree again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import grpc

from nodedaemon.checkpoint import Process
from nodedaemon.descriptions import IdlenessOf, describe_container, unwatched
from nodedaemon.devices import (
    CardDevices,
    card_mounts,
    require_card_node,
)
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.holders import Holder
from nodedaemon.hotplug import HotPlug
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import CardRecord, ContainerRecord, SliceRecord, SliceStage
from nodedaemon.results import known_container
from nodedaemon.runtime import Mount
from nodedaemon.slice_nodes import SliceNodes, in_use
from nodedaemon.slices import Slices
from nodedaemon.workspace import Attempts
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import Container, NodeEventKind, RuntimeKind

__all__ = ["Attachments", "Vacate"]

Vacate = Callable[[ContainerRecord, list[Holder]], Awaitable[Callable[[ContainerRecord], None]]]
"""Sees to it that nobody holds a container's cards, and returns what is to be written down once they are detached."""


class Attachments:
    """What the containers of this node see of its slices.

    Args:
        journal: where what is meant is kept.
        events: where what happens is told.
        gpus: the GPUs that the slices are on.
        slices: the slices.
        attempts: where the containers' directories are.
        cards: where the driver keeps its device files.
        hotplug: what makes nodes appear in containers.
        kind: what runs the containers.
        changed: called after any change of what a container sees.
        idleness: whether a container uses its cards.
    """

    def __init__(
        self,
        journal: Journal,
        events: EventLog,
        gpus: Gpus,
        slices: Slices,
        attempts: Attempts,
        cards: CardDevices,
        hotplug: HotPlug,
        kind: RuntimeKind.ValueType,
        *,
        changed: Callable[[], None],
        idleness: IdlenessOf = unwatched,
    ) -> None:
        self._journal = journal
        self._events = events
        self._gpus = gpus
        self._slices = slices
        self._attempts = attempts
        self._cards = cards
        self._hotplug = hotplug
        self.nodes = SliceNodes(gpus, cards, hotplug)
        """Where the nodes of slices are."""
        self._kind = kind
        self._changed = changed
        self._idleness = idleness
        # A lock is there for as long as somebody holds or awaits it.
        self._locks: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()
        self._unsure: dict[Owner, str] = {}
        """Whose container may not see what it should, and why."""

    # A container from its start ---------------------------------------------------------------------------

    def place(self, owner: Owner) -> str:
        """Returns where a command of an attempt finds the cap nodes of its slices."""
        return self._hotplug.place(self._attempts.folder(owner).caps)

    async def prepare(self, owner: Owner, nodes: dict[str, Path]) -> list[Mount]:
        """Returns what a container that is to be created must be given to see these nodes, and others later.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED.
            OSError: the disk is full.
        """
        cut = [] if self._cards.emulated else await self._gpus.cut_minors()
        return [*card_mounts(cut, self._cards), *await self._hotplug.prepare(self._attempts.folder(owner).caps, nodes)]

    # A living container -----------------------------------------------------------------------------------

    async def attach(self, owner: Owner, uuid: str) -> Container:
        """Makes a slice appear in an attempt's living container. One that is there already stays.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with CONTAINER_NOT_RUNNING,
                SLICE_NOT_FOUND, CAP_NODE_MISSING or HOTPLUG_UNAVAILABLE; INTERNAL with DRIVER_REFUSED. The container
                sees then what it saw before.
        """
        async with self._lock(owner):
            before = self._living(owner)
            one, gpu = self._slices.book.owned(owner, uuid)
            self.nodes.require([(one, gpu)])
            if not self._cards.emulated:
                require_card_node(gpu.minor, Path(f"/proc/{before.pid}/root"))
            new = uuid not in before.slice_uuids
            wanted = (*before.slice_uuids, uuid) if new else before.slice_uuids
            nodes = self._nodes_of(owner, wanted)
            self._write(owner, wanted)
            try:
                await self._show(before, nodes)
            except BaseException:
                if new:
                    await self._take_back(owner, before.slice_uuids)
                raise
            message = f"attached slice {uuid} ({one.profile}) to container {before.container_id[:12]}"
            if new:
                self._tell(owner, NodeEventKind.NODE_EVENT_KIND_SLICE_ATTACHED, "SLICE_ATTACHED", message, one)
            return self._describe(owner)

    async def _take_back(self, owner: Owner, uuids: Sequence[str]) -> None:
        """Makes a container see what it saw before something failed."""
        record = known_container(self._journal, owner)
        if record.slice_uuids != tuple(uuids):
            record = self._write(owner, uuids)
        try:
            await self._show(record, self._nodes_of(owner, uuids))
        except Refusal as error:
            # A slice that it saw may be hidden.
            self._doubt(record, error)

    async def detach(self, owner: Owner, uuid: str) -> Container:
        """Makes a slice vanish from an attempt's living container. One that is not there stays away.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with CONTAINER_NOT_RUNNING,
                SLICE_NOT_FOUND (this attempt never had it), SLICE_IN_USE, naming who holds it, HOLDERS_UNKNOWN or
                HOTPLUG_UNAVAILABLE; INTERNAL with DRIVER_REFUSED. The container sees then what it saw before.
        """
        async with self._lock(owner):
            before = self._living(owner)
            if uuid not in before.slice_uuids:
                self._slices.book.require_known(owner, uuid)
                return self._describe(owner)
            one, gpu = self._slices.book.owned(owner, uuid)
            rest = tuple(other for other in before.slice_uuids if other != uuid)
            nodes = self._nodes_of(owner, rest)
            try:
                # Hidden first: whoever does not hold it by then cannot come to hold it while this looks.
                await self._show(before, nodes)
                holders = await self.nodes.holders(before, one, gpu)
                if holders:
                    raise in_use(before, one, holders)
                message = f"detached slice {uuid} ({one.profile}) from container {before.container_id[:12]}"
                with self._journal.atomic():
                    self._write(owner, rest)
                    self._tell(owner, NodeEventKind.NODE_EVENT_KIND_SLICE_DETACHED, "SLICE_DETACHED", message, one)
            except BaseException:
                await self._take_back(owner, before.slice_uuids)
                raise
            return self._describe(owner)

    async def withdraw(self, owner: Owner, vacate: Vacate) -> tuple[ContainerRecord, list[SliceRecord]]:
        """Makes all slices of an attempt's living container vanish from it, or none.

        Args:
            owner: whose container.
            vacate: called once nothing can come to hold them, while they are hidden, with who holds them; it sees to it
                that nobody does. What it returns is written down together with the detachment.

        Returns:
            The container as it was, and the slices that it saw.

        Raises:
            Refusal: as `detach` does, and what `vacate` raises. The container sees then what it saw before.
        """
        async with self._lock(owner):
            before = self._living(owner)
            slices = [self._slices.book.owned(owner, uuid) for uuid in before.slice_uuids]
            try:
                await self._show(before, {})
                settle = await vacate(before, await self.nodes.all_holders(before, slices))
                after = known_container(self._journal, owner)
                if after.stage.is_alive:
                    for one, gpu in slices:
                        holders = await self.nodes.holders(before, one, gpu)
                        if holders:
                            raise in_use(before, one, holders)
                with self._journal.atomic():
                    self._write(owner, ())
                    settle(known_container(self._journal, owner))
                    for one, _ in slices:
                        message = f"detached slice {one.uuid} ({one.profile}) from container {before.container_id[:12]}"
                        kind = NodeEventKind.NODE_EVENT_KIND_SLICE_DETACHED
                        self._tell(owner, kind, "SLICE_DETACHED", message, one)
            except BaseException:
                if known_container(self._journal, owner).stage.is_alive:
                    await self._take_back(owner, before.slice_uuids)
                raise
            return before, [one for one, _ in slices]

    async def holders(self, owner: Owner) -> list[Holder]:
        """Returns the processes that hold the slices of an attempt's living container now, by process id.

        Raises:
            Refusal: as `detach` does.
        """
        before = self._living(owner)
        return await self.nodes.all_holders(
            before, [self._slices.book.owned(owner, uuid) for uuid in before.slice_uuids]
        )

    def cards(self, owner: Owner) -> list[tuple[CardRecord, dict[str, Path]]]:
        """Returns the slices that an attempt's container sees, and where their nodes are on the host, by name.

        Raises:
            Refusal: FAILED_PRECONDITION with SLICE_NOT_FOUND or CAP_NODE_MISSING; INTERNAL with DRIVER_REFUSED.
        """
        found = []
        for uuid in known_container(self._journal, owner).slice_uuids:
            one, gpu = self._slices.book.owned(owner, uuid)
            nodes = self.nodes.sources([(one, gpu)])
            found.append((CardRecord(uuid, gpu.model, one.profile, tuple(nodes)), nodes))
        return found

    async def signal(self, record: ContainerRecord, number: int, processes: Collection[Process] | None) -> list[int]:
        """Signals processes of a living container, as `HotPlug.signal` does."""
        return await self._hotplug.signal(record.pid, number, processes)

    # What should be so ------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Makes every living container see what the journal says, and lets go of slices that are there no more."""
        for record in self._journal.containers():
            await self._restore(record.owner)

    async def settle(self) -> None:
        """Tries again what could not be restored."""
        for owner in list(self._unsure):
            await self._restore(owner)

    async def let_go(self, one: SliceRecord) -> None:
        """Takes a slice that is gone, without anybody having asked for that, out of the container that sees it.

        A cap node is but a number: whoever sees it would see the next slice in that place.

        Raises:
            Refusal: as `detach` does, but for what is about holders.
        """
        async with self._lock(one.owner):
            record = self._journal.container(one.owner)
            if record is None or not record.stage.is_alive or one.uuid not in record.slice_uuids:
                return
            rest = tuple(other for other in record.slice_uuids if other != one.uuid)
            try:
                await self._show(record, self._nodes_of(one.owner, rest))
            except Refusal as error:
                # Its command has ended, which is told in a moment: nobody in it sees anything any more.
                if error.reason != "CONTAINER_NOT_RUNNING":
                    raise
            self._let_go(one.owner, one.uuid)

    def _let_go(self, owner: Owner, uuid: str) -> None:
        record = known_container(self._journal, owner)
        with self._journal.atomic():
            self._write(owner, [one for one in record.slice_uuids if one != uuid])
            self._tell(
                owner,
                NodeEventKind.NODE_EVENT_KIND_SLICE_DETACHED,
                "SLICE_VANISHED",
                f"slice {uuid} is gone, and with it from container {record.container_id[:12]}",
                self._journal.slice(uuid),
            )

    async def _restore(self, owner: Owner) -> None:
        async with self._lock(owner):
            record = self._journal.container(owner)
            if record is None or not record.stage.is_alive:
                self._unsure.pop(owner, None)
                return
            there = tuple(uuid for uuid in record.slice_uuids if self._is_there(owner, uuid))
            try:
                changed = await self._show(record, self._nodes_of(owner, there))
            except Refusal as error:
                if error.reason != "CONTAINER_NOT_RUNNING":
                    # What is gone stays noted: while the container sees its nodes nothing may be made in its place.
                    self._doubt(record, error)
                    return
                changed = False
            self._unsure.pop(owner, None)
            for uuid in set(record.slice_uuids) - set(there):
                self._let_go(owner, uuid)
            if changed and there == record.slice_uuids:
                message = f"container {record.container_id[:12]} sees its {len(there)} slices again"
                self._reconciled(owner, "ATTACHMENTS_RESTORED", message)

    def doubt(self, owner: Owner) -> str | None:
        """Returns why it is not sure that an attempt's container sees what it should; None when it is."""
        return self._unsure.get(owner)

    def _doubt(self, record: ContainerRecord, error: Refusal) -> None:
        """Notes that a container may not see what it should, which is tried again until it does."""
        if self._unsure.get(record.owner) != error.message:
            self._unsure[record.owner] = error.message
            message = f"container {record.container_id[:12]} may not see what it should: {error.message}"
            self._reconciled(record.owner, error.reason, message)

    def _is_there(self, owner: Owner, uuid: str) -> bool:
        one = self._journal.slice(uuid)
        return one is not None and one.owner == owner and one.stage is SliceStage.ACTIVE

    # Parts ------------------------------------------------------------------------------------------------

    def _lock(self, owner: Owner) -> asyncio.Lock:
        return self._locks.setdefault(owner, asyncio.Lock())

    def _living(self, owner: Owner) -> ContainerRecord:
        record = known_container(self._journal, owner)
        if not record.stage.is_alive:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CONTAINER_NOT_RUNNING",
                f"the command of {owner} is not running, so its container sees no slice; a new attempt gets a new one",
            )
        return record

    def _nodes_of(self, owner: Owner, uuids: Iterable[str]) -> dict[str, Path]:
        """Returns where the cap nodes of an attempt's slices are on the host, by name.

        A slice that vanished may have none any more, and it is not for the others to wait until that is noticed.

        Raises:
            Refusal: FAILED_PRECONDITION with CAP_NODE_MISSING; INTERNAL with DRIVER_REFUSED.
        """
        slices = [self._slices.book.owned(owner, uuid) for uuid in uuids if self._is_there(owner, uuid)]
        return {name: source for name, source in self.nodes.sources(slices).items() if source.exists()}

    async def _show(self, record: ContainerRecord, nodes: dict[str, Path]) -> bool:
        try:
            return await self._hotplug.show(self._attempts.folder(record.owner).caps, nodes, record.pid)
        except OSError as error:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "HOTPLUG_UNAVAILABLE",
                f"the container's directory of nodes cannot be changed: {error}; see that the disk is not full",
            ) from error

    def _write(self, owner: Owner, uuids: Sequence[str]) -> ContainerRecord:
        # What the journal says now: the command may have ended while something was awaited.
        record = known_container(self._journal, owner)
        return self._journal.put_container(replace(record, slice_uuids=tuple(uuids)))

    def _describe(self, owner: Owner) -> Container:
        record = known_container(self._journal, owner)
        return describe_container(record, self._kind, self._idleness(record))

    def _tell(
        self, owner: Owner, kind: NodeEventKind.ValueType, reason: str, message: str, one: SliceRecord | None
    ) -> None:
        container = self._describe(owner)
        self._events.add(
            kind,
            reason,
            message,
            owner=container.owner,
            slice=self._slices.book.describe(one) if one is not None else None,
            container=container,
        )
        self._changed()

    def _reconciled(self, owner: Owner, reason: str, message: str) -> None:
        self._events.add(NodeEventKind.NODE_EVENT_KIND_RECONCILED, reason, message, owner=owner.ref())
