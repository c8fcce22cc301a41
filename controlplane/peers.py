"""The peers of this centre: one connection to each, what they told last, and how they kept their promises.

Capacity goes both ways over one stream for each direction of calling. It is a summary by profile: no nodes, no jobs, so
what a centre tells does not grow with what it has, and with how many peers it has only by the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace

import grpc
import structlog

from controlplane.allowance import Allowance
from controlplane.certificates import CentreIdentity, name_of, pem_of
from controlplane.faults import retry_delay_s
from controlplane.peer import Peer
from controlplane.peer_client import GrpcPeerClient, PeerClient
from controlplane.records import PeerRecord
from controlplane.store import Store
from puhui.rpc.channel import open_pinned_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, seconds, timestamp
from puhui.rpc.tls import Pinned
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.peer_service_pb2 import PeerTerms

__all__ = ["Peer", "Peers", "Summary", "connect", "is_news"]

_log = structlog.get_logger(__name__)

_SOON_S = 1.0
_AT_LEAST_EVERY_S = 20.0
_SILENT_S = 60.0
_WORDS_A_SECOND, _WORDS_AT_ONCE = 5.0, 20.0
"""A peer that tells its capacity more often than that is broken, or hostile."""
_PING_EVERY_S = 60.0
_WAIT_NEWS_S, _WAIT_NEWS = 5.0, 0.1
"""A wait is news when it differs by more than this, and more than this part of it."""
_STEADY_S = 30.0

Summary = tuple[Sequence[wire.CapacitySummary], int, bool]
"""(capacity by profile, jobs that wait, whether cards are emulated)."""


_Connection = tuple[Peer | None, asyncio.Task[None] | None]
"""A peer, and what keeps contact with it."""


def is_news(last: Summary, newest: Summary) -> bool:
    """Returns whether peers that know one summary need to be told another.

    A wait that differs by little is none: it does so all the time, and would be told every second to every peer.
    """
    if last[1] != newest[1] or len(last[0]) != len(newest[0]):
        return True
    return any(_differ(before, after) for before, after in zip(last[0], newest[0], strict=True))


def _differ(before: wire.CapacitySummary, after: wire.CapacitySummary) -> bool:
    named, counted = ("gpu_model", "profile"), ("free", "idle")
    if any(getattr(before, field) != getattr(after, field) for field in (*named, *counted)):
        return True
    if before.HasField("expected_wait") != after.HasField("expected_wait"):
        return True
    known, real = seconds(before.expected_wait), seconds(after.expected_wait)
    return abs(known - real) > max(_WAIT_NEWS_S, _WAIT_NEWS * known)


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


class Peers:
    """The peers of one centre.

    Args:
        store: where they are kept.
        identity: who this centre is.
        centre: its name.
        summary: tells its own capacity.
        on_change: called when a peer's capacity or contact has changed.
        connect: opens a connection, see `connect`.
        silent_s: a peer that has said nothing for this long, in seconds, is out of contact.
    """

    def __init__(
        self,
        store: Store,
        identity: CentreIdentity,
        centre: str,
        summary: Callable[[], Summary],
        on_change: Callable[[], None],
        connect: Callable[[CentreIdentity, str, bytes, str], PeerClient] = connect,
        silent_s: float = _SILENT_S,
    ) -> None:
        self._store = store
        self._identity = identity
        self._centre = centre
        self._summary = summary
        self._on_change = on_change
        self.on_removed: Callable[[str], None] = lambda name: None
        """Told of a peer that is one no longer."""
        self._connect = connect
        self._silent_s = silent_s
        self.is_open = False
        """Whether who is not among them is no peer; see `PeerBook`."""
        self._peers: dict[str, Peer] = {}
        self._by_certificate: dict[bytes, Peer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._exchanges: dict[str, asyncio.Event] = {}
        """By name of the peer, ends the exchange that it has begun."""
        self._writing = asyncio.Lock()
        """What is stored of a peer is stored in the order in which it happened."""

    async def start(self) -> None:
        """Opens the connections."""
        for record in await self._store.peers():
            self._open(record)
        self.is_open = True

    async def stop(self) -> None:
        """Closes the connections."""
        self.is_open = False
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
        """Stores a peer and opens the connection to it, in place of one with its name."""
        async with self._writing:
            await self._store.put_peer(record)
            peer = await self._reopen(record)
        self._on_change()
        return peer

    async def take(self, record: PeerRecord, invitation: str) -> bool:
        """Stores a peer in exchange for its invitation, and opens the connection to it.

        Args:
            record: the peer.
            invitation: public key of the invitation.

        Returns:
            False, and nothing is done, when the invitation is gone.
        """
        async with self._writing:
            if not await self._store.take_invitation(invitation, record):
                return False
            await self._reopen(record)
        self._on_change()
        return True

    async def agree(self, peer: Peer, terms: PeerTerms) -> None:
        """Changes what is agreed with a peer.

        Raises:
            Refusal: NOT_FOUND with PEER_NOT_FOUND: it is none any longer.
        """
        async with self._writing:
            if self._peers.get(peer.record.name) is not peer:
                raise Refusal(grpc.StatusCode.NOT_FOUND, "PEER_NOT_FOUND", f"{peer.record.name} is no peer any longer")
            await self._store.put_peer(replace(peer.record, terms=terms))
            # What was measured meanwhile stays.
            peer.record = replace(peer.record, terms=terms)
        self._on_change()

    async def remove(self, name: str) -> None:
        """Ends work with a peer: it is forgotten, and what it has open here ends."""
        async with self._writing:
            await self._store.remove_peer(name)
            await self._close(name)
        self.on_removed(name)
        self._on_change()

    # -- connections

    async def _reopen(self, record: PeerRecord) -> Peer:
        # At once: in between, its calls would be those of a stranger.
        before = self._forget(record.name)
        peer = self._open(record)
        await self._end(before)
        return peer

    def _open(self, record: PeerRecord) -> Peer:
        client = None
        if record.address:
            client = self._connect(self._identity, record.address, record.certificate, record.centre_id)
        peer = Peer.of(record, client)
        self._peers[record.name] = peer
        self._by_certificate[record.certificate] = peer
        if client is not None:
            self._tasks[record.name] = asyncio.create_task(self._keep(peer), name=f"peer {record.name}")
        return peer

    async def _close(self, name: str) -> None:
        await self._end(self._forget(name))

    def _forget(self, name: str) -> _Connection:
        peer = self._peers.pop(name, None)
        if peer is not None:
            self._by_certificate.pop(peer.record.certificate, None)
        exchange = self._exchanges.pop(name, None)
        if exchange is not None:
            exchange.set()
        return peer, self._tasks.pop(name, None)

    async def _end(self, connection: _Connection) -> None:
        peer, task = connection
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if peer is not None:
            peer.lost("work with it was ended")
            if peer.is_called:
                await peer.client.close()

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
                why = f"it has said nothing for {self._silent_s:.0f} s"
            except Refusal as refusal:
                why = _why(refusal, peer.record.address)
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
            async for profiles, queued, emulated, number in self._summaries(peer):
                yield wire.ExchangeCapacityRequest(
                    centre=self._centre,
                    profiles=profiles,
                    queued_jobs=queued,
                    time=timestamp(now()),
                    sequence=number,
                    emulated=emulated,
                )

        ping_at, words = loop.time(), Allowance(loop.time)
        async with contextlib.aclosing(peer.client.exchange(told())) as answers:
            while True:
                async with asyncio.timeout(self._silent_s):
                    said = await anext(answers, None)
                if said is None:
                    return
                _count(words)
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
        async with self._writing:
            if self._peers.get(peer.record.name) is peer:
                with contextlib.suppress(OSError):  # it is measured again
                    await self._store.put_peer(peer.record)

    def _for(self, peer: Peer) -> Summary:
        """Returns this centre's capacity for a peer: one from which nothing is taken has none here."""
        # What it is now: since its exchange began, it may have been paired again, and its terms changed.
        peer = self._peers.get(peer.record.name, peer)
        profiles, queued, emulated = self._summary()
        # Once its work is taken again, that is news to it, and it asks at once.
        return ((), 0, emulated) if peer.record.terms.receive_off else (profiles, queued, emulated)

    async def _summaries(
        self, peer: Peer
    ) -> AsyncGenerator[tuple[Sequence[wire.CapacitySummary], int, bool, int], None]:
        """Yields this centre's capacity: at once, then when it has changed, and every now and then."""
        number, loop = 0, asyncio.get_running_loop()
        while True:
            last = self._for(peer)
            number += 1
            yield (*last, number)
            due = loop.time() + _AT_LEAST_EVERY_S * random.uniform(0.8, 1.0)  # noqa: S311
            while (left_s := due - loop.time()) > 0:
                await asyncio.sleep(min(left_s, _SOON_S * random.uniform(0.8, 1.2)))  # noqa: S311
                if is_news(last, self._for(peer)):
                    break

    async def exchange(
        self, peer: Peer, requests: AsyncIterator[wire.ExchangeCapacityRequest]
    ) -> AsyncGenerator[wire.ExchangeCapacityResponse, None]:
        """Answers a peer that tells its capacity with our own, for as long as both live.

        A peer has one exchange: the next one that it begins ends the one before.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_RATE: it tells more often than anybody needs to know.
        """
        name, ended = peer.record.name, asyncio.Event()
        before = self._exchanges.get(name)
        if before is not None:
            before.set()
        self._exchanges[name] = ended
        summaries = self._summaries(peer)
        # One of these ends the exchange.
        listening = asyncio.create_task(self._listen(peer, requests))
        ending = asyncio.create_task(ended.wait())
        telling: asyncio.Task[tuple[Sequence[wire.CapacitySummary], int, bool, int]] | None = None
        try:
            while True:
                telling = asyncio.create_task(anext(summaries))
                await asyncio.wait({listening, ending, telling}, return_when=asyncio.FIRST_COMPLETED)
                if listening.done():
                    listening.result()
                    return
                if ending.done():
                    return
                profiles, queued, emulated, number = telling.result()
                yield wire.ExchangeCapacityResponse(
                    centre=self._centre,
                    profiles=profiles,
                    queued_jobs=queued,
                    time=timestamp(now()),
                    sequence=number,
                    emulated=emulated,
                )
        finally:
            if self._exchanges.get(name) is ended:
                del self._exchanges[name]
            tasks = [task for task in (listening, ending, telling) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await summaries.aclose()

    async def _listen(self, peer: Peer, requests: AsyncIterator[wire.ExchangeCapacityRequest]) -> None:
        words, last = Allowance(asyncio.get_running_loop().time), 0
        async for said in requests:
            _count(words)
            if said.sequence <= last:
                continue  # an older one
            last = said.sequence
            peer.last_contact = now()
            if not peer.in_contact:
                # One that is never called is known by what it tells.
                peer.told(said)


def _count(words: Allowance) -> None:
    if words.take(_WORDS_A_SECOND, _WORDS_AT_ONCE):
        raise Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "PEER_RATE",
            "capacity is told once a second at most; come more slowly",
            retry_after_s=_AT_LEAST_EVERY_S,
        )


def _why(refusal: Refusal, address: str) -> str:
    """Returns why a peer is not in contact."""
    if refusal.reason != "UNKNOWN":
        return f"it refuses: {refusal.message}"
    if "CERTIFICATE_VERIFY_FAILED" in refusal.message:
        return f"who answers at {address} is not the centre that was paired; if that was made anew, pair with it again"
    return f"no answer at {address}, or none for us any longer: {refusal.message or refusal.code.name}"
