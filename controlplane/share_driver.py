"""Takes the share of a living job back and gives it one again (steps S6 to S8).

The job in the store says what is meant; every step may be done again after a crash. The node executes: it looks again
whether the share is really unused, warns, and takes the mildest rung that works.
"""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from typing import Protocol

import structlog

from controlplane import happenings
from controlplane.cutting import Placed, cut
from controlplane.faults import Verdict, retry_delay_s, verdict
from controlplane.happenings import Happening
from controlplane.node_asker import Fenced
from controlplane.node_link import NodeLink
from controlplane.records import JobRecord, Reservation
from controlplane.reservations import Reservations
from controlplane.wants import Wants
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, seconds
from puhui.v1 import job_pb2, node_pb2, node_service_pb2
from puhui.v1.job_pb2 import (
    RECLAIM_MODE_CHECKPOINT,
    RECLAIM_MODE_DETACH,
    RECLAIM_MODE_NEVER,
    RECLAIM_MODE_STOP,
)

__all__ = ["Driven", "ShareDriver", "hardest_mild", "rest_until"]

_log = structlog.get_logger(__name__)

_LONGEST_REST_S = 3600.0
_LONGEST_BACK_OFF_S = 600.0
_ENDED_BY_SIGNAL = (128 + signal.SIGTERM, 128 + signal.SIGKILL)


class Driven(Placed, Protocol):
    """The attempt whose share comes and goes."""

    @property
    def link(self) -> NodeLink:
        """The connection to its node."""

    @property
    def reservations(self) -> Reservations:
        """The shares that are held."""

    @property
    def wants(self) -> Wants:
        """Runs that wait."""

    @property
    def warm_s(self) -> float:
        """A slice of this job that was taken back is kept for its tenant for this long, in seconds."""

    async def change(
        self, *told: Happening, release: bool = False, reserve: Reservation | None = None, if_still: bool = False
    ) -> bool:
        """Stores what happened; with `if_still`, returns False where it can no longer happen."""

    def wake_in(self, delay_s: float) -> None:
        """Has the next step looked at after so many seconds, although nothing happens."""

    def queue(self) -> None:
        """The job waits for a share."""

    def withdraw(self) -> None:
        """The job waits for none any longer."""


def hardest_mild(policy: job_pb2.IdlePolicy) -> job_pb2.ReclaimMode.ValueType:
    """Returns the hardest rung that a job's share is taken by although nobody waits for it: none that ends work."""
    if policy.reclaim_mode in (RECLAIM_MODE_NEVER, RECLAIM_MODE_DETACH):
        return policy.reclaim_mode
    return RECLAIM_MODE_CHECKPOINT


def rest_until(record: JobRecord) -> float:
    """Returns when a batch job that lost its share for being idle looks for room again, in seconds since the epoch.

    It rests as long as it was idle before, and twice as long each time that this was in vain.
    """
    idle_after_s = seconds(record.job.idle_policy.idle_after)
    return record.idle_at + float(min(_LONGEST_REST_S, idle_after_s * 2 ** min(record.rests, 16)))


