"""Slices: cut at an exact placement, verified, and destroyed again. Foreign ones are never touched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import structlog

from nodedaemon.descriptions import describe_foreign, describe_slice
from nodedaemon.driver import GpuFacts, GpuInstance, ProfileFacts, Span
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.host import boot_id
from nodedaemon.journal import Journal, SliceRecord, SliceStage
from nodedaemon.owner import Owner
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1.card_pb2 import Slice
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["Slices", "is_same"]

_log = structlog.get_logger(__name__)

_FIRST_RETRY_S = 0.02
_LONGEST_RETRY_S = 1.0


class Slices:
    """The slices of this node.

    Args:
        gpus: the GPUs that they are cut from.
        journal: where what is intended is kept.
        events: where what happens is told.
        changed: called after any change of slices.
        release_s: how long a destroy waits for the last process on the slice to go, in seconds.
    """

    def __init__(
        self,
        gpus: Gpus,
        journal: Journal,
        events: EventLog,
        *,
        changed: Callable[[], None],
        release_s: float = 10.0,
    ) -> None:
        self._gpus = gpus
        self._journal = journal
        self._events = events
        self._changed = changed
        self._release_s = release_s
        self._boot_id = boot_id()

    # Making one -------------------------------------------------------------------------------------------

    async def create(self, owner: Owner, token: int, gpu_uuid: str, profile_name: str, span: Span) -> Slice:
        """Cuts a slice exactly there.

        Raises:
            Refusal: NOT_FOUND with GPU_NOT_FOUND or PROFILE_NOT_FOUND, INVALID_ARGUMENT with PLACEMENT_INVALID,
                FAILED_PRECONDITION with PLACEMENT_TAKEN or MIG_DISABLED, PERMISSION_DENIED with
                DRIVER_PERMISSION, INTERNAL with DRIVER_REFUSED.
        """
        gpu = self._gpus.gpu(gpu_uuid)
        async with self._gpus.lock(gpu):
            profile = await self._gpus.profile(gpu, profile_name)
            if span not in profile.placements:
                raise _placement_invalid(profile, span)
            for record in self._journal.slices():
                same = (record.gpu_uuid, record.owner, record.profile, record.span)
                if same == (gpu_uuid, owner, profile_name, span) and record.stage is SliceStage.ACTIVE:
                    return self.describe(record)  # made before a crash that swallowed the answer
            await self._require_free(gpu, span)
            record = self._journal.add_slice(
                SliceRecord(
                    id=0,
                    owner=owner,
                    token=token,
                    gpu_uuid=gpu_uuid,
                    profile=profile.name,
                    profile_id=profile.profile_id,
                    span=span,
                    memory_mib=profile.memory_mib,
                    stage=SliceStage.CREATING,
                    create_time=now(),
                    boot_id=self._boot_id,
                )
            )
            record = await self._make(gpu, profile, record)
        self._told(record, NodeEventKind.NODE_EVENT_KIND_SLICE_CREATED, "SLICE_CREATED", "made slice {slice}")
        return self.describe(record)

    async def _require_free(self, gpu: GpuFacts, span: Span) -> None:
        for instance in await self._gpus.instances(gpu):
            if not instance.span.overlaps(span):
                continue
            mine = next((r for r in self._journal.slices() if is_same(r, instance)), None)
            if mine is not None and mine.stage is SliceStage.ERROR and not mine.uuid:
                # The rest of a slice that nobody was ever given; perhaps it can be removed by now.
                await self._unmake(gpu, mine)
                continue
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "PLACEMENT_TAKEN",
                f"{instance.profile.name} at {instance.span.start} on GPU {gpu.index} is in the way; it belongs to "
                + (f"{mine.owner}" if mine else "nobody this daemon knows, and is not touched"),
                gpu_uuid=gpu.uuid,
                foreign=str(mine is None).lower(),
            )

    async def _make(self, gpu: GpuFacts, profile: ProfileFacts, record: SliceRecord) -> SliceRecord:
        try:
            gi = await self._gpus.ask(
                gpu, self._gpus.driver.create_gpu_instance, gpu.uuid, profile.profile_id, record.span
            )
            record = self._journal.update_slice(replace(record, gi=gi))
            return await self._complete(gpu, record, profile.compute_slices)
        except BaseException as error:
            if isinstance(error, Refusal) and error.reason == "PLACEMENT_TAKEN" and record.gi is None:
                self._journal.delete_slice(record)  # somebody else was quicker: what is there now is not ours
            else:
                await self._unmake(gpu, record)
            raise

    async def _unmake(self, gpu: GpuFacts, record: SliceRecord) -> None:
        """Rolls a half-made slice back.

        What cannot be rolled back now stays in the journal; the next create in its place and the next start try again.
        """
        try:
            await self._destroy_once(gpu, record)
        except Refusal as error:
            self._stuck(record, error, [])
        else:
            self._journal.delete_slice(record)

    async def _complete(self, gpu: GpuFacts, record: SliceRecord, compute_slices: int) -> SliceRecord:
        """Gives a GPU instance its full-width compute instance, and believes only what the driver then lists."""
        gi = _given(record.gi)
        instance = await self._instance(gpu, gi)
        if not (instance and instance.compute_instances):
            await self._gpus.ask(gpu, self._gpus.driver.create_compute_instance, gpu.uuid, gi, compute_slices)
            instance = await self._instance(gpu, gi)
        whole = [c for c in instance.compute_instances if c.compute_slices == compute_slices] if instance else []
        if instance is None or instance.span != record.span or len(whole) != 1 or not whole[0].uuid:
            raise Refusal(
                grpc.StatusCode.INTERNAL,
                "SLICE_NOT_VERIFIED",
                f"the driver said that it made {record.profile} at {record.span.start} on GPU {gpu.index}, but lists "
                f"{instance!r}; see the driver's log",
            )
        return self._journal.update_slice(
            replace(record, ci=whole[0].id, uuid=whole[0].uuid, stage=SliceStage.ACTIVE, notice="")
        )

    async def _instance(self, gpu: GpuFacts, gi: int) -> GpuInstance | None:
        instances = await self._gpus.instances(gpu)
        return next((instance for instance in instances if instance.id == gi), None)

    # Destroying one ---------------------------------------------------------------------------------------

    async def destroy(self, owner: Owner, uuid: str, holder_of: Callable[[str], str | None]) -> None:
        """Destroys a slice, waiting a while for the last process on it to go.

        Args:
            owner: who asks; only an attempt's own slices are destroyed for it.
            uuid: the slice.
            holder_of: says which living container has a slice, if any.

        Raises:
            Refusal: NOT_FOUND with SLICE_NOT_FOUND; FAILED_PRECONDITION with SLICE_IN_USE, naming who holds it;
                INTERNAL with DRIVER_REFUSED.
        """
        record = self._journal.slice(uuid)
        if record is None or record.owner != owner:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "SLICE_NOT_FOUND",
                f"{owner} has no slice {uuid!r} here; ListSlices shows what there is",
                slice_uuid=uuid,
            )
        if record.stage is SliceStage.DESTROYED:
            return
        container = holder_of(uuid)
        if container is not None:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "SLICE_IN_USE",
                f"container {container[:12]} runs on slice {uuid}; remove the container first",
                slice_uuid=uuid,
                container_id=container,
            )
        await self.take_apart(record)

    async def take_apart(self, record: SliceRecord, release_s: float | None = None) -> None:
        """Destroys a slice of this daemon: first its compute instance, then its GPU instance.

        Args:
            record: the slice.
            release_s: how long to wait for the last process on it to go, in seconds; None is the usual time.

        Raises:
            Refusal: FAILED_PRECONDITION with SLICE_IN_USE; INTERNAL with DRIVER_REFUSED.
        """
        gpu = self._gpus.gpu(record.gpu_uuid)
        record = self._journal.update_slice(replace(record, stage=SliceStage.DESTROYING))
        deadline = time.monotonic() + (self._release_s if release_s is None else release_s)
        pause = _FIRST_RETRY_S
        while True:
            try:
                async with self._gpus.lock(gpu):
                    await self._destroy_once(gpu, record)
                break
            except Refusal as error:
                in_use = error.reason == "SLICE_IN_USE"
                if not in_use or time.monotonic() + pause > deadline:
                    holders = await self._gpus.holders(gpu, record.gi or 0) if in_use else []
                    raise self._stuck(record, error, holders) from error
            # The lock is free meanwhile: what waits for a process to go must not hold up others.
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_RETRY_S)
        record = self._journal.update_slice(replace(record, stage=SliceStage.DESTROYED, notice=""))
        self._told(record, NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED, "SLICE_DESTROYED", "destroyed slice {slice}")

    async def _destroy_once(self, gpu: GpuFacts, record: SliceRecord) -> None:
        instance = next(
            (i for i in await self._gpus.instances(gpu) if is_same(record, i)),
            None,
        )
        if instance is None:
            return  # somebody else was quicker
        for compute in instance.compute_instances:
            await self._gpus.ask(gpu, self._gpus.driver.destroy_compute_instance, gpu.uuid, instance.id, compute.id)
        await self._gpus.ask(gpu, self._gpus.driver.destroy_gpu_instance, gpu.uuid, instance.id)

    def _stuck(self, record: SliceRecord, error: Refusal, holders: list[str]) -> Refusal:
        if error.reason == "SLICE_IN_USE":
            who = "process " + ", ".join(holders) if holders else "a process that the driver does not name"
            error = Refusal(
                error.code,
                error.reason,
                f"slice {record.uuid or record.profile} is still held by {who}; end it, then destroy the slice again",
                slice_uuid=record.uuid,
                holders=", ".join(holders),
            )
        record = self._journal.update_slice(replace(record, stage=SliceStage.ERROR, notice=error.message))
        self._told(record, NodeEventKind.NODE_EVENT_KIND_SLICE_ERROR, error.reason, error.message)
        return error

    # After a restart --------------------------------------------------------------------------------------

    async def finish(self, record: SliceRecord, gi: int) -> None:
        """Completes a slice whose making was cut short.

        Raises:
            Refusal: as `create` does; the half that was there is gone then.
        """
        gpu = self._gpus.gpu(record.gpu_uuid)
        async with self._gpus.lock(gpu):
            profile = await self._gpus.profile(gpu, record.profile)
            try:
                record = self._journal.update_slice(replace(record, gi=gi))
                record = await self._complete(gpu, record, profile.compute_slices)
            except BaseException:
                await self._unmake(gpu, record)
                raise
        self._told(record, NodeEventKind.NODE_EVENT_KIND_SLICE_CREATED, "SLICE_COMPLETED", "completed slice {slice}")

    def drop(self, record: SliceRecord) -> None:
        """Notes that a slice of the journal is there no more, and nobody asked for that."""
        # A repeated request must make it again rather than be told that it was made.
        self._journal.forget_answers(record.owner)
        if not record.uuid:
            self._journal.delete_slice(record)
            return
        record = self._journal.update_slice(replace(record, stage=SliceStage.DESTROYED))
        message = "slice {slice} is gone, and nobody here destroyed it"
        self._told(record, NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED, "SLICE_VANISHED", message)

    def keep_in_doubt(self, record: SliceRecord) -> None:
        """Notes that it cannot be known now whether a slice is there: its GPU does not answer."""
        gpu = self._gpus.known(record.gpu_uuid)
        why = f"its GPU {gpu.uuid} does not answer: {gpu.notice or 'see `nvidia-smi`'}"
        stage = SliceStage.ACTIVE if record.stage is SliceStage.ACTIVE else SliceStage.ERROR
        record = self._journal.update_slice(replace(record, stage=stage, notice=why))
        self._told(record, NodeEventKind.NODE_EVENT_KIND_SLICE_ERROR, "GPU_SILENT", "slice {slice} is in doubt: " + why)

    # Reading ----------------------------------------------------------------------------------------------

    async def describe_all(self, *, foreign: bool) -> list[Slice]:
        """Returns the slices of this node for the wire, by GPU index and placement.

        Raises:
            Refusal: INTERNAL with DRIVER_REFUSED.
        """
        instances = await self._gpus.all_instances() if foreign else []
        records = self._journal.slices()
        found = [self.describe(record) for record in records]
        found.extend(
            describe_foreign(instance, gpu, emulated=self._gpus.emulated)
            for gpu, instance in instances
            if not any(is_same(record, instance) for record in records)
        )
        return sorted(found, key=lambda one: (one.gpu_index, one.placement.start))

    def describe(self, record: SliceRecord) -> Slice:
        """Returns a slice for the wire."""
        return describe_slice(record, self._gpus.known(record.gpu_uuid), emulated=self._gpus.emulated)

    def owned(self, owner: Owner, uuid: str) -> tuple[SliceRecord, GpuFacts]:
        """Returns an active slice of an attempt, and its GPU.

        Raises:
            Refusal: FAILED_PRECONDITION with SLICE_NOT_FOUND.
        """
        record = self._journal.slice(uuid)
        if record is None or record.owner != owner or record.stage is not SliceStage.ACTIVE:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "SLICE_NOT_FOUND",
                f"{owner} has no active slice {uuid!r} here; create it first",
                slice_uuid=uuid,
            )
        return record, self._gpus.gpu(record.gpu_uuid)

    def _told(self, record: SliceRecord, kind: NodeEventKind.ValueType, reason: str, message: str) -> None:
        described = self.describe(record)
        gpu = self._gpus.known(record.gpu_uuid)
        where = f"{record.uuid} ({record.profile} at {record.span.start} on GPU {gpu.index})"
        self._events.add(
            kind, reason, message.replace("{slice}", where), owner=record.owner.ref(record.token), slice=described
        )
        self._changed()


def is_same(record: SliceRecord, instance: GpuInstance) -> bool:
    """Says whether an instance on a GPU is a slice of the journal."""
    if (record.gpu_uuid, record.span, record.profile_id) != (
        instance.gpu_uuid,
        instance.span,
        instance.profile.profile_id,
    ):
        return False
    if record.gi is None:
        return True  # being made: the place was free when that was written down
    uuids = {compute.uuid for compute in instance.compute_instances}
    return record.gi == instance.id and (not record.uuid or not uuids or record.uuid in uuids)


def _given(number: int | None) -> int:
    assert number is not None, "a GPU instance has an id"  # noqa: S101 - for the type checker
    return number


def _placement_invalid(profile: ProfileFacts, span: Span) -> Refusal:
    offered = ", ".join(str(place.start) for place in profile.placements)
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "PLACEMENT_INVALID",
        f"{profile.name} cannot be at {span.start} with size {span.size}; it has size "
        f"{profile.placements[0].size if profile.placements else 0} and may be at {offered or 'no place'}",
    )
