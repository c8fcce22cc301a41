from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.forward_budget import Budget
from controlplane.forwarding import (
    Candidate,
    Neighbour,
    Rules,
    distance,
    in_order,
    is_worth,
    transfer_s,
    why_none,
    why_not,
)
from controlplane.offers import Offer, Standing, best, judged_s
from controlplane.spill import Ask, Spill, Step
from puhui.v1 import job_pb2
from tests.unit.controlplane.neighbours import FakeNeighbour, candidate, neighbour, offer, summary


def policy(**fields: Any) -> job_pb2.PeerPolicy:
    return job_pb2.PeerPolicy(**fields)


# -- whether


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, ""),
        ({"policy": policy(here_only=True)}, "here only"),
        ({"hops_left": -1}, "as often as it may"),
        ({"hops_left": 0}, ""),
        ({"transit": False}, "does not let it"),
        ({"policy": policy(max_wait=Duration(seconds=1200))}, "no longer than the 1200 s"),
        ({"policy": policy(max_wait=Duration(seconds=1200)), "waited_s": 300.0}, ""),
        ({"policy": policy(max_wait=Duration(seconds=1200)), "wait_s": None}, ""),
        ({"policy": policy(max_wait=Duration())}, ""),
    ],
)
def test_whether_a_job_may_leave(fields: dict[str, Any], why: str) -> None:
    found = why_none(candidate(**fields))
    assert why in found
    assert bool(why) == bool(found)


EU = {"region": "eu"}


@pytest.mark.parametrize(
    ("peer", "job", "why"),
    [
        ({}, {}, ""),
        ({"send_off": True}, {}, "nothing is sent"),
        ({"address": ""}, {}, "never called"),
        ({"in_contact": False}, {}, "out of contact"),
        ({}, {"visited": ("c-a", "c-b")}, "has been there"),
        ({}, {"not_at": ("b",)}, "could not run it"),
        ({}, {"unheard_of_at": ("b",)}, "may have ended there"),
        ({}, {"unheard_of_at": ("c",)}, ""),
        ({}, {"is_guest": True}, "not sent there"),
        ({"transit": True}, {"is_guest": True}, ""),
        ({"tenants": ["other"]}, {}, "tenant lab"),
        ({"tenants": ["lab"]}, {}, ""),
        ({}, {"policy": policy(required_labels=EU)}, "labels"),
        ({"labels": EU}, {"policy": policy(required_labels=EU)}, ""),
        ({"labels": EU}, {"policy": policy(forbidden_labels=EU)}, "labels"),
        ({"most_sent": 7}, {}, "7 of our jobs"),
        ({"most_sent": 8}, {}, ""),
        ({"profiles": [summary("2g.20gb", 5)]}, {}, "no slice of this size"),
        ({"profiles": [summary("1g.10gb", 0)]}, {}, ""),
        ({"profiles": [summary("7g.80gb")]}, {"profile": "", "required_mib": 81152}, ""),
        ({"profiles": [summary("7g.40gb")]}, {"profile": "", "required_mib": 81152}, "no slice of this size"),
        ({"profiles": [summary("odd")]}, {"profile": "", "required_mib": 81152}, ""),
    ],
)
def test_whom_a_job_may_go_to(peer: dict[str, Any], job: dict[str, Any], why: str) -> None:
    found = why_not(candidate(**job), neighbour(**peer), sent=7)
    assert why in found
    assert bool(why) == bool(found)


# -- whom first


def names(job: Candidate, *peers: FakeNeighbour) -> list[str]:
    return [one.record.name for one in in_order(job, peers, random.Random(1).random)]


def test_preferred_peers_first_then_those_with_room_then_the_nearest() -> None:
    far, near = neighbour("far", round_trip_s=0.2), neighbour("near", round_trip_s=0.01)
    roomy = neighbour("roomy", round_trip_s=0.3, profiles=[summary(free=1)])
    set_near = neighbour("set", round_trip_s=0.5, distance=1.0)
    assert names(candidate(), far, near, roomy, set_near) == ["roomy", "set", "near", "far"]
    assert names(candidate(policy=policy(preferred_peers=["far", "gone", "near"])), far, near, roomy) == [
        "far",
        "near",
        "roomy",
    ]
    assert distance(near) == 10


def test_equally_near_peers_are_asked_in_a_random_order() -> None:
    peers = [neighbour(name) for name in "bcdef"]
    chance = random.Random(3)
    first = Counter(in_order(candidate(), peers, chance.random)[0].record.name for _ in range(500))
    assert len(first) == 5
    assert min(first.values()) > 50


