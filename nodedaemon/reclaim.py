"""Takes the cards of containers back while they live on (step S7), and lets what was checkpointed go on (step S8).

The ladder is detach, checkpoint, stop: the mildest rung that works is taken. All cards of a container are taken, or
none. What is checkpointed is in the journal before it is done, so that a start after a crash at any moment either makes
the container be as it was before, or knows that its cards were taken and what is to be restored.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import grpc
import structlog

from nodedaemon.attachments import Attachments
from nodedaemon.checkpoint import CheckpointError, Checkpoints, Move, living
from nodedaemon.containers import Containers
from nodedaemon.events import EventLog
from nodedaemon.idle import IdleState
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.reclaim_ladder import ReclaimLadder, keep_checkpoint, processes_of
from nodedaemon.reclaim_plan import MismatchError, pair_cards
from nodedaemon.records import CardRecord, CheckpointRecord, CheckpointStage, ContainerRecord, ContainerStage
from nodedaemon.results import known_container
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.suspension import living_container
from puhui.rpc.errors import Refusal
from puhui.v1.job_pb2 import ReclaimMode
from puhui.v1.node_pb2 import Container, NodeEventKind

__all__ = ["Reclaim", "Reclaimed", "Terms"]

_log = structlog.get_logger(__name__)

_DETACH = ReclaimMode.RECLAIM_MODE_DETACH
_CHECKPOINT = ReclaimMode.RECLAIM_MODE_CHECKPOINT
_STOP = ReclaimMode.RECLAIM_MODE_STOP
_NAMES = {_DETACH: "detach", _CHECKPOINT: "checkpoint", _STOP: "stop"}
_REASONS = {_DETACH: "DETACHED", _CHECKPOINT: "CHECKPOINTED", _STOP: "STOPPED"}
_AGAIN_S = 30.0

Look = Callable[[Owner], Awaitable[IdleState | None]]
"""Looks whether a container uses its cards now; None when it is not watched."""


@dataclass(frozen=True)
class Terms:
    """How cards may be taken."""

    hardest: ReclaimMode.ValueType
    only_if_idle: bool = False
    freeze: bool = False
    warn_signal: bool = False
    on_reclaim: tuple[str, ...] = ()
    on_reclaim_limit_s: float = 10.0


@dataclass(frozen=True)
class Reclaimed:
    """How they were taken."""

    container: Container
    mode: ReclaimMode.ValueType
    slice_uuids: tuple[str, ...]
    message: str
    warning: str = ""
    """What went wrong on the way; "" when nothing did."""


class Reclaim:
    """Reclaims and restores the containers of this node.

    Args:
        runtime: what runs them.
        journal: where what is meant is kept.
        events: where what happens is told.
        containers: the containers.
        attachments: what they see of their slices.
        checkpoints: what moves processes off their cards.
        look: tells whether cards are used.
    """

    def __init__(
        self,
        runtime: ContainerRuntime,
        journal: Journal,
        events: EventLog,
        containers: Containers,
        attachments: Attachments,
        checkpoints: Checkpoints,
        look: Look,
    ) -> None:
        self._journal = journal
        self._events = events
        self._containers = containers
        self._attachments = attachments
        self._checkpoints = checkpoints
        self._look = look
        self._ladder = ReclaimLadder(runtime, journal, containers, attachments, checkpoints)
        self._watches: dict[Owner, asyncio.Task[None]] = {}
        # A lock is there for as long as somebody holds or awaits it.
        self._turns: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()

    def _turn(self, owner: Owner) -> asyncio.Lock:
        return self._turns.setdefault(owner, asyncio.Lock())

    # Taking -----------------------------------------------------------------------------------------------

    async def reclaim(self, owner: Owner, token: int, terms: Terms) -> Reclaimed:
        """Takes all cards of a container by the mildest rung that works. One that has none any more is left alone.

        Raises:
            Refusal: INVALID_ARGUMENT with SPEC_INVALID; NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with
                CONTAINER_NOT_RUNNING, NOT_IDLE, RECLAIM_IMPOSSIBLE, or as `Attachments.detach` does. The container
                then goes on as before, with its cards.
        """
        if terms.hardest not in _NAMES:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "SPEC_INVALID",
                "hardest must be RECLAIM_MODE_DETACH, RECLAIM_MODE_CHECKPOINT or RECLAIM_MODE_STOP",
                field="hardest",
            )
        async with self._turn(owner):
            return await self._reclaim(owner, token, terms)

    async def _reclaim(self, owner: Owner, token: int, terms: Terms) -> Reclaimed:
        record = living_container(self._journal, owner)
        if not record.slice_uuids:
            mode = _CHECKPOINT if record.checkpoint is not None else _DETACH
            return await self._done(owner, terms, mode, (), "it had no cards")
        try:
            # Before anybody is warned of it, and the container is touched.
            await self._ladder.require_possible(record, terms.hardest)
            warning = await self._warn(record, token, terms)
            if terms.only_if_idle:
                await self._require_idle(owner)
            return replace(await self._take(record, terms), warning=warning)
        except Refusal as error:
            known = self._journal.container(owner)
            if known is not None:
                self._tell(known, NodeEventKind.NODE_EVENT_KIND_RECLAIM_REFUSED, error.reason, error.message)
            raise

    async def _warn(self, record: ContainerRecord, token: int, terms: Terms) -> str:
        """Warns what runs in a container. Returns what went wrong with that; empty when nothing did."""
        if record.stage is ContainerStage.SUSPENDED or not (terms.warn_signal or terms.on_reclaim):
            return ""
        self._tell(
            record,
            NodeEventKind.NODE_EVENT_KIND_RECLAIM_WARNED,
            "RECLAIM_WARNED",
            f"the cards of container {record.container_id[:12]} are about to be taken",
        )
        if terms.warn_signal:
            warned = await self._attachments.signal(record, signal.SIGUSR1, None)
            _log.info("warned of a reclaim", container=record.container_id[:12], processes=warned)
        if not terms.on_reclaim:
            return ""
        message = await self._on_reclaim(record, token, terms)
        if message:
            self._tell(record, NodeEventKind.NODE_EVENT_KIND_RECLAIM_WARNED, "ON_RECLAIM_FAILED", message)
        return message

    async def _on_reclaim(self, record: ContainerRecord, token: int, terms: Terms) -> str:
        """Runs what is to be run before cards are taken. Returns what went wrong; empty when nothing did."""
        limit_s = terms.on_reclaim_limit_s
        command = terms.on_reclaim
        try:
            code, said = await self._containers.execs.run(record.owner, token, command, limit_s)
        except Refusal as error:
            return f"the on_reclaim command {command[0]!r} could not be run: {error.message}"
        _log.info("on_reclaim command ended", container=record.container_id[:12], exit_code=code, output=said)
        if code is None:
            return f"the on_reclaim command {command[0]!r} did not end within {limit_s:g} s and was killed"
        return f"the on_reclaim command {command[0]!r} ended with exit code {code}" if code else ""

    async def _require_idle(self, owner: Owner) -> None:
        state = await self._look(owner)
        if state is None or not state.idle:
            why = f"{state.signal}: {state.reading}" if state is not None else "nobody watches whether they are used"
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NOT_IDLE",
                f"the cards of {owner} are not idle ({why}); wait until they are, or reclaim without only_if_idle",
            )

    async def _take(self, record: ContainerRecord, terms: Terms) -> Reclaimed:
        began = time.monotonic()
        climb = self._ladder.climb(terms.hardest)
        try:
            before, slices = await self._attachments.withdraw(record.owner, climb.vacate)
        except BaseException:
            await self._undo(record.owner)
            raise
        uuids = tuple(one.uuid for one in slices)
        who = f"; {', '.join(map(str, climb.holders))}" if climb.holders else ""
        message = (
            f"took {len(uuids)} of container {before.container_id[:12]} by {_NAMES[climb.mode]} in "
            f"{(time.monotonic() - began) * 1000:.0f} ms{who}"
        )
        result = await self._done(record.owner, terms, climb.mode, uuids, message)
        after = known_container(self._journal, record.owner)
        self._tell(after, NodeEventKind.NODE_EVENT_KIND_RECLAIMED, _REASONS[climb.mode], message)
        self.watch(after)
        return result

    async def _done(
        self, owner: Owner, terms: Terms, mode: ReclaimMode.ValueType, uuids: tuple[str, ...], message: str
    ) -> Reclaimed:
        record = known_container(self._journal, owner)
        # What is checkpointed blocks by itself, and must run to ask for its card.
        if terms.freeze and mode == _DETACH and record.stage is ContainerStage.RUNNING:
            record = await self._containers.suspension.suspend(owner)
            message += "; froze it"
        return Reclaimed(self._containers.describe(record), mode, uuids, message)

    async def _undo(self, owner: Owner) -> None:
        """Puts processes back on the cards that they had, after they could not all be taken."""
        record = self._journal.container(owner)
        if record is None or record.checkpoint is None or record.checkpoint.stage is not CheckpointStage.TAKING:
            return
        if record.stage.is_alive:
            try:
                await self._put_back(record, record.checkpoint)
            except (CheckpointError, Refusal) as error:
                # It stays in the journal, and is tried again.
                said = error.message if isinstance(error, Refusal) else str(error)
                message = f"processes of container {record.container_id[:12]} are not on their cards yet: {said}"
                self._tell(record, NodeEventKind.NODE_EVENT_KIND_RECONCILED, "RECLAIM_NOT_UNDONE", message)
                self._later(owner)
                return
        keep_checkpoint(self._journal, owner, None)

    async def _put_back(self, record: ContainerRecord, kept: CheckpointRecord) -> None:
        place = self._attachments.place(record.owner)
        moves = [_move(card, card, place) for card in kept.cards]
        async with self._containers.suspension.awake(record):
            await self._checkpoints.restore(kept.init, processes_of(kept), moves)

    # Going on ---------------------------------------------------------------------------------------------

    async def resume(self, owner: Owner) -> ContainerRecord:
        """Thaws a container, and moves what is checkpointed in it to the slices that it sees.

        Raises:
            Refusal: FAILED_PRECONDITION with RESTORE_MISMATCH or RESTORE_FAILED; and as `Suspension.resume` does.
        """
        record = living_container(self._journal, owner)
        moves = self._moves(record, record.checkpoint) if record.checkpoint is not None else []
        record = await self._containers.suspension.resume(owner)
        if record.checkpoint is not None:
            await self._restore(record, record.checkpoint, moves)
        return known_container(self._journal, owner)

    def _moves(self, record: ContainerRecord, kept: CheckpointRecord) -> list[Move]:
        """Returns where the processes of a container go.

        Raises:
            Refusal: FAILED_PRECONDITION with RESTORE_MISMATCH.
        """
        try:
            pairs = pair_cards(kept.cards, [card for card, _ in self._attachments.cards(record.owner)])
        except MismatchError as error:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "RESTORE_MISMATCH",
                f"container {record.container_id[:12]} cannot go on: {error}; attach one first",
            ) from error
        place = self._attachments.place(record.owner)
        return [_move(old, new, place) for old, new in pairs]

    async def _restore(self, record: ContainerRecord, kept: CheckpointRecord, moves: Sequence[Move]) -> None:
        await self._unwatch(record.owner)
        keep_checkpoint(self._journal, record.owner, replace(kept, stage=CheckpointStage.RESTORING))
        began = time.monotonic()
        try:
            await self._checkpoints.restore(kept.init, processes_of(kept), moves)
        except CheckpointError as error:
            self.watch(known_container(self._journal, record.owner))
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "RESTORE_FAILED",
                f"processes of container {record.container_id[:12]} stay checkpointed: {error}; resume again, or stop "
                "the container",
            ) from error
        keep_checkpoint(self._journal, record.owner, None)
        pids = ", ".join(str(one.pid) for one in living(processes_of(kept))) or "none, all have ended"
        self._tell(
            known_container(self._journal, record.owner),
            NodeEventKind.NODE_EVENT_KIND_RESTORED,
            "RESTORED",
            f"processes of container {record.container_id[:12]} are on a card again after "
            f"{(time.monotonic() - began) * 1000:.0f} ms: {pids}",
        )

    # After a crash ----------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Settles what an earlier daemon left in the middle. Containers must see what the journal says by then."""
        for record in self._journal.containers():
            if record.stage.is_alive and record.checkpoint is not None:
                await self._settle(record, record.checkpoint)

    async def _settle(self, record: ContainerRecord, kept: CheckpointRecord) -> None:
        if kept.stage is CheckpointStage.TAKING:
            await self._undo(record.owner)
            if known_container(self._journal, record.owner).checkpoint is None:
                message = f"container {record.container_id[:12]} has its cards as before: a reclaim had not ended"
                self._tell(record, NodeEventKind.NODE_EVENT_KIND_RECONCILED, "RECLAIM_UNDONE", message)
            return
        if kept.stage is CheckpointStage.RESTORING:
            try:
                moves = self._moves(record, kept)
                async with self._containers.suspension.awake(record):
                    await self._restore(record, kept, moves)
            except Refusal as error:
                self._tell(record, NodeEventKind.NODE_EVENT_KIND_RECONCILED, error.reason, error.message)
        self.watch(known_container(self._journal, record.owner))

    def _later(self, owner: Owner) -> None:
        """Tries again to put processes back on their cards."""

        async def again() -> None:
            await asyncio.sleep(_AGAIN_S)
            self._watches.pop(owner, None)
            async with self._turn(owner):
                try:
                    await self._undo(owner)
                except Exception as error:  # noqa: BLE001 - processes must not stay where they are because of one failure
                    _log.error("a reclaim cannot be undone yet", owner=str(owner), exc_info=error)
                    self._later(owner)

        self._watches[owner] = asyncio.create_task(again(), name=f"undoing of a reclaim of {owner}")

    # Who wants a card -------------------------------------------------------------------------------------

    def watch(self, record: ContainerRecord) -> None:
        """Begins to look out for checkpointed processes that ask for their cards."""
        kept = record.checkpoint
        if kept is None or not record.stage.is_alive or record.owner in self._watches:
            return
        work = self._await_wanted(record.owner, kept)
        self._watches[record.owner] = asyncio.create_task(work, name=f"who of {record.owner} wants a card")

    async def _await_wanted(self, owner: Owner, kept: CheckpointRecord) -> None:
        try:
            wanting = await self._checkpoints.wanted(kept.init, processes_of(kept))
        except CheckpointError as error:
            _log.warning("who wants a card cannot be told", owner=str(owner), error=str(error))
            return
        record = self._journal.container(owner)
        if wanting is not None and record is not None and record.stage.is_alive:
            message = f"process {wanting.pid} of container {record.container_id[:12]} asks for its card, and waits"
            self._tell(record, NodeEventKind.NODE_EVENT_KIND_CARD_WANTED, "CARD_WANTED", message)

    async def _unwatch(self, owner: Owner) -> None:
        task = self._watches.pop(owner, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """Lets go. What is checkpointed stays so."""
        for owner in list(self._watches):
            await self._unwatch(owner)

    # Parts ------------------------------------------------------------------------------------------------

    def _tell(self, record: ContainerRecord, kind: NodeEventKind.ValueType, reason: str, message: str) -> None:
        self._events.add(
            kind,
            reason,
            message,
            owner=record.owner.ref(record.token),
            container=self._containers.describe(record),
        )


def _move(old: CardRecord, new: CardRecord, place: str) -> Move:
    paths = {before: f"{place}/{after}" for before, after in zip(old.nodes, new.nodes, strict=True)}
    return Move(old.uuid, new.uuid, paths)
