"""Many centres with skewed load: each alone, as peers, and as one giant pool. Events in the order of time.

Whom to ask, what is promised and what is taken is decided by the control plane's own code: `spill`, `forwarding`,
`forward_budget`, `offers`, `offer_desk`, `outlook` and `queue_model`; placement is that of the queue model, for all
three alike. A message takes half a round trip, a forward besides the transfer of its bundle. Coarser than the real
thing is, nothing fails, no share is idle, capacity is told one second after it has changed, and a centre looks at its
queue again when something has happened, when its search says so, or after half a minute.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.federation_load import HORIZON_S, LOAD, MOST_NEIGHBOURS, Work, neighbours, work_of
from bench.federation_site import BANDWIDTH, FederatedSite, Link, Site, Waiting, link
from bench.idle_fleet import geometry
from bench.report import Aim, Figure
from controlplane.capacity import profile_capacity
from controlplane.forwarding import Candidate, Rules
from controlplane.offers import Offer
from controlplane.spill import Ask
from puhui.rpc.moment import moment, seconds
from puhui.v1 import card_pb2, job_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["Outcome", "alone", "as_peers", "as_pool", "simulate"]

CARD = "H100-80GB-SXM5"
GPUS = 4
BUNDLE_BYTES = 10_000_000
HOPS = 2
_LOOK_AGAIN_S = 30.0
_EXCHANGE_S = 1.0
_TOLD_AGAIN_S = 20.0
"""Capacity that does not change is told again this often; that is counted, and not played."""
_RENEW_S = 300.0
"""A third of the default lease."""
_OVERLOAD = 1.3
_ANY_POLICY = job_pb2.PeerPolicy()
_RULES = Rules()


@dataclass
class Outcome:
    """What became of the jobs."""

    slices: int
    """Memory slices of all GPUs."""
    waits_s: list[float] = field(default_factory=list)
    busy_slice_s: float = 0.0
    """Memory slices times seconds in which they were used, while jobs arrived."""
    sent: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    """Control messages while jobs arrived, by kind."""

    @property
    def mean_wait_s(self) -> float:
        """From the submission of a job to its start."""
        return sum(self.waits_s) / max(1, len(self.waits_s))

    @property
    def utilization(self) -> float:
        """Share of the memory slices that were used while jobs arrived."""
        return self.busy_slice_s / (self.slices * HORIZON_S)

    def note(self, waiting: Waiting, at_s: float) -> None:
        """A job has begun."""
        work = waiting.work
        self.waits_s.append(at_s - work.at_s)
        self.busy_slice_s += work.slices * max(0.0, min(HORIZON_S, at_s + work.length_s) - at_s)


class _Clock:
    """Events in the order of time."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def now(self) -> float:
        return self.at_s

    def at(self, at_s: float, happens: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (max(at_s, self.at_s), self._number, happens))

    def run(self) -> None:
        while self._events:
            self.at_s, _, happens = heapq.heappop(self._events)
            happens()


class _Centres:
    """Centres that do not know of each other."""

    def __init__(self, centres: int, gpus: int) -> None:
        self.clock = _Clock()
        self.outcome = Outcome(slices=centres * gpus * 8)
        self.sites: Sequence[Site] = self.make(centres, gpus)
        self._due: dict[str, float] = {}

    def make(self, centres: int, gpus: int) -> Sequence[Site]:
        kind = geometry(CARD)
        return [Site(number, kind, gpus, self.clock.now, self.began) for number in range(centres)]

    def began(self, waiting: Waiting, number: int) -> None:
        self.outcome.note(waiting, self.clock.at_s)

    def run(self, works: Sequence[Work]) -> Outcome:
        for work in works:
            self.clock.at(work.at_s, lambda work=work: self.submit(work.centre, Waiting(work, work.at_s)))  # type: ignore[misc]
        self.clock.run()
        return self.outcome

    def submit(self, number: int, waiting: Waiting) -> None:
        site = self.sites[number]
        site.advance(self.clock.at_s)
        site.submit(waiting)
        self.changed(site)

    def changed(self, site: Site) -> None:
        """Something was placed, or has ended: the centre is looked at when its next share ends."""
        at_s = site.next_end_s
        if at_s < self._due.get(site.name, float("inf")) or self._due.get(site.name, 0.0) <= self.clock.at_s:
            self._due[site.name] = at_s
            if at_s < float("inf"):
                self.clock.at(at_s, lambda: self._end(site))

    def _end(self, site: Site) -> None:
        self._due.pop(site.name, None)
        site.advance(self.clock.at_s)
        self.changed(site)


