"""Carries out at a start what `nodedaemon.reconcile` plans, and tells of every decision."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from nodedaemon.containers import Containers
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.host import boot_id
from nodedaemon.journal import Journal, SliceStage
from nodedaemon.owner import Owner
from nodedaemon.reconcile import plan_containers, plan_slices
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["Recovery"]

_log = structlog.get_logger(__name__)

_RELEASE_S = 1.0


@dataclass(frozen=True)
class Recovery:
    """Makes the journal, the driver and the runtime agree again."""

    journal: Journal
    events: EventLog
    gpus: Gpus
    slices: Slices
    containers: Containers
    runtime: ContainerRuntime

    async def run(self) -> None:
        """Recovers. Containers come first: a slice is in use for as long as its container is there.

        Raises:
            Refusal: the driver or the runtime does not answer at all.
        """
        await self._containers()
        await self._slices()

    async def _containers(self) -> None:
        plan = plan_containers(self.journal.containers(), await self.runtime.containers())
        for container_id in plan.remove:
            await self.runtime.remove(container_id)
            self._tell(None, "CONTAINER_REMOVED", f"removed container {container_id[:12]}, which nobody owns")
        for record in plan.forget:
            await self.containers.forget(record)
            self._tell(record.owner, "CONTAINER_FORGOTTEN", "rolled back a container that was half made")
        for record, status in plan.adopt:
            self.containers.adopt(record, status)
            self._tell(record.owner, "CONTAINER_ADOPTED", f"container {status.id[:12]} ran on without the daemon")
        for record, status in plan.ended:
            self.containers.ends.note_end(self.containers.adopt(record, status), status)
        for record in plan.lost:
            self.containers.ends.note_lost(record)

    async def _slices(self) -> None:
        instances = [instance for _, instance in await self.gpus.all_instances()]
        boot = boot_id()
        records = self.journal.slices()
        # Of a GPU that does not answer nothing is known, and so nothing is decided; a boot wipes its slices even so.
        doubtful = [one for one in records if self.gpus.may_have(one.gpu_uuid) and one.boot_id == boot]
        for one in doubtful:
            self.slices.keep_in_doubt(one)
        plan = plan_slices([one for one in records if one not in doubtful], instances, boot)
        for one, why in plan.drop:
            name = one.uuid or f"{one.profile} at {one.span.start}"
            self.slices.drop(one)
            self._tell(one.owner, "SLICE_DROPPED", f"slice {name} is gone: {why}")
        for one in plan.adopt:
            self._tell(one.owner, "SLICE_ADOPTED", f"slice {one.uuid} is still there")
        for one, gi in plan.finish:
            try:
                await self.slices.finish(one, gi)
                self._tell(one.owner, "SLICE_COMPLETED", f"completed {one.profile} at {one.span.start}")
            except Refusal as error:
                message = f"could not complete {one.profile} at {one.span.start}: {error.message}"
                self._tell(one.owner, error.reason, message)
        for one in plan.destroy:
            if one.stage is SliceStage.ACTIVE:
                self.journal.forget_answers(one.owner)
            try:
                await self.slices.take_apart(one, _RELEASE_S)
                self._tell(one.owner, "SLICE_DESTROYED", f"destroyed slice {one.uuid}, which was half destroyed")
            except Refusal as error:
                _log.warning("a slice stays half destroyed", slice=one.uuid, error=error.message)

    def _tell(self, owner: Owner | None, reason: str, message: str) -> None:
        self.events.add(NodeEventKind.NODE_EVENT_KIND_RECONCILED, reason, message, owner=owner.ref() if owner else None)
