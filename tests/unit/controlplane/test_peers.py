"""The peers of a centre: contact, what they tell, and what they are measured by. Their end is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.certificates import CentreIdentity, key_from_secret, new_secret
from controlplane.peer import ASSUMED_BYTES_PER_SECOND, ASSUMED_ROUND_TRIP_S, Peer, sound_capacity
from controlplane.peer_client import PeerClient
from controlplane.peers import Peers, Summary, is_news
from controlplane.records import PeerRecord
from controlplane.sqlite_store import SqliteStore
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration
from puhui.v1.federation_service_pb2 import CapacitySummary, ExchangeCapacityRequest, ExchangeCapacityResponse
from puhui.v1.peer_service_pb2 import PeerTerms
from tests.unit.controlplane.centres import eventually

IDENTITY = CentreIdentity.of_key(key_from_secret(new_secret()), "a" * 32)
Word = ExchangeCapacityResponse | Exception | None
SLICES = CapacitySummary(gpu_model="H", profile="1g.10gb", free=3)


def record(name: str = "b", address: str = "b.example:1") -> PeerRecord:
    certificate = CentreIdentity.of_key(key_from_secret(new_secret()), name * 32).certificate
    return PeerRecord(name, name * 32, address, certificate, PeerTerms(), 1.0)


class There:
    """The other end: says what the test wants said, on every connection from the beginning."""

    def __init__(self) -> None:
        self.says: asyncio.Queue[Word] = asyncio.Queue()
        self.heard: list[ExchangeCapacityRequest] = []
        self.connections = 0
        self.pings = 0
        self.closed = False

    async def exchange(self, summaries: AsyncIterator[Any]) -> AsyncGenerator[ExchangeCapacityResponse, None]:
        self.connections += 1
        self.heard.append(await anext(summaries))
        while True:
            word = await self.says.get()
            if isinstance(word, Exception):
                raise word
            if word is None:
                return
            yield word

    async def ping(self) -> None:
        self.pings += 1

    async def close(self) -> None:
        self.closed = True


class Here:
    """The peers of a centre with one of them, and how often somebody was told of a change."""

    def __init__(self, store: SqliteStore, silent_s: float = 60.0) -> None:
        self.there = There()
        self.changes = 0
        self.store = store
        summary = [SLICES], 2, True
        self.peers = Peers(store, IDENTITY, "a", lambda: summary, self._changed, self._connect, silent_s)

    def _changed(self) -> None:
        self.changes += 1

    def _connect(self, *_: Any) -> PeerClient:
        return cast("PeerClient", self.there)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    store = await SqliteStore.open(tmp_path / "store.db", Feed())
    one = Here(store)
    yield one
    await one.peers.stop()
    await store.close()


def said(sequence: int, queued: int = 0, free: int = 1) -> ExchangeCapacityResponse:
    profile = CapacitySummary(gpu_model="H", profile="7g.80gb", free=free)
    return ExchangeCapacityResponse(sequence=sequence, queued_jobs=queued, profiles=[profile])


async def test_a_peer_is_in_contact_from_its_first_word_on_and_measured(here: Here) -> None:
    peer = await here.peers.add(record())
    assert not peer.in_contact
    assert (peer.round_trip_s, peer.bytes_per_second) == (ASSUMED_ROUND_TRIP_S, ASSUMED_BYTES_PER_SECOND)
    here.there.says.put_nowait(said(1, queued=4))
    await asyncio.wait_for(peer.contact(), 10)
    await eventually(lambda: peer.queued_jobs == 4 and here.there.pings == 1)
    [heard] = here.there.heard
    assert (heard.centre, heard.sequence, heard.queued_jobs, heard.emulated) == ("a", 1, 2, True)
    assert list(heard.profiles) == [SLICES]
    assert peer.round_trip_s < ASSUMED_ROUND_TRIP_S
    measured = "select 1 from peers where json_extract(body, '$.round_trip_s') > 0"
    await eventually(lambda: here.store._read.execute(measured).fetchone() is not None)
    shown = peer.described(3, 2)
    assert (shown.name, shown.in_contact, shown.sent, shown.received, shown.message) == ("b", True, 3, 2, "")


async def test_words_that_are_old_are_dropped_and_the_same_ones_are_no_news(here: Here) -> None:
    peer = await here.peers.add(record())
    here.there.says.put_nowait(said(5, queued=5))
    await eventually(lambda: peer.queued_jobs == 5)
    changes = here.changes
    for word in (said(4, queued=40), said(5, queued=50), said(6, queued=5)):
        here.there.says.put_nowait(word)
    here.there.says.put_nowait(said(7, queued=6))
    await eventually(lambda: peer.queued_jobs == 6)
    assert here.changes == changes + 1


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (None, "it ended the exchange of capacity"),
        (Refusal(grpc.StatusCode.UNAUTHENTICATED, "PEER_UNKNOWN", "no peer\x1b[2J"), "it refuses: no peer?[2J"),
        (Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "refused"), "no answer at b.example:1"),
        (
            Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "CERTIFICATE_VERIFY_FAILED"),
            "not the centre that was paired",
        ),
        (RuntimeError("unforeseen"), "see this control plane's log"),
    ],
)
async def test_a_peer_that_breaks_off_is_out_of_contact_and_asked_again(here: Here, word: Word, why: str) -> None:
    peer = await here.peers.add(record())
    here.there.says.put_nowait(said(9, queued=9))
    await asyncio.wait_for(peer.contact(), 10)
    changes = here.changes
    here.there.says.put_nowait(word)
    await eventually(lambda: not peer.in_contact)
    assert why in peer.described(0, 0).message
    await eventually(lambda: here.changes > changes)
    # It began anew, so its numbers begin anew.
    here.there.says.put_nowait(said(1, queued=1))
    await asyncio.wait_for(peer.contact(), 10)
    await eventually(lambda: peer.queued_jobs == 1)
    assert here.there.connections == 2


async def test_a_peer_that_falls_silent_is_out_of_contact(here: Here) -> None:
    quick = Here(here.store, silent_s=0.3)
    peer = await quick.peers.add(record())
    quick.there.says.put_nowait(said(1))
    await asyncio.wait_for(peer.contact(), 10)
    await eventually(lambda: not peer.in_contact)
    assert "said nothing" in peer.trouble
    await quick.peers.stop()


async def test_a_peer_that_answers_without_end_is_left(here: Here) -> None:
    peer = await here.peers.add(record())
    for number in range(1, 200):
        here.there.says.put_nowait(said(number, queued=number))
    await eventually(lambda: "more slowly" in peer.trouble)
    assert peer.queued_jobs < 30


async def test_one_that_is_removed_is_closed_and_forgotten(here: Here) -> None:
    peer = await here.peers.add(record())
    here.there.says.put_nowait(said(1))
    await asyncio.wait_for(peer.contact(), 10)
    peer.carried(2**20, 0.5)
    await here.peers.remove("b")
    assert here.there.closed
    assert not peer.in_contact
    assert (here.peers.all(), here.peers.pins(), await here.store.peers()) == ([], [], [])
    await here.peers.remove("b")  # nothing is left to be removed


async def test_what_was_measured_is_known_after_a_restart(here: Here) -> None:
    peer = await here.peers.add(record())
    peer.carried(1000, 0.001)  # too small to say much
    assert peer.bytes_per_second == ASSUMED_BYTES_PER_SECOND
    peer.carried(10**6, 1.0)
    peer.carried(2 * 10**6, 1.0)
    here.there.says.put_nowait(None)
    await eventually(lambda: bool(peer.trouble))
    await here.peers.agree(peer, PeerTerms(most_sent=2))
    again = Here(here.store)
    await again.peers.start()
    [known] = again.peers.all()
    assert known.bytes_per_second == pytest.approx(1.3e6)
    assert known.record.terms.most_sent == 2
    await again.peers.stop()


def test_broken_promises_are_remembered_and_kept_ones_are_not_rewarded() -> None:
    peer = Peer.of(record(), None)
    peer.began(promised_s=10, actual_s=20)
    assert peer.broken_s == pytest.approx(3, abs=0.01)
    peer.began(promised_s=10, actual_s=1)
    assert peer.broken_s == pytest.approx(2.1, abs=0.01)
    peer.offered(True)
    peer.offered(False, "FULL\x1b" + "x" * 100)
    shown = peer.described(0, 0)
    assert (shown.offers_asked, shown.offers_accepted) == (2, 1)
    assert shown.last_refusal == "FULL?" + "x" * 59
    with pytest.raises(Refusal, match="serves nobody"):
        _ = peer.client


# -- the served side


def telling(*words: ExchangeCapacityRequest, ends: bool = False) -> AsyncIterator[ExchangeCapacityRequest]:
    async def tell() -> AsyncIterator[ExchangeCapacityRequest]:
        for word in words:
            yield word
        if not ends:
            await asyncio.Event().wait()

    return tell()


async def ended(exchange: AsyncGenerator[ExchangeCapacityResponse, None]) -> None:
    async with asyncio.timeout(10):
        async for _ in exchange:
            pass


async def test_who_tells_its_capacity_is_told_ours(here: Here) -> None:
    peer = await here.peers.add(record(address=""))
    words = [ExchangeCapacityRequest(sequence=number, queued_jobs=number, emulated=True) for number in (2, 1)]
    exchange = here.peers.exchange(peer, telling(*words))
    answer = await anext(exchange)
    assert (answer.centre, answer.queued_jobs, list(answer.profiles)) == ("a", 2, [SLICES])
    assert answer.emulated
    await eventually(lambda: peer.queued_jobs == 2)
    assert peer.described(0, 0).emulated
    assert peer.described(0, 0).HasField("last_contact_time")
    await exchange.aclose()


async def test_an_exchange_ends_with_its_peer_or_with_the_next_one(here: Here) -> None:
    peer = await here.peers.add(record(address=""))
    await ended(here.peers.exchange(peer, telling(ends=True)))
    first = here.peers.exchange(peer, telling())
    await anext(first)
    second = here.peers.exchange(peer, telling())
    await anext(second)
    await ended(first)
    await here.peers.remove("b")
    await ended(second)


async def test_who_tells_without_end_is_cut_off(here: Here) -> None:
    peer = await here.peers.add(record(address=""))
    words = [ExchangeCapacityRequest(sequence=number) for number in range(1, 100)]
    with pytest.raises(Refusal) as caught:
        await ended(here.peers.exchange(peer, telling(*words)))
    assert caught.value.reason == "PEER_RATE"


def test_what_is_no_news_is_not_told() -> None:
    def told(wait_s: float | None = 100.0, queued: int = 1, **fields: Any) -> Summary:
        wait = duration(wait_s) if wait_s is not None else None
        return [CapacitySummary(gpu_model="H", profile="1g.10gb", expected_wait=wait, **fields)], queued, False

    assert not is_news(told(), told())
    assert not is_news(told(), told(91.0))  # it waits 9 s less, 9 s later
    assert not is_news(told(0.0), told(4.0))
    for other in (told(89.0), told(None), told(queued=2), told(free=1), told(idle=1), ([], 1, False)):
        assert is_news(told(), other)
        assert is_news(other, told())


summaries = st.builds(
    CapacitySummary,
    gpu_model=st.text(max_size=100),
    profile=st.text(max_size=100),
    free=st.integers(0, 2**32 - 1),
    idle=st.integers(0, 2**32 - 1),
    expected_wait=st.none() | st.floats(-1e9, 9e9).map(duration),
)


@given(st.lists(summaries, max_size=20))
def test_whatever_a_peer_tells_can_be_shown_and_reckoned_with(told: list[CapacitySummary]) -> None:
    sound = sound_capacity(told)
    assert len(sound) <= len(told)
    for one in sound:
        assert (one.gpu_model + one.profile).isprintable()
        assert max(len(one.gpu_model), len(one.profile)) <= 64
        assert max(one.free, one.idle) <= 2**20
        assert 0 <= one.expected_wait.ToTimedelta().total_seconds() <= 366 * 86400
    assert sound_capacity(sound) == sound
    assert len(sound_capacity([CapacitySummary(profile=str(number)) for number in range(2000)])) == 512
