"""What every store promises about peers, what was sent to them, and what they have sent."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from controlplane import happenings
from controlplane.forwards import ForwardRecord, ForwardStage
from controlplane.guests import GuestRecord, GuestStage, bind, cancel
from controlplane.jobs import transition
from controlplane.records import Change, InvitationRecord, JobRecord, PeerRecord
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2, peer_service_pb2
from tests.contract.store.conftest import Open
from tests.unit.controlplane.samples import first_events, queued


def guest_record(job_id: str = "j-1", attempt: int = 1, **fields: object) -> GuestRecord:
    wanted = GuestRecord(
        "b", "j-there", attempt, 1, digest="d", job_id=job_id, lease_end=500.0, at=1000.0, lease_s=400.0
    )
    return replace(wanted, **fields)  # type: ignore[arg-type]


def guest_job(wanted: GuestRecord) -> tuple[JobRecord, list[job_pb2.JobEvent]]:
    record = queued(wanted.job_id)
    record.job.guest.CopyFrom(job_pb2.Guest(peer=wanted.peer, job_id=wanted.origin_job, attempt=wanted.attempt))
    return first_events(record)


async def come(store: Store, wanted: GuestRecord) -> JobRecord:
    return await store.add_job(*guest_job(wanted), guest=lambda known: bind(known, wanted, 100.0, 900.0))


def ended(record: JobRecord, at: float) -> Change:
    after, event = transition(record, happenings.CancelRequested(), at)
    return Change(after, (event,))


# -- guests


async def test_a_guest_and_its_job_come_together_and_stay(opener: Open) -> None:
    store = await opener()
    record = await come(store, guest_record())
    again = await opener()
    assert await again.guest(("b", "j-there", 1)) == guest_record()
    assert await again.guest_of("j-1") == guest_record()
    assert await again.job("j-1") == record
    assert record.job.guest.job_id == "j-there"
    assert await again.guest(("b", "j-there", 2)) is None
    assert await again.guest(("c", "j-there", 1)) is None
    assert await again.guest_of("j-2") is None


async def test_the_same_guest_again_is_the_same_job(store: Store) -> None:
    first = await come(store, guest_record("j-1"))
    again = await come(store, guest_record("j-2", token=4))
    assert again.id == first.id
    assert await store.job("j-2") is None
    assert await store.guest_of("j-1") == guest_record("j-1", token=4)
    assert len(await store.unfinished_jobs()) == 1


async def test_of_many_that_come_at_once_one_is_bound(store: Store) -> None:
    came = await asyncio.gather(*(come(store, guest_record(f"j-{number}")) for number in range(8)))
    assert len({record.id for record in came}) == 1
    assert len(await store.unfinished_jobs()) == 1


async def test_a_guest_that_is_refused_leaves_nothing(store: Store) -> None:
    await store.change_guest(("b", "j-there", 1), lambda known: cancel(known, GuestRecord("b", "j-there", 1, 1)))
    with pytest.raises(Refusal) as refused:
        await come(store, guest_record())
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "GUEST_CANCELLED")
    assert await store.job("j-1") is None
    assert await store.events("j-1", 0) == []
    assert await store.guests() == []


async def test_an_end_and_a_binding_at_once_never_both_win(store: Store) -> None:
    key = ("b", "j-there", 1)
    end = store.change_guest(key, lambda known: cancel(known, GuestRecord(*key, 1)))
    bound, after = await asyncio.gather(come(store, guest_record()), end, return_exceptions=True)
    assert isinstance(after, GuestRecord)
    assert after.stage is GuestStage.CANCELLED
    assert bool(after.job_id) is not isinstance(bound, Refusal)


async def test_a_change_of_a_guest_that_raises_changes_nothing(store: Store) -> None:
    await come(store, guest_record())

    def decide(known: GuestRecord | None) -> GuestRecord:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.change_guest(("b", "j-there", 1), decide)
    with pytest.raises(ValueError, match="no"):
        await store.change_guest(("b", "j-other", 1), decide)
    assert await store.guest(("b", "j-there", 1)) == guest_record()
    assert await store.guest(("b", "j-other", 1)) is None


async def test_guests_are_those_that_have_not_ended(store: Store) -> None:
    await come(store, guest_record("j-1", 1))
    await come(store, guest_record("j-2", 2))
    await store.change_guest(("b", "j-x", 1), lambda known: cancel(known, GuestRecord("b", "j-x", 1, 1)))
    assert [one.job_id for one in await store.guests()] == ["j-1", "j-2"]
    await store.change_job("j-1", lambda record, _: ended(record, 2000.0))
    assert [one.job_id for one in await store.guests()] == ["j-2"]


async def test_old_guests_are_those_that_ended_or_were_refused_long_ago(store: Store) -> None:
    for number in (1, 2, 3):
        await come(store, guest_record(f"j-{number}", number, at=1000.0))
    await store.change_job("j-1", lambda record, _: ended(record, 2000.0))
    await store.change_job("j-2", lambda record, _: ended(record, 3000.0))
    refused = GuestRecord("b", "j-x", 1, 1, at=2000.0)
    await store.change_guest(refused.key, lambda known: cancel(known, refused))
    assert await store.old_guests(1999.0) == []
    assert {one.job_id for one in await store.old_guests(2500.0)} == {"j-1", ""}
    assert {one.job_id for one in await store.old_guests(9999.0)} == {"j-1", "j-2", ""}
    await store.forget_guest(refused.key)
    await store.forget_guest(refused.key)
    assert await store.guest(refused.key) is None
    assert await store.guest_of("j-1") is not None


# -- forwards


def forward_record(job_id: str, attempt: int = 1, **fields: object) -> ForwardRecord:
    return replace(ForwardRecord(job_id, attempt, "b", token=3, lease_end=900.5, peer_time=1.25), **fields)  # type: ignore[arg-type]


async def test_a_forward_is_stored_with_the_change_that_it_belongs_to(opener: Open) -> None:
    store = await opener()
    added = await store.add_job(*first_events(queued("j-1")))
    sent = forward_record("j-1")
    await store.change_job(added.id, lambda record, _: Change(record, forward=sent))
    store = await opener()
    assert await store.forward("j-1", 1) == sent
    assert await store.forwards() == [sent]
    assert await store.forward("j-1", 2) is None
    bound = replace(sent, stage=ForwardStage.BOUND, peer_job_id="j-9", cursor=7, bundle_there=True)
    await store.change_job(added.id, lambda record, _: Change(record, forward=bound))
    assert await store.forward("j-1", 1) == bound


async def test_a_change_that_fails_stores_no_forward(store: Store) -> None:
    added = await store.add_job(*first_events(queued("j-1")))

    def decide(record: JobRecord, _: int) -> Change:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.change_job(added.id, decide)
    with pytest.raises(KeyError):
        await store.change_job("j-absent", lambda record, _: Change(record, forward=forward_record("j-absent")))
    assert await store.forwards() == []


async def test_settled_forwards_are_not_asked_after_again(store: Store) -> None:
    added = await store.add_job(*first_events(queued("j-1")))
    for number, stage in enumerate(ForwardStage, 1):
        one = forward_record("j-1", number, stage=stage)
        await store.change_job(added.id, lambda record, _, one=one: Change(record, forward=one))  # type: ignore[misc]
    stages = {one.stage for one in await store.forwards()}
    assert stages == set(ForwardStage) - {ForwardStage.SETTLED}
    settled = await store.forward("j-1", list(ForwardStage).index(ForwardStage.SETTLED) + 1)
    assert settled is not None


# -- peers and invitations


def peer_record(name: str = "b", certificate: bytes = b"\x00der", **fields: object) -> PeerRecord:
    terms = peer_service_pb2.PeerTerms(
        tenants=["astro"], tenants_out={"astro": "a"}, labels={"region": "eu"}, weight=2.5, highest_priority=-3
    )
    whole = PeerRecord(name, "0" * 32, "b:7072", certificate, terms, 5.5, 0.25, 1e6)
    return replace(whole, **fields)  # type: ignore[arg-type]


async def test_a_peer_comes_back_as_it_was_stored(opener: Open) -> None:
    store = await opener()
    await store.put_peer(peer_record("b"))
    await store.put_peer(peer_record("a", b"other"))
    store = await opener()
    assert await store.peers() == [peer_record("a", b"other"), peer_record("b")]
    changed = peer_record("b", address="", terms=peer_service_pb2.PeerTerms(receive_off=True))
    await store.put_peer(changed)
    assert await store.peers() == [peer_record("a", b"other"), changed]
    await store.remove_peer("a")
    await store.remove_peer("a")
    assert await store.peers() == [changed]


async def test_no_two_peers_have_one_certificate(store: Store) -> None:
    await store.put_peer(peer_record("b"))
    with pytest.raises(Exception, match="UNIQUE"):
        await store.put_peer(peer_record("c"))
    assert await store.peers() == [peer_record("b")]


def invitation(key: str = "04ab", expires: float = 4e9) -> InvitationRecord:
    return InvitationRecord(key, expires, "b", peer_service_pb2.PeerTerms(most_sent=3), b"\x01der")


async def test_an_invitation_is_taken_once(opener: Open) -> None:
    store = await opener()
    await store.put_invitation(invitation())
    store = await opener()
    assert await store.invitations() == [invitation()]
    assert not await store.take_invitation("04ff", peer_record("x"))
    outcomes = await asyncio.gather(*(store.take_invitation("04ab", peer_record("b")) for _ in range(4)))
    assert sorted(outcomes) == [False, False, False, True]
    assert await store.invitations() == []
    assert await store.peers() == [peer_record("b")]


async def test_an_invitation_that_cannot_be_used_is_not_used_up(store: Store) -> None:
    await store.put_peer(peer_record("b"))
    await store.put_invitation(invitation())
    with pytest.raises(Exception, match="UNIQUE"):
        await store.take_invitation("04ab", peer_record("c"))
    assert await store.invitations() == [invitation()]


async def test_invitations_that_hold_no_longer_are_forgotten_with_the_next(store: Store) -> None:
    await store.put_invitation(invitation("04aa", expires=1.0))
    await store.put_invitation(invitation("04bb"))
    assert [one.public_key for one in await store.invitations()] == ["04bb"]
