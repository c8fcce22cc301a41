"""What may become of a guest: bound once, commanded by the newest token, gone for good when its lease has run out."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.guests import (
    GuestRecord,
    GuestStage,
    bind,
    cancel,
    expire,
    has_lease,
    renew,
    require_command,
    stop_ahead_s,
)
from puhui.rpc.errors import Refusal

LONGEST_S = 900.0


def guest(
    token: int = 1,
    lease_end: float = 500.0,
    stage: GuestStage = GuestStage.LIVE,
    job_id: str = "j-1",
    digest: str = "d",
) -> GuestRecord:
    return GuestRecord("b", "j-there", 1, token, digest, job_id, stage, lease_end, "boot-1", 7.0)


def refusal(code: grpc.StatusCode, reason: str) -> pytest.RaisesExc[Refusal]:
    return pytest.RaisesExc(Refusal, check=lambda error: (error.code, error.reason) == (code, reason))


def test_it_is_bound_as_it_was_asked_for() -> None:
    assert bind(None, guest(lease_end=500.0), 100.0, LONGEST_S) == replace(guest(lease_end=500.0), lease_s=400.0)


def test_no_lease_is_longer_than_this_centre_gives() -> None:
    assert bind(None, guest(lease_end=1e18), 100.0, LONGEST_S).lease_end == 1000.0
    assert renew(guest(), 1, 1e18, 100.0, LONGEST_S, boot="boot-1").lease_end == 1000.0


def test_the_same_again_is_answered_as_before_and_keeps_its_job_and_lease() -> None:
    first = bind(None, guest(), 100.0, LONGEST_S)
    again = bind(first, guest(token=2, lease_end=900.0, job_id="j-other"), 200.0, LONGEST_S)
    assert again == replace(first, token=2)


def test_another_request_for_the_same_attempt_is_refused() -> None:
    with refusal(grpc.StatusCode.ALREADY_EXISTS, "GUEST_DIFFERS"):
        bind(guest(), guest(digest="another"), 100.0, LONGEST_S)


def test_who_is_out_of_date_commands_nothing() -> None:
    known = guest(token=5)
    stale = (grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN")
    with refusal(*stale):
        require_command(known, 4)
    with refusal(*stale):
        bind(known, guest(token=4), 100.0, LONGEST_S)
    with refusal(*stale):
        renew(known, 4, 600.0, 100.0, LONGEST_S, boot="boot-1")
    with refusal(*stale):
        cancel(known, guest(token=4))
    require_command(known, 5)
    require_command(None, 0)


def test_a_binding_that_arrives_after_its_lease_is_refused() -> None:
    with refusal(grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"):
        bind(None, guest(lease_end=100.0), 100.0, LONGEST_S)


def test_an_end_that_overtakes_the_binding_keeps_it_out() -> None:
    tombstone = cancel(None, GuestRecord("b", "j-there", 1, 3))
    assert (tombstone.stage, tombstone.job_id) == (GuestStage.CANCELLED, "")
    with refusal(grpc.StatusCode.FAILED_PRECONDITION, "GUEST_CANCELLED"):
        bind(tombstone, guest(token=3), 100.0, LONGEST_S)
    with refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND"):
        renew(tombstone, 3, 600.0, 100.0, LONGEST_S, boot="boot-1")


def test_what_was_never_bound_cannot_be_renewed() -> None:
    with refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND"):
        renew(None, 1, 600.0, 100.0, LONGEST_S, boot="boot-1")


def test_a_renewal_never_shortens_a_lease() -> None:
    assert renew(guest(lease_end=500.0), 1, 300.0, 100.0, LONGEST_S, boot="boot-1").lease_end == 500.0
    assert renew(guest(lease_end=500.0), 2, 600.0, 100.0, LONGEST_S, boot="boot-1") == replace(
        guest(token=2, lease_end=600.0), lease_s=500.0
    )


def test_a_lease_that_has_run_out_does_not_come_back() -> None:
    expired = (grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED")
    with refusal(*expired):
        renew(guest(lease_end=500.0), 1, 900.0, 500.0, LONGEST_S, boot="boot-1")  # nobody has noted it yet
    noted = expire(guest(lease_end=500.0), 500.0, "boot-1")
    assert noted.stage is GuestStage.EXPIRED
    with refusal(*expired):
        renew(noted, 1, 900.0, 400.0, LONGEST_S, boot="boot-1")
    with refusal(*expired):
        bind(noted, guest(token=2), 400.0, LONGEST_S)


def test_a_lease_that_runs_is_left_alone() -> None:
    assert expire(guest(lease_end=500.0), 499.9, "boot-1") == guest(lease_end=500.0)
    ended = guest(stage=GuestStage.CANCELLED)
    assert expire(ended, 1e9, "boot-1") == ended


def test_a_stop_begins_so_early_that_nothing_runs_at_the_end() -> None:
    bound = bind(None, guest(lease_end=1000.0), 100.0, LONGEST_S)
    assert stop_ahead_s(bound, grace_s=10.0) == 12.0
    # Of a short lease, the larger part is for work.
    assert stop_ahead_s(bound, grace_s=3600.0) == 225.0
    ahead_s = stop_ahead_s(bound, 10.0)
    assert expire(bound, 987.9 + ahead_s, "boot-1") == bound
    assert expire(bound, 988.0 + ahead_s, "boot-1").stage is GuestStage.EXPIRED


def test_a_reboot_ends_every_lease() -> None:
    assert not has_lease(guest(), 100.0, "boot-2")
    assert expire(guest(), 100.0, "boot-2").stage is GuestStage.EXPIRED
    with refusal(grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"):
        renew(guest(), 1, 600.0, 100.0, LONGEST_S, boot="boot-2")
    with refusal(grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"):
        bind(guest(), replace(guest(), boot="boot-2"), 100.0, LONGEST_S)


def test_an_end_that_comes_late_changes_only_the_token() -> None:
    expired = guest(stage=GuestStage.EXPIRED)
    assert cancel(expired, guest(token=2)) == replace(expired, token=2)
    assert cancel(guest(), guest(token=2)) == guest(token=2, stage=GuestStage.CANCELLED)


KNOWN_REASONS = {"STALE_FENCING_TOKEN", "GUEST_CANCELLED", "GUEST_DIFFERS", "GUEST_NOT_FOUND", "LEASE_EXPIRED"}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["bind", "renew", "cancel", "expire"]),
        st.integers(0, 3),  # token
        st.floats(-100.0, 2000.0),  # lease that is asked for, from now
        st.floats(0.0, 600.0),  # time that passes before
        st.sampled_from(["d", "other"]),
    ),
    max_size=30,
)


@given(STEPS)
def test_whatever_comes_in_whatever_order(steps: list[tuple[str, int, float, float, str]]) -> None:
    known: GuestRecord | None = None
    at, refused = 0.0, set[str]()
    for number, (what, token, asked_s, passes_s, digest) in enumerate(steps):
        at += passes_s
        before = known
        wanted = guest(token, at + asked_s, job_id=f"j-{number}", digest=digest)
        try:
            if what == "bind":
                known = bind(known, wanted, at, LONGEST_S)
            elif what == "renew":
                known = renew(known, token, at + asked_s, at, LONGEST_S, boot="boot-1")
            elif what == "cancel":
                known = cancel(known, GuestRecord(*wanted.key, token))
            elif known is not None:
                known = expire(known, at, "boot-1")
        except Refusal as error:
            refused.add(error.reason)
            continue
        if known is None:
            continue
        assert known.lease_end <= at + LONGEST_S
        if before is None:
            continue
        assert known.job_id == before.job_id, "bound once"
        assert known.digest == before.digest
        assert known.token >= before.token
        assert known.lease_end >= before.lease_end
        if before.stage is not GuestStage.LIVE:
            assert known.stage is before.stage, "an end is an end"
            assert what != "bind"
        if known.lease_end > before.lease_end:
            assert before.lease_end > at, "it was renewed in time"
            assert before.stage is not GuestStage.EXPIRED
    assert refused <= KNOWN_REASONS
