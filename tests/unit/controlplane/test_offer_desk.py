from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.durations import Durations
from controlplane.fleet import GpuView, Use
from controlplane.gpu_timeline import IDLE_LEAVES_S
from controlplane.offer_desk import HOLDS_S, OfferDesk
from controlplane.outlook import Outlook
from controlplane.queued_job import QueuedJob
from controlplane.records import JobQuery, JobRecord, PeerRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, moment, seconds
from puhui.v1 import card_pb2, job_pb2, peer_service_pb2, prediction_pb2
from puhui.v1 import federation_service_pb2 as wire
from tests.unit.controlplane.samples import H100, view


class Nothing:
    """A store without jobs."""

    async def job(self, job_id: str) -> JobRecord | None:
        return None

    async def jobs(self, query: JobQuery) -> list[JobRecord]:
        return []


@dataclass
class Here:
    """A centre, as far as offers need one."""

    views: list[GpuView] = field(default_factory=lambda: [view()])
    queue: Sequence[QueuedJob] = ()
    at: float = 5000.0
    guests: dict[str, int] = field(default_factory=dict)
    bundles: set[str] = field(default_factory=set)
    meter: float = 0.0
    costs_s: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outlook = Outlook(self, self, Durations(Nothing()), 60.0, lambda: 1000.0)
        self.desk = OfferDesk(
            "c-here",
            outlook,
            self,
            longest_lease_s=900.0,
            received=lambda peer: self.guests.get(peer, 0),
            bundle_there=self.bundles.__contains__,
            is_open=lambda hours, at: hours != "never",
            labels=self.labels,
            most_bundle_bytes=10**6,
            wall=lambda: 1000.0,
            meter=self.pass_time,
            chance=random.Random(1),
        )

    def gpus(self) -> list[GpuView]:
        return self.views

    def now(self) -> float:
        return self.at

    def pass_time(self) -> float:
        self.meter += self.costs_s
        return self.meter

    def ask(self, job: str = "j-1", peer: str = "b", terms: Any = None, **fields: Any) -> wire.GetOfferResponse:
        return self.desk.give(request(job, **fields), Peer(peer, terms or peer_service_pb2.PeerTerms()))


class Peer:
    def __init__(self, name: str, terms: peer_service_pb2.PeerTerms) -> None:
        self.record = PeerRecord(name, f"c-{name}", "", b"", terms, 0.0)


def ref(job: str = "j-1", attempt: int = 1) -> card_pb2.AttemptRef:
    return card_pb2.AttemptRef(centre="b", job_id=job, attempt=attempt, fencing_token=1)


def request(job: str = "j-1", profile: str = "7g.80gb", **fields: Any) -> wire.GetOfferRequest:
    given_fields = {"resources": job_pb2.Resources(profile=profile), "visited_centres": ["c-b"], **fields}
    return wire.GetOfferRequest(origin=ref(job), **given_fields)


def held(number: int, profile: str = "7g.80gb", **fields: Any) -> tuple[Use, ...]:
    return (Use(profile, 0, 8, False, key=(f"h{number}", 1), **fields),)


def test_what_fits_is_offered_now() -> None:
    here = Here()
    offer = here.ask()
    assert offer.accepted
    assert seconds(offer.expected_wait) == 0
    assert (offer.profile, offer.gpu_model) == ("7g.80gb", H100)
    assert moment(offer.time) == 5000
    assert moment(offer.expire_time) == 5000 + HOLDS_S
    assert seconds(offer.longest_lease) == 900
    assert offer.cost == 1
    assert not offer.bundle_present


def test_one_slice_is_promised_once_and_again_when_the_offer_has_expired() -> None:
    here = Here()
    assert seconds(here.ask("j-1", expected_duration=duration(40)).expected_wait) == 0
    assert seconds(here.ask("j-2", expected_duration=duration(40)).expected_wait) == 40
    assert seconds(here.ask("j-3", "c").expected_wait) == 80
    here.at += HOLDS_S
    assert seconds(here.ask("j-4").expected_wait) == 0


def test_who_asks_again_for_an_attempt_does_not_stand_in_its_own_way() -> None:
    here = Here()
    first, second = here.ask("j-1"), here.ask("j-1")
    assert seconds(second.expected_wait) == 0
    assert first.offer_id != second.offer_id
    assert list(here.desk.open) == [second.offer_id]


