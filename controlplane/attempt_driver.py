"""Drives one attempt, step by step, from its reservation to its release.

The state of the job in the store says where to go on, and every step may be done again: after a crash of the
control plane at any point the attempt is taken up under a higher fencing token and driven from there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from controlplane import happenings
from controlplane.bundles import Bundles
from controlplane.collect import Collected, collect
from controlplane.endings import CONTAINER_LOST, not_started
from controlplane.faults import MOST_ATTEMPTS, Verdict, retry_delay_s, verdict
from controlplane.happenings import Happening
from controlplane.jobs import FINAL_STATES, transition
from controlplane.node_asker import Fenced, GivenUp, NodeAsker
from controlplane.node_client import NodeClient, is_unreachable
from controlplane.node_link import NodeLink
from controlplane.nodes import Nodes
from controlplane.records import Change, JobRecord
from controlplane.reservations import Reservations
from controlplane.results import Results
from controlplane.store import Store
from controlplane.workload import container_request
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, seconds
from puhui.v1 import card_pb2, job_pb2, node_pb2, node_service_pb2

__all__ = ["AttemptDriver", "Surroundings"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What every driver works with."""

    centre: str
    store: Store
    nodes: Nodes
    reservations: Reservations
    bundles: Bundles
    results: Results
    release_patience_s: float
    """A job whose share is not confirmed to be released within this time ends all the same."""
    collect_patience_s: float
    """Results that a node in contact has refused for this long, and several times, are given up."""


_Told = tuple[Happening, float]
"""What happened, and when, in seconds since the epoch."""

_DEFAULT_GRACE_S = 10.0
_TELL_AFTER_TRIES = 2
_GIVE_UP_AFTER_REFUSALS = 5


