"""Keeps the journal's slices and the driver's in agreement: at a start, and for as long as the daemon runs."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from nodedaemon.driver_facts import GpuInstance, Mig
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.host import boot_id
from nodedaemon.inventory import Revision
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.reconcile import is_same, plan_slices
from nodedaemon.records import SliceRecord, SliceStage
from nodedaemon.slice_calls import find
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["SliceRecovery"]

_log = structlog.get_logger(__name__)

_LOOK_S = 2.0
_START_S = 3.0


@dataclass
class SliceRecovery:
    """Carries out what `nodedaemon.reconcile` plans for slices, and tells of every decision.

    Attributes:
        revision: grows when something changed that this daemon did not do.
        boot: what tells the host's boot from any other.
    """

    journal: Journal
    events: EventLog
    gpus: Gpus
    slices: Slices
    revision: Revision = field(default_factory=Revision)
    boot: str = field(default_factory=boot_id)
    settle: Callable[[], Awaitable[None]] | None = None
    """Called after every look: what containers see may have to be made right."""
    _foreign: set[tuple[str, int]] | None = None
    _working: set[asyncio.Task[None]] = field(default_factory=set)
    """What a start did not wait for; it goes on beside the daemon."""

    async def run(self) -> None:
        """Recovers at a start, when the daemon serves nobody yet."""
        await self._agree(start=True)

    async def keep(self) -> None:
        """Keeps journal and driver in agreement until cancelled.

        Tries again what could not be destroyed, notices what somebody destroyed by hand, and settles doubts about a GPU
        once it answers.
        """
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.look()
            except (Refusal, OSError) as error:
                _log.warning("cannot compare the journal with the driver now", error=str(error))

    async def look(self) -> None:
        """Compares journal and driver once.

        Raises:
            Refusal: the driver does not answer.
            OSError: the disk is full.
        """
        await self.gpus.refresh()
        await self._agree(start=False)
        foreign = await self.slices.book.foreign()
        if self._foreign is not None and foreign != self._foreign:
            self.revision.grow()  # what somebody else made or destroyed changes what there is room for
        self._foreign = foreign
        if self.settle is not None:
            await self.settle()

    async def _agree(self, *, start: bool) -> None:
        boot = self.boot
        records = [one for one in self.journal.slices() if not self.slices.in_hand(one)]
        # No instance survives a boot: there is nothing to doubt about one of an earlier boot.
        gone = [one for one in records if one.boot_id != boot]
        instances, doubtful = await self._look_at([one for one in records if one.boot_id == boot])
        # Of a GPU that does not answer nothing is known, and so nothing is decided.
        sure = [one for one in records if one in gone or one not in doubtful]
        uncut = {gpu.uuid for gpu in self.gpus.every() if gpu.mig is Mig.DISABLED}
        plan = plan_slices([one for one in sure if self.slices.is_as(one)], instances, boot, uncut)
        for one in doubtful:
            if self.slices.is_as(one):
                self.slices.keep_in_doubt(one)
        for one in plan.adopt:
            if self.slices.is_as(one):
                self.slices.trust(one)
                if start:
                    self._tell(one.owner, "SLICE_ADOPTED", f"slice {one.uuid} is still there")
        for one, why in plan.drop:
            # What was taken in hand while this waited is no longer what was looked at.
            if self.slices.is_as(one):
                await self.slices.drop(one, why)
        # One GPU that is slow holds up its own slices only, and a start not for long.
        by_gpu: dict[str, list[Coroutine[Any, Any, None]]] = defaultdict(list)
        for one, gi in plan.finish:
            # At a start its owner is waiting for it, and will ask again; later, its making has failed.
            by_gpu[one.gpu_uuid].append(self._finish(one, gi) if start else self._take_apart(one))
        for one in plan.destroy:
            by_gpu[one.gpu_uuid].append(self._take_apart(one))
        if by_gpu:
            tasks = [asyncio.create_task(_in_turn(work)) for work in by_gpu.values()]
            self._working.update(tasks)
            done, _ = await asyncio.wait(tasks, timeout=_START_S if start else None)
            self._working -= done
            for task in done:
                task.result()

    async def _look_at(self, records: Sequence[SliceRecord]) -> tuple[list[GpuInstance], list[SliceRecord]]:
        """Looks at the GPUs.

        Args:
            records: slices of the journal that are wanted.

        Returns:
            Every GPU instance that the driver lists, and those of the records that it has but does not list; and the
            records of which nothing can be known, because their GPU does not answer.
        """
        listing = await self.gpus.list_all()
        found, doubtful = [instance for _, instance in listing.instances], []
        for record in records:
            if listing.may_have(record.gpu_uuid):
                doubtful.append(record)
            elif not any(is_same(record, instance) for instance in found):
                gpu = self.gpus.known(record.gpu_uuid)
                try:
                    if gpu.mig is Mig.ENABLED and (
                        really := await self.gpus.read(gpu, partial(find, self.gpus.driver, record))
                    ):
                        found.append(really)
                except Refusal:
                    doubtful.append(record)
        return found, doubtful

    async def _finish(self, record: SliceRecord, gi: int) -> None:
        if not self.slices.is_as(record):
            return
        try:
            await self.slices.finish(record, gi)
        except Refusal as error:
            message = f"could not complete {record.profile} at {record.span.start}: {error.message}"
            self._tell(record.owner, error.reason, message)

    async def _take_apart(self, record: SliceRecord) -> None:
        if not self.slices.is_as(record):
            return
        if record.stage is SliceStage.ACTIVE:
            self.journal.forget_answers(record.owner)
        try:
            await self.slices.take_apart(record, 0)
        except Refusal as error:
            _log.info("a slice stays half destroyed", slice=record.uuid, error=error.message)

    def _tell(self, owner: Owner | None, reason: str, message: str) -> None:
        self.events.add(NodeEventKind.NODE_EVENT_KIND_RECONCILED, reason, message, owner=owner.ref() if owner else None)


async def _in_turn(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    for one in work:
        await one
