"""Commands in living containers. The daemon owns them, not who started them.

What a command writes goes to a file of its attempt, and callers are served from there: a slow one costs disk, not
memory, and one that went away takes the output up where it left it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import structlog
from google.protobuf.wrappers_pb2 import StringValue

from nodedaemon.answers import Mutations
from nodedaemon.events import EventLog
from nodedaemon.exec_process import LOG, ExecProcess, exit_code, never_began, settle_start
from nodedaemon.exec_request import first_start, identity, require_sound_start
from nodedaemon.exec_stream import feed, output
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage, ExecRecord, ExecStage
from nodedaemon.runtime import ContainerRuntime, ExecSpec
from nodedaemon.suspension import living_container
from nodedaemon.workspace import Attempts
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id, request_digest
from puhui.rpc.moment import now
from puhui.v1.node_pb2 import NodeEventKind
from puhui.v1.node_service_pb2 import ExecRequest, ExecResponse, ExecStart

__all__ = ["Execs"]

_log = structlog.get_logger(__name__)

_MOST_LIVE = 64
_NOTE_AGAIN_S = 1.0
_KEPT_S = 24 * 3600
_KILL_S = 20.0
_TAIL_BYTES = 4000
# What the container's own environment may say of slices that are not attached any more.
_OF_SLICES = ("PUHUI_SLICE_PROFILE", "PUHUI_SLICE_MEMORY_MIB")


@dataclass
class _Live:
    """A command that runs."""

    process: ExecProcess
    ended: asyncio.Event
    watching: asyncio.Task[None] | None = None


class Execs:
    """The commands that run in containers of this node beside their own.

    Args:
        runtime: what runs them.
        journal: where what is intended is kept.
        events: where what happens is told.
        attempts: where their output goes.
        environment: returns what Puhui adds to the environment of a command that starts now in a container.
    """

    def __init__(
        self,
        runtime: ContainerRuntime,
        journal: Journal,
        events: EventLog,
        attempts: Attempts,
        environment: Callable[[ContainerRecord], dict[str, str]],
    ) -> None:
        self._runtime = runtime
        self._journal = journal
        self._events = events
        self._attempts = attempts
        self._environment = environment
        self._live: dict[str, _Live] = {}
        self._readers: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._own: set[str] = set()
        self.on_began: Callable[[Owner], None] = lambda owner: None
        """Called when a command of a caller's begins in a container."""

    def commands(self, owner: Owner) -> int:
        """Returns how many commands of callers run in a container."""
        records = self._journal.execs(owner)
        return sum(record.stage is not ExecStage.ENDED and record.id not in self._own for record in records)

    # Serving a caller -------------------------------------------------------------------------------------

    async def serve(
        self,
        requests: AsyncIterator[ExecRequest],
        mutations: Mutations,
        accepted: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[ExecResponse, None]:
        """Starts a command, or comes back to one, and yields its output and at last its exit code.

        A caller that goes away leaves a command with a request_id running, with its standard input open. One without
        is hung up: nobody could come back to it. For the same reason the end of the requests is the end of standard
        input for a command without a request_id, and only `stdin_closed` is for one that has it.

        Args:
            requests: the start, then input.
            mutations: fence the start, and answer a repeated one.
            accepted: called once the command runs, or was found again, before anything of it is told.

        Raises:
            Refusal: INVALID_ARGUMENT with SPEC_INVALID or COMMAND_NOT_FOUND; NOT_FOUND with CONTAINER_NOT_FOUND;
                FAILED_PRECONDITION with CONTAINER_NOT_RUNNING or CONTAINER_SUSPENDED; RESOURCE_EXHAUSTED with
                EXEC_LIMIT; UNAVAILABLE with DAEMON_STOPPING; DATA_LOSS with EXEC_LOST; and as `Mutations` does.
        """
        start = first_start(await anext(aiter(requests), None))
        require_sound_start(start)
        exec_id = await self._started(start, mutations)
        record = self._journal.exec(exec_id)
        if record is None:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "CONTAINER_NOT_FOUND",
                "the results of this attempt were discarded, and this command's output with them",
            )
        live = self._live.get(exec_id)
        if live is not None and start.HasField("terminal_size"):
            live.process.resize(start.terminal_size.columns, start.terminal_size.rows)
        # From here on the command is not discarded under this caller, however soon it ends.
        self._readers[exec_id] = self._readers.get(exec_id, 0) + 1
        try:
            if accepted is not None:
                await accepted()
            feeding = feed(requests, live.process if live is not None else None, record)
            ended = live.ended if live is not None else None
            log = self._folder(record) / LOG
            reading = output(log, start.output_offset, ended, feeding, self._stopping)
            async with contextlib.aclosing(reading) as chunks:
                async for chunk in chunks:
                    yield ExecResponse(output=chunk)
            after = self._journal.exec(exec_id) or record
            if after.exit_code is None:
                raise _lost(record)
            yield ExecResponse(exit_code=after.exit_code)
        finally:
            self._readers[exec_id] -= 1
            self._left(record)

    async def _started(self, start: ExecStart, mutations: Mutations) -> str:
        """Starts a command unless that was done already, and returns its id."""
        started: list[str] = []
        gone = False

        async def act(owner: Owner, token: int) -> StringValue:
            record = await self._start(owner, token, start)
            started.append(record.id)
            if gone:
                self._left(record)
            return StringValue(value=record.id)

        try:
            return (await mutations.carry_out(identity(start), StringValue, act)).value
        except asyncio.CancelledError:
            # The start itself is carried out even so.
            gone = True
            record = self._journal.exec(started[0]) if started else None
            if record is not None:
                self._left(record)
            raise

    # Starting and ending ----------------------------------------------------------------------------------

    async def _start(self, owner: Owner, token: int, start: ExecStart, *, own: bool = False) -> ExecRecord:
        digest = request_digest(_without_token(start).SerializeToString(deterministic=True))
        known = self._journal.exec_by_request(owner.centre, start.request_id) if start.request_id else None
        if known is not None:
            if known.digest != digest:
                raise Refusal(
                    grpc.StatusCode.ALREADY_EXISTS,
                    "REQUEST_ID_REUSED",
                    f"request_id {start.request_id!r} was used for another command; use a new one",
                    request_id=start.request_id,
                )
            return known
        container = self._ready(owner)
        record = self._journal.put_exec(
            ExecRecord(
                id=new_id("exec"),
                owner=owner,
                token=token,
                request_id=start.request_id,
                digest=digest,
                stage=ExecStage.STARTING,
                tty=start.tty,
                stop_grace_s=container.stop_grace_s,
                start_time=now(),
            )
        )
        if own:
            self._own.add(record.id)
        else:
            self.on_began(owner)
        try:
            spec = ExecSpec(
                folder=await asyncio.to_thread(self._attempts.make_exec, owner, record.id),
                command=list(start.command),
                env={**start.env, **self._environment(container)},
                without=_OF_SLICES,
                working_directory=start.working_directory,
                tty=start.tty,
                columns=start.terminal_size.columns,
                rows=start.terminal_size.rows,
            )
            process = await self._runtime.start_exec(container.container_id, spec)
        except OSError as error:
            self._discard(record)
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "WORKSPACE_UNAVAILABLE",
                f"the command's output cannot be kept on this node: {error.strerror}",
            ) from error
        except BaseException:
            self._discard(record)
            raise
        record = replace(record, stage=ExecStage.RUNNING)
        if process is not None:
            # Before it is written down: a full disk must not leave a command running that nobody looks after.
            self._watch(record, process)
        with self._journal.atomic():
            self._journal.put_exec(record)
            message = f"{record.id} runs {start.command[0][-100:]}"
            self._tell(record, NodeEventKind.NODE_EVENT_KIND_EXEC_STARTED, "EXEC_STARTED", message)
        if process is None:
            self._note_end(record, exit_code(self._folder(record)))
        return record

    async def run(self, owner: Owner, token: int, command: Sequence[str], limit_s: float) -> tuple[int | None, str]:
        """Runs a command of the daemon's own in a container to its end; one that takes too long is killed.

        Returns:
            Its exit code, None when it was killed; and the last of what it wrote.

        Raises:
            Refusal: as `serve` does.
        """
        record = await self._start(owner, token, ExecStart(owner=owner.ref(token), command=command), own=True)
        self._readers[record.id] = self._readers.get(record.id, 0) + 1
        try:
            live = self._live.get(record.id)
            overdue = False
            if live is not None:
                try:
                    async with asyncio.timeout(limit_s):
                        await live.ended.wait()
                except TimeoutError:
                    overdue = True
                    live.process.signal(signal.SIGKILL)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_KILL_S):
                            await live.ended.wait()
            after = self._journal.exec(record.id) or record
            with contextlib.suppress(OSError):
                said = (self._folder(record) / LOG).read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
                return None if overdue else after.exit_code, said
            return None if overdue else after.exit_code, ""
        finally:
            self._readers[record.id] -= 1
            self._left(record)
            self._own.discard(record.id)

    def _ready(self, owner: Owner) -> ContainerRecord:
        container = living_container(self._journal, owner)
        if container.stage is ContainerStage.SUSPENDED:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CONTAINER_SUSPENDED",
                f"the container of {owner} is suspended; resume it with ResumeContainer first",
            )
        live = sum(1 for record in self._journal.execs(owner) if record.stage is not ExecStage.ENDED)
        if live >= _MOST_LIVE:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "EXEC_LIMIT",
                f"{live} commands run in the container of {owner} beside its own, and more may not; end one of them",
                limit=str(_MOST_LIVE),
            )
        return container

    def _watch(self, record: ExecRecord, process: ExecProcess | None) -> None:
        if process is None:
            self._note_end(record, exit_code(self._folder(record)))
            return
        live = self._live[record.id] = _Live(process, asyncio.Event())
        live.watching = self._run(self._await_end(record, live), f"end of {record.id}")

    async def _await_end(self, record: ExecRecord, live: _Live) -> None:
        code = await live.process.wait()
        if code is None:
            # Nobody stays with it any more, and nobody would read what it writes.
            live.process.signal(signal.SIGKILL)
        live.process.close()
        try:
            while True:
                if self._noted_end(record, code):
                    break
                await asyncio.sleep(_NOTE_AGAIN_S)
        finally:
            # Whoever waits for the end is not kept waiting, whatever became of the note.
            live.ended.set()
            del self._live[record.id]
        if not self._readers.get(record.id):
            self._left(record)

    def _noted_end(self, record: ExecRecord, code: int | None) -> bool:
        """Notes the end of a command, unless the disk is full."""
        try:
            with self._journal.atomic():
                self._note_end(record, code)
        except OSError as error:
            _log.error("the end of a command cannot be written down yet", exec_id=record.id, error=str(error))
            return False
        return True

    def _note_end(self, record: ExecRecord, code: int | None) -> None:
        if self._journal.exec(record.id) is None:
            return  # discarded with its attempt
        record = self._journal.put_exec(replace(record, stage=ExecStage.ENDED, end_time=now(), exit_code=code))
        if code is None:
            reason, message = "EXEC_LOST", f"how {record.id} ended is not known: what stayed with it was killed"
        else:
            reason, message = "EXEC_ENDED", f"{record.id} ended with exit code {code}"
        self._tell(record, NodeEventKind.NODE_EVENT_KIND_EXEC_ENDED, reason, message)

    def _left(self, record: ExecRecord) -> None:
        """Hangs up a command that nobody can come back to, or discards it when it has ended."""
        if self._readers.get(record.id):
            return
        self._readers.pop(record.id, None)
        if record.request_id or self._stopping.is_set():
            return
        live = self._live.get(record.id)
        if live is None:
            self._discard(record)
        else:
            self._run(self._hang_up(record, live), f"hang-up of {record.id}")

    async def _hang_up(self, record: ExecRecord, live: _Live) -> None:
        for number, wait_s in ((signal.SIGHUP, record.stop_grace_s), (signal.SIGKILL, _KILL_S)):
            if live.ended.is_set():
                return
            live.process.signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await live.ended.wait()
        if not live.ended.is_set():
            _log.warning("a command that was hung up did not end", exec=record.id)

    def _discard(self, record: ExecRecord) -> None:
        self._journal.delete_exec(record.id)
        folder = self._folder(record)
        # Its output may be large.
        self._run(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True), f"removal of {record.id}")

    # With the daemon and the container --------------------------------------------------------------------

    async def restore(self) -> list[tuple[ExecRecord, str]]:
        """Takes the commands back that outlived an earlier daemon, and finishes what it left half done.

        Returns:
            Each of them, and what became of it, in a sentence.
        """
        told = []
        for record in self._journal.execs():
            if record.stage is ExecStage.ENDED:
                if not record.request_id:
                    self._discard(record)
                continue
            folder = self._folder(record)
            await settle_start(folder)
            process = ExecProcess.find(folder, tty=record.tty)
            if process is None and never_began(folder):
                self._discard(record)
                told.append((record, f"{record.id} had not begun"))
                continue
            if record.stage is ExecStage.STARTING:
                record = self._journal.put_exec(replace(record, stage=ExecStage.RUNNING))
                self._tell(record, NodeEventKind.NODE_EVENT_KIND_EXEC_STARTED, "EXEC_STARTED", f"{record.id} runs")
            told.append((record, f"{record.id} ran on without the daemon"))
            self._watch(record, process)
            self._left(record)
        return told

    async def settle(self, owner: Owner) -> None:
        """Waits until the ends of the commands of a container that is gone are noted."""
        live = [self._live[record.id] for record in self._journal.execs(owner) if record.id in self._live]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_S):
                for one in live:
                    await one.ended.wait()

    def prune(self, moment: float) -> None:
        """Drops commands that ended 24 h before a time (seconds since the epoch), with their output."""
        for record in self._journal.execs():
            if record.end_time is not None and record.end_time < moment - _KEPT_S and not self._readers.get(record.id):
                self._discard(record)

    def stop(self) -> None:
        """Ends every call: the daemon is stopping. Commands live on."""
        self._stopping.set()

    async def close(self) -> None:
        """Lets go of the commands, which live on."""
        self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for live in self._live.values():
            live.process.close()

    def _folder(self, record: ExecRecord) -> Path:
        return self._attempts.exec_folder(record.owner, record.id)

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tell(self, record: ExecRecord, kind: NodeEventKind.ValueType, reason: str, message: str) -> None:
        self._events.add(kind, reason, message, owner=record.owner.ref(record.token))


def _without_token(start: ExecStart) -> ExecStart:
    same = identity(start)
    same.owner.fencing_token = 0
    return same


def _lost(record: ExecRecord) -> Refusal:
    return Refusal(
        grpc.StatusCode.DATA_LOSS,
        "EXEC_LOST",
        f"how {record.id} ended is not known, because the process that stayed with it was killed; its output up to "
        "then is complete",
    )
