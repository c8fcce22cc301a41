"""What two centres have agreed on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.peer_terms import (
    TermsError,
    is_open,
    labels_allow,
    parse_hours,
    require_sound_terms,
    tenant_in,
    tenant_out,
)
from puhui.v1.job_pb2 import PeerPolicy
from puhui.v1.peer_service_pb2 import PeerTerms

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


def at(day: int, hour: int, minute: int = 0) -> float:
    """Returns a moment of a week, from Monday, 0."""
    return (MONDAY + timedelta(days=day, hours=hour, minutes=minute)).timestamp()


def test_without_hours_it_is_always_open() -> None:
    assert is_open("", at(3, 4), UTC)
    assert is_open("  ", at(3, 4), UTC)


def test_nights_go_on_into_the_next_day_and_week() -> None:
    nights = "mon-fri 20:00-08:00, sat-sun 00:00-24:00"
    assert is_open(nights, at(0, 20), UTC)
    assert is_open(nights, at(1, 7, 59), UTC)
    assert not is_open(nights, at(1, 8), UTC)
    assert not is_open(nights, at(0, 7), UTC)  # Sunday ends at 24:00
    assert not is_open(nights, at(2, 12), UTC)
    assert is_open(nights, at(5, 12), UTC)
    assert is_open(nights, at(6, 23, 59), UTC)
    sunday_night = "sun 22:00-06:00"
    assert is_open(sunday_night, at(6, 23), UTC)
    assert is_open(sunday_night, at(0, 5, 59), UTC)
    assert not is_open(sunday_night, at(0, 6), UTC)


def test_days_may_wrap_be_left_out_and_be_written_large() -> None:
    assert is_open("sat-mon 10:00-11:00", at(0, 10), UTC)
    assert not is_open("sat-mon 10:00-11:00", at(1, 10), UTC)
    assert all(is_open("12:00-13:00", at(day, 12, 30), UTC) for day in range(7))
    assert is_open("WED 9:00 - 10:00", at(2, 9), UTC)
    assert is_open("tue 08:00-08:00", at(2, 7, 59), UTC)  # a whole day, from eight to eight


def test_hours_are_those_of_the_time_zone() -> None:
    east = timezone(timedelta(hours=8))
    assert is_open("mon 08:00-09:00", at(0, 0, 30), east)
    assert not is_open("mon 08:00-09:00", at(0, 8, 30), east)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nights", "write them as"),
        ("mon 20:00", "write them as"),
        ("mon 20:00-08:00,", "write them as"),
        ("mon-fri 20.00-08.00", "write them as"),
        ("moo 20:00-08:00", "days are mon, tue"),
        ("mon-xyz 20:00-08:00", "days are mon, tue"),
        ("mon 24:01-08:00", "from 00:00 to 24:00"),
        ("mon 10:60-12:00", "from 00:00 to 24:00"),
        ("mon 10:00-99:00", "from 00:00 to 24:00"),
    ],
)
def test_hours_that_cannot_be_read_are_told_how(text: str, why: str) -> None:
    with pytest.raises(TermsError, match=why):
        parse_hours(text)
    with pytest.raises(TermsError, match=why):
        require_sound_terms(PeerTerms(hours=text))


hours_of_day = st.integers(0, 24 * 60).map(lambda minute: f"{minute // 60:02}:{minute % 60:02}")
parts = st.builds(
    lambda first, last, begin, end: f"{first}-{last} {begin}-{end}",
    st.sampled_from(DAYS),
    st.sampled_from(DAYS),
    hours_of_day,
    hours_of_day,
)


@given(st.lists(parts, min_size=1, max_size=4), st.integers(0, 7 * 24 * 60 - 1))
def test_whatever_is_written_so_can_be_asked_at_any_minute(written: list[str], minute: int) -> None:
    text = ", ".join(written)
    moment = (MONDAY + timedelta(minutes=minute)).timestamp()
    assert all(0 <= start < stop <= start + 24 * 60 for start, stop in parse_hours(text))
    assert is_open(text, moment, UTC) == any(is_open(part, moment, UTC) for part in written)
    assert is_open(text, moment, UTC) == is_open(text, moment + 7 * 86400, UTC)


@given(st.text(max_size=40))
def test_any_text_is_hours_or_refused_with_a_sentence(text: str) -> None:
    try:
        parse_hours(text)
    except TermsError as error:
        assert str(error).startswith("hours ")  # noqa: PT017 - either is right


def test_tenants_keep_their_names_there_unless_told_otherwise() -> None:
    terms = PeerTerms(tenants=["astro", "bio"], tenants_out={"bio": "life"})
    assert tenant_out(terms, "astro") == "astro"
    assert tenant_out(terms, "bio") == "life"
    assert tenant_out(terms, "chem") is None
    assert tenant_out(PeerTerms(), "chem") == "chem"


def test_tenants_from_there_are_ours_or_that_peers_own() -> None:
    terms = PeerTerms(tenants_in={"life": "bio"})
    assert tenant_in("b", terms, "life") == "bio"
    assert tenant_in("b", terms, "astro") == "b.astro"
    for wrong in ("", "Astro", "a b", "../x", "x" * 64, "a\n"):
        with pytest.raises(TermsError):
            tenant_in("b", terms, wrong)
    with pytest.raises(TermsError, match="too long"):
        tenant_in("b", terms, "x" * 62)


names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,31}", fullmatch=True)
tenants = st.from_regex(r"[a-z0-9._-]{1,30}", fullmatch=True)


@given(st.tuples(names, tenants), st.tuples(names, tenants))
def test_no_two_tenants_of_peers_become_one(one: tuple[str, str], other: tuple[str, str]) -> None:
    same = tenant_in(one[0], PeerTerms(), one[1]) == tenant_in(other[0], PeerTerms(), other[1])
    assert same == (one == other)


def test_labels_that_are_demanded_must_be_there_and_forbidden_ones_must_not() -> None:
    here = {"region": "eu", "owner": "us"}
    assert labels_allow(here, PeerPolicy())
    assert labels_allow(here, PeerPolicy(required_labels={"region": "eu"}))
    assert not labels_allow(here, PeerPolicy(required_labels={"region": "us"}))
    assert not labels_allow({}, PeerPolicy(required_labels={"region": "eu"}))
    assert not labels_allow(here, PeerPolicy(forbidden_labels={"owner": "us"}))
    assert labels_allow(here, PeerPolicy(forbidden_labels={"owner": "them"}))
    both = PeerPolicy(required_labels={"region": "eu"}, forbidden_labels={"owner": "us"})
    assert not labels_allow(here, both)


@pytest.mark.parametrize(
    "terms",
    [
        PeerTerms(tenants=["A B"]),
        PeerTerms(tenants_out={"a": ""}),
        PeerTerms(tenants_in={"a": "no name"}),
        PeerTerms(tenants_in={"": "a"}),
        PeerTerms(labels={"": "x"}),
        PeerTerms(labels={"a": "x" * 300}),
        PeerTerms(weight=-1),
        PeerTerms(weight=float("nan")),
        PeerTerms(cost=float("inf")),
        PeerTerms(distance=2e9),
        PeerTerms(highest_priority=101),
    ],
)
def test_terms_that_nobody_can_keep_are_refused(terms: PeerTerms) -> None:
    require_sound_terms(PeerTerms(weight=2, labels={"region": "eu"}, hours="mon 01:00-02:00", highest_priority=-5))
    with pytest.raises(TermsError):
        require_sound_terms(terms)
