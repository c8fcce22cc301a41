"""Sends waiting jobs to peers that promise to begin sooner (step S10). `spill` decides; this asks, and commits.

Woken by the scheduler once it has looked at the queue, by peers that tell their capacity, by answers, and by the time
that the last step named.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from controlplane.forwarding import Candidate, Neighbour, Rules, transfer_s
from controlplane.forwards import LAST_MOMENT_S, count_at_peers, unheard_of
from controlplane.offers import Offer
from controlplane.outlook import Outlook
from controlplane.peer_client import PeerClient
from controlplane.peer_request import guest_left_s, hops_left, lease_left, visited
from controlplane.peer_terms import tenant_out
from controlplane.queued_job import QueuedJob
from controlplane.reach import Reach
from controlplane.records import Change, JobRecord
from controlplane.sending import send
from controlplane.spill import Ask, Spill
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, moment, now, seconds
from puhui.v1 import card_pb2, job_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["Forwarder", "ForwardingPeer", "ForwardingPeers", "Line"]

_log = structlog.get_logger(__name__)

_MOST_CANDIDATES = 256
_MOST_READ = 256
_MOST_KNOWN = 4096
_LEAST_PAUSE_S = 0.02
_LOOK_AGAIN_S = 2.0
"""Waits change while nothing happens: the queue is looked at this often at least, while anybody waits."""
_LONGEST_HOLD_S = 60.0
_LONGEST_RETRY_S = 3600.0
_MOST_ID = 128
_MOST_COST = 1e6
_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,62}")


class ForwardingPeer(Neighbour, Protocol):
    """A peer that can be asked; `peers.Peer` is one."""

    @property
    def client(self) -> PeerClient:
        """The connection to it. Raises a Refusal, UNAVAILABLE with PEER_NOT_CALLED, when it is never called."""

    def offered(self, accepted: bool, reason: str = "") -> None:
        """It has answered, or not, what it would do; counted for people."""


class ForwardingPeers(Protocol):
    """The peers there are; `peers.Peers` is one."""

    def get(self, name: str) -> ForwardingPeer | None:
        """Returns a peer by its name."""

    def all(self) -> Sequence[ForwardingPeer]:
        """Returns every peer."""


class Line(Protocol):
    """The queue; `Scheduler` is one."""

    @property
    def queue(self) -> Sequence[QueuedJob]:
        """Every job that waits, in the order of the queue."""

    def remove(self, job_id: str) -> None:
        """A job waits no longer."""


class Drivers(Protocol):
    """Who drives attempts; `Attempts` is one."""

    def drive(self, record: JobRecord) -> None:
        """Begins to drive the newest attempt of a job."""


@dataclass(frozen=True)
class _Known:
    """A waiting job, as it was read."""

    record: JobRecord
    bundle_bytes: int
    """Of its bundle."""
    input_bytes: int
    """Of data that it will read besides. Puhui does not carry that, but it must get there somehow."""


class Forwarder:
    """Looks for peers for what waits here.

    Args:
        centre: name of this centre.
        store: where jobs are.
        line: the queue.
        peers: whom to ask.
        drivers: who drives what was sent.
        outlook: how long jobs wait here.
        reach: this centre's id, its lease clock, and the length of leases.
        rules: how eagerly.
        chance: for everything that is spread.
        wall: seconds since the epoch.
        meter: seconds that only grow.
        settle_s: for so long after the start, a wait that is not known sends nothing away: nodes come into contact.
    """

    def __init__(
        self,
        centre: str,
        store: Store,
        line: Line,
        peers: ForwardingPeers,
        drivers: Drivers,
        outlook: Outlook,
        reach: Reach,
        *,
        rules: Rules | None = None,
        chance: random.Random | None = None,
        wall: Callable[[], float] = now,
        meter: Callable[[], float] = time.monotonic,
        settle_s: float = 10.0,
    ) -> None:
        self._began, self._settle_s = meter(), settle_s
        self._centre = centre
        self._store = store
        self._line = line
        self._peers = peers
        self._drivers = drivers
        self._outlook = outlook
        self._reach = reach
        self._wall = wall
        self._meter = meter
        self._spill = Spill(rules, chance)
        self._known: dict[str, _Known] = {}
        self._asks: set[asyncio.Task[None]] = set()
        self._told: dict[str, tuple[bytes, ...]] = {}
        """The last word of each peer."""
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Something has changed that may let a job go."""
        self._wake.set()

    def why_here(self, job_id: str) -> str:
        """Returns why a waiting job was not sent to a peer, in a clause; "" when nothing is known about that yet."""
        return self._spill.why(job_id)

    async def run(self) -> None:
        """Looks for peers for ever."""
        try:
            while True:
                self._wake.clear()
                try:
                    wait_s = await self.look()
                except Exception as error:  # noqa: BLE001 - what waits must not wait for ever
                    _log.error("looking for peers failed; trying again", exc_info=error)
                    wait_s = 1.0
                await asyncio.sleep(_LEAST_PAUSE_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s if wait_s < math.inf else None):
                        await self._wake.wait()
        finally:
            for task in self._asks:
                task.cancel()
            await asyncio.gather(*self._asks, return_exceptions=True)

    async def look(self) -> float:
        """Looks once at all that waits. Returns after how many seconds to look again, if nothing happens before."""
        peers = self._peers.all()
        self._hear(peers)
        if not self._line.queue or not peers:
            self._known.clear()
            self._spill.step(self._meter(), self._reach.clock.now(), (), (), {}, {})
            return math.inf
        await self._outlook.refresh()
        await self._read()
        forwards = await self._store.forwards()
        there, sending = count_at_peers(forwards)
        jobs = self._candidates(unheard_of(forwards))
        step = self._spill.step(self._meter(), self._reach.clock.now(), jobs, peers, there, sending)
        for ask in step.asks:
            task = asyncio.create_task(self._ask(ask), name=f"offer for {ask.job_id} of {ask.peer}")
            self._asks.add(task)
            task.add_done_callback(self._asks.discard)
        for job_id, offer in step.takes:
            await self._take(job_id, offer)
        if step.takes:
            self.wake()
        return max(0.0, min(step.wake_at - self._meter(), _LOOK_AGAIN_S))

    def _hear(self, peers: Iterable[ForwardingPeer]) -> None:
        """Tells what peers have said since the last look."""
        heard = {peer.record.name: tuple(one.SerializeToString() for one in peer.profiles) for peer in peers}
        for name, word in heard.items():
            if word != self._told.get(name):
                self._spill.news(self._meter(), name)
        self._told = heard

    # -- what waits

    def _may_leave(self, job: QueuedJob) -> bool:
        # Whose container lives here, or whose workspace is kept here, stays.
        return not (job.home or job.rest or job.gpu_model)

    async def _read(self) -> None:
        """Reads the jobs that came since; a bounded number each time."""
        queue = self._line.queue
        waiting = {job.id for job in queue}
        self._known = {job_id: known for job_id, known in self._known.items() if job_id in waiting}
        left = min(_MOST_READ, _MOST_KNOWN - len(self._known))
        for job in [job for job in queue if job.id not in self._known and self._may_leave(job)][:left]:
            record = await self._store.job(job.id)
            if record is None or record.state != job_pb2.JOB_STATE_QUEUED:
                continue
            bundle = await self._store.bundle(record.job.bundle_id) if record.job.bundle_id else None
            inputs = sum(data.size_bytes for data in record.job.spec.inputs)
            self._known[job.id] = _Known(record, bundle.size_bytes if bundle is not None else 0, inputs)

    def _candidates(self, unheard_of_at: Mapping[str, Sequence[str]]) -> list[Candidate]:
        queue = self._line.queue
        waits, at = self._outlook.waits([job.id for job in queue[:_MOST_CANDIDATES]]).waits, self._wall()
        settled = self._meter() - self._began >= self._settle_s
        found: list[Candidate] = []
        for job in queue:
            known, wait = self._known.get(job.id), waits.get(job.id)
            if known is None or known.record.restart or known.record.carry_from or not self._may_leave(job):
                continue
            # A wait that was not worked out yet is not an unknown one, and what nodes have is not known at first.
            if wait is None or (wait.seconds is None and not settled):
                continue
            found.append(self._candidate(job, known, wait.seconds, at, unheard_of_at.get(job.id, ())))
            if len(found) >= _MOST_CANDIDATES:
                break
        return found

    def _candidate(
        self, job: QueuedJob, known: _Known, wait_s: float | None, at: float, unheard_of_at: Sequence[str]
    ) -> Candidate:
        record = known.record
        guest = record.job.guest if record.job.HasField("guest") else None
        sender = self._peers.get(guest.peer) if guest is not None else None
        return Candidate(
            job.id,
            job.profile,
            job.required_mib,
            record.job.spec.tenant,
            record.job.spec.peers,
            wait_s,
            max(0.0, at - job.since),
            known.bundle_bytes + known.input_bytes,
            tuple(visited(record, self._reach.centre_id)),
            hops_left(record),
            guest is None or (sender is not None and sender.record.terms.transit),
            guest is not None,
            record.not_at,
            tuple(unheard_of_at),
        )

    # -- asking

    async def _ask(self, ask: Ask) -> None:
        """Asks one peer for one offer, and tells what came of it, whatever that is."""
        peer, known = self._peers.get(ask.peer), self._known.get(ask.job_id)
        try:
            if peer is None or known is None:
                self._spill.failed(self._meter(), ask, "it is a peer no longer, or the job waits no longer")
                return
            response = await peer.client.get_offer(self._request(known, peer))
            self._answer(ask, peer, known, response, self._reach.clock.now())
        except Refusal as refusal:
            peer_name = ask.peer
            _log.info("a peer was asked for an offer in vain", peer=peer_name, why=f"{refusal.reason}: {refusal}")
            self._spill.failed(self._meter(), ask, _reason(refusal.reason), _retry_s(refusal.retry_after_s or 0.0))
            if peer is not None:
                peer.offered(False, _reason(refusal.reason))
        except asyncio.CancelledError:
            self._spill.failed(self._meter(), ask, "this control plane stops")
            raise
        except Exception as error:  # noqa: BLE001 - one peer, or one job, must not stop the others
            _log.error("asking for an offer met the unforeseen", peer=ask.peer, job=ask.job_id, exc_info=error)
            self._spill.failed(self._meter(), ask, "its answer made no sense")
        finally:
            self.wake()

    def _request(self, known: _Known, peer: ForwardingPeer) -> wire.GetOfferRequest:
        job = known.record.job
        expected_s = self._outlook.duration_s(job.spec)
        return wire.GetOfferRequest(
            sizing=job.sizing,
            bundle_bytes=known.bundle_bytes,
            visited_centres=visited(known.record, self._reach.centre_id),
            expected_duration=duration(expected_s) if expected_s is not None else None,
            tenant=tenant_out(peer.record.terms, job.spec.tenant) or "",
            required_labels=job.spec.peers.required_labels,
            origin=card_pb2.AttemptRef(centre=self._centre, job_id=job.id, attempt=len(job.attempts) + 1),
            kind=job.spec.kind,
            bundle_id=job.bundle_id,
            hops_left=max(0, hops_left(known.record)),
            resources=job.spec.resources,
            image=job.spec.image,
        )

    def _answer(
        self, ask: Ask, peer: ForwardingPeer, known: _Known, response: wire.GetOfferResponse, read_at: float
    ) -> None:
        at = self._meter()
        if not response.accepted:
            reason = _reason(response.reason)
            peer.offered(False, reason)
            self._spill.refused(at, ask, reason, _retry_s(seconds(response.retry_after)))
            return
        offer = self._offer(peer, known, response, read_at)
        if offer is None:
            peer.offered(False, "MALFORMED")
            self._spill.failed(at, ask, "its offer made no sense")
            return
        peer.offered(True)
        self._spill.offered(at, ask, offer, peer)

    @staticmethod
    def _offer(peer: ForwardingPeer, known: _Known, response: wire.GetOfferResponse, read_at: float) -> Offer | None:
        """Returns what was offered; None when no honest peer would say that."""
        peer_time, holds_s = moment(response.time), moment(response.expire_time) - moment(response.time)
        lease_s, cost = seconds(response.longest_lease), response.cost
        if not 0 < len(response.offer_id) <= _MOST_ID or not 0 < peer_time < LAST_MOMENT_S:
            return None
        if holds_s <= 0 or lease_s <= 0:
            return None
        if not 0 <= cost <= _MOST_COST or seconds(response.expected_wait) < 0:
            return None
        carried = known.input_bytes + (0 if response.bundle_present else known.bundle_bytes)
        return Offer(
            peer.record.name,
            response.offer_id,
            seconds(response.expected_wait),
            transfer_s(peer, carried),
            (cost or 1.0) * (peer.record.terms.cost or 1.0),
            peer_time,
            read_at,
            read_at + min(holds_s, _LONGEST_HOLD_S),
            lease_s,
            response.profile[:_MOST_ID],
            response.gpu_model[:_MOST_ID],
            response.bundle_present,
            peer.record.create_time,
        )

    # -- going

    async def _take(self, job_id: str, offer: Offer) -> None:
        """Sends a job to a peer if it still waits; `PeerDriver` does the rest."""
        known, went = self._known.pop(job_id, None), False
        reach = self._reach
        try:
            lease_s = lease_left(reach, await guest_left_s(self._store, job_id, reach))
            if known is None or lease_s <= 0:
                return
            attempts = len(known.record.job.attempts)

            def decide(record: JobRecord, token: int) -> Change | None:
                nonlocal went
                # The offer is for one attempt. Another one may have come and gone meanwhile.
                if len(record.job.attempts) != attempts:
                    return None
                change = send(
                    record,
                    token,
                    offer,
                    at=self._wall(),
                    clock_s=reach.clock.now(),
                    boot=reach.clock.boot,
                    lease_s=lease_s,
                )
                went = change is not None
                return change

            record = await self._store.change_job(job_id, decide)
            if went:
                self._line.remove(job_id)
                self._drivers.drive(record)
                _log.info("sent to a peer", job=job_id, peer=offer.peer, promised_s=round(offer.total_s, 1))
        except Exception as error:  # noqa: BLE001 - it waits on; a full disk may have room again
            _log.error("a job could not be sent to a peer; it waits on", job=job_id, peer=offer.peer, exc_info=error)
        finally:
            self._spill.taken(job_id)


def _reason(said: str) -> str:
    return said if _REASON.fullmatch(said) else "UNKNOWN"


def _retry_s(said: float) -> float:
    return min(_LONGEST_RETRY_S, max(0.0, said))