def test_jobs_that_wait_here_come_first() -> None:
    here = Here(queue=[QueuedJob("own", 0, 1, "7g.80gb", 0, 1000.0)])
    assert seconds(here.ask().expected_wait) == 600


def test_a_peer_of_high_priority_still_comes_after_those_of_the_same() -> None:
    terms = peer_service_pb2.PeerTerms(highest_priority=50)
    here = Here(queue=[QueuedJob("own", 0, 1, "7g.80gb", 0, 1000.0)])
    assert seconds(here.ask(terms=terms).expected_wait) == 600
    here = Here(queue=[QueuedJob("own", -5, 1, "7g.80gb", 0, 1000.0)])
    assert seconds(here.ask(terms=terms).expected_wait) == 0
    assert seconds(here.ask("j-2", terms=peer_service_pb2.PeerTerms(highest_priority=-9)).expected_wait) == 1200


def test_idle_shares_are_offered_after_the_time_that_taking_them_back_takes() -> None:
    here = Here([view(uses=held(1, idle=True, idle_since=1.0))])
    assert seconds(here.ask().expected_wait) == IDLE_LEAVES_S


BUSY = [view(uses=held(1))]


@pytest.mark.parametrize(
    ("here", "terms", "fields", "reason"),
    [
        ({}, {"receive_off": True}, {}, "NOT_RECEIVING"),
        ({}, {"hours": "never"}, {}, "OUT_OF_HOURS"),
        ({}, {"most_received": 3}, {}, "TOO_MANY_GUESTS"),
        ({}, {}, {"visited_centres": ["c-b", "c-here"]}, "LOOP"),
        ({"labels": {"region": "us"}}, {}, {"required_labels": {"region": "eu"}}, "LABELS_DIFFER"),
        ({}, {}, {"bundle_bytes": 10**6 + 1}, "BUNDLE_TOO_LARGE"),
        ({}, {"most_bundle_bytes": 10}, {"bundle_bytes": 11}, "BUNDLE_TOO_LARGE"),
        ({}, {}, {"profile": "9g.90gb"}, "PROFILE_NOT_AVAILABLE"),
        ({}, {}, {"resources": job_pb2.Resources(memory_mib=10**6)}, "TOO_LARGE"),
        ({}, {}, {"profile": "", "sizing": prediction_pb2.Sizing(required_mib=10**6)}, "TOO_LARGE"),
        ({"views": [view(usable=False)]}, {}, {}, "DRAINING"),
        ({"views": []}, {}, {}, "NO_GPUS"),
        ({"views": BUSY}, {}, {}, "FULL"),
    ],
)
def test_a_refusal_says_why_and_when_to_ask_again(
    here: dict[str, Any], terms: dict[str, Any], fields: dict[str, Any], reason: str
) -> None:
    centre = Here(guests={"b": 3}, **here)
    answer = centre.ask(terms=peer_service_pb2.PeerTerms(**terms), **fields)
    assert (answer.accepted, answer.reason) == (False, reason)
    assert answer.message
    assert not answer.offer_id
    assert seconds(answer.retry_after) > 0
    assert moment(answer.time) == 5000
    assert not centre.desk.open


def test_those_who_are_refused_together_are_not_told_to_come_together() -> None:
    here = Here(BUSY)
    told = {round(seconds(here.ask(f"j-{number}").retry_after), 3) for number in range(50)}
    assert len(told) > 45
    assert 15 <= min(told) <= max(told) <= 45


def test_what_is_promised_counts_as_received() -> None:
    here = Here([view(f"GPU-{n}", node=f"n-{n}") for n in range(5)])
    terms = peer_service_pb2.PeerTerms(most_received=2)
    answers = [here.ask(f"j-{number}", terms=terms) for number in range(3)]
    assert [one.accepted for one in answers] == [True, True, False]
    assert here.ask("j-0", "c").accepted


def test_the_memory_for_a_peer_is_bounded() -> None:
    here = Here()
    terms = peer_service_pb2.PeerTerms(most_received=1000)
    for number in range(100):
        here.ask(f"j-{number}", terms=terms)
        here.desk.note_bundle("b", f"sha256:{number}")
    assert len(here.desk.open) == 64
    assert here.ask("j-more", terms=terms).reason == "TOO_MANY_OFFERS"
    assert here.ask("j-more", "c").accepted
    here.desk.forget_peer("b")
    assert len(here.desk.open) == 1