# -- what is worth it


def test_a_promise_must_beat_the_wait_here_by_a_margin() -> None:
    rules, job = Rules(margin_s=5, doubt=4), candidate(wait_s=105)
    assert is_worth(job, offer(wait_s=24.9), Standing(), rules)
    assert not is_worth(job, offer(wait_s=25), Standing(), rules)
    assert not is_worth(job, offer(wait_s=15, transfer_s=15), Standing(), rules)
    assert not is_worth(job, offer(wait_s=15), Standing(broken_s=15), rules)
    assert is_worth(job, offer(wait_s=15), Standing(broken_s=-15), rules)
    assert is_worth(candidate(wait_s=None), offer(wait_s=9999), Standing(), rules)
    assert not is_worth(candidate(wait_s=5), offer(), Standing(), rules)


def test_the_best_offer_is_the_soonest_then_the_heaviest_then_the_cheapest() -> None:
    plain = Standing()
    assert best([]) is None

    def pick(*offers: tuple[Offer, Standing]) -> str:
        found = best(offers)
        assert found is not None
        return found.peer

    assert pick((offer("b", 10), plain), (offer("c", 5), plain)) == "c"
    assert pick((offer("b", 10), plain), (offer("c", 5, transfer_s=20), plain)) == "b"
    assert pick((offer("b", 10), plain), (offer("c", 5), Standing(broken_s=30))) == "b"
    assert pick((offer("b", 5), plain), (offer("c", 5), Standing(weight=2))) == "c"
    assert pick((offer("b", 5, cost=2), plain), (offer("c", 5), plain)) == "c"
    assert pick((offer("b", 50), Standing(preferred=0)), (offer("c", 5), plain)) == "b"
    assert judged_s(offer(wait_s=3, transfer_s=4), Standing(broken_s=5)) == 12


def test_a_transfer_takes_as_long_as_the_bandwidth_says() -> None:
    assert transfer_s(neighbour(bytes_per_second=1e6, round_trip_s=0.1), 5_000_000) == pytest.approx(5.2)


# -- how much is asked


def test_after_refusals_the_next_try_comes_later_and_later_but_not_for_ever() -> None:
    rules = Rules(back_off_s=1, most_back_off_s=100)

    def longest(refusals: int) -> float:
        found = 0.0
        for seed in range(200):
            budget = Budget(rules, random.Random(seed))
            for _ in range(refusals):
                budget.ask("b", "n")
                budget.refused(0.0, "b", "n", 0.0, no_room=True)
            found = max(found, budget.wait_for_s(0.0, "b", "n"))
        return found

    assert 0.9 < longest(1) <= 1
    assert 3.6 < longest(3) <= 4
    assert 90 < longest(30) <= 100


def test_a_peer_that_says_when_to_ask_again_is_not_asked_before() -> None:
    budget = Budget(Rules(), random.Random(1))
    budget.ask("b", "n")
    budget.refused(5.0, "b", "n", 40.0, no_room=True)
    assert budget.wait_for_s(5.0, "b", "n") >= 40
    assert budget.wait_for_s(5.0, "b", "other") == 0
    assert budget.wait_for_s(5.0, "c", "n") == 0
    budget.news(6.0, "b")
    assert budget.wait_for_s(6.0, "b", "n") <= 1


def test_a_peer_that_cannot_be_reached_is_left_alone_for_every_need() -> None:
    budget = Budget(Rules(), random.Random(1))
    budget.ask("b", "n")
    budget.failed(0.0, "b", "n", 7.0)
    assert budget.wait_for_s(0.0, "b", "other") >= 7
    assert budget.in_flight == 0


# -- all of it, in virtual time


