"""One attempt at a peer: how it stands, and what is known of its lease.

How it stands is its `ForwardRecord` with the job's record; both change in one transaction, and only here. What the peer
has told of its lease clock is kept beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
import structlog

from controlplane import happenings
from controlplane.draft import IllegalTransition
from controlplane.faults import retry_delay_s
from controlplane.forwards import LAST_MOMENT_S, ForwardRecord, is_surely_over, read_clock, rebooted
from controlplane.happenings import Happening
from controlplane.jobs import PLACED_STATES, transition
from controlplane.lasting import Lasting
from controlplane.learning import learnt
from controlplane.metering import AllEnded, Stretch
from controlplane.peer_request import lease_left, origin_of
from controlplane.peer_terms import DEFAULT_RESULT_BYTES
from controlplane.reach import KnownPeer, Reach
from controlplane.records import Change, Decide, JobRecord
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1 import card_pb2

__all__ = ["PeerAttempt"]

_log = structlog.get_logger(__name__)

_LOOK_S = 2.0


class PeerAttempt:
    """One attempt of one job at a peer.

    Args:
        centre: this centre's name.
        store: the centre's memory.
        reach: how peers are worked with.
        record: the job.
        number: the attempt.
    """

    def __init__(self, centre: str, store: Store, reach: Reach, record: JobRecord, number: int) -> None:
        self._centre = centre
        self._store = store
        self._reach = reach
        self._record = record
        self._number = number
        self._forward = ForwardRecord(record.id, number, record.job.attempts[number - 1].peer, 0)
        self._cancel = asyncio.Event()
        self._lasting = Lasting()
        self._storing = asyncio.Lock()
        if record.cancel_requested:
            self._cancel.set()

    async def load(self) -> None:
        """Reads the forward from the store; until then nothing is known of it.

        Raises:
            RuntimeError: the store has none.
        """
        forward = await self._store.forward(self._record.id, self._number)
        if forward is None:
            raise RuntimeError(f"attempt {self._record.id}/{self._number} is at a peer, but the store has no forward")
        self._forward = forward

    # -- what it stands on

    @property
    def forward(self) -> ForwardRecord:
        """The forward, as it is stored."""
        return self._forward

    @property
    def record(self) -> JobRecord:
        """The job, as it was last stored from here."""
        return self._record

    @property
    def number(self) -> int:
        """Its number among the attempts of the job."""
        return self._number

    @property
    def reach(self) -> Reach:
        """What it works with."""
        return self._reach

    @property
    def store(self) -> Store:
        """The centre's memory."""
        return self._store

    @property
    def origin(self) -> card_pb2.AttemptRef:
        """Under which the peer is commanded."""
        return origin_of(self._centre, self._forward)

    def peer(self) -> KnownPeer:
        """Returns the peer.

        Raises:
            Refusal: UNAVAILABLE with WORK_ENDED: it is no peer any longer, or was paired anew; or with PEERS_CLOSED:
                this centre is starting or stopping.
        """
        peer = self._reach.peers.get(self._forward.peer)
        if peer is None and not self._reach.peers.is_open:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE, "PEERS_CLOSED", "this centre is starting or stopping, and has no peers yet"
            )
        if peer is None or peer.record.create_time != self._forward.paired:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "WORK_ENDED",
                f"{self._forward.peer} is no peer of this centre any longer",
            )
        return peer

    def is_newest(self, record: JobRecord) -> bool:
        """Whether the job has no newer attempt."""
        return len(record.job.attempts) == self._number

    @property
    def most_result_bytes(self) -> int:
        """So much is taken of what it left, in bytes."""
        peer = self._reach.peers.get(self._forward.peer)
        return (peer.record.terms.most_result_bytes if peer is not None else 0) or DEFAULT_RESULT_BYTES

    # -- contact and lease

    async def until_contact(self, tries: int) -> None:
        """Waits until asking the peer again makes sense, but never past the end of the lease."""
        peer = self._reach.peers.get(self._forward.peer)
        delay_s = min(_LOOK_S, retry_delay_s(tries))
        if peer is None or peer.in_contact:
            await asyncio.sleep(delay_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await peer.contact()

    def heard(self, peer_time: float) -> None:
        """The peer has told its lease clock."""
        if 0 < peer_time < LAST_MOMENT_S:
            self._forward = read_clock(self._forward, peer_time, self._reach.clock.now())

    @property
    def left_s(self) -> float:
        """How long its lease still lasts, in seconds, as far as known."""
        here_s = self._reach.clock.now() - self._forward.read_at
        return self._forward.lease_end - self._forward.peer_time - here_s

    @property
    def is_over(self) -> bool:
        """Whether its lease is over for certain."""
        return is_surely_over(self._forward, self._reach.clock.now(), self._reach.margin_s)

    async def until_over(self) -> None:
        """Waits until its lease is over for certain."""
        while not self.is_over:  # noqa: ASYNC110 - it is time that is waited for, and the lease may be renewed
            await asyncio.sleep(min(_LOOK_S, max(0.05, self.left_s)))

    def lease_s(self, guest_left_s: float | None) -> float:
        """Returns the length of lease to ask for: no longer than the lease that this centre itself has."""
        return lease_left(self._reach, guest_left_s)

    # -- its end

    def cancel(self) -> None:
        """The job's end was asked for, and that is stored."""
        self._cancel.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the job's end was asked for."""
        return self._cancel.is_set()

    async def until_cancelled(self) -> None:
        """Waits until the job's end is asked for."""
        await self._cancel.wait()

    # -- what is stored

    async def change(
        self,
        *told: Happening,
        usage_there: Sequence[Stretch] = (),
        over: bool = False,
        otherwise: Happening | None = None,
        **forward: Any,
    ) -> None:
        """Stores what happened, and how the forward is now, in one transaction.

        Args:
            told: what happened to the job; nothing when it has a newer attempt.
            usage_there: what it has used at the peer, as that is now.
            over: whatever was counted as usage ends.
            otherwise: what happened when that cannot happen to the job, or it has a newer attempt.
            forward: fields of the forward that have changed.

        Raises:
            IllegalTransition: it cannot happen to the job.
        """
        await self._lasting.do(self._change(told, usage_there, over, otherwise, forward))

    async def _change(
        self,
        told: Sequence[Happening],
        usage_there: Sequence[Stretch],
        over: bool,
        otherwise: Happening | None,
        fields: Mapping[str, Any],
    ) -> None:
        async with self._storing:
            after = replace(self._forward, **fields)

            def decide(record: JobRecord, _: int) -> Change:
                before, events = record, []
                try:
                    for one in told if self.is_newest(record) else ():
                        record, event = transition(record, one, now())
                        events.append(event)
                except IllegalTransition:
                    if otherwise is None:
                        raise
                    record, events = before, []
                if otherwise is not None and not events:
                    record, event = transition(record, otherwise, now())
                    events.append(event)
                ended = (AllEnded(now()),) if over else ()
                runs = tuple(record.job.runs) if events and self.is_newest(record) else ()
                return Change(
                    record,
                    tuple(events),
                    forward=after,
                    runs=runs,
                    usage=ended,
                    usage_there=tuple(usage_there),
                    observed=learnt(told, record, now()) if events else (),
                )

            self._record = await self._patient_store(decide)
            # What the peer has told meanwhile is not stored: an older reading is as true.
            known = self._forward
            self._forward = replace(after, peer_time=known.peer_time, read_at=known.read_at)

    async def _patient_store(self, decide: Decide) -> JobRecord:
        """Stores a change; a full disk is waited out, because what happened has happened."""
        tries = 0
        while True:
            try:
                return await self._store.change_job(self._record.id, decide)
            except OSError as error:
                tries += 1
                _log.error("the store cannot be written; trying again", job=self._record.id, why=str(error))
                await asyncio.sleep(retry_delay_s(tries))

    async def adopt(self) -> None:
        """Takes it up under a higher fencing token, because its driver's process is gone."""
        at = self._reach.clock.now()

        def decide(record: JobRecord, token: int) -> Change:
            after = replace(rebooted(self._forward, self._reach.clock.boot, at), token=token)
            if not self.is_newest(record) or record.state not in PLACED_STATES:
                return Change(record, forward=after, token_taken=True)
            record, event = transition(record, happenings.Adopted(token), now())
            return Change(record, (event,), forward=after, token_taken=True)

        self._record = await self._patient_store(decide)
        stored = await self._store.forward(self._record.id, self._number)
        self._forward = stored or self._forward
