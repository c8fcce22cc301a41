"""Invitations: made, taken once, and what else may be tried with them. The network is one of the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.certificates import (
    CentreIdentity,
    certificate_of_key,
    key_from_secret,
    name_of,
    new_secret,
    pem_of,
    sign,
)
from controlplane.invitation_token import TOKEN_PREFIX, read_token, write_token
from controlplane.pairing import Pairing
from controlplane.peer_client import PeerClient
from controlplane.peers import Peers
from controlplane.sqlite_store import SqliteStore
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, timestamp
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.peer_service_pb2 import PeerInvitation, PeerTerms

NO_TERMS = PeerTerms()


@dataclass
class Context:
    """Of a call: who made it."""

    certificate: bytes

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [pem_of(self.certificate)]}


@dataclass
class Network:
    """Where centres find each other. It does what TLS does: nobody gets through who is not pinned on both sides."""

    sites: dict[str, Site] = field(default_factory=dict)
    loses_answers: int = 0
    """So many answers are lost."""

    def connect(self, identity: CentreIdentity, address: str, certificate: bytes, centre_id: str) -> PeerClient:
        return cast("PeerClient", Line(self, identity, address, certificate))


@dataclass
class Line:
    """A connection."""

    network: Network
    identity: CentreIdentity
    address: str
    certificate: bytes

    async def pair(self, request: wire.PairRequest) -> wire.PairResponse:
        there = self.network.sites.get(self.address)
        if there is None or there.identity.certificate != self.certificate:
            raise unreachable()
        if self.identity.certificate_pem not in there.pairing.pins():
            raise unreachable()
        answer = await there.pairing.pair(request, Context(self.identity.certificate))
        if self.network.loses_answers:
            self.network.loses_answers -= 1
            raise unreachable()
        return answer

    async def exchange(self, summaries: AsyncIterator[Any]) -> AsyncGenerator[wire.ExchangeCapacityResponse, None]:
        await asyncio.Event().wait()
        yield wire.ExchangeCapacityResponse()

    async def close(self) -> None:
        return None


def unreachable() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "failed to connect")


@dataclass
class Site:
    """What a centre knows of itself and of others."""

    name: str
    centre_id: str
    address: str
    store: SqliteStore
    identity: CentreIdentity
    peers: Peers
    pairing: Pairing
    network: Network

    async def invite(self, name: str = "", valid_s: float = 60.0, terms: PeerTerms = NO_TERMS) -> str:
        token, _ = await self.pairing.invite(valid_s, "", name, terms)
        return token

    async def add(self, token: str, name: str = "", terms: PeerTerms = NO_TERMS) -> str:
        return (await self.pairing.add(token, name, "", terms)).record.name

    async def restart(self) -> None:
        """Forgets what is not stored."""
        await self.peers.stop()
        self.peers, self.pairing = await parts(self)

    def knows(self) -> dict[str, str]:
        return {peer.record.name: peer.record.centre_id for peer in self.peers.all()}


async def parts(site: Site) -> tuple[Peers, Pairing]:
    peers = Peers(
        site.store, site.identity, site.name, lambda: ([], 0, False), lambda: None, connect=site.network.connect
    )
    await peers.start()
    pairing = Pairing(
        site.store, site.identity, site.name, site.centre_id, peers, lambda: site.address, site.network.connect
    )
    await pairing.load()
    return peers, pairing


MakeSite = Callable[..., Any]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[MakeSite]:
    network = Network()
    made: list[Site] = []

    async def site(name: str, address: str | None = None) -> Site:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        store = await SqliteStore.open(folder / "store.db", Feed())
        centre_id = await store.centre_id()
        identity = CentreIdentity.open(folder, centre_id)
        where = f"{name}{len(made)}.example:7443" if address is None else address
        unmade = cast("Any", None)
        one = Site(name, centre_id, where, store, identity, unmade, unmade, network)
        one.peers, one.pairing = await parts(one)
        network.sites[where] = one
        made.append(one)
        return one

    yield site
    for one in made:
        await one.peers.stop()
        await one.store.close()


def refused(reason: str, *words: str) -> Any:
    def check(refusal: Refusal) -> bool:
        assert (refusal.reason, [word for word in words if word not in refusal.message]) == (reason, []), refusal
        return True

    return pytest.raises(Refusal, check=check)


async def test_who_takes_an_invitation_is_a_peer_and_stays_one(make: MakeSite) -> None:
    a, b = await make("a"), await make("b")
    token = await a.invite(terms=PeerTerms(most_received=3))
    assert await b.add(token, terms=PeerTerms(labels={"region": "eu"})) == "a"
    for _ in range(2):
        assert (a.knows(), b.knows()) == ({"b": b.centre_id}, {"a": a.centre_id})
        [there], [here] = a.peers.all(), b.peers.all()
        assert (there.record.address, there.record.certificate) == (b.address, b.identity.certificate)
        assert (here.record.address, here.record.certificate) == (a.address, a.identity.certificate)
        assert (there.record.terms.most_received, here.record.terms.labels["region"]) == (3, "eu")
        assert a.peers.by_certificate(b.identity.certificate) is there
        assert b.identity.certificate_pem in a.pairing.pins()
        await a.restart()
        await b.restart()


async def test_a_centre_that_serves_nobody_can_be_a_peer_but_not_invite(make: MakeSite) -> None:
    a, b = await make("a"), await make("b", address="")
    with refused("FEDERATION_OFF", "--federation-listen"):
        await b.invite()
    await b.add(await a.invite())
    with refused("PEER_NOT_CALLED"):
        _ = a.peers.all()[0].client


async def test_an_invitation_is_for_one_centre(make: MakeSite) -> None:
    a, b, c = [await make(name) for name in "abc"]
    token = await a.invite()
    await b.add(token)
    with refused("INVITATION_UNKNOWN", "taken before", "puhui peers invite"):
        await c.add(token)
    await a.restart()
    with refused("PEER_UNREACHABLE", "ask for a new invitation"):
        await c.add(token)
    assert (list(a.knows()), c.knows()) == (["b"], {})


async def test_of_two_that_take_one_invitation_at_once_one_is_a_peer(make: MakeSite) -> None:
    a, b, c = [await make(name) for name in "abc"]
    token = await a.invite()
    came = await asyncio.gather(b.add(token), c.add(token), return_exceptions=True)
    assert sorted(isinstance(one, Refusal) for one in came) == [False, True]
    assert len(a.knows()) == 1
    assert len(b.knows()) + len(c.knows()) == 1


async def test_two_that_come_with_one_name_at_once_do_not_become_one(make: MakeSite) -> None:
    a, b, c = await make("a"), await make("same"), await make("same")
    tokens = [await a.invite(), await a.invite()]
    came = await asyncio.gather(b.add(tokens[0]), c.add(tokens[1]), return_exceptions=True)
    [loser] = [one for one in came if isinstance(one, Refusal)]
    assert loser.reason == "PEER_EXISTS"
    assert len(a.knows()) == 1


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_lost_answer_can_be_asked_for_again(make: MakeSite, restarts: bool) -> None:
    a, b, c = [await make(name) for name in "abc"]
    token = await a.invite()
    a.network.loses_answers = 2  # by the invitation, and by the pinned certificate
    with refused("PEER_UNREACHABLE"):
        await b.add(token)
    assert (list(a.knows()), b.knows()) == (["b"], {})
    if restarts:
        await a.restart()
    assert await b.add(token) == "a"
    assert (list(a.knows()), list(b.knows())) == (["b"], ["a"])
    with pytest.raises(Refusal):
        await c.add(token)


async def test_a_peer_that_has_moved_says_so_with_an_invitation(make: MakeSite) -> None:
    a, b = await make("a"), await make("b")
    await b.add(await a.invite("bee"), terms=PeerTerms(weight=2))
    b.address = "b.moved.example:7443"
    a.network.sites[b.address] = b
    assert await b.add(await a.invite()) == "a"
    assert [peer.record.address for peer in a.peers.all()] == ["b.moved.example:7443"]
    assert list(a.knows()) == ["bee"]
    assert b.peers.all()[0].record.terms.weight == 2  # what is not said stays
    with refused("PEER_EXISTS", "leave --name out"):
        await b.add(await a.invite(), name="other")


async def test_names_are_not_given_twice(make: MakeSite) -> None:
    a, b, namesake = await make("a"), await make("b"), await make("a")
    await b.add(await a.invite())
    with refused("PEER_EXISTS", "choose another with --name"):
        await b.add(await namesake.invite())
    with refused("PEER_EXISTS", "a is this centre's own name", "invite you with --name"):
        await namesake.add(await a.invite(), name="first")
    with refused("PEER_EXISTS"):
        await a.invite("b")
    with refused("NAME_INVALID", "choose another with --name"):
        await a.invite("no name")
    assert await namesake.add(await a.invite("second"), name="first") == "first"
    assert await b.add(await namesake.invite(), name="second") == "second"
    assert sorted(a.knows()) == ["b", "second"]


async def test_a_centre_whose_name_is_no_name_of_a_peer_gets_one_like_it(make: MakeSite) -> None:
    a, b = await make("GPU 1.example.org", address="gpu.example:7443"), await make("b")
    assert await b.add(await a.invite()) == "gpu-1-example-org"


async def test_what_cannot_be_taken_is_refused_with_what_to_do(make: MakeSite) -> None:
    a, b = await make("a"), await make("b")
    with refused("INVITATION_INVALID", "this centre's own"):
        await a.add(await a.invite())
    old = read_token(await a.invite())
    old.expire_time.CopyFrom(timestamp(now() - 1))
    with refused("INVITATION_EXPIRED", "puhui peers invite"):
        await b.add(write_token(old))
    # Its own clock may say otherwise than the inviting centre's.
    late = read_token(await a.invite(valid_s=1e-6))
    late.expire_time.CopyFrom(timestamp(now() + 60))
    with refused("PEER_UNREACHABLE", "new invitation"):
        await b.add(write_token(late))
    for valid_s in (0.0, -1.0, 8 * 86400.0, float("nan")):
        with refused("VALIDITY_INVALID"):
            await a.invite(valid_s=valid_s)
    with refused("TERMS_INVALID", "hours"):
        await a.invite(terms=PeerTerms(hours="nights"))
    for nowhere in (
        "0.0.0.0:7443",
        "[::]:7443",
        "unix:/run/peer",
        "a.example:0",
        "a.example",
        "a b:1",
        "x" * 400 + ":1",
    ):
        with refused("ADDRESS_INVALID", "--address"):
            await a.pairing.invite(60, nowhere, "", NO_TERMS)
    b.address = "0.0.0.0:7443"
    with refused("ADDRESS_INVALID", "--federation-address"):
        await b.add(await a.invite())
    a.network.sites.clear()
    b.address = "b.example:1"
    with refused("PEER_UNREACHABLE", a.address) as caught:
        await b.add(await a.invite())
    assert caught.value.retry_after_s is None  # nobody waits for it: who typed the command is told
    assert (a.knows(), b.knows()) == ({}, {})


def request_of(said: PeerInvitation, certificate: bytes, centre_id: str, **more: str) -> wire.PairRequest:
    return wire.PairRequest(
        centre="mallory", centre_id=centre_id, certificate=certificate, proof=sign(said.key, certificate), **more
    )


async def test_nobody_takes_over_the_entry_of_another_centre(make: MakeSite) -> None:
    a, b = await make("a"), await make("b")
    await b.add(await a.invite())
    before = a.peers.all()[0].record
    said = read_token(await a.invite("mallory"))
    invited = Context(said.key_certificate)
    own = certificate_of_key(key_from_secret(new_secret()), name_of(b.centre_id))
    with refused("PEER_EXISTS", "another certificate", "puhui peers remove b"):
        await a.pairing.pair(request_of(said, own, b.centre_id), invited)
    with refused("PEER_EXISTS"):
        await a.pairing.pair(request_of(said, b.identity.certificate, "c" * 32), invited)
    with refused("INVITATION_UNKNOWN", "not signed"):
        wrong = request_of(said, own, b.centre_id)
        wrong.proof = sign(new_secret(), own)
        await a.pairing.pair(wrong, invited)
    with refused("CERTIFICATE_INVALID"):  # a name that TLS would look by for another centre
        await a.pairing.pair(request_of(said, own, "c" * 32), invited)
    # A certificate is no secret: to show it changes nothing.
    await a.pairing.pair(request_of(said, b.identity.certificate, b.centre_id, address="evil.example:1"), invited)
    assert [peer.record for peer in a.peers.all()] == [before]
    # Nor does the peer itself bring anybody in.
    with refused("INVITATION_UNKNOWN", "a peer already"):
        await a.pairing.pair(request_of(said, own, b.centre_id), Context(b.identity.certificate))
    assert [peer.record for peer in a.peers.all()] == [before]


async def test_an_invitation_of_somebody_else_does_not_replace_a_peer(make: MakeSite) -> None:
    a, b, mallory = await make("a"), await make("b"), await make("mallory")
    await b.add(await a.invite())
    said = read_token(await mallory.invite())
    secret = new_secret()
    said.certificate = certificate_of_key(key_from_secret(secret), name_of(a.centre_id))
    said.centre_id = a.centre_id
    with refused("PEER_EXISTS", "puhui peers remove a"):
        await b.add(write_token(said))
    assert b.peers.all()[0].record.certificate == a.identity.certificate


async def test_who_tries_an_invitation_too_often_is_shut_out(make: MakeSite) -> None:
    a = await make("a")
    said = read_token(await a.invite())
    wrong = request_of(said, said.key_certificate, "c" * 32)
    for _ in range(101):
        with pytest.raises(Refusal):
            await a.pairing.pair(wrong, Context(said.key_certificate))
    assert pem_of(said.key_certificate) not in a.pairing.pins()


async def test_a_removed_peer_is_let_in_no_more_and_stays_away(make: MakeSite) -> None:
    a, b = await make("a"), await make("b")
    token = await a.invite()
    await b.add(token)
    await a.peers.remove("b")
    for _ in range(2):
        assert b.identity.certificate_pem not in a.pairing.pins()
        with pytest.raises(Refusal):
            await b.add(token)
        assert a.knows() == {}
        await a.restart()
    assert await b.add(await a.invite()) == "a"


async def test_terms_and_measures_are_stored_beside_each_other(make: MakeSite) -> None:
    a, b = await make("a"), await make("b")
    await b.add(await a.invite())
    peer = a.peers.all()[0]
    agreed = asyncio.create_task(a.peers.agree(peer, PeerTerms(most_sent=7)))
    peer.carried(10**6, 1.0)
    await agreed
    assert (peer.record.terms.most_sent, peer.record.bytes_per_second) == (7, 1e6)
    await a.restart()
    assert a.peers.all()[0].record.terms.most_sent == 7
    with refused("PEER_NOT_FOUND"):
        await a.peers.agree(peer, NO_TERMS)


# -- tokens

IDENTITY = CentreIdentity.of_key(key_from_secret(new_secret()), "a" * 32)
SECRET = new_secret()
SAID = PeerInvitation(
    centre="a",
    centre_id="a" * 32,
    address="a.example:7443",
    certificate=IDENTITY.certificate,
    key=SECRET,
    expire_time=timestamp(2e9),
    key_certificate=certificate_of_key(key_from_secret(SECRET), "b.invited.puhui"),
)
TOKEN = write_token(SAID)


def test_a_token_is_read_as_it_was_written_however_it_was_copied() -> None:
    assert read_token(TOKEN) == SAID
    assert read_token("\n " + "\r\n".join(TOKEN[at : at + 60] for at in range(0, len(TOKEN), 60)) + "\n") == SAID


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("", "begins with"),
        ("hello", "begins with"),
        (TOKEN.replace("-1.", "-2."), "another version"),
        (TOKEN + "A" * 5000, "longer than any"),
        (TOKEN_PREFIX, "damaged, or cut off"),
        (TOKEN_PREFIX + "!", "damaged, or cut off"),
        (TOKEN_PREFIX + "AAAA", "damaged, or cut off"),
    ],
)
def test_what_is_no_token_is_refused_with_a_sentence(token: str, why: str) -> None:
    with refused("INVITATION_INVALID", why):
        read_token(token)


@given(st.integers(0, len(TOKEN) - 1))
def test_a_token_that_was_cut_off_is_refused(length: int) -> None:
    with refused("INVITATION_INVALID"):
        read_token(TOKEN[:length])


@given(st.integers(len(TOKEN_PREFIX), len(TOKEN) - 1), st.sampled_from("ABCabc019-_"))
def test_a_letter_that_was_copied_wrongly_makes_nobody_else_a_peer(at: int, letter: str) -> None:
    try:
        said = read_token(TOKEN[:at] + letter + TOKEN[at + 1 :])
    except Refusal as refusal:
        assert refusal.reason == "INVITATION_INVALID"  # noqa: PT017 - either is right
        return
    assert (said.certificate, said.centre_id, said.key) == (SAID.certificate, SAID.centre_id, SAID.key)
    assert said.key_certificate == SAID.key_certificate
