"""Who is let in, over real mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.certificates import CentreIdentity, certificate_of_key, key_from_secret, name_of, new_secret, pem_of
from controlplane.invitation_token import read_token, write_token
from puhui.rpc.channel import open_pinned_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.tls import Pinned
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2, peer_service_pb2
from puhui.v1.federation_service_pb2_grpc import FederationServiceStub
from tests.integration.federation.neighbourhood import Neighbour, in_contact, neighbour, pair
from tests.unit.controlplane.centres import eventually

STRANGER = CentreIdentity.of_key(key_from_secret(new_secret()), "e" * 32)


def identity(one: Neighbour) -> CentreIdentity:
    return one.centre._federation._identity


def address(one: Neighbour) -> str:
    return one.centre._federation.address


async def centre_id(one: Neighbour) -> str:
    return await one.centre._store.centre_id()


@contextlib.asynccontextmanager
async def line(
    to: Neighbour, who: CentreIdentity = STRANGER, chain: bytes = b"", pinned: bytes = b""
) -> AsyncIterator[grpc.aio.Channel]:
    """Opens a connection to a centre's door for peers.

    Args:
        to: the centre.
        who: who comes.
        chain: further certificates (PEM) that it shows.
        pinned: the only certificate (PEM) that it accepts; "" is the centre's own.
    """
    expected = pinned or identity(to).certificate_pem
    tls = Pinned(who.key_pem, who.certificate_pem + chain, expected, name_of(await centre_id(to)))
    channel = open_pinned_channel(address(to), tls)
    try:
        yield channel
    finally:
        await channel.close(None)


async def ask(channel: grpc.aio.Channel) -> Refusal | None:
    """Asks for an offer; returns how that was refused."""
    try:
        await FederationServiceStub(channel).GetOffer(wire.GetOfferRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        return Refusal.of(error)
    return None


async def is_let_in(channel: grpc.aio.Channel) -> bool:
    """Returns whether a handshake is finished: health is told to everybody who gets that far."""
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return True


@contextlib.contextmanager
def refused(reason: str) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield caught
    assert Refusal.of(caught.value).reason == reason, caught.value


async def invited(by: Neighbour, **fields: Any) -> str:
    return (await by.operator.InvitePeer(peer_service_pb2.InvitePeerRequest(**fields))).token


async def add(to: Neighbour, token: str, **fields: Any) -> peer_service_pb2.Peer:
    return (await to.operator.AddPeer(peer_service_pb2.AddPeerRequest(token=token, **fields))).peer


async def peers(of: Neighbour) -> dict[str, peer_service_pb2.Peer]:
    listed = await of.operator.ListPeers(peer_service_pb2.ListPeersRequest())
    return {peer.name: peer for peer in listed.peers}


async def test_peers_know_each_other_by_their_certificates_and_tell_their_capacity(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path, gpus=2) as b:
        token = await invited(a)
        added = await add(b, token)
        assert (added.name, added.address, added.fingerprint) == ("a", address(a), identity(a).fingerprint)
        await in_contact(a)
        await in_contact(b)
        there = (await peers(a))["b"]
        assert (there.in_contact, there.fingerprint, there.centre_id) == (
            True,
            identity(b).fingerprint,
            await centre_id(b),
        )
        assert {one.profile: one.free for one in there.profiles}["7g.80gb"] == 2
        await eventually(lambda: all(one.record.round_trip_s for one in a.centre._federation.peers.all()))
        assert 0 < (await peers(a))["b"].round_trip.ToTimedelta().total_seconds() < 5
        # What changes there is known here without being asked for.
        await b.submit(resources=job_pb2.Resources(profile="7g.80gb"))
        told = a.centre._federation.peers.all()[0]
        await eventually(lambda: {one.profile: one.free for one in told.profiles}["7g.80gb"] == 1)


async def test_who_is_not_pinned_does_not_get_past_the_handshake(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b, neighbour("c", tmp_path) as c:
        async with line(a) as channel:
            assert not await is_let_in(channel)  # nobody is let in where nobody is a peer
        await pair(a, b)
        for who in (STRANGER, identity(c)):
            async with line(a, who) as channel:
                assert not await is_let_in(channel)
                answer = await ask(channel)
                assert answer is not None
                assert answer.code is grpc.StatusCode.UNAVAILABLE
        async with line(a, identity(b)) as channel:
            assert await is_let_in(channel)
            assert await ask(channel) is None
        # One with the name of a peer, but another key.
        namesake = CentreIdentity.of_key(key_from_secret(new_secret()), await centre_id(b))
        async with line(a, namesake) as channel:
            assert not await is_let_in(channel)
        plain = grpc.aio.insecure_channel(address(a))
        assert not await is_let_in(plain)
        await plain.close(None)


async def test_who_is_not_the_pinned_one_is_told_nothing(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b:
        await pair(a, b)
        # Somebody else answers at a's address: with another key and a's name.
        other = certificate_of_key(key_from_secret(new_secret()), name_of(await centre_id(a)))
        async with line(a, identity(b), pinned=pem_of(other)) as channel:
            assert not await is_let_in(channel)
        said = read_token(await invited(a))
        said.certificate = other
        with refused("PEER_EXISTS"):
            await add(b, write_token(said))
    async with neighbour("a", tmp_path / "x") as a, neighbour("b", tmp_path / "x") as b:
        said = read_token(await invited(a))
        said.certificate = certificate_of_key(key_from_secret(new_secret()), name_of(await centre_id(a)))
        with refused("PEER_UNREACHABLE"):
            await add(b, write_token(said))
        assert (await peers(a), await peers(b)) == ({}, {})


async def test_a_peer_lets_nobody_else_in(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b:
        await pair(a, b)
        signer = serialization.load_pem_private_key(identity(b).key_pem, None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key, at = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
        issuer = x509.load_der_x509_certificate(identity(b).certificate).subject
        for name in (name_of("f" * 32), name_of(await centre_id(b))):
            issued = (
                x509.CertificateBuilder()
                .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
                .issuer_name(issuer)
                .public_key(key.public_key())
                .serial_number(7)
                .not_valid_before(at - datetime.timedelta(days=1))
                .not_valid_after(at + datetime.timedelta(days=1))
                .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
                .sign(signer, hashes.SHA256())
            )
            other = CentreIdentity.of_key(key, "f" * 32)
            friend = CentreIdentity(other.key_pem, issued.public_bytes(serialization.Encoding.DER))
            async with line(a, friend, chain=identity(b).certificate_pem) as channel:
                assert not await is_let_in(channel)


async def test_an_invitation_opens_nothing_but_the_way_to_become_a_peer_and_once(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b, neighbour("c", tmp_path) as c:
        tokens = [await invited(a) for _ in range(3)]
        said = read_token(tokens[1])
        guest = CentreIdentity.of_secret(said.key, said.key_certificate)
        async with line(a, guest) as channel:
            answer = await ask(channel)
            assert answer is not None
            assert (answer.code, answer.reason) == (grpc.StatusCode.UNAUTHENTICATED, "PEER_UNKNOWN")
            for call in (
                FederationServiceStub(channel).ExchangeCapacity(iter(())),
                FederationServiceStub(channel).WatchForwardedJob(wire.WatchForwardedJobRequest()),
            ):
                with refused("PEER_UNKNOWN"):
                    await anext(aiter(call))
            with refused("PEER_UNKNOWN"):
                await FederationServiceStub(channel).Unpair(wire.UnpairRequest())
        # Several may be open at once, and each is good for one centre.
        assert (await add(c, tokens[2])).name == "a"
        assert (await add(b, tokens[1])).name == "a"
        async with neighbour("d", tmp_path) as d:
            with refused("INVITATION_UNKNOWN"):
                await add(d, tokens[1])
            assert await peers(d) == {}
        assert sorted(await peers(a)) == ["b", "c"]


async def test_who_was_removed_is_let_in_no_more(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b:
        await pair(a, b)
        async with line(a, identity(b)) as open_before:
            assert await ask(open_before) is None
            exchange = FederationServiceStub(open_before).ExchangeCapacity(endless())
            await anext(aiter(exchange))
            await a.operator.RemovePeer(peer_service_pb2.RemovePeerRequest(name="b"))
            # What it had open is at its end, and nothing new is let in.
            await read_all(exchange)
            answer = await ask(open_before)
            assert answer is not None
            assert answer.reason == "PEER_UNKNOWN"
        async with line(a, identity(b)) as channel:
            assert not await is_let_in(channel)
        # It was told, and has nothing to do with us any more either.
        assert (await peers(a), await peers(b)) == ({}, {})
        async with line(b, identity(a)) as channel:
            assert not await is_let_in(channel)
        with refused("PEER_NOT_FOUND"):
            await a.operator.RemovePeer(peer_service_pb2.RemovePeerRequest(name="b"))
        await pair(a, b)


async def read_all(exchange: Any) -> None:
    """Reads until there is no more."""
    async with asyncio.timeout(20):
        async for _ in exchange:
            pass


async def endless() -> AsyncIterator[wire.ExchangeCapacityRequest]:
    yield wire.ExchangeCapacityRequest(sequence=1)
    await asyncio.Event().wait()


async def test_a_peer_with_work_here_is_removed_by_force_only(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b:
        await pair(a, b)
        await a.fill()
        job_id = await a.submit(name="guest")
        guest = await b.guest("guest")
        await b.until(guest.id, job_pb2.JOB_STATE_RUNNING)
        await a.until(job_id, job_pb2.JOB_STATE_RUNNING)
        assert ((await peers(a))["b"].sent, (await peers(b))["a"].received) == (1, 1)
        for one, other in ((a, "b"), (b, "a")):
            with refused("PEER_BUSY"):
                await one.operator.RemovePeer(peer_service_pb2.RemovePeerRequest(name=other))
        await b.operator.RemovePeer(peer_service_pb2.RemovePeerRequest(name="a", force=True))
        assert (await b.ended(guest.id)).state == job_pb2.JOB_STATE_CANCELLED
        await eventually(lambda: b.node.empty)


async def test_peers_find_each_other_again_after_a_restart(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a:
        async with neighbour("b", tmp_path) as b:
            await pair(a, b)
            terms = peer_service_pb2.PeerTerms(most_sent=7, labels={"region": "eu"})
            await b.operator.SetPeerTerms(peer_service_pb2.SetPeerTermsRequest(name="a", terms=terms))
            at, who = address(b), identity(b).fingerprint
        lost = a.centre._federation.peers.all()[0]
        await eventually(lambda: not lost.in_contact)
        assert "no answer at" in (await peers(a))["b"].message
        async with neighbour("b", tmp_path, federation_listen=at) as b:
            assert identity(b).fingerprint == who
            await in_contact(a)
            await in_contact(b)
            assert (await peers(b))["a"].terms == terms
            with refused("TERMS_INVALID"):
                wrong = peer_service_pb2.PeerTerms(hours="nights")
                await b.operator.SetPeerTerms(peer_service_pb2.SetPeerTermsRequest(name="a", terms=wrong))
            assert (await peers(b))["a"].terms == terms


async def test_a_peer_that_talks_without_end_is_cut_off(tmp_path: Path) -> None:
    async def flood() -> AsyncIterator[wire.ExchangeCapacityRequest]:
        number = 0
        while True:
            number += 1
            yield wire.ExchangeCapacityRequest(sequence=number)

    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path, federation_listen="") as b:
        await add(b, await invited(a))
        await in_contact(b)
        async with line(a, identity(b)) as channel:
            stub = FederationServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):  # it is still writing, so it may not read why
                await read_all(stub.ExchangeCapacity(flood()))
            with refused("UNKNOWN") as caught:
                tenant = "x" * (9 * 2**20)
                await stub.GetOffer(wire.GetOfferRequest(tenant=tenant), timeout=10)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await ask(channel) is None  # the others are served as before


async def test_the_newest_word_of_a_peer_counts(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path, federation_listen="") as b:
        await add(b, await invited(a))
        await b.centre._federation.peers.stop()  # the test talks for it
        [known] = a.centre._federation.peers.all()
        read = asyncio.Event()

        async def words() -> AsyncIterator[wire.ExchangeCapacityRequest]:
            for sequence, queued in ((5, 50), (4, 40), (5, 51), (6, 60), (1, 10)):
                yield wire.ExchangeCapacityRequest(
                    sequence=sequence,
                    queued_jobs=queued,
                    profiles=[wire.CapacitySummary(profile="1g\x1b[2J", gpu_model="G" * 500, free=2**31)],
                )
            read.set()
            await asyncio.Event().wait()

        async with line(a, identity(b)) as channel:
            exchange = FederationServiceStub(channel).ExchangeCapacity(words())
            await anext(aiter(exchange))
            await asyncio.wait_for(read.wait(), 10)
            await eventually(lambda: known.queued_jobs == 60)
            exchange.cancel()
        [told] = known.profiles
        assert (told.profile, len(told.gpu_model), told.free) == ("1g?[2J", 64, 2**20)
        with pytest.raises(Refusal, match="serves nobody"):
            _ = known.client
