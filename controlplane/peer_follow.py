"""Follows an attempt at a peer while it is bound there: mirrors what happens, and renews its lease."""

from __future__ import annotations

import asyncio
import contextlib
import random

import structlog

from controlplane import happenings
from controlplane.draft import IllegalTransition
from controlplane.forwards import lease_to_ask
from controlplane.jobs import FINAL_STATES
from controlplane.metering import Kind, Stretch
from controlplane.node_asker import Fenced
from controlplane.peer_attempt import PeerAttempt
from controlplane.peer_request import guest_left_s
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, now, timestamp
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2

__all__ = ["PeerFollow"]

_log = structlog.get_logger(__name__)

_SHARE_OF_LEASE = 3
_RETRY_S = 1.0
_AWAY_AFTER_TRIES = 2
# No honest peer tells more of one attempt in so short a time; the others are slowed down.
_QUICK_EVENTS = 100
_MOST_EVENTS = 10_000
"""So many are kept of one attempt; after that only those by which its state changes."""
_SLOW_S = 0.05
_TOLD_HERE = frozenset({"SUBMITTED", "PREDICTED"})
"""What was told when it was submitted here is not told again."""
# Numbers of stretches of one attempt; those of the next begin above.
_PER_ATTEMPT = 10_000


class PeerFollow:
    """Follows one attempt.

    Attributes:
        ended: the job as the peer knows it, once that is in a final state.
        unknown: the peer says that it never had it.
    """

    def __init__(self, attempt: PeerAttempt) -> None:
        self.ended: job_pb2.Job | None = None
        self.unknown = False
        self._attempt = attempt
        self._away = False
        self._taken = 0

    async def watch(self) -> None:
        """Takes over what happens at the peer until it has ended there."""
        tries = 0
        while True:
            request = wire.WatchForwardedJobRequest(
                origin=self._attempt.origin, after_cursor=self._attempt.forward.cursor
            )
            try:
                responses = self._attempt.peer().client.watch(request)
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        tries = 0
                        await self._back()
                        if await self._take(response):
                            return
            except Refusal as refusal:
                if refusal.reason == "STALE_FENCING_TOKEN":
                    raise Fenced from refusal
                if refusal.reason == "GUEST_NOT_FOUND":
                    self.unknown = True
                    return
                _log.info("a peer cannot be watched", job=self._attempt.record.id, why=str(refusal))
            tries += 1
            if tries == _AWAY_AFTER_TRIES:
                await self._gone()
            await self._attempt.until_contact(tries)

    async def _take(self, response: wire.WatchForwardedJobResponse) -> bool:
        """Takes one event over. Returns whether it was the last."""
        event, job = response.event, response.job
        self._taken += 1
        if self._taken > _QUICK_EVENTS:
            await asyncio.sleep(_SLOW_S)
        if event.cursor <= self._attempt.forward.cursor:
            return False  # it was told before
        usage = self._usage(response)
        same = event.state == self._attempt.record.state
        if event.reason in _TOLD_HERE or (same and self._taken > _MOST_EVENTS):
            await self._attempt.change(cursor=event.cursor)
            return False
        if event.state in FINAL_STATES:
            # The cursor stays, so that whoever comes after a crash is told again.
            await self._attempt.change(usage_there=usage)
            self.ended = job
            return True
        was = self._attempt.record.state
        try:
            await self._attempt.change(happenings.PeerTold(event, job), usage_there=usage, cursor=event.cursor)
        except IllegalTransition as error:
            _log.warning("a peer tells what cannot be", job=self._attempt.record.id, why=str(error))
            await self._attempt.change(cursor=event.cursor)
        if was == job_pb2.JOB_STATE_STARTING and self._attempt.record.state == job_pb2.JOB_STATE_RUNNING:
            forward = self._attempt.forward
            with contextlib.suppress(Refusal):
                self._attempt.peer().began(forward.promised_wait_s, now() - forward.sent_at)
        return False

    def _usage(self, response: wire.WatchForwardedJobResponse) -> list[Stretch]:
        job, number = self._attempt.record.job, self._attempt.forward.attempt
        kinds = {kind.value: kind for kind in Kind}
        return [
            Stretch(
                job_id=job.id,
                kind=kinds[one.kind],
                number=number * _PER_ATTEMPT + one.number,
                run_id=one.run_id[:64],
                attempt=number,
                tenant=job.spec.tenant,
                job_name=job.spec.name,
                profile=one.profile[:64],
                gpu_model=one.gpu_model[:128],
                compute_slices=one.compute_slices,
                gpu_slices=one.gpu_slices,
                emulated=one.emulated,
                start=moment(one.start_time),
                end=moment(one.end_time) if one.HasField("end_time") else None,
                busy_s=one.busy_seconds,
                counter_s=None,
                reclaim_mode=one.reclaim_mode,
            )
            for one in response.usage
            if one.kind in kinds and one.number < _PER_ATTEMPT
        ]

    async def _gone(self) -> None:
        self._away = True
        name = self._attempt.forward.peer
        await self._note(
            "PEER_OUT_OF_CONTACT",
            f"peer {name} is out of contact; the job is taken to be running there still, and its lease is kept for it",
        )

    async def _back(self) -> None:
        if self._away:
            self._away = False
            await self._note("PEER_IN_CONTACT", f"peer {self._attempt.forward.peer} is in contact again")

    async def _note(self, reason: str, message: str) -> None:
        with contextlib.suppress(IllegalTransition):
            await self._attempt.change(happenings.PeerAway(reason, message))

    async def renew(self) -> None:
        """Renews the lease for ever, at a third of its length."""
        reach = self._attempt.reach
        while True:
            left_s = await guest_left_s(self._attempt.store, self._attempt.record.id, reach)
            lease_s = self._attempt.lease_s(left_s)
            # Not all at once: a restart of this centre would otherwise make them all fall due together for ever.
            pause_s = max(_RETRY_S, lease_s / _SHARE_OF_LEASE)
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.0))  # noqa: S311
            left_s = await guest_left_s(self._attempt.store, self._attempt.record.id, reach)
            until = lease_to_ask(self._attempt.forward, reach.clock.now(), self._attempt.lease_s(left_s))
            # Before it is asked for: whoever comes after a crash must know of it.
            await self._attempt.change(lease_end=until)
            await self._ask(until)

    async def _ask(self, until: float) -> None:
        """Asks for a lease until the peer has answered, or until another is due."""
        request = wire.RenewLeaseRequest(origin=self._attempt.origin, lease_expire_time=timestamp(until))
        clock = self._attempt.reach.clock
        give_up_at = clock.now() + self._attempt.reach.lease_s / _SHARE_OF_LEASE
        while clock.now() < give_up_at:
            try:
                answer = await self._attempt.peer().client.renew(request)
            except Refusal as refusal:
                if refusal.reason == "STALE_FENCING_TOKEN":
                    raise Fenced from refusal
                _log.info("a lease is not renewed yet", job=self._attempt.record.id, why=str(refusal))
                if refusal.reason in {"LEASE_EXPIRED", "GUEST_NOT_FOUND"}:
                    return  # whoever watches is told how it ended
            else:
                self._attempt.heard(moment(answer.time))
                await self._back()
                return
            await asyncio.sleep(min(_RETRY_S, self._attempt.reach.lease_s / 10))