class World:
    """Peers that answer after a while, jobs that wait, and a clock that is moved from event to event."""

    def __init__(self, peers: list[FakeNeighbour], rules: Rules, seed: int = 1, answer_s: float = 0.05) -> None:
        self.peers = peers
        self.rules = rules
        self.spill = Spill(rules, random.Random(seed))
        self.chance = random.Random(seed)
        self.answer_s = answer_s
        self.at = 0.0
        self.jobs: dict[str, Candidate] = {}
        self.calls: list[tuple[float, str, str]] = []
        self.gone: dict[str, str] = {}
        self.events: list[tuple[float, int, Ask]] = []
        self.free: Counter[str] = Counter()
        self.refusal = "FULL"
        self.number = 0

    def run(self, until: float) -> None:
        wake = self.at
        while self.at <= until:
            step = self.spill.step(self.at, self.at, list(self.jobs.values()), self.peers, {}, {})
            self._do(step)
            wake = step.wake_at if not step.takes else self.at + 0.001
            at = min(wake, self.events[0][0] if self.events else float("inf"))
            if at > until:
                self.at = until
                return
            assert at > self.at or self.events, "it turns in a circle"
            self.at = max(self.at, at)
            while self.events and self.events[0][0] <= self.at:
                self._answer(heapq.heappop(self.events)[2])

    def _do(self, step: Step) -> None:
        for ask in step.asks:
            self.number += 1
            self.calls.append((self.at, ask.peer, ask.job_id))
            delay_s = self.answer_s * self.chance.uniform(0.5, 1.5)
            heapq.heappush(self.events, (self.at + delay_s, self.number, ask))
        self.check()
        for job_id, taken in step.takes:
            self.gone[job_id] = taken.peer
            del self.jobs[job_id]
            self.spill.taken(job_id)

    def check(self) -> None:
        in_flight = Counter(ask.peer for _, _, ask in self.events)
        assert in_flight.total() <= self.rules.offers_in_flight
        assert max(in_flight.values(), default=0) <= self.rules.offers_in_flight_of_peer
        assert self.spill.budget.in_flight == in_flight.total()

    def _answer(self, ask: Ask) -> None:
        peer = next(one for one in self.peers if one.record.name == ask.peer)
        if self.refusal == "SILENCE":
            self.spill.failed(self.at, ask, "UNAVAILABLE")
        elif self.free[ask.peer] > 0:
            self.free[ask.peer] -= 1
            self.spill.offered(self.at, ask, offer(ask.peer, expire_at=self.at + 10), peer)
        else:
            self.spill.refused(self.at, ask, self.refusal, self.chance.uniform(5, 15))

    def most_calls_in(self, span_s: float) -> int:
        times = [at for at, _, _ in self.calls]
        return max((sum(at <= other < at + span_s for other in times) for at in times), default=0)


def crowd(count: int = 1000, **fields: Any) -> dict[str, Candidate]:
    return {f"j-{number}": candidate(f"j-{number}", **fields) for number in range(count)}


def test_a_thousand_jobs_at_a_full_centre_cause_no_storm() -> None:
    rules = Rules()
    world = World([neighbour(f"p{number}") for number in range(20)], rules)
    world.jobs = crowd()
    world.run(60)
    # One need: each peer is asked by one job, and by another only after it may have changed its mind.
    assert len(world.calls) < 20 * 8
    assert world.most_calls_in(1.0) <= rules.offers_at_once + rules.offers_a_second
    assert not world.gone


def test_a_thousand_jobs_that_all_differ_stay_in_the_budget_too() -> None:
    rules = Rules()
    world = World([neighbour(f"p{number}") for number in range(20)], rules)
    world.jobs = {
        key: replace(one, profile="", required_mib=number + 1) for number, (key, one) in enumerate(crowd().items())
    }
    world.run(20)
    assert world.most_calls_in(1.0) <= rules.offers_at_once + rules.offers_a_second
    assert len(world.calls) <= rules.offers_at_once + 20 * rules.offers_a_second + 1


def test_peers_that_do_not_answer_are_asked_less_and_less() -> None:
    world = World([neighbour(f"p{number}") for number in range(4)], Rules(), answer_s=5.0)
    world.refusal = "SILENCE"
    world.jobs = crowd()
    world.run(600)
    assert len(world.calls) < 120


def test_room_at_peers_is_found_and_used() -> None:
    world = World([neighbour("b"), neighbour("c")], Rules())
    world.free.update({"b": 60, "c": 60})
    world.jobs = crowd(100)
    world.run(15)
    assert len(world.gone) > 80
    assert len(set(world.gone)) == len(world.gone)


def test_a_job_waits_a_moment_before_its_first_round() -> None:
    world = World([neighbour("b")], Rules(first_delay_s=(0.1, 0.5)))
    world.jobs = crowd(50)
    world.run(3)
    assert 0.1 <= world.calls[0][0] <= 0.5


def test_rounds_widen() -> None:
    world = World([neighbour(f"p{number:02}", distance=number + 1) for number in range(14)], Rules(), answer_s=0.1)
    world.jobs = crowd(1)
    world.run(4)
    rounds = Counter(round(at, 6) for at, _, _ in world.calls)
    assert list(rounds.values())[:3] == [2, 4, 8]
    assert [peer for _, peer, _ in world.calls][:2] == ["p00", "p01"]


