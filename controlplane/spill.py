"""Which peers are asked for which waiting jobs, and which promises are taken: a state machine. Pure: time comes in.

`step` says what to ask and what to take; every answer is told to it; whoever drives it calls `step` again after that,
and at the time that the last step named.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.forward_budget import Budget
from controlplane.forwarding import (
    Candidate,
    Neighbour,
    Rules,
    beats,
    in_order,
    is_worth,
    standing,
    transfer_s,
    why_none,
    why_not,
)
from controlplane.offer_refusals import OfferRefusal, refused_clause, unanswered_clause
from controlplane.offers import Offer, Standing, best, judged_s

__all__ = ["Ask", "Spill", "Step"]

_OF_THE_JOB = frozenset({OfferRefusal.LOOP, OfferRefusal.LABELS_DIFFER, OfferRefusal.BUNDLE_TOO_LARGE})
"""Refused so, another job with the same need may be taken."""
_NO_ROOM = frozenset(
    {OfferRefusal.FULL, OfferRefusal.DRAINING, OfferRefusal.NOT_RECEIVING, OfferRefusal.TOO_MANY_GUESTS}
)
"""Refused so, a job is asked for again as soon as the peer tells another capacity."""
_MOST_TOLD = 5
_LEAST_S = 0.01
"""Steps that only time asks for are this far apart at least."""
_LEFT_S = 1.0
"""An offer that expires sooner than this is not taken any more."""


@dataclass(frozen=True)
class Ask:
    """An offer that is to be asked for."""

    job_id: str
    peer: str
    need: Hashable


@dataclass
class Step:
    """What to do now."""

    asks: list[Ask] = field(default_factory=list)
    takes: list[tuple[str, Offer]] = field(default_factory=list)
    """Jobs, each with the offer that it takes."""
    wake_at: float = float("inf")
    """The next step may be another at this time without anything having happened."""

    def wake(self, at: float) -> None:
        """Notes that the next step may be another at a time."""
        self.wake_at = min(self.wake_at, at)


@dataclass
class _Search:
    """What one job has asked and been told."""

    job: Candidate
    starts_at: float
    """Nobody is asked before."""
    since: float = 0.0
    """It was first looked at."""
    round: int = 0
    asked: dict[str, None] = field(default_factory=dict)
    """Peers that have not answered yet."""
    offers: dict[str, tuple[Offer, Standing]] = field(default_factory=dict)
    decide_at: float = float("inf")
    never: dict[str, float] = field(default_factory=dict)
    """Peers that refused just this job, with until when they are not asked again."""
    told: dict[str, str] = field(default_factory=dict)
    """What was last heard of each peer, in a few words."""
    taking: bool = False


class Spill:
    """Finds peers for waiting jobs.

    Args:
        rules: how eagerly.
        chance: for everything that is spread.
    """

    def __init__(self, rules: Rules | None = None, chance: random.Random | None = None) -> None:
        self.rules = rules or Rules()
        self._chance = chance or random.Random()  # noqa: S311 - only spreads
        self._budget = Budget(self.rules, self._chance)
        self._searches: dict[str, _Search] = {}
        self._none: dict[str, str] = {}
        self._said: dict[Hashable, dict[str, str]] = {}
        """Why a peer has made no offer for a need: nobody else with that need is asked for, for a while."""

    @property
    def budget(self) -> Budget:
        """What may be asked for now."""
        return self._budget

    def step(
        self,
        at: float,
        clock_s: float,
        jobs: Sequence[Candidate],
        peers: Sequence[Neighbour],
        sent: Mapping[str, int],
        sending: Mapping[str, int],
    ) -> Step:
        """Returns what to do now. Every ask of it is to be answered, and every take to be ended with `taken`.

        Args:
            at: now, in seconds that only grow.
            clock_s: now, on this centre's lease clock, on which offers expire.
            jobs: every waiting job that may be sent, in the order of the queue.
            peers: every peer.
            sent: our attempts at each peer, by name.
            sending: those of them that are not bound yet.
        """
        step = Step()
        busy, held = Counter(sending), Counter(sent)
        waiting, known = {job.id for job in jobs}, {peer.record.name: peer for peer in peers}
        self._searches = {key: one for key, one in self._searches.items() if key in waiting or one.taking}
        needs = {job.need for job in jobs}
        self._said = {
            need: {name: why for name, why in said.items() if name in known}
            for need, said in self._said.items()
            if need in needs
        }
        self._none = {}
        closed: dict[Hashable, float] = {}
        for job in jobs:
            none = why_none(job)
            if none:
                self._none[job.id] = none
                self._searches.pop(job.id, None)
                continue
            search = self._search(job, at)
            if search.taking:
                continue
            if at < search.starts_at and not search.offers:
                step.wake(search.starts_at)
                continue
            self._drop(search, clock_s, known, held)
            if self._take(search, at, step, busy, held) or search.asked:
                continue
            if job.need in closed:
                step.wake(closed[job.need])
                continue
            again_s = self._budget.wait_s(at)
            if again_s > 0:
                step.wake(at + again_s)
                continue
            self._ask(search, at, peers, held, step, closed)
        step.wake_at = max(step.wake_at, at + _LEAST_S)
        return step

    def _search(self, job: Candidate, at: float) -> _Search:
        search = self._searches.get(job.id)
        if search is None:
            starts_at = at + self._chance.uniform(*self.rules.first_delay_s)
            search = self._searches[job.id] = _Search(job, starts_at, since=at)
        search.job = job
        return search

    # -- taking

    def _drop(self, search: _Search, clock_s: float, peers: Mapping[str, Neighbour], held: Mapping[str, int]) -> None:
        """Drops promises that hold no longer, are worth nothing, or that may not be taken any more."""
        for name, (offer, stands) in list(search.offers.items()):
            gone = name not in peers or why_not(search.job, peers[name], held.get(name, 0))
            if gone or offer.expire_at - _LEFT_S <= clock_s or not is_worth(search.job, offer, stands, self.rules):
                del search.offers[name]

    def _take(self, search: _Search, at: float, step: Step, busy: Counter[str], held: Counter[str]) -> bool:
        """Takes the best promise, once its round is over; returns whether the job is spoken for, or waits for that."""
        if not search.offers:
            return False
        if search.asked and at < search.decide_at:
            step.wake(search.decide_at)
            return True
        rules = self.rules
        room = {
            name: one
            for name, one in search.offers.items()
            if busy[name] < rules.forwards_in_flight_of_peer and busy.total() < rules.forwards_in_flight
        }
        chosen = best(room.values())
        if chosen is not None:
            busy[chosen.peer] += 1
            held[chosen.peer] += 1
            search.taking = True
            step.takes.append((search.job.id, chosen))
        return True

    def taken(self, job_id: str) -> None:
        """A job has gone to the peer whose offer it was to take, or waits no longer, or could not go."""
        self._searches.pop(job_id, None)

    # -- asking

    def _ask(
        self,
        search: _Search,
        at: float,
        peers: Sequence[Neighbour],
        sent: Counter[str],
        step: Step,
        closed: dict[Hashable, float],
    ) -> None:
        job, again_s, special = search.job, float("inf"), False
        able = []
        for peer in peers:
            name = peer.record.name
            why = why_not(job, peer, sent[name])
            if not why and search.never.get(name, 0.0) > at:
                special, again_s = True, min(again_s, search.never[name] - at)
                continue
            if why:
                special = True
                search.told[name] = why
                continue
            wait_s = self._budget.wait_for_s(at, name, job.need)
            known = self._budget.promised_s(at, name, job.need)
            if known is not None and not beats(job, known[0] + transfer_s(peer, job.bundle_bytes), self.rules):
                # Another job with this need may wait longer here, or have less to carry.
                special, wait_s = True, max(wait_s, known[1])
            if wait_s > 0:
                again_s = min(again_s, wait_s)
                continue
            able.append(peer)
        if not able:
            search.round = 0
            if not special:
                closed[job.need] = at + again_s
            step.wake(at + again_s)
            return
        size = self.rules.first_round * 2 ** min(search.round, 16)
        for peer in in_order(job, able, self._chance.random)[:size]:
            if self._budget.wait_s(at) > 0:
                break
            name = peer.record.name
            self._budget.ask(name, job.need)
            search.asked[name] = None
            step.asks.append(Ask(job.id, name, job.need))
        search.round += 1
        search.decide_at = float("inf")

    # -- answers

    def offered(self, at: float, ask: Ask, offer: Offer, peer: Neighbour) -> None:
        """A peer has made an offer."""
        self._budget.accepted(ask.peer, ask.need)
        self._said.get(ask.need, {}).pop(ask.peer, None)
        search = self._answered(ask)
        if search is None:
            return
        stands = standing(search.job, peer)
        worth, long = is_worth(search.job, offer, stands, self.rules), offer.expected_wait_s > self.rules.long_wait_s
        if worth and long and at < search.since + self.rules.hesitates_s:
            # Much of what a peer has may be promised to those who will not take it: asked again, it may say otherwise.
            search.starts_at = max(search.starts_at, at + self.rules.asks_again_s)
            search.told[ask.peer] = f"{ask.peer} promises a start in {offer.total_s:.0f} s; it is asked once more"
            return
        if worth:
            search.offers[ask.peer] = offer, stands
            search.told[ask.peer] = f"{ask.peer} promises a start in {offer.total_s:.0f} s"
            search.decide_at = min(search.decide_at, at + self.rules.round_s)
            return
        promised_s = judged_s(offer, stands)
        self._budget.too_late(at, ask.peer, ask.need, promised_s - offer.transfer_s)
        search.told[ask.peer] = f"{ask.peer} promises a start in {promised_s:.0f} s, which is not worth it"

    def refused(self, at: float, ask: Ask, reason: str, retry_after_s: float) -> None:
        """A peer has refused."""
        search = self._answered(ask)
        if reason in _OF_THE_JOB:
            self._budget.refused_one(ask.peer, ask.need)
            if search is not None:
                search.never[ask.peer] = at + max(retry_after_s, self.rules.most_back_off_s)
        else:
            self._budget.refused(at, ask.peer, ask.need, retry_after_s, no_room=reason in _NO_ROOM)
            self._said.setdefault(ask.need, {})[ask.peer] = refused_clause(ask.peer, reason)
        if search is not None:
            search.told[ask.peer] = refused_clause(ask.peer, reason)

    def failed(self, at: float, ask: Ask, reason: str, retry_after_s: float = 0.0) -> None:
        """A peer has not answered, or nothing of sense."""
        self._budget.failed(at, ask.peer, ask.need, retry_after_s)
        search = self._answered(ask)
        if search is not None:
            search.told[ask.peer] = unanswered_clause(ask.peer, reason)
            self._said.setdefault(ask.need, {})[ask.peer] = search.told[ask.peer]

    def news(self, at: float, peer: str) -> None:
        """A peer has told its capacity."""
        self._budget.news(at, peer)

    def _answered(self, ask: Ask) -> _Search | None:
        search = self._searches.get(ask.job_id)
        if search is None or ask.peer not in search.asked:
            return None
        del search.asked[ask.peer]
        return search

    # -- why

    def why(self, job_id: str) -> str:
        """Returns why a job was not sent to a peer, in a clause such as "peers: b: out of contact"; "" when unknown."""
        none = self._none.get(job_id)
        if none is not None:
            return f"peers: not asked, because {none}"
        search = self._searches.get(job_id)
        told = {**self._said.get(search.job.need, {}), **search.told} if search is not None else {}
        if not told:
            return ""
        said = [text if text.startswith(name) else f"{name}: {text}" for name, text in sorted(told.items())]
        more = f"; and {len(said) - _MOST_TOLD} more" if len(said) > _MOST_TOLD else ""
        return f"peers: {'; '.join(said[:_MOST_TOLD])}{more}"