def test_offers_take_a_bounded_share_of_the_loop() -> None:
    here = Here(costs_s=0.4)
    terms = peer_service_pb2.PeerTerms(most_received=1000)
    reasons = [here.ask(f"j-{number}", terms=terms).reason for number in range(30)]
    assert reasons.count("BUSY") > 15
    here.costs_s = 0.0
    here.meter += 30
    assert here.ask("j-later", terms=terms).accepted


def test_an_offer_is_taken_by_whom_it_was_given_to_and_for_what() -> None:
    here = Here()
    offer = here.ask("j-1").offer_id
    for name, peer, origin in (
        ("no", "b", ref()),
        (offer, "c", ref()),
        (offer, "b", ref("j-2")),
        (offer, "b", ref("j-1", 2)),
    ):
        with pytest.raises(Refusal) as refused:
            here.desk.take(name, peer, origin)
        assert refused.value.reason == "OFFER_EXPIRED"
    here.desk.take(offer, "b", ref())
    here.desk.take(offer, "b", ref())  # an upload that broke off is tried again


def test_an_offer_that_has_expired_is_not_taken() -> None:
    here = Here()
    offer = here.ask().offer_id
    here.at += HOLDS_S
    with pytest.raises(Refusal):
        here.desk.take(offer, "b", ref())


def test_what_was_taken_stays_promised_while_it_is_uploaded_and_until_it_is_settled() -> None:
    here = Here()
    offer = here.ask("j-1", bundle_bytes=10**6, expected_duration=duration(40)).offer_id
    here.desk.take(offer, "b", ref())
    here.at += HOLDS_S + 0.5
    assert seconds(here.ask("j-2").expected_wait) == 40
    here.desk.settle("b", ref("j-2"))
    here.desk.settle("b", ref("j-1"))
    assert seconds(here.ask("j-3").expected_wait) == 0
    here.desk.settle("b", ref("j-3"))
    here.desk.take(here.ask("j-4", bundle_bytes=10**6).offer_id, "b", ref("j-4"))
    here.at += HOLDS_S + 1.0
    assert not here.desk.open


def test_a_bundle_is_present_only_for_whohas_sent_it() -> None:
    here = Here([view(f"GPU-{n}", node=f"n-{n}") for n in range(5)], bundles={"sha256:1"})
    here.desk.note_bundle("b", "sha256:1")
    here.desk.note_bundle("b", "sha256:2")
    assert here.ask("j-1", "b", bundle_id="sha256:1").bundle_present
    assert not here.ask("j-2", "c", bundle_id="sha256:1").bundle_present
    assert not here.ask("j-3", "b", bundle_id="sha256:2").bundle_present  # it is gone
    assert not here.ask("j-4", "b").bundle_present


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.integers(0, 9), st.sampled_from("bc")),
            st.tuples(st.just("take"), st.integers(0, 9), st.sampled_from("bc")),
            st.tuples(st.just("settle"), st.integers(0, 9), st.sampled_from("bc")),
            st.tuples(st.just("wait"), st.integers(1, 15), st.just("")),
        ),
        max_size=40,
    )
)
def test_no_slice_is_promised_twice_at_once(steps: list[tuple[str, int, str]]) -> None:
    here = Here([view("GPU-0"), view("GPU-1", node="n-2")])
    now_until: dict[tuple[str, int], float] = {}
    ids: dict[tuple[str, int], str] = {}
    for what, number, peer in steps:
        key = (peer, number)
        if what == "ask":
            taken = key in now_until and now_until[key] == float("inf")
            answer = here.ask(f"j-{number}", peer)
            if not taken:
                now_until.pop(key, None)
            if answer.accepted:
                ids[key] = answer.offer_id
                if seconds(answer.expected_wait) == 0 and not taken:
                    now_until[key] = here.at + HOLDS_S
        elif what == "take" and key in ids:
            try:
                here.desk.take(ids[key], peer, ref(f"j-{number}"))
            except Refusal:
                continue
            if key in now_until:
                now_until[key] = here.at + HOLDS_S
        elif what == "settle":
            here.desk.settle(peer, ref(f"j-{number}"))
            now_until.pop(key, None)
        else:
            here.at += number
        now_until = {one: until for one, until in now_until.items() if until > here.at}
        assert len(now_until) <= 2
