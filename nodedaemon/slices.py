"""Slices: cut at an exact placement, verified, and destroyed again. Foreign ones are never touched."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import grpc
import structlog

from nodedaemon.driver_facts import GpuFacts, ProfileFacts, Span
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.holders import Holder
from nodedaemon.host import boot_id
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.reconcile import is_same
from nodedaemon.records import SliceRecord, SliceStage
from nodedaemon.slice_book import SliceBook
from nodedaemon.slice_calls import fill, in_the_way, remove, whole
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1.card_pb2 import Slice
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["Slices"]

_log = structlog.get_logger(__name__)

_FIRST_RETRY_S = 0.02
_LONGEST_RETRY_S = 1.0
_VERIFY_S = 2.0


class Slices:
    """The slices of this node.

    Args:
        gpus: the GPUs that they are cut from.
        journal: where what is intended is kept.
        events: where what happens is told.
        changed: called after any change of slices.
        release_s: how long a destroy waits for the last process on the slice to go, in seconds.
        boot: what tells the host's boot from any other; None is this host's.
    """

    def __init__(
        self,
        gpus: Gpus,
        journal: Journal,
        events: EventLog,
        *,
        changed: Callable[[], None],
        release_s: float = 10.0,
        boot: str | None = None,
    ) -> None:
        self._gpus = gpus
        self._journal = journal
        self.book = SliceBook(gpus, journal, events, changed)
        self._release_s = release_s
        self._boot_id = boot_id() if boot is None else boot
        self._hands: Counter[int] = Counter()
        self.on_vanished: Callable[[SliceRecord], Awaitable[None]] = _nobody_cares
        """Called before a slice that vanished is forgotten: takes it out of the container that sees it, or refuses."""

    # Making one -------------------------------------------------------------------------------------------

    async def create(self, owner: Owner, token: int, gpu_uuid: str, profile_name: str, span: Span) -> Slice:
        """Cuts a slice exactly there.

        Raises:
            Refusal: NOT_FOUND with GPU_NOT_FOUND or PROFILE_NOT_FOUND, INVALID_ARGUMENT with PLACEMENT_INVALID,
                FAILED_PRECONDITION with PLACEMENT_TAKEN, SLICE_STILL_SEEN or MIG_DISABLED, PERMISSION_DENIED with
                DRIVER_PERMISSION, INTERNAL with DRIVER_REFUSED or SLICE_NOT_VERIFIED.
        """
        gpu = await self._gpus.find(gpu_uuid)
        async with self._gpus.lock(gpu):
            profile = await self._gpus.profile(gpu, profile_name)
            if span not in profile.placements:
                raise _placement_invalid(profile, span)
            for record in self._journal.slices():
                same = (record.gpu_uuid, record.owner, record.profile, record.span)
                if same == (gpu_uuid, owner, profile_name, span) and record.stage is SliceStage.ACTIVE:
                    return self.book.describe(record)  # made before a crash that swallowed the answer
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
            with self._in_hand(record):
                return self.book.describe(await self._make(gpu, profile, record))

    async def _require_free(self, gpu: GpuFacts, span: Span) -> None:
        for really in await self._gpus.ask(gpu, in_the_way, self._gpus.driver, gpu.uuid, span):
            mine = next((r for r in self._journal.slices() if is_same(r, really)), None)
            if mine is not None and mine.stage is SliceStage.ERROR and not mine.uuid:
                # The rest of a slice that nobody was ever given; perhaps it can be removed by now.
                with self._in_hand(mine):
                    await self._unmake(gpu, mine)
                continue
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "PLACEMENT_TAKEN",
                f"{really.profile.name} at {really.span.start} on GPU {gpu.index} is in the way; it belongs to "
                + (f"{mine.owner}" if mine else "nobody this daemon knows, and is not touched"),
                gpu_uuid=gpu.uuid,
                foreign=str(mine is None).lower(),
            )

    async def _bury(self, new: SliceRecord) -> None:
        """Forgets the slice that had this GPU instance id before and was destroyed by somebody else.

        Its container may still see the cap nodes, whose numbers follow from the id: it would see the new slice as soon
        as that has its compute instance.

        Raises:
            Refusal: FAILED_PRECONDITION with SLICE_STILL_SEEN.
        """
        for old in self._journal.slices():
            if (old.gpu_uuid, old.gi) == (new.gpu_uuid, new.gi) and old.id != new.id:
                await self.drop(old, "somebody else destroyed it")
                if not self._is_destroyed(old):
                    raise Refusal(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        "SLICE_STILL_SEEN",
                        f"a container of {old.owner} still sees the nodes of a slice that somebody destroyed, and "
                        "would see this one; stop that container first",
                        gpu_uuid=new.gpu_uuid,
                    )

    async def _make(self, gpu: GpuFacts, profile: ProfileFacts, record: SliceRecord) -> SliceRecord:
        try:
            gi = await self._gpus.ask(
                gpu, self._gpus.driver.create_gpu_instance, gpu.uuid, profile.profile_id, record.span
            )
            record = self._journal.update_slice(replace(record, gi=gi))
            await self._bury(record)
            return await self._complete(gpu, record, profile.compute_slices, new=True)
        except Refusal as error:
            if error.reason == "PLACEMENT_TAKEN" and record.gi is None:
                self._journal.delete_slice(record)  # somebody else was quicker: what is there now is not ours
            else:
                await self._unmake(gpu, record)
            raise
        # Whatever else ends this (a full disk, the end of the daemon in the middle of a call to the driver) leaves the
        # record: what came of the call is for `Recovery` to find out.

    async def _unmake(self, gpu: GpuFacts, record: SliceRecord) -> None:
        """Rolls a half-made slice back. What cannot be rolled back now stays in the journal, and is tried again."""
        try:
            await self._remove(gpu, record)
        except Refusal as error:
            self._stuck(record, error, [])
        else:
            self._journal.delete_slice(record)

    async def _complete(self, gpu: GpuFacts, record: SliceRecord, compute_slices: int, *, new: bool) -> SliceRecord:
        """Gives a GPU instance its full-width compute instance, and believes only what the driver then lists."""
        gi = _given(record.gi)
        instance = await self._gpus.ask(gpu, fill, self._gpus.driver, record, compute_slices, new)
        deadline = time.monotonic() + _VERIFY_S
        pause = _FIRST_RETRY_S
        while (compute := whole(instance, record, compute_slices)) is None:
            if time.monotonic() > deadline:
                raise Refusal(
                    grpc.StatusCode.INTERNAL,
                    "SLICE_NOT_VERIFIED",
                    f"the driver said that it made {record.profile} at {record.span.start} on GPU {gpu.index}, but "
                    f"lists {instance!r}; see the driver's log",
                )
            await asyncio.sleep(pause)  # its lists may lag behind
            pause *= 2
            instance = await self._gpus.ask(gpu, self._gpus.driver.instance, gpu.uuid, gi)
        record = replace(record, ci=compute.id, uuid=compute.uuid, stage=SliceStage.ACTIVE, notice="")
        kind = NodeEventKind.NODE_EVENT_KIND_SLICE_CREATED
        if new:
            return self.book.keep(record, kind, "SLICE_CREATED", "made slice {slice}")
        return self.book.keep(record, kind, "SLICE_COMPLETED", "completed slice {slice}, which was half made")

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
                f"container {container[:12]} sees slice {uuid}; detach it with DetachSlice, or remove the container",
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
            Refusal: FAILED_PRECONDITION with SLICE_IN_USE, or what keeps its container from letting go of it; INTERNAL
                with DRIVER_REFUSED.
        """
        gpu = await self._gpus.find(record.gpu_uuid)
        deadline = time.monotonic() + (self._release_s if release_s is None else release_s)
        pause = _FIRST_RETRY_S
        with self._in_hand(record):
            # One that somebody half destroyed may still be seen by its container.
            await self.on_vanished(record)
            record = self._journal.update_slice(replace(record, stage=SliceStage.DESTROYING))
            while True:
                try:
                    async with self._gpus.lock(gpu):
                        if self._is_destroyed(record):
                            return  # by another who was asked to
                        await self._remove(gpu, record)
                        record = replace(record, stage=SliceStage.DESTROYED, notice="")
                        kind = NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED
                        self.book.keep(record, kind, "SLICE_DESTROYED", "destroyed slice {slice}")
                    return
                except Refusal as error:
                    in_use = error.reason == "SLICE_IN_USE"
                    if not in_use or time.monotonic() + pause > deadline:
                        holders = await self._holders(gpu, record) if in_use else []
                        raise self._stuck(record, error, holders) from error
                # The lock is free meanwhile: what waits for a process to go must not hold up others.
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_RETRY_S)

    def _is_destroyed(self, record: SliceRecord) -> bool:
        return all(one.id != record.id for one in self._journal.slices())

    async def _remove(self, gpu: GpuFacts, record: SliceRecord) -> None:
        await self._gpus.ask(gpu, remove, self._gpus.driver, record)

    async def _holders(self, gpu: GpuFacts, record: SliceRecord) -> list[Holder]:
        try:
            return await self._gpus.holders(gpu, record.gi or 0)
        except Refusal as error:  # NO_PERMISSION for an unprivileged user, say
            _log.info("the driver does not name who holds a slice", gpu=gpu.index, error=error.message)
            return []

    def _stuck(self, record: SliceRecord, error: Refusal, holders: list[Holder]) -> Refusal:
        if error.reason == "SLICE_IN_USE":
            who = "process " + ", ".join(map(str, holders)) if holders else "a process that the driver does not name"
            error = Refusal(
                error.code,
                error.reason,
                f"slice {record.uuid or record.profile} is still held by {who}; it is destroyed as soon as that ends",
                slice_uuid=record.uuid,
                holder_pids=",".join(str(one.pid) for one in holders),
                holder_commands=", ".join(one.command for one in holders),
                holder_containers=",".join(one.container for one in holders if one.container),
            )
        told = record.notice == error.message  # tried again in vain
        record = replace(record, stage=SliceStage.ERROR, notice=error.message)
        if told:
            self._journal.update_slice(record)
        else:
            self.book.keep(record, NodeEventKind.NODE_EVENT_KIND_SLICE_ERROR, error.reason, error.message)
        return error

    # What `Recovery` asks for -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _in_hand(self, record: SliceRecord) -> Iterator[None]:
        self._hands[record.id] += 1
        try:
            yield
        finally:
            self._hands[record.id] -= 1

    def in_hand(self, record: SliceRecord) -> bool:
        """Says whether a slice is being made or destroyed at this moment."""
        return self._hands[record.id] > 0

    async def finish(self, record: SliceRecord, gi: int) -> None:
        """Completes a slice whose making was cut short.

        Raises:
            Refusal: as `create` does; the half that was there is gone then.
        """
        gpu = await self._gpus.find(record.gpu_uuid)
        async with self._gpus.lock(gpu):
            with self._in_hand(record):
                try:
                    profile = await self._gpus.profile(gpu, record.profile)
                    record = self._journal.update_slice(replace(record, gi=gi))
                    await self._bury(record)
                    await self._complete(gpu, record, profile.compute_slices, new=False)
                except Refusal:
                    await self._unmake(gpu, record)
                    raise

    async def drop(self, record: SliceRecord, why: str) -> None:
        """Notes that a slice of the journal is there no more. While a container still sees its nodes it stays noted.

        Args:
            record: the slice.
            why: what happened to it, as far as that is known.
        """
        try:
            await self.on_vanished(record)
        except Refusal as error:
            notice = f"it is gone ({why}), but its container still sees its nodes: {error.message}"
            if record.notice != notice:
                kind = NodeEventKind.NODE_EVENT_KIND_SLICE_ERROR
                self.book.keep(replace(record, notice=notice), kind, error.reason, "slice {slice}: " + notice)
            return
        if not self.is_as(record):
            return  # somebody else came to the same conclusion meanwhile
        asked = record.stage in (SliceStage.DESTROYING, SliceStage.ERROR)
        with self._journal.atomic():
            if not asked:
                # A repeated request must make it again rather than be told that it was made.
                self._journal.forget_answers(record.owner)
            self.book.keep(
                replace(record, stage=SliceStage.DESTROYED),
                NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED,
                "SLICE_DESTROYED" if asked else "SLICE_VANISHED",
                "slice {slice} is gone: " + why,
            )
            if not record.uuid:
                self._journal.delete_slice(record)

    def is_as(self, record: SliceRecord) -> bool:
        """Says whether the journal still says this of a slice, and nobody has it in hand."""
        return not self.in_hand(record) and record in self._journal.slices()

    def keep_in_doubt(self, record: SliceRecord) -> None:
        """Notes that it cannot be known now whether a slice is there: its GPU does not answer."""
        gpu = self._gpus.known(record.gpu_uuid)
        why = f"its GPU {gpu.uuid} does not answer: {gpu.notice or 'see `nvidia-smi`'}"
        if record.notice == why:
            return  # told before
        kind = NodeEventKind.NODE_EVENT_KIND_SLICE_ERROR
        self.book.keep(replace(record, notice=why), kind, "GPU_SILENT", "slice {slice} is in doubt: " + why)

    def trust(self, record: SliceRecord) -> None:
        """Notes that a slice that was in doubt is there after all."""
        if record.notice:
            self._journal.update_slice(replace(record, notice=""))
            self.book.changed()


async def _nobody_cares(_: SliceRecord) -> None:
    """Stands for the containers where there are none."""


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
