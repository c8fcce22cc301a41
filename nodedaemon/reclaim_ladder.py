"""Sees to it that nobody holds a container's cards, by the mildest rung that works (step S7).

What is checkpointed is in the journal before it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import grpc

from nodedaemon.attachments import Attachments
from nodedaemon.checkpoint import CheckpointError, Checkpoints, Process, living, start_time
from nodedaemon.containers import Containers
from nodedaemon.holders import Holder
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.reclaim_plan import belongs_to_command, plan_rungs
from nodedaemon.records import CheckpointRecord, CheckpointStage, ContainerRecord
from nodedaemon.runtime import ContainerRuntime
from puhui.rpc.errors import Refusal
from puhui.v1.job_pb2 import ReclaimMode
from puhui.v1.node_pb2 import RuntimeKind

__all__ = ["Climb", "ReclaimLadder", "keep_checkpoint", "processes_of"]

_DETACH = ReclaimMode.RECLAIM_MODE_DETACH
_CHECKPOINT = ReclaimMode.RECLAIM_MODE_CHECKPOINT
_STOP = ReclaimMode.RECLAIM_MODE_STOP
_KILL_S = 20.0


def keep_checkpoint(journal: Journal, owner: Owner, kept: CheckpointRecord | None) -> None:
    """Writes down what is checkpointed of a container; None when nothing is. One that is gone has nothing."""
    record = journal.container(owner)
    if record is not None:
        journal.put_container(replace(record, checkpoint=kept))


def processes_of(kept: CheckpointRecord) -> list[Process]:
    """Returns the processes that were taken off their cards."""
    return [Process(pid, started) for pid, started in kept.processes]


class ReclaimLadder:
    """The ways to take cards from who holds them: detach, checkpoint, stop.

    Args:
        runtime: what runs the containers.
        journal: where what is meant is kept.
        containers: the containers.
        attachments: what they see of their slices.
        checkpoints: what moves processes off their cards.
    """

    def __init__(
        self,
        runtime: ContainerRuntime,
        journal: Journal,
        containers: Containers,
        attachments: Attachments,
        checkpoints: Checkpoints,
    ) -> None:
        self._runtime = runtime
        self._journal = journal
        self._containers = containers
        self._attachments = attachments
        self._checkpoints = checkpoints

    async def require_possible(self, record: ContainerRecord, hardest: ReclaimMode.ValueType) -> None:
        """Refuses what cannot be done, before the container is touched.

        Raises:
            Refusal: FAILED_PRECONDITION with RECLAIM_IMPOSSIBLE; as `Attachments.holders` does.
        """
        able = hardest == _STOP or (hardest == _CHECKPOINT and self._checkpoints.probe().name)
        holders = [] if able else await self._attachments.holders(record.owner)
        plan = plan_rungs(holders, hardest, self._checkpoints.probe())
        if not plan.rungs:
            raise _impossible(record, holders, plan.why_not)

    def climb(self, hardest: ReclaimMode.ValueType) -> Climb:
        """Returns one climb of the ladder, not begun.

        Args:
            hardest: the last rung that may be taken.
        """
        return Climb(self, self._journal, self._checkpoints, hardest)

    async def take_off(self, record: ContainerRecord, holders: Sequence[Holder]) -> CheckpointRecord:
        """Checkpoints who holds cards, and returns what is to be kept of that.

        Raises:
            CheckpointError: it cannot be done. What was done of it is undone later.
        """
        cards = self._attachments.cards(record.owner)
        processes = tuple(_began(one.pid) for one in holders)
        # Those whom a reclaim before this took off, and could not put back, are not forgotten over the others.
        before = self._journal.container(record.owner)
        earlier = before.checkpoint.processes if before is not None and before.checkpoint is not None else ()
        now_taken = tuple((one.pid, one.started) for one in processes if one is not None)
        kept = CheckpointRecord(
            CheckpointStage.TAKING,
            record.pid,
            (*(one for one in earlier if one not in now_taken), *now_taken),
            tuple(card for card, _ in cards),
        )
        keep_checkpoint(self._journal, record.owner, kept)
        nodes = {name: path for _, known in cards for name, path in known.items()}
        async with self._containers.suspension.awake(record):
            await self._checkpoints.checkpoint(kept.init, processes_of(kept), nodes)
        return replace(kept, stage=CheckpointStage.TAKEN)

    async def end(self, record: ContainerRecord, holders: Sequence[Holder]) -> None:
        """Ends who holds cards: the container's command if it is of that, else the processes: SIGTERM, grace, SIGKILL.

        Raises:
            Refusal: DEADLINE_EXCEEDED with CONTAINER_STUCK; as the runtime does.
        """
        parents, begun = await asyncio.to_thread(_family)
        has_init = self._runtime.describe().kind == RuntimeKind.RUNTIME_KIND_PODMAN
        if any(belongs_to_command(one.pid, record.pid, parents, begun, has_init=has_init) for one in holders):
            await self._containers.ends.end(record, record.stop_grace_s)
            return
        processes = [one for one in (_began(holder.pid) for holder in holders) if one is not None]
        async with self._containers.suspension.awake(record):
            for number, wait_s in ((signal.SIGTERM, record.stop_grace_s), (signal.SIGKILL, _KILL_S)):
                left = living(processes)
                if not left:
                    break
                await self._attachments.signal(record, number, left)
                await _ended(left, wait_s)


class Climb:
    """One climb of the ladder.

    Attributes:
        mode: the rung that was taken last.
        holders: who held the cards when it began.
    """

    def __init__(
        self, ladder: ReclaimLadder, journal: Journal, checkpoints: Checkpoints, hardest: ReclaimMode.ValueType
    ) -> None:
        self._ladder = ladder
        self._journal = journal
        self._checkpoints = checkpoints
        self._hardest = hardest
        self.mode = _DETACH
        self.holders: list[Holder] = []

    async def vacate(self, record: ContainerRecord, holders: list[Holder]) -> Callable[[ContainerRecord], None]:
        """Sees to it that nobody holds a container's cards; see `Attachments.withdraw`.

        Raises:
            Refusal: FAILED_PRECONDITION with RECLAIM_IMPOSSIBLE; as `ReclaimLadder.end` does.
        """
        self.holders = holders
        plan = plan_rungs(holders, self._hardest, self._checkpoints.probe())
        why_not = plan.why_not
        kept = record.checkpoint
        for rung in plan.rungs:
            self.mode = rung
            if rung == _CHECKPOINT:
                try:
                    kept = await self._ladder.take_off(record, holders)
                except CheckpointError as error:
                    why_not = f"{why_not}; checkpoint failed: {error}"
                    continue
            elif rung == _STOP:
                await self._ladder.end(record, holders)
                kept = None
            return lambda now: keep_checkpoint(self._journal, now.owner, kept)
        raise _impossible(record, holders, why_not)


def _impossible(record: ContainerRecord, holders: Sequence[Holder], why_not: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "RECLAIM_IMPOSSIBLE",
        f"the cards of container {record.container_id[:12]} cannot be taken: {why_not}",
        container_id=record.container_id,
        holders=", ".join(map(str, holders)),
    )


def _began(pid: int) -> Process | None:
    try:
        return Process(pid, start_time(pid))
    except OSError:
        return None


def _family() -> tuple[dict[int, int], dict[int, int]]:
    """Returns the parent of each process, and when each began."""
    parents, begun = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)], begun[int(entry.name)] = int(fields[1]), int(fields[19])
    return parents, begun


async def _ended(processes: Sequence[Process], limit_s: float) -> None:
    """Waits until processes have ended, but no longer than that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            for one in living(processes):
                await _end_of(one)


async def _end_of(process: Process) -> None:
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, over.set)
    try:
        # The id may have become another's before the descriptor was opened.
        if living([process]):
            await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
