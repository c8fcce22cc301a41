"""Leases: until when containers may run without being renewed, enforced by the daemon and, without it, by keepers."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from nodedaemon.answers import Mutations
from nodedaemon.journal import Journal
from nodedaemon.lease_hold import KeeperFailedError, LeaseHold, ran_out
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.runtime import ContainerRuntime
from puhui.rpc.errors import Refusal
from puhui.rpc.lease_clock import LeaseClock
from puhui.rpc.moment import moment, timestamp
from puhui.v1.node_pb2 import RuntimeKind
from puhui.v1.node_service_pb2 import (
    CreateContainerRequest,
    RenewContainerLeaseRequest,
    RenewContainerLeaseResponse,
)

__all__ = ["ContainerLeases"]

_log = structlog.get_logger(__name__)

_LONGEST_WAIT_S = 60.0
_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 30.0
_LAST_SECOND = 253_402_300_799  # of a protobuf Timestamp
_KEPT_S = 24 * 3600.0
_KILLED = 128 + signal.SIGKILL


@dataclass
class _Leased:
    """A living container with a lease."""

    hold: LeaseHold
    alarm: asyncio.TimerHandle | None = None
    keeping: asyncio.Task[None] | None = None
    ending: asyncio.Task[None] | None = None


class ContainerLeases:
    """The leases of this node's containers.

    A lease never becomes shorter, and one that has run out is not renewed. Its container is then killed at once: who
    let it run out has stopped it gracefully before, or cannot reach it. A keeper beside each container does that too,
    and needs no daemon.

    Args:
        clock: on which leases are written.
        runtime: what runs the containers.
        journal: where leases are kept.
        folder: where the lease files are; made if it is missing.
        python: what keepers run with.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        clock: LeaseClock,
        runtime: ContainerRuntime,
        journal: Journal,
        folder: Path,
        python: str = sys.executable,
    ) -> None:
        self._clock = clock
        self._runtime = runtime
        self._journal = journal
        self._folder = folder.absolute()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._python = python
        self._group = runtime.describe().kind == RuntimeKind.RUNTIME_KIND_PROCESS
        self._leased: dict[Owner, _Leased] = {}

    # Asking and renewing ----------------------------------------------------------------------------------

    def renew(self, request: RenewContainerLeaseRequest, mutations: Mutations) -> RenewContainerLeaseResponse:
        """Has a container run until then, unless it may already run longer, and tells the clock.

        It waits for nothing that is being done to the container: a lease must not run out because a stop takes long.

        Raises:
            Refusal: INVALID_ARGUMENT with SPEC_INVALID or OWNER_INVALID; FAILED_PRECONDITION with
                STALE_FENCING_TOKEN, or LEASE_EXPIRED when the lease has run out and its container dies or is dead.
            OSError: the disk is full.
        """
        owner = Owner.of(request.owner)
        problem = _problem(request.lease_expire_time)
        if problem:
            raise _invalid(problem)
        mutations.fence(owner, request.owner.fencing_token)
        if request.HasField("lease_expire_time"):
            self._extend(owner, moment(request.lease_expire_time))
        kept = self._journal.leases.get(owner)
        return RenewContainerLeaseResponse(
            time=timestamp(self._clock.now()), lease_expire_time=timestamp(kept) if kept is not None else None
        )

    def _extend(self, owner: Owner, expire_time: float) -> None:
        record, known = self._journal.container(owner), self._journal.leases.get(owner)
        if record is not None:
            if known is None:
                return  # it was made to run for ever, and a lease never becomes shorter
            if record.lease_expired or (record.stage.is_alive and self._clock.now() >= known):
                raise _expired(owner)
        leased = self._leased.get(owner)
        # The file first: it says whether the keeper has found meanwhile that the lease has run out.
        if leased is not None and not leased.hold.extend(self._uptime_at(expire_time)):
            raise _expired(owner)
        with self._journal.atomic():
            self._journal.leases.extend(owner, expire_time)

    def _uptime_at(self, at: float) -> float:
        """Returns what CLOCK_BOOTTIME will be when the lease clock is at `at`, in seconds."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) + at - self._clock.now()

    # Making a container -----------------------------------------------------------------------------------

    def of_new(self, owner: Owner, request: CreateContainerRequest) -> float | None:
        """Returns until when a container that is to be made may run; None is for ever.

        Raises:
            Refusal: INVALID_ARGUMENT with SPEC_INVALID; FAILED_PRECONDITION with LEASE_EXPIRED.
        """
        problem = _problem(request.lease_expire_time)
        if problem:
            raise _invalid(problem)
        asked = [moment(request.lease_expire_time)] if request.HasField("lease_expire_time") else []
        known = self._journal.leases.get(owner)
        ends = asked + ([known] if known is not None else [])
        if ends and max(ends) <= self._clock.now():
            raise _expired(owner)
        return max(ends, default=None)

    async def hold(self, record: ContainerRecord, pid: int) -> None:
        """Holds a container to its lease, if it has one, before its command begins or right after.

        Args:
            record: the container.
            pid: its first process.

        Raises:
            Refusal: INTERNAL with LEASE_NOT_KEPT, the container must not run; FAILED_PRECONDITION with LEASE_EXPIRED.
        """
        expire_time = self._journal.leases.get(record.owner)
        if expire_time is None:
            return
        leased = self._begin(record)
        try:
            if not leased.hold.extend(self._uptime_at(expire_time)):
                raise _expired(record.owner)
            if leased.hold.find(pid):
                await leased.hold.keep(lambda: self._keep_again(record.owner))
        except KeeperFailedError as error:
            raise Refusal(
                grpc.StatusCode.INTERNAL,
                "LEASE_NOT_KEPT",
                f"the container was not started, because nothing would hold it to its lease: {error}",
            ) from error
        self._await_end(record.owner)

    def _begin(self, record: ContainerRecord) -> _Leased:
        leased = self._leased.get(record.owner)
        if leased is None:
            leased = _Leased(LeaseHold(self._path(record), group=self._group, python=self._python))
            self._leased[record.owner] = leased
        return leased

    def _path(self, record: ContainerRecord) -> Path:
        return self._folder / record.container_id

    # Watching over it -------------------------------------------------------------------------------------

    async def restore(self, record: ContainerRecord) -> None:
        """Holds a container that outlived the daemon to its lease again, with the keeper that it has or a new one."""
        expire_time = self._journal.leases.get(record.owner)
        if expire_time is None:
            return
        leased = self._begin(record)
        if not leased.hold.deadline:
            # Its file is gone. Else the file is what counts: it is written first, and no clock can change it.
            leased.hold.extend(self._uptime_at(expire_time))
        self._keep_again(record.owner)
        self._await_end(record.owner)

    def _keep_again(self, owner: Owner) -> None:
        leased = self._leased.get(owner)
        if leased is not None and leased.keeping is None:
            leased.keeping = asyncio.create_task(self._keep(owner, leased))

    async def _keep(self, owner: Owner, leased: _Leased) -> None:
        """Tries until a keeper stays with a container that lives; the daemon alone holds it to its lease meanwhile."""
        pause = _FIRST_RETRY_S
        while (record := self._journal.container(owner)) is not None and record.stage.is_alive:
            try:
                if leased.hold.find(record.pid):
                    await leased.hold.keep(lambda: self._keep_again(owner))
                break
            except KeeperFailedError as error:
                _log.warning("only the daemon holds a container to its lease", owner=str(owner), error=str(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_RETRY_S)
        leased.keeping = None

    def _await_end(self, owner: Owner) -> None:
        """Looks at a lease when it is to run out."""
        leased = self._leased.get(owner)
        if leased is None or leased.ending is not None:
            return
        left = leased.hold.deadline - time.clock_gettime(time.CLOCK_BOOTTIME)
        if left <= 0 and leased.hold.run_out():
            leased.ending = asyncio.create_task(self._end(owner, leased))
            return
        # The event loop's clock stands still while the host sleeps.
        wait_s = min(max(left, 0.0), _LONGEST_WAIT_S)
        leased.alarm = asyncio.get_running_loop().call_later(wait_s, self._await_end, owner)

    async def _end(self, owner: Owner, leased: _Leased) -> None:
        """Kills a container whose lease has run out, until it has ended."""
        pause = _FIRST_RETRY_S
        while (record := self._journal.container(owner)) is not None and not _is_over(record):
            try:
                held = leased.hold.kill()
                if not record.lease_expired:
                    record = self._journal.put_container(replace(record, lease_expired=True))
                if not held:
                    await self._runtime.signal(record.container_id, signal.SIGKILL)
                if record.stage is ContainerStage.SUSPENDED:
                    # What a cgroup has frozen dies all the same, but the runtime would go on calling it frozen.
                    await self._runtime.resume(record.container_id)
            except (Refusal, OSError) as error:
                _log.warning("a container whose lease has run out is killed again", owner=str(owner), error=str(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_RETRY_S)

    def has_expired(self, record: ContainerRecord, exit_code: int | None) -> bool:
        """Says whether a container that has ended was killed because its lease had run out."""
        return record.lease_expired or (exit_code == _KILLED and ran_out(self._path(record)))

    def let_go(self, record: ContainerRecord) -> None:
        """Lets go of a container that has ended, or that was never begun."""
        leased = self._leased.pop(record.owner, None)
        if leased is None:
            if record.container_id:
                self._path(record).unlink(missing_ok=True)
            return
        _cancel(leased)
        leased.hold.remove()

    def sweep(self) -> None:
        """Removes the files of containers that are no more, which an earlier daemon left."""
        alive = {record.container_id for record in self._journal.containers() if not _is_over(record)}
        for path in self._folder.iterdir():
            if path.name not in alive:
                path.unlink(missing_ok=True)

    def prune(self) -> None:
        """Forgets the leases of containers that never came, a day after they ran out.

        Raises:
            OSError: the disk is full.
        """
        with self._journal.atomic():
            self._journal.leases.prune(self._clock.now() - _KEPT_S)

    async def close(self) -> None:
        """Lets go of the containers; their keepers stay with them."""
        tasks = []
        for leased in self._leased.values():
            tasks += _cancel(leased)
        await asyncio.gather(*tasks, return_exceptions=True)
        for leased in self._leased.values():
            leased.hold.close()
        self._leased.clear()


def _is_over(record: ContainerRecord) -> bool:
    return record.stage in (ContainerStage.EXITED, ContainerStage.REMOVED)


def _cancel(leased: _Leased) -> list[asyncio.Task[None]]:
    if leased.alarm is not None:
        leased.alarm.cancel()
    tasks = [task for task in (leased.keeping, leased.ending) if task is not None]
    for task in tasks:
        task.cancel()
    return tasks


def _problem(stamp: Timestamp) -> str:
    if not (0 <= stamp.seconds <= _LAST_SECOND and 0 <= stamp.nanos < 10**9):
        return "is no time: its seconds must be 0 to 253402300799, and its nanos 0 to 999999999"
    return ""


def _invalid(problem: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"lease_expire_time {problem}", field="lease_expire_time"
    )


def _expired(owner: Owner) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "LEASE_EXPIRED",
        f"the lease of {owner} has run out, and its container is killed; what is to run on is a new attempt",
    )
