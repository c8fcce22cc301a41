"""What is written down of the slices, and told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import grpc

from nodedaemon.descriptions import describe_foreign, describe_slice
from nodedaemon.driver_facts import GpuFacts
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.reconcile import is_same
from nodedaemon.records import SliceRecord, SliceStage
from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import Slice
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["SliceBook"]


class SliceBook:
    """The slices of this node, as the journal has them.

    Args:
        gpus: the GPUs that they are cut from.
        journal: where they are written down.
        events: where what happens to them is told.
        changed: called after any change of them.
    """

    def __init__(self, gpus: Gpus, journal: Journal, events: EventLog, changed: Callable[[], None]) -> None:
        self._gpus = gpus
        self._journal = journal
        self._events = events
        self.changed = changed

    def keep(self, record: SliceRecord, kind: NodeEventKind.ValueType, reason: str, message: str) -> SliceRecord:
        """Writes a slice down together with the event that tells why: there is never one without the other."""
        with self._journal.atomic():
            self._journal.update_slice(record)
            gpu = self._gpus.known(record.gpu_uuid)
            where = f"{record.uuid or 'without a UUID'} ({record.profile} at {record.span.start} on GPU {gpu.index})"
            self._events.add(
                kind,
                reason,
                message.replace("{slice}", where),
                owner=record.owner.ref(record.token),
                slice=self.describe(record),
            )
        self.changed()
        return record

    async def describe_all(self, *, foreign: bool) -> list[Slice]:
        """Returns the slices of this node for the wire, by GPU index and placement.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED.
        """
        instances = (await self._gpus.list_all()).instances if foreign else []
        records = self._journal.slices()
        viewers = self._journal.viewers()
        found = [self._described(record, viewers) for record in records]
        found.extend(
            describe_foreign(instance, gpu, emulated=self._gpus.emulated)
            for gpu, instance in instances
            if not any(is_same(record, instance) for record in records)
        )
        return sorted(found, key=lambda one: (one.gpu_index, one.placement.start))

    def describe(self, record: SliceRecord) -> Slice:
        """Returns a slice for the wire."""
        return self._described(record, self._journal.viewers())

    def _described(self, record: SliceRecord, viewers: Mapping[str, str]) -> Slice:
        return describe_slice(
            record,
            self._gpus.known(record.gpu_uuid),
            emulated=self._gpus.emulated,
            viewer=viewers.get(record.uuid, ""),
        )

    def owned(self, owner: Owner, uuid: str) -> tuple[SliceRecord, GpuFacts]:
        """Returns an active slice of an attempt, and its GPU.

        Raises:
            Refusal: FAILED_PRECONDITION with SLICE_NOT_FOUND.
        """
        record = self.require_known(owner, uuid)
        if record.stage is not SliceStage.ACTIVE:
            raise _not_found(owner, uuid, f"it is {record.stage}; create another")
        return record, self._gpus.gpu(record.gpu_uuid)

    def require_known(self, owner: Owner, uuid: str) -> SliceRecord:
        """Returns a slice that an attempt has or had.

        Raises:
            Refusal: FAILED_PRECONDITION with SLICE_NOT_FOUND.
        """
        record = self._journal.slice(uuid)
        if record is None:
            raise _not_found(owner, uuid, "ListSlices shows what there is")
        if record.owner != owner:
            raise _not_found(owner, uuid, f"it belongs to {record.owner}")
        return record

    async def foreign(self) -> set[tuple[str, int]]:
        """Returns (GPU UUID, GPU instance id) of every listed slice that this daemon did not make."""
        records = self._journal.slices()
        return {
            (gpu.uuid, instance.id)
            for gpu, instance in (await self._gpus.list_all()).instances
            if not any(is_same(record, instance) for record in records)
        }


def _not_found(owner: Owner, uuid: str, why: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "SLICE_NOT_FOUND",
        f"{owner} has no slice {uuid!r} here: {why}",
        slice_uuid=uuid,
    )
