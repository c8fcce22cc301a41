"""How containers end: by themselves, when asked to, at their time limit, or lost. Each end is noted and told once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass, replace

import grpc
import structlog

from nodedaemon.container_leases import ContainerLeases
from nodedaemon.descriptions import IdlenessOf, describe_container
from nodedaemon.events import EventLog
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.results import known_container
from nodedaemon.runtime import ContainerExit, ContainerGone, ContainerRuntime, ContainerStatus
from nodedaemon.suspension import Suspension
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1.node_pb2 import NodeEventKind

__all__ = ["ContainerEnds"]

_log = structlog.get_logger(__name__)

_KILL_S = 20.0
_LOOK_AGAIN_S = 30.0
_MISSED_S = 1.0
_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 30.0


@dataclass
class _Life:
    """What is known of a container beside its record, while it is there."""

    ended: asyncio.Event
    deadline: asyncio.TimerHandle | None = None
    timed_out: bool = False


class ContainerEnds:
    """Watches over the containers of this node to their ends.

    Args:
        runtime: what runs them.
        journal: where what is known of them is kept.
        events: where their ends are told.
        suspension: thaws one that is to be ended.
        leases: knows whether its lease ran out.
        idleness: whether they use their cards.
    """

    def __init__(
        self,
        runtime: ContainerRuntime,
        journal: Journal,
        events: EventLog,
        suspension: Suspension,
        leases: ContainerLeases,
        idleness: IdlenessOf,
    ) -> None:
        self._runtime = runtime
        self._suspension = suspension
        self._leases = leases
        self._idleness = idleness
        self._journal = journal
        self._events = events
        self._kind = runtime.describe().kind
        self._lives: dict[Owner, _Life] = {}
        # Ends that came before their start was written down: a command can be that quick.
        self._early: dict[str, ContainerExit] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._missed = asyncio.Event()

    def begin(self, record: ContainerRecord) -> None:
        """Watches over a container whose command runs."""
        life = self._lives[record.owner] = _Life(asyncio.Event())
        if record.max_duration_s is not None and record.start_time is not None:
            left = max(0.0, record.start_time + record.max_duration_s - now())
            life.deadline = asyncio.get_running_loop().call_later(left, self._time_out, record.owner)

    def _time_out(self, owner: Owner) -> None:
        self._lives[owner].timed_out = True
        task = asyncio.create_task(self._end_overdue(owner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end_overdue(self, owner: Owner) -> None:
        pause = _FIRST_RETRY_S
        while (record := self._journal.container(owner)) is not None and record.stage.is_alive:
            try:
                await self.end(record, record.stop_grace_s)
            except Refusal as error:
                _log.warning("an overdue container cannot be ended yet", owner=str(owner), error=error.message)
            else:
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_RETRY_S)

    async def watch(self) -> None:
        """Notes every end of a command, until cancelled."""
        again = asyncio.create_task(self._look_again())
        try:
            async for ended in self._runtime.exits():
                try:
                    await self._hear(ended)
                except OSError as error:
                    self._miss(error)
        finally:
            again.cancel()
            for task in self._tasks:
                task.cancel()

    async def _hear(self, ended: ContainerExit | ContainerGone | None) -> None:
        if ended is None:
            await self.look()
            return
        record = next((r for r in self._journal.containers() if r.container_id == ended.id), None)
        if isinstance(ended, ContainerGone):
            if record is not None and record.stage.is_alive:
                await self.look()
        elif record is not None and record.stage.is_alive:
            self._note_exit(record, ended)
        elif record is not None and record.stage is ContainerStage.CREATING:
            self._early[ended.id] = ended

    def _miss(self, error: OSError) -> None:
        """Has an end that could not be written down be looked for again soon."""
        _log.error("the end of a container cannot be written down yet", error=str(error), again_in_s=_MISSED_S)
        self._missed.set()

    async def _look_again(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._missed.wait()
                await asyncio.sleep(_MISSED_S)
            self._missed.clear()
            try:
                await self.look()
            except OSError as error:
                self._miss(error)
            except Exception as error:  # noqa: BLE001 - this look is what finds ends that nothing else told of
                _log.error("cannot look at the containers", exc_info=error)

    async def look(self) -> None:
        """Looks for ends that no event told of, and for containers that somebody else removed."""
        # Asked before the list is made: what begins meanwhile cannot be missing from it.
        before = [record for record in self._journal.containers() if record.stage.is_alive]
        try:
            statuses = {status.id: status for status in await self._runtime.containers()}
        except Refusal as error:
            _log.warning("cannot look at the containers", error=error.message)
            return
        for known in before:
            record = self._journal.container(known.owner)
            if record is None or not record.stage.is_alive:
                continue
            status = statuses.get(record.container_id)
            if status is None:
                self.note_lost(record)
            elif status.exit_code is not None:
                self.note_end(record, status)

    def note_end(self, record: ContainerRecord, status: ContainerStatus) -> None:
        """Notes that a command has ended, as the runtime's list tells."""
        self._note_exit(
            record,
            ContainerExit(record.container_id, status.exit_code or 0, status.oom_killed, status.end_time or now()),
        )

    def _note_exit(self, record: ContainerRecord, ended: ContainerExit) -> None:
        life = self._lives.get(record.owner)
        record = replace(
            record,
            stage=ContainerStage.EXITED,
            pid=0,
            exit_code=ended.exit_code,
            oom_killed=ended.oom_killed,
            timed_out=record.timed_out or (life is not None and life.timed_out),
            lease_expired=self._leases.has_expired(record, ended.exit_code),
            end_time=ended.end_time,
        )
        if record.lease_expired:
            self._tell_end(record, "LEASE_EXPIRED", "the container was killed because its lease had run out")
            return
        reason = "TIMED_OUT" if record.timed_out else "HOST_OUT_OF_MEMORY" if record.oom_killed else "COMMAND_ENDED"
        self._tell_end(record, reason, f"command ended with exit code {ended.exit_code}")

    def note_lost(self, record: ContainerRecord) -> None:
        """Notes that somebody else removed a container: how its command ended is not known."""
        record = replace(record, stage=ContainerStage.EXITED, pid=0, exit_code=None, end_time=now())
        self._tell_end(record, "CONTAINER_LOST", "the container is gone, and nobody here removed it")

    def _tell_end(self, record: ContainerRecord, reason: str, message: str) -> None:
        """Writes an end down together with the event that tells of it: it is noted once, and so told once."""
        with self._journal.atomic():
            self._journal.put_container(record)
            self._events.add(
                NodeEventKind.NODE_EVENT_KIND_CONTAINER_EXITED,
                reason,
                message,
                owner=record.owner.ref(record.token),
                container=describe_container(record, self._kind, self._idleness(record)),
            )
        self._leases.let_go(record)
        life = self._lives.get(record.owner)
        if life is not None:
            if life.deadline is not None:
                life.deadline.cancel()
            life.ended.set()

    async def end(self, record: ContainerRecord, grace_s: float) -> ContainerRecord:
        """Ends a command, if it has not ended, and waits for it: SIGTERM, grace, SIGKILL. What is suspended is thawed.

        Raises:
            Refusal: DEADLINE_EXCEEDED with CONTAINER_STUCK; as the runtime does.
        """
        if record.stage is ContainerStage.SUSPENDED:
            await self._suspension.thaw(record)
            record = known_container(self._journal, record.owner)
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_S)):
            life = self._lives.get(record.owner)
            if not record.stage.is_alive or life is None or life.ended.is_set():
                break
            await self._runtime.signal(record.container_id, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await life.ended.wait()
        record = known_container(self._journal, record.owner)
        if record.stage.is_alive:
            await self.look()
            record = known_container(self._journal, record.owner)
        if record.stage.is_alive:
            raise Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "CONTAINER_STUCK",
                f"container {record.container_id[:12]} did not end within {_KILL_S:g} s of SIGKILL; a process of it "
                "waits for the kernel, see `ps -eo pid,stat,wchan,args`",
            )
        return record

    def note_early(self, record: ContainerRecord) -> None:
        """Notes an end that came before the container's start was written down, if it did."""
        early = self._early.pop(record.container_id, None)
        if early is not None:
            self._note_exit(record, early)

    def removed(self, container_id: str) -> None:
        """Forgets what was told of a container that is gone."""
        self._early.pop(container_id, None)

    def forget(self, owner: Owner) -> None:
        """Forgets an attempt."""
        self._lives.pop(owner, None)

    def ended(self, owner: Owner) -> asyncio.Event | None:
        """Returns what is set when an attempt's command has ended; None when it has no living container."""
        life = self._lives.get(owner)
        return life.ended if life is not None else None
