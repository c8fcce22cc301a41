"""The end of an attempt: its results are collected, then everything that it has is released (step S5)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

import structlog

from controlplane import happenings
from controlplane.collect import Collected, collect
from controlplane.cutting import discard_warm
from controlplane.draft import current_share
from controlplane.faults import Verdict, retry_delay_s, verdict
from controlplane.happenings import Happening
from controlplane.memory_verdict import look_at_memory
from controlplane.node_asker import Fenced, GivenUp
from controlplane.node_client import NodeClient, is_unreachable
from controlplane.records import Reservation
from controlplane.share_driver import Driven
from controlplane.surroundings import Surroundings
from controlplane.workload import stop_request
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1 import card_pb2, node_pb2, node_service_pb2

__all__ = ["AttemptEnd", "Told"]

_log = structlog.get_logger(__name__)

Told: TypeAlias = tuple[Happening, float]
"""What happened, and when, in seconds since the epoch."""

_TELL_AFTER_TRIES = 2
_GIVE_UP_AFTER_REFUSALS = 5


class _Ending(Driven, Protocol):
    """The attempt that ends."""

    async def change(
        self,
        *told: Happening,
        before: Sequence[Told] = (),
        release: bool = False,
        reserve: Reservation | None = None,
        if_still: bool = False,
    ) -> bool:
        """Stores what happened."""

    def owner_of(self, number: int) -> card_pb2.AttemptRef:
        """Under which another attempt of the job is commanded."""

    def request_id(self, step: str) -> str:
        """Request id of a step of the attempt."""


class AttemptEnd:
    """Ends one attempt.

    Args:
        driven: the attempt.
        around: what it works with.
        cancel: set once the job's end was asked for.
    """

    def __init__(self, driven: _Ending, around: Surroundings, cancel: asyncio.Event) -> None:
        self._driven = driven
        self._around = around
        self._cancel = cancel
        self._refusals = 0
        self._refused_at = 0.0

    async def finish(self) -> None:
        """Collects the results and releases everything; the job has ended then."""
        await self._collect(patient=False)
        await self._look_at_memory()
        release = asyncio.create_task(self._release_for_certain())
        try:
            done, _ = await asyncio.wait({release}, timeout=self._around.release_patience_s)
            if self._driven.record.grows and await self._grow(release):
                return
            if done or release.done():
                await self._driven.change(happenings.Ended(), before=release.result(), release=True)
                return
            name = self._around.nodes.name(self._driven.attempt.node_id)
            held = f"its share stays held until node {name} confirms that it is released"
            await self._driven.change(happenings.Ended(held))
            await self._driven.change(before=await release, release=True)
        finally:
            release.cancel()
            await asyncio.gather(release, return_exceptions=True)

    async def _look_at_memory(self) -> None:
        """Says that it ran out of device memory, if it did."""
        driven = self._driven
        held = self._around.reservations.get((driven.record.id, driven.attempt.number))
        if self._cancel.is_set() or held is None or not driven.record.results_collected:
            return
        found = await look_at_memory(
            driven.record,
            driven.record.job.log_size_bytes,
            held.memory_mib,
            self._around.results,
            self._around.nodes.geometries,
            self._around.offered,
        )
        if found is not None:
            await driven.change(happenings.RanOut(found), if_still=True)

    async def _grow(self, release: asyncio.Task[list[Told]]) -> bool:
        """Has the job wait for a larger slice once nothing of this attempt is left. False when its end is asked for.

        A node out of contact is waited for: it holds a share, and may hold what the attempt was.
        """
        cancelled = asyncio.create_task(self._cancel.wait())
        try:
            await asyncio.wait({release, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
        if not release.done():
            return False
        return await self._driven.change(happenings.Grows(), before=release.result(), release=True, if_still=True)

    async def release_late(self) -> None:
        """The job has ended, but its share is held."""
        if self._holds():
            await self._driven.change(before=await self._release_for_certain(), release=True)

    async def _collect(self, *, patient: bool) -> None:
        """Collects the results; unless `patient`, only until the job's end is asked for.

        A node out of contact is waited for, however long it takes; one that only refuses is not.
        """
        tries = 0
        while not self._driven.record.results_collected and self._driven.attempt.container_id:
            if self._cancel.is_set() and not patient:
                return
            got = await collect(self._driven.link.client, self._driven.owner, self._around.results)
            if got.error is None:
                await self._driven.change(happenings.ResultsCollected(got.log_bytes, got.artifacts))
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
        _log.error("results are given up", job=self._driven.record.id, missing=got.missing, why=str(refusal))
        why = f"its {got.missing} could not be had from its node and are lost: {refusal.message} ({refusal.reason})"
        await self._driven.change(happenings.ResultsLost(why, got.log_bytes, got.artifacts))

    async def _bear(self, error: Refusal | OSError, tries: int, *, tell: bool) -> None:
        """Waits after the results could not be collected."""
        unreachable = isinstance(error, Refusal) and is_unreachable(error)
        if isinstance(error, Refusal) and verdict(error) is Verdict.FENCED:
            raise Fenced from error
        _log.warning("results cannot be collected yet", job=self._driven.record.id, why=str(error))
        if tell and tries == _TELL_AFTER_TRIES:
            await self._driven.change(happenings.ResultsDelayed(f"its results cannot be collected yet: {error}"))
        if not unreachable:
            # Often enough that patience, not the delays, says when it is enough.
            rarely_s = self._around.collect_patience_s / (_GIVE_UP_AFTER_REFUSALS - 1)
            delay_s = retry_delay_s(tries)
            await asyncio.sleep(min(delay_s, rarely_s) if isinstance(error, Refusal) else delay_s)
            return
        with contextlib.suppress(GivenUp):
            await self._driven.asker.until_contact(retry_delay_s(tries), give_up=tell)

    # -- releasing

    async def _release_for_certain(self) -> list[Told]:
        """Collects what was not collected, then releases everything, however long it takes."""
        tries = 0
        while True:
            try:
                await self._stop()
                await self._collect(patient=True)
                if self._driven.record.carry_from:
                    await self._forget_former()
                return await self.release(give_up=False)
            except Refusal as refusal:
                tries += 1
                _log.warning("the share cannot be released yet", job=self._driven.record.id, why=refusal.message)
                await asyncio.sleep(retry_delay_s(tries))

    async def _stop(self) -> None:
        """Ends the command, whose log would else never end: its node may not have heard that its end was asked for.

        Raises:
            Refusal: the node cannot do it now.
        """
        owner, job = self._driven.owner, self._driven.record.job
        container = self._driven.link.containers.get((owner.job_id, owner.attempt))
        exited = container is not None and container.state == node_pb2.CONTAINER_STATE_EXITED
        if not self._cancel.is_set() or not self._driven.attempt.container_id or exited:
            return
        request = stop_request(job, owner, self._driven.request_id("stop"))
        await self._gone(lambda client: client.stop_container(request), "CONTAINER_NOT_FOUND", give_up=False)

    async def release(self, *, give_up: bool) -> list[Told]:
        """Removes the container and destroys the slice, whatever of them there is. Returns what happened.

        Raises:
            Refusal: the node cannot do it now.
            GivenUp: as `give_up` says.
        """
        owner, told = self._driven.owner, list[Told]()
        remove = node_service_pb2.RemoveContainerRequest(
            owner=owner, discard_results=True, request_id=self._driven.request_id("remove-container")
        )
        await self._gone(lambda client: client.remove_container(remove), "CONTAINER_NOT_FOUND", give_up)
        if self._driven.attempt.container_id:
            told.append((happenings.ContainerRemoved(self._driven.attempt.number), now()))
        if not self._holds():
            return told
        uuid = await self._slice(give_up)
        if uuid:
            destroy = node_service_pb2.DestroySliceRequest(
                owner=owner, slice_uuid=uuid, request_id=self._driven.request_id("destroy-slice")
            )
            await self._gone(lambda client: client.destroy_slice(destroy), "SLICE_NOT_FOUND", give_up)
            self._around.nodes.slice_gone(self._driven.attempt.node_id, uuid)
        told.append((happenings.SliceDestroyed(self._driven.attempt.number, uuid, self._busy_s()), now()))
        return told

    async def _forget_former(self) -> None:
        """Removes what a former attempt kept for this one, which needs it no longer.

        Its node may be out of contact; what is left there then is an orphan, and removed when it is back.
        """
        record = self._driven.record
        former = record.job.attempts[record.carry_from - 1]
        remove = node_service_pb2.RemoveContainerRequest(
            owner=self._driven.owner_of(former.number),
            discard_results=True,
            request_id=f"{record.id}/{former.number}/carry-remove",
        )
        link = self._around.nodes.link(former.node_id)
        if link is not None:
            with contextlib.suppress(Refusal):
                await link.client.remove_container(remove)
        self._around.results.drop_workspace(record.id, former.number)

    def _holds(self) -> bool:
        """Returns whether the attempt has a share: one that was taken back is kept warm by others."""
        held = self._around.reservations.get((self._driven.record.id, self._driven.attempt.number))
        return held is not None and not held.is_warm

    def _busy_s(self) -> float:
        """Returns for how long the last share was used, in seconds, as far as the node said."""
        seen_s = self._driven.record.busy_seen_s
        return max(0.0, seen_s - self._driven.record.busy_counted_s) if seen_s is not None else 0.0

    async def _slice(self, give_up: bool) -> str:
        """Returns the UUID of the attempt's slice; "" when none was made."""
        share = current_share(self._driven.attempt)
        if share is not None:
            return share.slice_uuid
        if self._driven.record.take_over is not None:
            # It may have been taken over, with no time left to say so.
            await discard_warm(self._driven, self._driven.record.take_over)
        return await self._find_slice(give_up)

    async def _gone(self, call: Callable[[NodeClient], Awaitable[object]], absent: str, give_up: bool) -> None:
        try:
            await self._driven.asker.ask(call, give_up=give_up)
        except Refusal as refusal:
            if refusal.reason != absent:
                raise

    async def _find_slice(self, give_up: bool) -> str:
        """Returns the slice of an attempt whose control plane was gone before it could note it; "" for none."""
        for piece in await self._driven.asker.ask(lambda client: client.list_slices(), give_up=give_up):
            owner = piece.owner
            mine = (self._around.centre, self._driven.record.id, self._driven.attempt.number)
            if (owner.centre, owner.job_id, owner.attempt) == mine:
                return piece.uuid
        return ""
