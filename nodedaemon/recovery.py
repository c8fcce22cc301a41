"""Carries out at a start what `nodedaemon.reconcile` plans, and tells of every decision."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from nodedaemon.containers import Containers
from nodedaemon.events import EventLog
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.reconcile import plan_containers
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.slice_recovery import SliceRecovery
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["Recovery"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Recovery:
    """Makes the journal, the driver and the runtime agree again."""

    journal: Journal
    events: EventLog
    containers: Containers
    runtime: ContainerRuntime
    slices: SliceRecovery

    async def run(self) -> None:
        """Recovers. Containers come first: a slice is in use for as long as its container is there.

        Raises:
            Refusal: the driver or the runtime does not answer at all.
        """
        await self._containers()
        await self.slices.run()

    async def _containers(self) -> None:
        plan = plan_containers(self.journal.containers(), await self.runtime.containers())
        for container_id in plan.remove:
            try:
                await self.runtime.remove(container_id)
            except Refusal as error:
                # One that does not go (a process of it hangs in the kernel, say) holds up no other.
                message = f"container {container_id[:12]}, which nobody owns, cannot be removed yet: {error.message}"
                self._tell(None, error.reason, message)
            else:
                self._tell(None, "CONTAINER_REMOVED", f"removed container {container_id[:12]}, which nobody owns")
        for record in plan.forget:
            await self.containers.forget(record)
            self._tell(record.owner, "CONTAINER_FORGOTTEN", "rolled back a container that was half made")
        for record, status in plan.adopt:
            adopted = self.containers.adopt(record, status)
            self._tell(record.owner, "CONTAINER_ADOPTED", f"container {status.id[:12]} ran on without the daemon")
            await self.containers.leases.restore(adopted)
            try:
                await self.containers.suspension.restore(adopted)
            except Refusal as error:
                self._tell(record.owner, error.reason, f"could not freeze the container again: {error.message}")
        for record, status in plan.ended:
            self.containers.ends.note_end(self.containers.adopt(record, status), status)
        for record in plan.lost:
            self.containers.ends.note_lost(record)
        self.containers.leases.sweep()
        for command, message in await self.containers.execs.restore():
            self._tell(command.owner, "EXEC_ADOPTED", message)

    def _tell(self, owner: Owner | None, reason: str, message: str) -> None:
        self.events.add(NodeEventKind.NODE_EVENT_KIND_RECONCILED, reason, message, owner=owner.ref() if owner else None)
