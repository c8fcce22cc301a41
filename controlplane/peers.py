"""The peers of this centre: one connection to each, what they told last, and how they kept their promises.

Capacity goes both ways over one stream for each direction of calling. It is a summary by profile: no nodes, no jobs, so
what a centre tells does not grow with what it has, and with how many peers it has only by the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import grpc
import structlog

from controlplane.certificates import CentreIdentity, name_of, pem_of
from controlplane.faults import retry_delay_s
from controlplane.peer_client import GrpcPeerClient, PeerClient
from controlplane.records import PeerRecord
from controlplane.store import Store
from puhui.rpc.channel import open_pinned_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, timestamp
from puhui.rpc.tls import Pinned
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import peer_service_pb2

__all__ = ["Peer", "Peers", "Summary", "connect"]

_log = structlog.get_logger(__name__)

ASSUMED_ROUND_TRIP_S = 0.05
ASSUMED_BYTES_PER_SECOND = 12.5e6
"""100 Mbit/s, until something was carried there."""
_SOON_S = 1.0
_AT_LEAST_EVERY_S = 20.0
_SILENT_S = 60.0
_QUICKEST_S = 0.2
_SMALLEST_MEASURE = 256 * 1024
_WEIGHT = 0.3
"""Of a new measurement in a running mean."""
_MOST_PROFILES = 512
_PING_EVERY_S = 60.0
_STEADY_S = 30.0

Summary = tuple[Sequence[wire.CapacitySummary], int, bool]
"""(capacity by profile, jobs that wait, whether cards are emulated)."""


def connect(identity: CentreIdentity, address: str, certificate: bytes, centre_id: str) -> PeerClient:
    """Opens a connection to a centre whose certificate is known.

    Args:
        identity: who we are.
        address: where it serves its peers.
        certificate: its certificate (DER).
        centre_id: its id.
    """
    pinned = Pinned(identity.key_pem, identity.certificate_pem, pem_of(certificate), name_of(centre_id))
    return GrpcPeerClient(open_pinned_channel(address, pinned))


@dataclass
class Peer:
    """Another centre, as this one sees it."""

    record: PeerRecord
    round_trip_s: float = ASSUMED_ROUND_TRIP_S
    bytes_per_second: float = ASSUMED_BYTES_PER_SECOND
    profiles: Sequence[wire.CapacitySummary] = ()
    """Its capacity, as of its last word."""
    queued_jobs: int = 0
    last_contact: float = 0.0
    """In seconds since the epoch; 0 when it was never heard of."""
    asked: int = 0
    accepted: int = 0
    last_refusal: str = ""
    broken_s: float = 0.0
    """How late its work began, in the mean of the last ones, in seconds."""
    trouble: str = ""
    """Why it is not in contact."""
    _client: PeerClient | None = None
    _there: asyncio.Event = field(default_factory=asyncio.Event)
    _sequence: int = 0

    @property
    def client(self) -> PeerClient:
        """The connection to it.

        Raises:
            Refusal: UNAVAILABLE with PEER_NOT_CALLED.
        """
        if self._client is None:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "PEER_NOT_CALLED",
                f"peer {self.record.name} serves nobody: it sends work only, and cannot be asked for anything",
            )
        return self._client

    @property
    def in_contact(self) -> bool:
        """Whether the connection to it stands."""
        return self._there.is_set()

    async def contact(self) -> None:
        """Returns when it is in contact."""
        await self._there.wait()

    def carried(self, size_bytes: int, elapsed_s: float) -> None:
        """So many bytes have gone there in so many seconds; what is small says more about the round trip."""
        if size_bytes >= _SMALLEST_MEASURE and elapsed_s > 0:
            measured = size_bytes / elapsed_s
            known = self.bytes_per_second if self.record.bytes_per_second else measured
            self.bytes_per_second = known + _WEIGHT * (measured - known)
            self.record = replace(self.record, bytes_per_second=self.bytes_per_second)

    def offered(self, accepted: bool, reason: str = "") -> None:
        """It has said what it would do, or not."""
        self.asked += 1
        self.accepted += accepted
        if not accepted:
            self.last_refusal = reason[:64]

    def began(self, promised_s: float, actual_s: float) -> None:
        """Work there began so many seconds after it was sent."""
        self.broken_s += _WEIGHT * (max(0.0, actual_s - promised_s) - self.broken_s)

    def heard(self, said: wire.ExchangeCapacityRequest | wire.ExchangeCapacityResponse) -> bool:
        """It has told its capacity. Returns whether that is news."""
        self.last_contact = now()
        if said.sequence <= self._sequence:
            return False
        self._sequence = said.sequence
        profiles = list(said.profiles[:_MOST_PROFILES])
        news = (profiles, said.queued_jobs) != (list(self.profiles), self.queued_jobs)
        self.profiles, self.queued_jobs = profiles, said.queued_jobs
        return news

    def measured(self, round_trip_s: float) -> None:
        """A message and its answer took so long."""
        known = self.round_trip_s if self.record.round_trip_s else round_trip_s
        self.round_trip_s = known + _WEIGHT * (round_trip_s - known)
        self.record = replace(self.record, round_trip_s=self.round_trip_s)

    def connected(self) -> None:
        """Its answers come."""
        self.trouble = ""
        self.last_contact = now()
        self._there.set()

    def lost(self, why: str) -> None:
        """Its answers come no longer."""
        self.trouble = why
        self._sequence = 0
        self._there.clear()


class Peers:
    """The peers of one centre.

    Args:
        store: where they are kept.
        identity: who this centre is.
        centre: its name.
        summary: tells its own capacity.
        on_change: called when a peer's capacity or contact has changed.
        connect: opens a connection, see `connect`.
    """

    def __init__(
        self,
        store: Store,
        identity: CentreIdentity,
        centre: str,
        summary: Callable[[], Summary],
        on_change: Callable[[], None],
        connect: Callable[[CentreIdentity, str, bytes, str], PeerClient] = connect,
    ) -> None:
        self._store = store
        self._identity = identity
        self._centre = centre
        self._summary = summary
        self._on_change = on_change
        self._connect = connect
        self._peers: dict[str, Peer] = {}
        self._by_certificate: dict[bytes, Peer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Opens the connections."""
        for record in await self._store.peers():
            self._open(record)

    async def stop(self) -> None:
        """Closes the connections."""
        for name in list(self._peers):
            await self._close(name)

    def get(self, name: str) -> Peer | None:
        """Returns a peer by its name here."""
        return self._peers.get(name)

    def all(self) -> list[Peer]:
        """Returns every peer, by name."""
        return [self._peers[name] for name in sorted(self._peers)]

    def by_certificate(self, certificate: bytes) -> Peer | None:
        """Returns the peer whose certificate (DER) this is."""
        return self._by_certificate.get(certificate)

    def pins(self) -> list[bytes]:
        """Returns the certificates of all peers: PEM. May be called from any thread."""
        return [pem_of(certificate) for certificate in tuple(self._by_certificate)]

    async def add(self, record: PeerRecord) -> Peer:
        """A peer is stored: opens the connection to it, in place of an older one."""
        await self._close(record.name)
        return self._open(record)

    async def change(self, record: PeerRecord) -> Peer:
        """Stores what has changed of a peer, but for its address and certificate, and keeps its connection."""
        await self._store.put_peer(record)
        peer = self._peers[record.name]
        peer.record = record
        self._on_change()
        return peer

    async def remove(self, name: str) -> None:
        """Ends work with a peer."""
        await self._store.remove_peer(name)
        await self._close(name)
        self._on_change()

    def capacity_changed(self) -> None:
        """This centre's capacity may have changed."""
        self._changed.set()

    # -- connections

    def _open(self, record: PeerRecord) -> Peer:
        peer = Peer(
            record,
            round_trip_s=record.round_trip_s or ASSUMED_ROUND_TRIP_S,
            bytes_per_second=record.bytes_per_second or ASSUMED_BYTES_PER_SECOND,
        )
        if record.address:
            peer._client = self._connect(self._identity, record.address, record.certificate, record.centre_id)
            self._tasks[record.name] = asyncio.create_task(self._keep(peer), name=f"peer {record.name}")
        self._peers[record.name] = peer
        self._by_certificate[record.certificate] = peer
        return peer

    async def _close(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        self._by_certificate.pop(peer.record.certificate, None)
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        peer.lost("work with it was ended")
        if peer._client is not None:
            await peer._client.close()

    async def _keep(self, peer: Peer) -> None:
        """Keeps the exchange with a peer going, for ever."""
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            began = loop.time()
            try:
                await self._exchange(peer)
                why = "it ended the exchange of capacity"
            except TimeoutError:
                why = f"it has said nothing for {_SILENT_S:.0f} s"
            except Refusal as refusal:
                why = refusal.message or refusal.code.name
            except Exception as error:  # noqa: BLE001 - whatever one peer brings about, it is asked again
                _log.error("the exchange with a peer met the unforeseen", peer=peer.record.name, exc_info=error)
                why = "the exchange with it met the unforeseen; see this control plane's log"
            if peer.in_contact:
                _log.warning("peer out of contact", peer=peer.record.name, why=why)
            peer.lost(why)
            self._on_change()
            await self._keep_measures(peer)
            tries = 1 if loop.time() - began > _STEADY_S else tries + 1
            # Spread, so that a centre that comes back is not met by all at once.
            await asyncio.sleep(retry_delay_s(tries) * random.uniform(0.5, 1.0))  # noqa: S311

    async def _exchange(self, peer: Peer) -> None:
        loop = asyncio.get_running_loop()

        async def told() -> AsyncIterator[wire.ExchangeCapacityRequest]:
            async for profiles, queued, emulated, number in self._summaries():
                yield wire.ExchangeCapacityRequest(
                    centre=self._centre,
                    profiles=profiles,
                    queued_jobs=queued,
                    time=timestamp(now()),
                    sequence=number,
                    emulated=emulated,
                )

        ping_at = loop.time()
        async with contextlib.aclosing(peer.client.exchange(told())) as answers:
            while True:
                async with asyncio.timeout(_SILENT_S):
                    said = await anext(answers, None)
                if said is None:
                    return
                fresh = not peer.in_contact
                peer.connected()
                if peer.heard(said) or fresh:
                    self._on_change()
                if loop.time() >= ping_at:
                    began = loop.time()
                    await peer.client.ping()
                    peer.measured(loop.time() - began)
                    ping_at = loop.time() + _PING_EVERY_S
                    await self._keep_measures(peer)

    async def _keep_measures(self, peer: Peer) -> None:
        """Stores what was measured, so that it is known after a restart."""
        if self._peers.get(peer.record.name) is peer:
            with contextlib.suppress(OSError):
                await self._store.put_peer(peer.record)

    async def _summaries(self) -> AsyncIterator[tuple[Sequence[wire.CapacitySummary], int, bool, int]]:
        """Yields this centre's capacity: at once, then when it has changed, and every now and then."""
        number, last = 0, None
        while True:
            summary = self._summary()
            number += 1
            last = summary
            yield (*summary, number)
            loop = asyncio.get_running_loop()
            due = loop.time() + _AT_LEAST_EVERY_S * random.uniform(0.8, 1.0)  # noqa: S311
            while (left_s := due - loop.time()) > 0:
                await asyncio.sleep(min(left_s, _SOON_S * random.uniform(0.8, 1.2)))  # noqa: S311
                if self._summary()[:2] != last[:2]:
                    break

    async def exchange(
        self, peer: Peer, requests: AsyncIterator[wire.ExchangeCapacityRequest]
    ) -> AsyncGenerator[wire.ExchangeCapacityResponse, None]:
        """Answers a peer that tells its capacity with our own, for as long as both live.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_RATE: it tells more often than anybody needs to know.
        """
        listening = asyncio.create_task(self._listen(peer, requests))
        try:
            async for profiles, queued, emulated, number in self._summaries():
                if listening.done():
                    listening.result()
                    return
                yield wire.ExchangeCapacityResponse(
                    centre=self._centre,
                    profiles=profiles,
                    queued_jobs=queued,
                    time=timestamp(now()),
                    sequence=number,
                    emulated=emulated,
                )
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, peer: Peer, requests: AsyncIterator[wire.ExchangeCapacityRequest]) -> None:
        loop = asyncio.get_running_loop()
        allowed, at, last = 20.0, loop.time(), 0
        async for said in requests:
            allowed, at = min(20.0, allowed + (loop.time() - at) / _QUICKEST_S), loop.time()
            allowed -= 1
            if allowed < 0:
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "PEER_RATE",
                    "capacity is told once a second at most; come more slowly",
                    retry_after_s=_AT_LEAST_EVERY_S,
                )
            if said.sequence <= last:
                continue  # an older one
            last = said.sequence
            peer.last_contact = now()
            if peer._client is None or not peer.in_contact:
                # One that is never called is known by what it tells.
                peer.profiles, peer.queued_jobs = list(said.profiles[:_MOST_PROFILES]), said.queued_jobs

    def described(self, peer: Peer, sent: int, received: int) -> peer_service_pb2.Peer:
        """Returns a peer for people.

        Args:
            peer: the peer.
            sent: our attempts there.
            received: its attempts here.
        """
        record = peer.record
        shown = peer_service_pb2.Peer(
            name=record.name,
            centre_id=record.centre_id,
            address=record.address,
            fingerprint=record.fingerprint,
            terms=record.terms,
            in_contact=peer.in_contact,
            message=peer.trouble,
            bytes_per_second=peer.bytes_per_second if record.bytes_per_second else 0.0,
            profiles=peer.profiles,
            queued_jobs=peer.queued_jobs,
            sent=sent,
            received=received,
            offers_asked=peer.asked,
            offers_accepted=peer.accepted,
            last_refusal=peer.last_refusal,
            create_time=timestamp(record.create_time),
        )
        if peer.last_contact:
            shown.last_contact_time.CopyFrom(timestamp(peer.last_contact))
        if record.round_trip_s:
            shown.round_trip.FromNanoseconds(round(peer.round_trip_s * 1e9))
        shown.broken_promise.FromNanoseconds(round(peer.broken_s * 1e9))
        return shown