def test_why_a_job_was_not_sent_is_told() -> None:
    world = World([neighbour("b"), neighbour("c", send_off=True)], Rules())
    world.jobs = crowd(1) | {"j-x": candidate("j-x", policy=policy(here_only=True))}
    assert world.spill.why("j-0") == ""
    world.run(2)
    full = "b has no room for it within a day, or does not know when (FULL)"
    assert world.spill.why("j-0") == f"peers: {full}; c: nothing is sent there"
    assert world.spill.why("j-x") == "peers: not asked, because it is to run here only"


def test_what_a_peer_has_refused_one_job_is_told_to_others_of_its_need_that_are_not_asked_for() -> None:
    world = World([neighbour("b")], Rules())
    world.jobs = crowd(3)
    world.run(0.5)
    asked = {job_id for _, _, job_id in world.calls}
    assert len(asked) < 3
    assert {world.spill.why(f"j-{number}") for number in range(3)} == {
        "peers: b has no room for it within a day, or does not know when (FULL)"
    }
    world.jobs = {"j-y": candidate("j-y", profile="7g.80gb")}
    world.spill.step(world.at, world.at, list(world.jobs.values()), world.peers, {}, {})
    world.jobs = crowd(1)
    world.spill.step(world.at, world.at, list(world.jobs.values()), world.peers, {}, {})
    assert world.spill.why("j-0") == "", "what nobody waits for any longer is forgotten"


def test_a_promise_that_is_not_worth_it_is_not_asked_for_again_at_once() -> None:
    spill, peer = Spill(Rules(), random.Random(1)), neighbour("b")
    jobs = [candidate(f"j-{number}", wait_s=60.0) for number in range(10)]
    asked = 0
    at = 0.0
    while at < 10:
        step = spill.step(at, at, jobs, [peer], {}, {})
        assert not step.takes
        for ask in step.asks:
            asked += 1
            spill.offered(at, ask, offer("b", 300.0), peer)
        at += 0.1
    assert asked == 1
    assert "not worth it" in spill.why("j-0") + spill.why("j-1") + "".join(spill.why(job.id) for job in jobs)
    # Who waits longer here may well take it.
    patient = candidate("j-long", wait_s=5000.0)
    spill.step(at, at, [*jobs, patient], [peer], {}, {})
    assert spill.step(at + 1, at + 1, [*jobs, patient], [peer], {}, {}).asks[0].job_id == "j-long"


def test_what_only_this_job_is_refused_for_is_asked_for_others() -> None:
    spill, peer = Spill(Rules(), random.Random(1)), neighbour("b")
    jobs = [candidate("j-1"), candidate("j-2")]
    spill.step(0.0, 0.0, jobs, [peer], {}, {})
    (first,) = spill.step(1.0, 1.0, jobs, [peer], {}, {}).asks
    spill.refused(1.0, first, "LOOP", 60.0)
    (second,) = spill.step(1.1, 1.1, jobs, [peer], {}, {}).asks
    assert {first.job_id, second.job_id} == {"j-1", "j-2"}


def test_no_more_is_on_its_way_than_may_be() -> None:
    rules = Rules(forwards_in_flight=5, forwards_in_flight_of_peer=3)
    spill, peers = Spill(rules, random.Random(1)), [neighbour("b"), neighbour("c")]
    jobs = [candidate(f"j-{number}") for number in range(40)]
    taken: Counter[str] = Counter()
    for tick in range(200):
        at = tick / 10
        step = spill.step(at, at, jobs, peers, {}, taken)
        for ask in step.asks:
            peer = next(one for one in peers if one.record.name == ask.peer)
            spill.offered(at, ask, offer(ask.peer), peer)
        taken.update(one.peer for _, one in step.takes)
        gone = {job_id for job_id, _ in step.takes}
        jobs = [job for job in jobs if job.id not in gone]
        for job_id in gone:
            spill.taken(job_id)
        assert taken.total() <= 5
        assert max(taken.values(), default=0) <= 3
    assert taken.total() == 5


def test_an_offer_that_has_expired_is_not_taken() -> None:
    spill, peer = Spill(Rules(forwards_in_flight=0), random.Random(1)), neighbour("b")
    jobs = [candidate()]
    spill.step(0.0, 0.0, jobs, [peer], {}, {})
    (ask,) = spill.step(1.0, 1.0, jobs, [peer], {}, {}).asks
    spill.offered(1.0, ask, offer("b", expire_at=11.0), peer)
    assert not spill.step(2.0, 2.0, jobs, [peer], {}, {}).asks
    assert spill.step(10.5, 10.5, jobs, [peer], {}, {}).asks


