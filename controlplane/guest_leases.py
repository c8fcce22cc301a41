"""Ends guests whose leases have run out, and forgets the results of those that ended long ago."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import grpc
import structlog

from controlplane import happenings
from controlplane.cancelling import Cancelling
from controlplane.guests import GuestRecord, GuestStage, expire, has_lease, stop_ahead_s
from controlplane.jobs import LIVING_STATES, transition
from controlplane.lasting import Lasting
from controlplane.reach import Clock
from controlplane.records import Change, JobRecord
from controlplane.results import Results
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, seconds
from puhui.v1 import job_pb2

__all__ = ["GuestLeases"]

_log = structlog.get_logger(__name__)

_LOOK_S = 1.0
_FORGET_EVERY_S = 600.0
_DEFAULT_GRACE_S = 10.0
_LONGEST_GRACE_S = 3600.0
_NOTHING = job_pb2.JobArtifacts()


class GuestLeases:
    """Looks after the leases of the guests of one centre.

    Args:
        store: where guests and their jobs are.
        results: where their results are.
        cancelling: ends jobs.
        clock: this centre's lease clock.
        lasting: carries an end through.
        keep_s: results are kept for so long after their end, in seconds.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        results: Results,
        cancelling: Cancelling,
        clock: Clock,
        lasting: Lasting,
        keep_s: float,
        wall: Callable[[], float] = now,
    ) -> None:
        self._store = store
        self._results = results
        self._cancelling = cancelling
        self._clock = clock
        self._lasting = lasting
        self._keep_s = keep_s
        self._wall = wall
        self._received = Counter[str]()

    def received(self, peer: str) -> int:
        """Returns how many guests of a peer have not ended, as of a moment ago."""
        return self._received[peer]

    def came(self, peer: str) -> None:
        """One more guest of a peer has come."""
        self._received[peer] += 1

    async def run(self) -> None:
        """Ends guests whose leases run out, so that nothing of them runs then, and forgets old results, for ever."""
        forget_at = 0.0
        while True:
            try:
                await self._end_expired()
                if now() >= forget_at:
                    forget_at = now() + _FORGET_EVERY_S
                    await self._forget_old()
            except Exception as error:  # noqa: BLE001 - whatever happens to one, the others' leases run out
                _log.error("looking after guests met the unforeseen; trying again", exc_info=error)
            await asyncio.sleep(_LOOK_S)

    async def _end_expired(self) -> None:
        guests = await self._store.guests()
        self._received = Counter(guest.peer for guest in guests)
        at, boot = self._clock.now(), self._clock.boot
        for guest in guests:
            soonest = at + stop_ahead_s(guest, _LONGEST_GRACE_S)
            if guest.stage is GuestStage.EXPIRED or not has_lease(guest, soonest, boot):
                await self._end(guest)

    async def _end(self, guest: GuestRecord) -> None:
        record = await self._store.job(guest.job_id)
        if record is None or record.state == job_pb2.JOB_STATE_STOPPING:
            return  # its command has ended, and what it left is being collected
        runs, spec = record.state in LIVING_STATES, record.job.spec
        grace_s = (seconds(spec.stop_grace) if spec.HasField("stop_grace") else _DEFAULT_GRACE_S) if runs else 0.0

        def decide(known: GuestRecord | None) -> GuestRecord:
            if known is None:
                # It is kept under another name since work with its peer was ended: the next round finds it there.
                raise Refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND", f"{guest.key} is known no longer")
            return expire(known, self._clock.now() + stop_ahead_s(known, grace_s), self._clock.boot)

        if decide(guest).stage is not GuestStage.EXPIRED:
            return
        try:
            after = await self._store.change_guest(guest.key, decide)
        except Refusal:
            return
        if after.stage is not GuestStage.EXPIRED or record.cancel_requested:
            return
        why = f"its origin, {guest.peer}, has not renewed its lease"
        await self._lasting.do(self._cancelling.end(guest.job_id, why, reason="LEASE_EXPIRED"))

    async def _forget_old(self) -> None:
        for guest in await self._store.old_guests(self._wall() - self._keep_s):
            record = await self._store.job(guest.job_id) if guest.job_id else None
            if record is not None:
                for number in range(1, len(record.job.attempts) + 1):
                    await asyncio.to_thread(self._results.remove, guest.job_id, number)
                await self._store.change_job(guest.job_id, _without_results)
            await self._store.forget_guest(guest.key)


def _without_results(record: JobRecord, _: int) -> Change | None:
    if not record.job.attempts:
        return None
    gone = happenings.ResultsLost("its results were kept for its origin for a while, and are gone", 0, _NOTHING)
    after, event = transition(record, gone, now())
    return Change(after, (event,))