class ShareDriver:
    """Drives what the share of one attempt does, while its container lives."""

    def __init__(self, driven: Driven) -> None:
        self._driven = driven
        self._refusals = 0
        """Times in a row that the share could not be taken although it was not used."""
        self._try_at = 0.0
        """It is not tried again before, on the loop's clock."""
        self._tries = 0

    @property
    def _key(self) -> tuple[str, int]:
        return self._driven.owner.job_id, self._driven.owner.attempt

    async def step(self, container: node_pb2.Container | None) -> bool:
        """Does what is to be done now. Returns False when there is nothing.

        Args:
            container: the container as the node tells of it; None when it does not.
        """
        state = self._driven.record.state
        if state == job_pb2.JOB_STATE_RUNNING:
            return container is not None and await self._running(container)
        if state == job_pb2.JOB_STATE_IDLE:
            return await self._idle(container)
        return await self._resuming(container)

    # -- RUNNING: is it to be taken back?

    async def _running(self, container: node_pb2.Container) -> bool:
        record = self._driven.record
        if record.reclaiming:
            await self._reclaim()
            return True
        if record.suspend:
            await self._begin("SUSPENDED", record.suspend, None)
            return True
        idle = container.HasField("idleness") and container.idleness.idle
        reservations, policy = self._driven.reservations, record.job.idle_policy
        if not idle or record.id in self._driven.wants:
            reservations.mark_idle(self._key, False)
            # Whoever was to have it has to look elsewhere.
            reservations.mark_leaving(self._key, leaving=False)
            return False
        since = container.idleness.unused_since.ToNanoseconds() / 1e9
        if self._key in reservations.leaving and policy.reclaim_mode == RECLAIM_MODE_STOP:
            await self._begin("NEEDED", RECLAIM_MODE_STOP, container)
            return True
        hardest = hardest_mild(policy)
        if hardest == RECLAIM_MODE_NEVER:
            return False
        if asyncio.get_running_loop().time() < self._try_at:
            # Whoever needs it may have it, if the job allows its work to be ended.
            reservations.mark_idle(self._key, policy.reclaim_mode == RECLAIM_MODE_STOP, since)
            return False
        await self._begin("IDLE", hardest, container)
        return True

    async def _begin(
        self, why: str, hardest: job_pb2.ReclaimMode.ValueType, container: node_pb2.Container | None
    ) -> None:
        idleness = container.idleness if container is not None else None
        if await self._driven.change(happenings.ReclaimBegun(why, hardest, idleness), if_still=True):
            await self._reclaim()

    async def _reclaim(self) -> None:
        """Has the node take the share back; what it answers may be asked for again."""
        driven, record = self._driven, self._driven.record
        policy = record.job.idle_policy
        batch = record.job.spec.kind != job_pb2.JOB_KIND_SESSION
        request = node_service_pb2.ReclaimContainerRequest(
            owner=driven.owner,
            hardest=record.hardest,
            only_if_idle=record.reclaiming != "SUSPENDED",
            freeze=batch,
            warn_signal=policy.warn_signal,
            on_reclaim=policy.on_reclaim,
            request_id=f"{record.id}/{driven.owner.attempt}/reclaim-{record.reclaims}",
        )
        if policy.HasField("on_reclaim_limit"):
            request.on_reclaim_limit.CopyFrom(policy.on_reclaim_limit)
        try:
            answer = await driven.asker.ask(lambda client: client.reclaim_container(request), give_up=True)
        except Refusal as refusal:
            ended = self._ended_by_reclaim(refusal)
            if ended is not None:
                await self._reclaimed(RECLAIM_MODE_STOP, ended, refusal.message, "")
                return
            await driven.change(happenings.ReclaimRefused(refusal.reason, refusal.message))
            driven.reservations.mark_leaving(self._key, leaving=False)
            self._bear(refusal)
            return
        self._refusals = 0
        driven.link.note(self._key, answer.container)
        await self._reclaimed(answer.mode, answer.container, answer.message, answer.warning)

    def _ended_by_reclaim(self, refusal: Refusal) -> node_pb2.Container | None:
        """Returns the container whose command this reclaim has ended, with its node killed before it could say so.

        A command that ended by itself at that moment has another exit code than that of SIGTERM or SIGKILL.
        """
        container = self._driven.link.containers.get(self._key)
        if refusal.reason != "CONTAINER_NOT_RUNNING" or self._driven.record.hardest != RECLAIM_MODE_STOP:
            return None
        exited = container is not None and container.state == node_pb2.CONTAINER_STATE_EXITED
        return container if container is not None and exited and container.exit_code in _ENDED_BY_SIGNAL else None

    async def _reclaimed(
        self, mode: job_pb2.ReclaimMode.ValueType, container: node_pb2.Container, message: str, warning: str
    ) -> None:
        """Notes that the share was taken: the job lives without, and the slice is kept for its tenant."""
        driven = self._driven
        held = driven.reservations.get(self._key)
        kept = None
        if held is not None and not held.is_warm:
            kept = replace(held, slice_uuid=driven.attempt.slice_uuid, warm_until=now() + driven.warm_s)
        happening = happenings.Reclaimed(mode, container, message, driven.warm_s, warning)
        await driven.change(happening, reserve=kept)

    def _bear(self, refusal: Refusal) -> None:
        """Puts the next try off: whoever holds the card may let go of it, and nothing tells of that."""
        if refusal.reason == "NOT_IDLE":
            self._refusals = 0
            return
        idle_after_s = seconds(self._driven.record.job.idle_policy.idle_after)
        delay_s = min(_LONGEST_BACK_OFF_S, max(1.0, idle_after_s) * 2 ** min(self._refusals, 16))
        self._refusals += 1
        self._try_at = asyncio.get_running_loop().time() + delay_s
        self._driven.wake_in(delay_s)

    # -- IDLE: is it to have one again?

    async def _idle(self, container: node_pb2.Container | None) -> bool:
        driven, record = self._driven, self._driven.record
        held = driven.reservations.get(self._key)
        if held is not None and not held.is_warm:
            # It was reserved just as nobody wanted it any longer.
            if await self._drop():
                await driven.change(release=True)
            else:
                driven.wake_in(1.0)
            return False
        if record.id in driven.wants:
            return await driven.change(happenings.ResumeRequested("RUN"), if_still=True)
        batch = record.job.spec.kind != job_pb2.JOB_KIND_SESSION
        # A batch job's work, and a run that was checkpointed, are not left standing for ever.
        works = batch or (container is not None and container.checkpointed)
        # What was ended begins again only when somebody says so.
        if works and not record.parked and not record.restart:
            if self._key in driven.link.wanted:
                return await driven.change(happenings.ResumeRequested("WANTED"), if_still=True)
            driven.queue()
        return False

    # -- RESUMING: a share is scheduled for it, then made and attached

    async def _resuming(self, container: node_pb2.Container | None) -> bool:
        driven, record = self._driven, self._driven.record
        held = driven.reservations.get(self._key)
        if held is None or held.is_warm:
            if record.suspend or (record.wake == "RUN" and record.id not in driven.wants):
                driven.withdraw()
                return await driven.change(happenings.ResumeWithdrawn(), if_still=True)
            driven.queue()
            return False
        if container is None:
            return False
        try:
            piece = await cut(driven, f"resume-{record.resumes}")
            request = node_service_pb2.AttachSliceRequest(
                owner=driven.owner, slice_uuid=piece.uuid, request_id=self._request_id("attach")
            )
            await driven.asker.ask(lambda client: client.attach_slice(request), give_up=True)
            thaw = node_service_pb2.ResumeContainerRequest(owner=driven.owner, request_id=self._request_id("thaw"))
            # Whether it is frozen may be told wrongly by an event that comes late.
            after = await driven.asker.ask(lambda client: client.resume_container(thaw), give_up=True)
            driven.link.note(self._key, after)
        except Refusal as refusal:
            await self._retry(refusal)
            return True
        driven.link.wanted.discard(self._key)
        self._tries, self._try_at = 0, 0.0
        await driven.change(happenings.Resumed(piece, container.checkpointed))
        return True

    async def _retry(self, refusal: Refusal) -> None:
        """The node could not give the share: it is given back, and another is waited for."""
        driven = self._driven
        if verdict(refusal) is Verdict.FENCED:
            raise Fenced from refusal
        _log.warning("a share could not be given to a living job", job=driven.owner.job_id, why=str(refusal))
        self._tries += 1
        await driven.asker.until_contact(retry_delay_s(self._tries), give_up=True)
        if not await self._drop():
            return
        await driven.change(happenings.ResumeRetried(refusal.reason, refusal.message), release=True)

    async def _drop(self) -> bool:
        """Takes off and destroys whatever slice of the attempt there is. Returns whether that is certain."""
        driven = self._driven
        try:
            for piece in await driven.asker.ask(lambda client: client.list_slices(), give_up=True):
                owner = piece.owner
                if (owner.centre, owner.job_id, owner.attempt) != (driven.owner.centre, *self._key):
                    continue
                detach = node_service_pb2.DetachSliceRequest(owner=driven.owner, slice_uuid=piece.uuid)
                destroy = node_service_pb2.DestroySliceRequest(owner=driven.owner, slice_uuid=piece.uuid)
                if piece.container_id:
                    await driven.asker.ask(lambda client, it=detach: client.detach_slice(it), give_up=True)  # type: ignore[misc]
                await driven.asker.ask(lambda client, it=destroy: client.destroy_slice(it), give_up=True)  # type: ignore[misc]
        except Refusal as refusal:
            _log.warning("a share cannot be given back yet", job=driven.owner.job_id, why=str(refusal))
            return False
        return True

    def _request_id(self, step: str) -> str:
        return f"{self._driven.record.id}/{self._driven.owner.attempt}/{step}-{self._driven.record.resumes}"
