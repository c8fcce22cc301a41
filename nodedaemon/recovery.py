"""Carries out at a start what `nodedaemon.reconcile` plans, and tells of every decision."""

from __future__ import annotations

import structlog

from nodedaemon.containers import Containers
from nodedaemon.events import EventLog
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.reconcile import plan_containers, plan_slices
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.slices import Slices, boot_id
from puhui.rpc.errors import Refusal
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["recover"]

_log = structlog.get_logger(__name__)


async def recover(
    journal: Journal, events: EventLog, slices: Slices, containers: Containers, runtime: ContainerRuntime
) -> None:
    """Makes the journal, the driver and the runtime agree again.

    Containers come first: a slice is in use for as long as its container is there.

    Raises:
        Refusal: the driver or the runtime does not answer at all.
    """

    def told(owner: Owner | None, reason: str, message: str) -> None:
        events.add(NodeEventKind.NODE_EVENT_KIND_RECONCILED, reason, message, owner=owner.ref() if owner else None)

    plan = plan_containers(journal.containers(), await runtime.containers())
    for container_id in plan.remove:
        await runtime.remove(container_id)
        told(None, "CONTAINER_REMOVED", f"removed container {container_id[:12]}, which nobody owns")
    for record in plan.forget:
        await containers.forget(record)
        told(record.owner, "CONTAINER_FORGOTTEN", "rolled back a container that was being made when the daemon ended")
    for record, status in plan.adopt:
        containers.adopt(record, status)
        told(record.owner, "CONTAINER_ADOPTED", f"container {status.id[:12]} ran on while the daemon was away")
    for record, status in plan.ended:
        containers.adopt(record, status)
        containers.note_end(journal.container(record.owner) or record, status)
    for record in plan.lost:
        containers.note_lost(record)

    slice_plan = plan_slices(journal.slices(), await slices.instances(), boot_id())
    for one, why in slice_plan.drop:
        slices.drop(one, f"slice {one.uuid or 'of ' + one.profile} is gone: {why}")
        told(one.owner, "SLICE_DROPPED", f"slice {one.uuid or 'of ' + one.profile} is gone: {why}")
    for one in slice_plan.adopt:
        slices.adopt(one)
        told(one.owner, "SLICE_ADOPTED", f"slice {one.uuid} is still there")
    for one, gi in slice_plan.finish:
        try:
            await slices.finish(one, gi)
            told(one.owner, "SLICE_COMPLETED", f"completed {one.profile} at {one.span.start}, which was half made")
        except Refusal as error:
            told(one.owner, error.reason, f"could not complete {one.profile} at {one.span.start}: {error.message}")
    for one in slice_plan.destroy:
        try:
            await slices.take_apart(one)
            told(one.owner, "SLICE_DESTROYED", f"destroyed slice {one.uuid}, which was half destroyed")
        except Refusal as error:
            _log.warning("a slice stays half destroyed", slice=one.uuid, error=error.message)
