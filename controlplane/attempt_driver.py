"""Drives one attempt, step by step, from its reservation to its release.

The state of the job in the store says where to go on, and every step may be done again: after a crash of the
control plane at any point the attempt is taken up under a higher fencing token and driven from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from controlplane import happenings
from controlplane.attempt_end import AttemptEnd, Told
from controlplane.container_lease import ContainerLease
from controlplane.cutting import cut
from controlplane.draft import IllegalTransition
from controlplane.endings import CONTAINER_LOST, not_started
from controlplane.faults import MOST_ATTEMPTS, Verdict, retry_delay_s, verdict
from controlplane.happenings import Happening
from controlplane.jobs import FINAL_STATES, LIVING_STATES, transition
from controlplane.learning import learnt
from controlplane.metering import UsageChange
from controlplane.node_asker import Fenced, GivenUp, NodeAsker
from controlplane.node_link import NodeLink
from controlplane.records import Change, Decide, JobRecord, Reservation
from controlplane.reservations import Reservations
from controlplane.share_driver import ShareDriver
from controlplane.store import Store
from controlplane.surroundings import Surroundings
from controlplane.usage_of import usage_of
from controlplane.wants import Wants
from controlplane.workload import container_request, stop_request
from controlplane.workspace_carrier import WorkspaceCarrier
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, seconds
from puhui.v1 import card_pb2, job_pb2, node_pb2

__all__ = ["AttemptDriver"]

_log = structlog.get_logger(__name__)


_DEFAULT_GRACE_S = 10.0


class AttemptDriver:
    """Drives one attempt of one job. `run` returns when nothing of it is left to do."""

    def __init__(self, around: Surroundings, record: JobRecord, number: int) -> None:
        self._around = around
        self._record = record
        self._number = number
        self._cancel = asyncio.Event()
        self._news = asyncio.Event()
        self._asker = NodeAsker(lambda: self.link, self._cancel)
        self._share = ShareDriver(self)
        self._carrier = WorkspaceCarrier(self, around, self._cancel)
        self._end = AttemptEnd(self, around, self._cancel)
        clock = around.reach.clock if around.reach is not None else None
        self._lease = ContainerLease(self, around.feed, clock, self._cancel)
        if record.cancel_requested:
            self._cancel.set()

    def cancel(self) -> None:
        """The job's end was asked for, and that is stored."""
        self._cancel.set()
        self._news.set()

    async def run(self, *, adopt: bool) -> JobRecord:
        """Drives the attempt to its end. Returns the job: ended, or queued again.

        Args:
            adopt: take the attempt up under a new token, because its driver's process is gone.
        """
        try:
            if adopt:
                await self._adopt()
            if self._has_moved_on():
                await self._end.release_late()
                return self._record
            async with self._lease.kept():
                if self._record.state == job_pb2.JOB_STATE_STARTING:
                    await self._start()
                if self._record.state in LIVING_STATES:
                    await self._live()
            if self._has_moved_on():
                return self._record
            if self._record.state == job_pb2.JOB_STATE_STOPPING:
                await self._end.finish()
            elif self._record.state in FINAL_STATES:
                await self._end.release_late()
        except Fenced:
            _log.error("another control plane commands this attempt", job=self._record.id, attempt=self._number)
        return self._record

    # -- what it stands on

    @property
    def record(self) -> JobRecord:
        """The job."""
        return self._record

    @property
    def attempt(self) -> job_pb2.Attempt:
        """The attempt."""
        return self._record.job.attempts[self._number - 1]

    def _has_moved_on(self) -> bool:
        """Whether the job has a newer attempt."""
        return len(self._record.job.attempts) > self._number

    @property
    def link(self) -> NodeLink:
        """The connection to the attempt's node."""
        return self.link_to(self.attempt)

    def link_to(self, attempt: job_pb2.Attempt) -> NodeLink:
        """Returns the connection to the node of any attempt of the job."""
        link = self._around.nodes.link(attempt.node_id)
        if link is None:
            raise RuntimeError(f"node {attempt.node_id} of attempt {self._record.id}/{attempt.number} is not known")
        return link

    @property
    def owner(self) -> card_pb2.AttemptRef:
        """Under which its node is commanded."""
        return self.owner_of(self._number)

    def owner_of(self, number: int) -> card_pb2.AttemptRef:
        """Returns under which the node of an attempt of the job is commanded."""
        return card_pb2.AttemptRef(
            centre=self._around.centre,
            job_id=self._record.id,
            attempt=number,
            fencing_token=self._record.job.attempts[number - 1].fencing_token,
        )

    @property
    def asker(self) -> NodeAsker:
        """Asks its node."""
        return self._asker

    @property
    def store(self) -> Store:
        """The centre's memory."""
        return self._around.store

    @property
    def reservations(self) -> Reservations:
        """The shares that are held."""
        return self._around.reservations

    @property
    def wants(self) -> Wants:
        """Runs that wait."""
        return self._around.wants

    @property
    def warm_s(self) -> float:
        """A slice of this job that was taken back is kept for its tenant for this long, in seconds."""
        return self._around.warm_s(self._record.job.spec.tenant)

    def wake_in(self, delay_s: float) -> None:
        """Has the next step looked at after so many seconds, although nothing happens."""
        asyncio.get_running_loop().call_later(delay_s, self._news.set)

    def queue(self) -> None:
        """The job waits for a share."""
        self._around.queue(self._record)

    def withdraw(self) -> None:
        """The job waits for none any longer."""
        self._around.withdraw(self._record.id)

    def request_id(self, step: str) -> str:
        """Returns the request id of a step of the attempt."""
        return f"{self._record.id}/{self._number}/{step}"

    async def _adopt(self) -> None:
        def decide(record: JobRecord, token: int) -> Change:
            after, event = transition(record, happenings.Adopted(token), now())
            return Change(after, (event,), token_taken=True)

        self._record = await self._patient_store(decide)

    async def change(
        self,
        *told: Happening,
        before: Sequence[Told] = (),
        release: bool = False,
        reserve: Reservation | None = None,
        if_still: bool = False,
    ) -> bool:
        """Stores what happened in one transaction.

        Args:
            told: what happened now.
            before: what happened before that and was not stored yet, with its time.
            release: the attempt's reservation ends.
            reserve: the attempt's reservation is this one from now on.
            if_still: store nothing when it can no longer happen, because somebody else was faster.

        Returns:
            Whether it was stored.

        Raises:
            IllegalTransition: it cannot happen, and `if_still` does not say that this may be.
        """
        happened = [*before, *((one, now()) for one in told)]
        stored = True
        held = self._around.reservations.get((self._record.id, self._number))
        usage = tuple(change for one, at in happened for change in self._usage(one, at))
        # A warm share is no longer the attempt's to release.
        release = release and (held is None or not held.is_warm)

        def decide(record: JobRecord, _: int) -> Change | None:
            nonlocal stored
            stored, events = True, []
            try:
                for one, at in happened:
                    record, event = transition(record, one, at)
                    events.append(event)
            except IllegalTransition:
                if not if_still:
                    raise
                stored = False
                return None
            released = (self._number,) if release else ()
            return Change(record, tuple(events), reserve, released, usage=usage, observed=learnt(told, record, now()))

        self._record = await self._patient_store(decide)
        if stored and release:
            self._around.reservations.release((self._record.id, self._number))
        if stored and reserve is not None:
            self._around.reservations.hold(reserve)
        return stored

    def _usage(self, happening: Happening, at: float) -> tuple[UsageChange, ...]:
        """Returns what something that happened means for the job's usage."""
        if self._has_moved_on():
            return ()  # what is counted is the newer attempt's
        key = (self._record.id, self._number)
        container, held = self.link.containers.get(key), self._around.reservations.get(key)
        seen = container is not None and container.HasField("idleness")
        counter_s = container.idleness.busy_seconds if container is not None and seen else self._record.busy_seen_s
        if isinstance(happening, happenings.SliceCreated | happenings.Resumed):
            gpu_slices = self._around.nodes.compute_slices(self.attempt.node_id, happening.slice.gpu_uuid)
            return usage_of(happening, self.attempt, held, gpu_slices, at, counter_s)
        return usage_of(happening, self.attempt, held, 0, at, counter_s)

    async def _patient_store(self, decide: Decide) -> JobRecord:
        """Stores a change; a full disk is waited out, because what happened has happened."""
        tries = 0
        while True:
            try:
                return await self._around.store.change_job(self._record.id, decide)
            except OSError as error:
                tries += 1
                _log.error("the store cannot be written; trying again", job=self._record.id, why=str(error))
                await asyncio.sleep(retry_delay_s(tries))

    # -- STARTING

    async def _start(self) -> None:
        try:
            if self._cancel.is_set():
                raise GivenUp
            carried = await self._carrier.bring() if self._record.carry_from else 0
            piece = await self._make_slice()
            if self._cancel.is_set():
                raise GivenUp
            await self._make_container(piece, carried)
        except GivenUp:
            await self.change(happenings.Stopped())
        except Refusal as refusal:
            await self._not_started(refusal)

    async def _make_slice(self) -> card_pb2.Slice:
        made, sent = await asyncio.gather(cut(self, "create-slice"), self._send_bundle(), return_exceptions=True)
        for outcome in (made, sent):
            if isinstance(outcome, BaseException):
                raise outcome
        assert isinstance(made, card_pb2.Slice)  # noqa: S101 - gather's type cannot say so
        return made

    async def _send_bundle(self) -> None:
        if not self._record.job.bundle_id:
            return
        header, archive = await self._around.bundles.locate(self._record.job.bundle_id)
        await self._asker.ask(lambda client: client.put_bundle(header, archive), give_up=True)

    async def _make_container(self, piece: card_pb2.Slice, workspace_of: int) -> None:
        request = container_request(self._record.job, self.owner, piece, self.request_id("create-container"))
        request.workspace_of_attempt = workspace_of
        lease_end = await self._lease.first()
        if lease_end is not None:
            request.lease_expire_time.CopyFrom(lease_end)

        async def create() -> node_pb2.Container:
            try:
                return await self._asker.ask(lambda client: client.create_container(request), give_up=True)
            except Refusal as refusal:
                if refusal.reason != "BUNDLE_NOT_FOUND":
                    raise
            await self._send_bundle()
            return await self._asker.ask(lambda client: client.create_container(request), give_up=True)

        # The slice is noted while the container is made: the next start of the control plane would find either.
        container, noted = await asyncio.gather(
            create(), self.change(happenings.SliceCreated(piece)), return_exceptions=True
        )
        for outcome in (noted, container):
            if isinstance(outcome, BaseException):
                raise outcome
        assert isinstance(container, node_pb2.Container)  # noqa: S101 - gather's type cannot say so
        self.link.note((self._record.id, self._number), container)
        carried = self._record.carry_from
        if not carried:
            await self.change(happenings.ContainerStarted(container))
            return
        size_bytes = self._carrier.size_bytes()
        await self.change(happenings.ContainerStarted(container), happenings.WorkspaceCarried(size_bytes))
        self._carrier.leave(carried)

    async def _not_started(self, refusal: Refusal) -> None:
        fault = verdict(refusal)
        if fault is Verdict.FAIL or self._record.failed_starts + 1 >= MOST_ATTEMPTS:
            await self.change(happenings.NotStarted(not_started(refusal)))
            return
        _log.warning("the node could not start it", job=self._record.id, reason=refusal.reason, why=refusal.message)
        # It must be certain that nothing of this attempt runs before another begins.
        try:
            released = await self._end.release(give_up=True)
            await self._asker.ask(lambda _: self._around.nodes.refresh(self.attempt.node_id), give_up=True)
        except (GivenUp, Refusal):
            await self.change(
                happenings.Stopped() if self._cancel.is_set() else happenings.NotStarted(not_started(refusal))
            )
            return
        await self.change(happenings.Requeued(refusal.reason, refusal.message), before=released, release=True)

    # -- RUNNING, IDLE, RESUMING

    async def _live(self) -> None:
        """Watches over the container and its share until the command has ended, or the job goes on elsewhere."""
        key = (self._record.id, self._number)
        news = self._news
        with self.link.watching(key, news), self._around.feed.watching(self._record.id, news):
            while True:
                news.clear()
                self._record = await self._stored()
                if self._has_moved_on() or self._record.state not in LIVING_STATES:
                    return
                container = self.link.containers.get(key)
                try:
                    if await self._is_over(container):
                        self._around.withdraw(self._record.id)
                        return
                    if await self._share.step(container):
                        continue
                except GivenUp:
                    continue
                await news.wait()

    async def _stored(self) -> JobRecord:
        record = await self._around.store.job(self._record.id)
        if record is None:
            raise RuntimeError(f"job {self._record.id} is driven, but not in the store")
        return record

    async def _is_over(self, container: node_pb2.Container | None) -> bool:
        """Ends the job's life when its command has ended, or somebody asked for that, or its container is lost."""
        stopped_by_reclaim = self._record.restart or self._record.reclaiming
        exited = container is not None and container.state == node_pb2.CONTAINER_STATE_EXITED
        if container is not None and exited and (not stopped_by_reclaim or self._cancel.is_set()):
            # A control plane before this one may have stopped it, and have had no time to note that.
            by_request = self._cancel.is_set()
            await self.change((happenings.Stopped if by_request else happenings.CommandEnded)(container))
            return True
        if self._cancel.is_set():
            await self._stop_command()
            return True
        if container is None and self.link.in_contact and not self._record.restart and await self._is_lost():
            await self.change(happenings.NotStarted(CONTAINER_LOST))
            return True
        return False

    async def _is_lost(self) -> bool:
        """Asks the node whether it still has the container."""
        for container in await self._asker.ask(lambda client: client.list_containers(), give_up=True):
            owner = container.owner
            if (owner.centre, owner.job_id, owner.attempt) == (self._around.centre, self._record.id, self._number):
                self.link.note((self._record.id, self._number), container)
                self._news.set()
                return False
        return True

    async def _stop_command(self) -> None:
        request = stop_request(self._record.job, self.owner, self.request_id("stop"))
        grace_s = seconds(request.grace) if request.HasField("grace") else _DEFAULT_GRACE_S
        try:
            async with asyncio.timeout(grace_s + self._around.release_patience_s):
                container = await self._asker.ask(lambda client: client.stop_container(request))
        except TimeoutError:
            await self.change(happenings.Stopped())
        except Refusal as refusal:
            _log.warning("the command could not be stopped", job=self._record.id, why=refusal.message)
            await self.change(happenings.Stopped())
        else:
            await self.change(happenings.Stopped(container))