_LABELS = st.dictionaries(st.sampled_from(["region", "tier"]), st.sampled_from(["x", "y"]), max_size=2)


@st.composite
def _neighbours(draw: st.DrawFn) -> list[FakeNeighbour]:
    return [
        neighbour(
            f"p{number}",
            labels=draw(_LABELS),
            send_off=draw(st.booleans()) and draw(st.booleans()),
            transit=draw(st.booleans()),
            most_sent=draw(st.integers(0, 3)),
            distance=draw(st.floats(0, 100)),
            in_contact=draw(st.integers(0, 4)) > 0,
        )
        for number in range(draw(st.integers(0, 6)))
    ]


@st.composite
def _candidates(draw: st.DrawFn) -> list[Candidate]:
    return [
        candidate(
            f"j-{number}",
            draw(st.one_of(st.none(), st.floats(0, 2000))),
            profile=draw(st.sampled_from(["1g.10gb", "2g.20gb"])),
            policy=policy(
                here_only=draw(st.integers(0, 5)) == 0,
                required_labels=draw(_LABELS),
                forbidden_labels=draw(_LABELS),
            ),
            visited=("c-here", *draw(st.lists(st.sampled_from(["c-p0", "c-p1", "c-p2"]), max_size=2))),
            not_at=tuple(draw(st.lists(st.sampled_from(["p3", "p4"]), max_size=2))),
            unheard_of_at=tuple(draw(st.lists(st.sampled_from(["p1", "p4"]), max_size=1))),
            is_guest=draw(st.booleans()),
            transit=draw(st.booleans()),
            hops_left=draw(st.integers(-1, 1)),
        )
        for number in range(draw(st.integers(0, 12)))
    ]


def _allowed(job: Candidate, peer: Neighbour) -> bool:
    """What must hold wherever anything is asked or sent, written down once more and plainly."""
    terms = peer.record.terms
    return (
        not job.policy.here_only
        and job.hops_left >= 0
        and job.transit
        and peer.record.centre_id not in job.visited
        and peer.record.name not in (*job.not_at, *job.unheard_of_at)
        and not terms.send_off
        and peer.in_contact
        and (terms.transit or not job.is_guest)
        and all(terms.labels.get(key) == value for key, value in job.policy.required_labels.items())
        and not any(terms.labels.get(key) == value for key, value in job.policy.forbidden_labels.items())
    )


@settings(max_examples=150, deadline=None)
@given(_neighbours(), _candidates(), st.integers(0, 2**32), st.data())
def test_nothing_is_asked_or_sent_that_may_not_be(
    peers: list[FakeNeighbour], jobs: list[Candidate], seed: int, data: st.DataObject
) -> None:
    rules = Rules(offers_in_flight=5, offers_in_flight_of_peer=2, forwards_in_flight=3, forwards_in_flight_of_peer=2)
    spill = Spill(rules, random.Random(seed))
    at, sent = 0.0, Counter[str]()
    asks: list[Ask] = []
    gone: set[str] = set()
    for _ in range(12):
        waiting = {job.id: job for job in jobs if job.id not in gone}
        step = spill.step(at, at, list(waiting.values()), peers, sent, {})
        asks.extend(step.asks)
        in_flight = Counter(ask.peer for ask in asks)
        assert in_flight.total() <= 5
        assert max(in_flight.values(), default=0) <= 2
        assert len(step.takes) <= 3
        for job_id, name in [
            *((ask.job_id, ask.peer) for ask in step.asks),
            *((job, one.peer) for job, one in step.takes),
        ]:
            peer = next(one for one in peers if one.record.name == name)
            assert _allowed(waiting[job_id], peer)
            assert sent[name] < (peer.record.terms.most_sent or 100)
        for job_id, taken in step.takes:
            assert job_id not in gone
            gone.add(job_id)
            sent[taken.peer] += 1
            spill.taken(job_id)
        for _ in range(data.draw(st.integers(0, len(asks)))):
            ask = asks.pop(data.draw(st.integers(0, len(asks) - 1)))
            peer = next(one for one in peers if one.record.name == ask.peer)
            match data.draw(st.integers(0, 3)):
                case 0:
                    spill.refused(at, ask, data.draw(st.sampled_from(["FULL", "LOOP", "X"])), 1.0)
                case 1:
                    spill.failed(at, ask, "UNAVAILABLE")
                case _:
                    spill.offered(at, ask, offer(ask.peer, data.draw(st.floats(0, 500)), expire_at=at + 10), peer)
        at += data.draw(st.floats(0.01, 5))