class _Peers(_Centres):
    """Centres that are peers of their neighbours."""

    def __init__(self, centres: int, gpus: int, seed: int, rules: Rules) -> None:
        self._seed = seed
        self._rules = rules
        super().__init__(centres, gpus)
        self._word: dict[str, tuple[tuple[str, int], ...]] = {}
        self._promised: dict[str, tuple[Link, float, float]] = {}
        self._telling: set[str] = set()
        links = sum(len(site.links) for site in self.federated)
        self.outcome.messages["summaries"] += int(links * HORIZON_S / _TOLD_AGAIN_S)

    def make(self, centres: int, gpus: int) -> Sequence[Site]:
        kind = geometry(CARD)
        known = neighbours(centres, self._seed)
        self.federated = [
            FederatedSite(
                number,
                kind,
                gpus,
                self.clock.now,
                self.began,
                {str(other): link(other, round_trip_s) for other, round_trip_s in known[number].items()},
                random.Random(self._seed * 1000 + number),
                self._rules,
            )
            for number in range(centres)
        ]
        return self.federated

    def count(self, what: str, number: int = 1) -> None:
        if self.clock.at_s < HORIZON_S:
            self.outcome.messages[what] += number

    def began(self, waiting: Waiting, number: int) -> None:
        super().began(waiting, number)
        promised = self._promised.pop(waiting.work.id, None)
        if promised is not None:
            peer, sent_at_s, promised_s = promised
            peer.late_s.append(max(0.0, self.clock.at_s - sent_at_s - promised_s))
        if waiting.visited:
            self.count("renewals", int(waiting.work.length_s / _RENEW_S) * len(waiting.visited))

    def changed(self, site: Site) -> None:
        super().changed(site)
        federated = self.federated[int(site.name)]
        if site.waiting:
            self.look_at(federated, self.clock.at_s)
        if site.name not in self._telling:
            self._telling.add(site.name)
            self.clock.at(self.clock.at_s + _EXCHANGE_S, lambda: self._tell(federated))

    def look_at(self, site: FederatedSite, at_s: float) -> None:
        """Has a centre look at its queue at a time, or sooner."""
        if at_s < site.next_look_s:
            site.next_look_s = at_s
            self.clock.at(at_s, lambda: self._look(site, at_s))

    def _look(self, site: FederatedSite, due_s: float) -> None:
        if due_s != site.next_look_s:
            return  # it was looked at sooner
        site.next_look_s = float("inf")
        if not site.waiting:
            return
        at_s = self.clock.at_s
        waits = site.outlook.waits()
        jobs = [self._candidate(site, one, waits.of(one.work.id).seconds) for one in site.waiting.values()]
        sent = {name: peer.sent for name, peer in site.links.items()}
        step = site.spill.step(at_s, at_s, jobs, list(site.links.values()), {}, sent)
        for ask in step.asks:
            self.count("offers")
            delay_s = site.links[ask.peer].round_trip_s / 2
            request = self._request(site, ask)
            self.clock.at(at_s + delay_s, lambda ask=ask, request=request: self._asked(site, ask, request))  # type: ignore[misc]
        for job_id, offer in step.takes:
            self._take(site, job_id, offer)
        self.look_at(site, at_s + 0.02 if step.takes else min(step.wake_at, at_s + _LOOK_AGAIN_S))

    def _candidate(self, site: FederatedSite, waiting: Waiting, wait_s: float | None) -> Candidate:
        return Candidate(
            waiting.work.id,
            waiting.work.profile,
            0,
            "t",
            _ANY_POLICY,
            wait_s,
            self.clock.at_s - waiting.since_s,
            BUNDLE_BYTES,
            (*waiting.visited, site.name),
            HOPS - len(waiting.visited) - 1,
            is_guest=bool(waiting.visited),
        )

    def _request(self, site: FederatedSite, ask: Ask) -> wire.GetOfferRequest:
        waiting = site.waiting[ask.job_id]
        return wire.GetOfferRequest(
            origin=card_pb2.AttemptRef(job_id=ask.job_id, attempt=1),
            resources=job_pb2.Resources(profile=waiting.work.profile),
            bundle_bytes=BUNDLE_BYTES,
            visited_centres=[*waiting.visited, site.name],
        )

    def _asked(self, site: FederatedSite, ask: Ask, request: wire.GetOfferRequest) -> None:
        there = self.federated[int(ask.peer)]
        there.advance(self.clock.at_s)
        response = there.desk.give(request, there.links[site.name])
        delay_s = site.links[ask.peer].round_trip_s / 2
        self.clock.at(self.clock.at_s + delay_s, lambda: self._answered(site, ask, response))

    def _answered(self, site: FederatedSite, ask: Ask, response: wire.GetOfferResponse) -> None:
        at_s, peer = self.clock.at_s, site.links[ask.peer]
        if response.accepted:
            offer = Offer(
                ask.peer,
                response.offer_id,
                seconds(response.expected_wait),
                BUNDLE_BYTES / BANDWIDTH + 2 * peer.round_trip_s,
                response.cost,
                moment(response.time),
                at_s,
                at_s + moment(response.expire_time) - moment(response.time),
                seconds(response.longest_lease),
                response.profile,
                response.gpu_model,
                bundle_present=False,
            )
            site.spill.offered(at_s, ask, offer, peer)
        else:
            site.spill.refused(at_s, ask, response.reason, seconds(response.retry_after))
        self.look_at(site, at_s + 0.02)

    def _take(self, site: FederatedSite, job_id: str, offer: Offer) -> None:
        site.spill.taken(job_id)
        if job_id not in site.waiting:
            return
        site.advance(self.clock.at_s)
        waiting = site.withdraw(job_id)
        peer = site.links[offer.peer]
        peer.sent += 1
        self.count("forwards")
        self.outcome.sent += 1
        self._promised[job_id] = peer, self.clock.at_s, offer.total_s
        there = self.federated[int(offer.peer)]
        origin = card_pb2.AttemptRef(job_id=job_id, attempt=1)
        self.clock.at(self.clock.at_s + peer.round_trip_s / 2, lambda: there.desk.take(offer.id, site.name, origin))

        def bind() -> None:
            peer.sent -= 1
            there.desk.settle(site.name, origin)
            arrived = Waiting(waiting.work, self.clock.at_s, (*waiting.visited, site.name))
            self.submit(int(there.name), arrived)

        self.clock.at(self.clock.at_s + offer.transfer_s, bind)
        super().changed(site)

    def _tell(self, site: FederatedSite) -> None:
        """Tells the neighbours what there is, when that has changed."""
        self._telling.discard(site.name)
        site.advance(self.clock.at_s)
        word = tuple((one.profile, one.free) for one in profile_capacity(site.gpus()))
        if word == self._word.get(site.name):
            return
        self._word[site.name] = word
        summaries = site.outlook.summaries()
        for name in site.links:
            there = self.federated[int(name)]
            there.links[site.name].profiles = summaries
            there.spill.news(self.clock.at_s, site.name)
            self.count("summaries")
            if there.waiting:
                self.look_at(there, self.clock.at_s + there.links[site.name].round_trip_s / 2)