class AttemptDriver:
    """Drives one attempt of one job. `run` returns when nothing of it is left to do."""

    def __init__(self, around: Surroundings, record: JobRecord, number: int) -> None:
        self._around = around
        self._record = record
        self._number = number
        self._cancel = asyncio.Event()
        self._news = asyncio.Event()
        self._refusals = 0
        self._refused_at = 0.0
        self._asker = NodeAsker(lambda: self._link, self._cancel)
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
            if self._record.state == job_pb2.JOB_STATE_STARTING:
                await self._start()
            if self._record.state == job_pb2.JOB_STATE_RUNNING:
                await self._watch()
            if self._record.state == job_pb2.JOB_STATE_STOPPING:
                await self._finish()
            elif self._record.state in FINAL_STATES:
                await self._release_late()
        except Fenced:
            _log.error("another control plane commands this attempt", job=self._record.id, attempt=self._number)
        return self._record

    # -- what it stands on

    @property
    def _attempt(self) -> job_pb2.Attempt:
        return self._record.job.attempts[self._number - 1]

    @property
    def _link(self) -> NodeLink:
        link = self._around.nodes.link(self._attempt.node_id)
        if link is None:
            raise RuntimeError(f"node {self._attempt.node_id} of attempt {self._record.id}/{self._number} is not known")
        return link

    @property
    def _owner(self) -> card_pb2.AttemptRef:
        return card_pb2.AttemptRef(
            centre=self._around.centre,
            job_id=self._record.id,
            attempt=self._number,
            fencing_token=self._attempt.fencing_token,
        )

    def _request_id(self, step: str) -> str:
        return f"{self._record.id}/{self._number}/{step}"

    async def _adopt(self) -> None:
        def decide(record: JobRecord, token: int) -> Change:
            after, event = transition(record, happenings.Adopted(token), now())
            return Change(after, (event,), token_taken=True)

        self._record = await self._patient_store(decide)

    async def _change(self, *happenings: Happening, before: Sequence[_Told] = (), release: bool = False) -> None:
        """Stores what happened in one transaction.

        Args:
            happenings: what happened now.
            before: what happened before that and was not stored yet, with its time.
            release: the attempt's reservation ends.
        """
        told = [*before, *((happening, now()) for happening in happenings)]

        def decide(record: JobRecord, _: int) -> Change:
            events = []
            for happening, at in told:
                record, event = transition(record, happening, at)
                events.append(event)
            return Change(record, tuple(events), release=(self._number,) if release else ())

        self._record = await self._patient_store(decide)
        if release:
            self._around.reservations.release((self._record.id, self._number))

    async def _patient_store(self, decide: Callable[[JobRecord, int], Change]) -> JobRecord:
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
            piece = await self._make_slice()
            if self._cancel.is_set():
                raise GivenUp
            await self._make_container(piece)
        except GivenUp:
            await self._change(happenings.Stopped())
        except Refusal as refusal:
            await self._not_started(refusal)

    async def _make_slice(self) -> card_pb2.Slice:
        attempt = self._attempt
        request = node_service_pb2.CreateSliceRequest(
            owner=self._owner,
            gpu_uuid=attempt.gpu_uuid,
            profile=attempt.profile,
            placement=attempt.placement,
            request_id=self._request_id("create-slice"),
        )
        made, sent = await asyncio.gather(
            self._asker.ask(lambda client: client.create_slice(request), give_up=True),
            self._send_bundle(),
            return_exceptions=True,
        )
        for outcome in (made, sent):
            if isinstance(outcome, BaseException):
                raise outcome
        assert isinstance(made, card_pb2.Slice)  # noqa: S101 - gather's type cannot say so
        return made

    async def _send_bundle(self) -> None:
        header, archive = await self._around.bundles.locate(self._record.job.bundle_id)
        await self._asker.ask(lambda client: client.put_bundle(header, archive), give_up=True)

    async def _make_container(self, piece: card_pb2.Slice) -> None:
        request = container_request(self._record.job, self._owner, piece, self._request_id("create-container"))

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
            create(), self._change(happenings.SliceCreated(piece)), return_exceptions=True
        )
        for outcome in (noted, container):
            if isinstance(outcome, BaseException):
                raise outcome
        assert isinstance(container, node_pb2.Container)  # noqa: S101 - gather's type cannot say so
        self._link.note((self._record.id, self._number), container)
        await self._change(happenings.ContainerStarted(container))

    async def _not_started(self, refusal: Refusal) -> None:
        fault = verdict(refusal)
        if fault is Verdict.FAIL or self._number >= MOST_ATTEMPTS:
            await self._change(happenings.NotStarted(not_started(refusal)))
            return
        _log.warning("the node could not start it", job=self._record.id, reason=refusal.reason, why=refusal.message)
        # It must be certain that nothing of this attempt runs before another begins.
        try:
            released = await self._release(give_up=True)
            await self._asker.ask(lambda _: self._around.nodes.refresh(self._attempt.node_id), give_up=True)
        except (GivenUp, Refusal):
            await self._change(
                happenings.Stopped() if self._cancel.is_set() else happenings.NotStarted(not_started(refusal))
            )
            return
        await self._change(happenings.Requeued(refusal.reason, refusal.message), before=released, release=True)

    # -- RUNNING

    async def _watch(self) -> None:
        key = (self._record.id, self._number)
        with self._link.watching(key, self._news):
            while True:
                self._news.clear()
                container = self._link.containers.get(key)
                if container is not None and container.state == node_pb2.CONTAINER_STATE_EXITED:
                    # A control plane before this one may have stopped it, and have had no time to note that.
                    by_request = self._cancel.is_set()
                    await self._change((happenings.Stopped if by_request else happenings.CommandEnded)(container))
                    return
                if self._cancel.is_set():
                    await self._stop_command()
                    return
                if container is None and self._link.in_contact and await self._is_lost():
                    await self._change(happenings.NotStarted(CONTAINER_LOST))
                    return
                await self._news.wait()

    async def _is_lost(self) -> bool:
        """Asks the node whether it still has the container."""
        for container in await self._asker.ask(lambda client: client.list_containers(), give_up=False):
            owner = container.owner
            if (owner.centre, owner.job_id, owner.attempt) == (self._around.centre, self._record.id, self._number):
                self._link.note((self._record.id, self._number), container)
                self._news.set()
                return False
        return True

    async def _stop_command(self) -> None:
        request = node_service_pb2.StopContainerRequest(owner=self._owner, request_id=self._request_id("stop"))
        grace_s = _DEFAULT_GRACE_S
        if self._record.job.spec.HasField("stop_grace"):
            request.grace.CopyFrom(self._record.job.spec.stop_grace)
            grace_s = seconds(request.grace)
        try:
            async with asyncio.timeout(grace_s + self._around.release_patience_s):
                container = await self._asker.ask(lambda client: client.stop_container(request))
        except TimeoutError:
            await self._change(happenings.Stopped())
        except Refusal as refusal:
            _log.warning("the command could not be stopped", job=self._record.id, why=refusal.message)
            await self._change(happenings.Stopped())
        else:
            await self._change(happenings.Stopped(container))

    # -- STOPPING

    async def _finish(self) -> None:
        await self._collect(patient=False)
        release = asyncio.create_task(self._release_for_certain())
        try:
            done, _ = await asyncio.wait({release}, timeout=self._around.release_patience_s)
            if done:
                await self._change(happenings.Ended(), before=release.result(), release=True)
                return
            name = self._around.nodes.name(self._attempt.node_id)
            await self._change(happenings.Ended(f"its share stays held until node {name} confirms that it is released"))
            await self._change(before=await release, release=True)
        finally:
            release.cancel()
            await asyncio.gather(release, return_exceptions=True)

    async def _release_late(self) -> None:
        """The job has ended, but its share is held."""
        if self._around.reservations.holds((self._record.id, self._number)):
            await self._change(before=await self._release_for_certain(), release=True)

    async def _collect(self, *, patient: bool) -> None:
        """Collects the results; unless `patient`, only until the job's end is asked for.

        A node out of contact is waited for, however long it takes; one that only refuses is not.
        """
        tries = 0
        while not self._record.results_collected and self._attempt.container_id:
            if self._cancel.is_set() and not patient:
                return
            got = await collect(self._link.client, self._owner, self._around.results)
            if got.error is None:
                await self._change(happenings.ResultsCollected(got.log_bytes, got.artifacts))
                return
            if isinstance(got.error, Refusal) and self._is_hopeless(got.error):
                await self._lose(got, got.error)
                return
            tries += 1
            await self._bear(got.error, tries, tell=not patient)

    def _is_hopeless(self, refusal: Refusal) -> bool:
        """Counts a node's refusal to give the results, and says whether it is the last that is borne."""
        if verdict(refusal) in {Verdict.WAIT, Verdict.FENCED}:
            return False
        at = asyncio.get_running_loop().time()
        self._refused_at = self._refused_at if self._refusals else at
        self._refusals += 1
        waited_s = at - self._refused_at
        return self._refusals >= _GIVE_UP_AFTER_REFUSALS and waited_s >= self._around.collect_patience_s

    async def _lose(self, got: Collected, refusal: Refusal) -> None:
        _log.error("results are given up", job=self._record.id, missing=got.missing, why=str(refusal))
        why = f"its {got.missing} could not be had from its node and are lost: {refusal.message} ({refusal.reason})"
        await self._change(happenings.ResultsLost(why, got.log_bytes, got.artifacts))

    async def _bear(self, error: Refusal | OSError, tries: int, *, tell: bool) -> None:
        """Waits after the results could not be collected."""
        unreachable = isinstance(error, Refusal) and is_unreachable(error)
        if isinstance(error, Refusal) and verdict(error) is Verdict.FENCED:
            raise Fenced from error
        _log.warning("results cannot be collected yet", job=self._record.id, why=str(error))
        if tell and tries == _TELL_AFTER_TRIES:
            await self._change(happenings.ResultsDelayed(f"its results cannot be collected yet: {error}"))
        if not unreachable:
            # Often enough that patience, not the delays, says when it is enough.
            rarely_s = self._around.collect_patience_s / (_GIVE_UP_AFTER_REFUSALS - 1)
            delay_s = retry_delay_s(tries)
            await asyncio.sleep(min(delay_s, rarely_s) if isinstance(error, Refusal) else delay_s)
            return
        with contextlib.suppress(GivenUp):
            await self._asker.until_contact(retry_delay_s(tries), give_up=tell)

    # -- releasing

    async def _release_for_certain(self) -> list[_Told]:
        """Collects what was not collected, then releases everything, however long it takes."""
        tries = 0
        while True:
            await self._collect(patient=True)
            try:
                return await self._release(give_up=False)
            except Refusal as refusal:
                tries += 1
                _log.warning("the share cannot be released yet", job=self._record.id, why=refusal.message)
                await asyncio.sleep(retry_delay_s(tries))

    async def _release(self, *, give_up: bool) -> list[_Told]:
        """Removes the container and destroys the slice, whatever of them there is. Returns what happened.

        Raises:
            Refusal: the node cannot do it now.
            GivenUp: as `give_up` says.
        """
        owner, told = self._owner, list[_Told]()
        remove = node_service_pb2.RemoveContainerRequest(
            owner=owner, discard_results=True, request_id=self._request_id("remove-container")
        )
        await self._gone(lambda client: client.remove_container(remove), "CONTAINER_NOT_FOUND", give_up)
        if self._attempt.container_id:
            told.append((happenings.ContainerRemoved(self._number), now()))
        uuid = self._attempt.slice_uuid or await self._find_slice(give_up)
        if uuid:
            destroy = node_service_pb2.DestroySliceRequest(
                owner=owner, slice_uuid=uuid, request_id=self._request_id("destroy-slice")
            )
            await self._gone(lambda client: client.destroy_slice(destroy), "SLICE_NOT_FOUND", give_up)
            self._around.nodes.slice_gone(self._attempt.node_id, uuid)
        told.append((happenings.SliceDestroyed(self._number, uuid), now()))
        return told

    async def _gone(self, call: Callable[[NodeClient], Awaitable[None]], absent: str, give_up: bool) -> None:
        try:
            await self._asker.ask(call, give_up=give_up)
        except Refusal as refusal:
            if refusal.reason != absent:
                raise

    async def _find_slice(self, give_up: bool) -> str:
        """Returns the slice of an attempt whose control plane was gone before it could note it; "" for none."""
        for piece in await self._asker.ask(lambda client: client.list_slices(), give_up=give_up):
            owner = piece.owner
            if (owner.centre, owner.job_id, owner.attempt) == (self._around.centre, self._record.id, self._number):
                return piece.uuid
        return ""