def alone(works: Sequence[Work], centres: int, gpus: int = GPUS) -> Outcome:
    """Returns what becomes of jobs at centres that do not know of each other."""
    return _Centres(centres, gpus).run(works)


def as_peers(works: Sequence[Work], centres: int, gpus: int = GPUS, seed: int = 1, rules: Rules = _RULES) -> Outcome:
    """Returns what becomes of jobs at centres that are peers of at most eight others each."""
    return _Peers(centres, gpus, seed, rules).run(works)


def as_pool(works: Sequence[Work], centres: int, gpus: int = GPUS) -> Outcome:
    """Returns what becomes of jobs at one centre that has everything."""
    pooled = [Work(work.id, 0, work.at_s, work.profile, work.slices, work.length_s) for work in works]
    return _Centres(1, centres * gpus).run(pooled)


def gain_pct(isolated: float, federated: float, pool: float) -> float:
    """Returns which share of the way from isolated centres to one pool was gone, in percent; 100 if there is none."""
    return 100.0 * (isolated - federated) / (isolated - pool) if abs(isolated - pool) > 1e-9 else 100.0


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns several days as one."""
    total = Outcome(slices=sum(one.slices for one in outcomes))
    for one in outcomes:
        total.waits_s += one.waits_s
        total.busy_slice_s += one.busy_slice_s
        total.sent += one.sent
        total.messages.update(one.messages)
    return total


def simulate(
    sizes: Sequence[tuple[int, int]] = ((2, 12), (8, 4), (32, 1), (200, 1)),
    overloaded: tuple[int, int] = (8, 1),
    seed: int = 1,
    gpus: int = GPUS,
) -> tuple[list[Figure], list[Aim], list[str]]:
    """Simulates every number of centres.

    Args:
        sizes: numbers of centres, each with how many days of them are simulated: few centres have few jobs a day, and
            a few long ones among them would decide the figure.
        overloaded: likewise, for centres that together are offered more than they can do; figures without an aim.
        seed: of all that is random; every day has its own.
        gpus: GPUs of each centre.

    Returns:
        Figures, aims and notes for a report. `pool_gain_pct` is in mean wait, and the least over the numbers of
        centres.
    """
    figures: list[Figure] = []
    gains: list[float] = []
    traffic: dict[int, float] = {}
    began = time.monotonic()
    for centres, days in sizes:
        loads = [(day, work_of(centres, gpus, day)) for day in range(seed, seed + days)]
        isolated = _together([alone(works, centres, gpus) for _, works in loads])
        peers = _together([as_peers(works, centres, gpus, day) for day, works in loads])
        pool = _together([as_pool(works, centres, gpus) for _, works in loads])
        centre_hours = centres * days * HORIZON_S / 3600
        gains.append(gain_pct(isolated.mean_wait_s, peers.mean_wait_s, pool.mean_wait_s))
        traffic[centres] = peers.messages.total() / centre_hours
        prefix = f"{centres}_centres"
        for name, outcome in (("isolated", isolated), ("federated", peers), ("pool", pool)):
            figures.append(Figure(f"{prefix}_{name}_mean_wait", outcome.mean_wait_s, "s"))
            figures.append(Figure(f"{prefix}_{name}_utilization", 100 * outcome.utilization, "%"))
        used = gain_pct(isolated.utilization, peers.utilization, pool.utilization)
        figures += [
            Figure(f"{prefix}_pool_gain", gains[-1], "%"),
            Figure(f"{prefix}_pool_gain_in_utilization", used, "%"),
            Figure(f"{prefix}_jobs", len(peers.waits_s), "jobs"),
            Figure(f"{prefix}_forwards", peers.sent, "forwards"),
            Figure(f"{prefix}_messages_per_centre", traffic[centres], "messages/h"),
        ]
        for kind, count in sorted(peers.messages.items()):
            figures.append(Figure(f"{prefix}_{kind}_per_centre", count / centre_hours, "messages/h"))
    centres, days = overloaded
    loads = [(day, work_of(centres, gpus, day, _OVERLOAD)) for day in range(seed, seed + days)]
    waits = [
        _together([alone(works, centres, gpus) for _, works in loads]).mean_wait_s,
        _together([as_peers(works, centres, gpus, day) for day, works in loads]).mean_wait_s,
        _together([as_pool(works, centres, gpus) for _, works in loads]).mean_wait_s,
    ]
    prefix = f"{centres}_overloaded_centres"
    for name, wait_s in zip(("isolated", "federated", "pool"), waits, strict=True):
        figures.append(Figure(f"{prefix}_{name}_mean_wait", wait_s, "s"))
    figures.append(Figure(f"{prefix}_pool_gain", gain_pct(*waits), "%"))
    figures.append(Figure("simulation_time", time.monotonic() - began, "s"))
    aims = [Aim("pool_gain_pct", min(gains), 90.0, "higher")]
    full = [centres for centres, _ in sizes if centres > MOST_NEIGHBOURS + 1]
    if len(full) > 1:
        # With fewer, not everybody has eight neighbours yet.
        aims.append(Aim("control_traffic_growth", traffic[full[-1]] / traffic[full[0]], 1.25, "lower"))
    notes = [
        f"simulated: {gpus} GPUs per centre; each centre is offered from a fifth to nearly twice of the mean, which "
        f"is {LOAD:.0%} of what all can do together, or {_OVERLOAD:.0%} where overloaded; jobs arrive for "
        f"{HORIZON_S / 3600:.0f} h; bench/federation_load.py says where the load comes from",
        "where even the pool is overloaded, peers reach less of it; why was not measured",
        "of the messages per centre, most are capacity that is told again every 20 s, whatever the number of centres; "
        "offers, forwards and renewals, which are played, are listed by themselves",
    ]
    return figures, aims, notes
