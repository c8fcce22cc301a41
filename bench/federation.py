"""What it costs to have another centre run a job, and what it gains.

Real centres as processes, each with a node daemon with emulated cards, made peers through relays that delay what they
pass on. The first centre is full, so what is submitted there is forwarded; the baseline is the same no-op job submitted
at the other centre itself, in turn. Then a simulation of many centres (bench/federation_simulation.py).

    python -m bench.federation [--json] [--rounds 24] [--runtime podman] [--no-simulation]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from bench.delay_relay import RelayProcess, round_trips
from bench.federated_centres import Site, federated, fill
from bench.federation_simulation import simulate
from bench.federation_trips import Pairs, figures, trips_by_delay, trips_by_time
from bench.report import Aim, Figure, Report
from controlplane.forwarding import Rules
from puhui.rpc.moment import moment
from puhui.v1.job_pb2 import JOB_STATE_SUCCEEDED, Job, JobEvent, JobSpec, Resources

CARD = "H100-80GB-SXM5"
WHOLE, SMALL = "7g.80gb", "1g.10gb"
ROUND_TRIPS_S = (0.0, 0.02, 0.08)
CODE = {"noop.py": b"pass\n"}
SPEC = JobSpec(name="noop", command=["date", "+%s.%N"], resources=Resources(profile=SMALL))
"""It says when it began: what a node tells is when it asked for that."""
_WARM_UP = 2
_MANY = 48
_PEERS = (1, 2)
_WAIT_S = 120.0


@dataclass(frozen=True)
class Ran:
    """One no-op job, whole."""

    submitted: float
    """Just before, in seconds since the epoch."""
    known: float
    """Its result was known to the submitter."""
    started: float
    """Its command had begun, as itself says; all centres have one clock here."""
    events: Sequence[JobEvent]
    there: str
    """Its id at the peer that ran it; empty when none did."""

    @classmethod
    def of(cls, site: Site, job: Job, submitted: float, known: float) -> Self:
        """Looks at a job that has ended."""
        said = b"".join(chunk.data for chunk in site.centre.logs(job.id))
        return cls(submitted, known, float(said), list(site.centre.watch(job.id)), job.attempts[-1].peer_job_id)

    def at(self, reason: str) -> float:
        """When the last event of a kind was."""
        return max(moment(event.time) for event in self.events if event.reason == reason)


def run(site: Site, *, forwarded: bool) -> Ran:
    """Runs one no-op job from its submission to its result.

    Raises:
        RuntimeError: it did not succeed, or ran elsewhere than it was to.
    """
    submitted = time.time()
    job = site.centre.submit(SPEC, CODE)
    ended = site.centre.wait(job.id, timeout_s=_WAIT_S)
    known = time.time()
    _require(ended, forwarded=forwarded)
    return Ran.of(site, ended, submitted, known)


def _require(job: Job, *, forwarded: bool) -> None:
    if job.state != JOB_STATE_SUCCEEDED:
        raise RuntimeError(f"the no-op job {job.id} did not succeed: {job.message}")
    if bool(job.attempts[-1].peer) != forwarded:
        raise RuntimeError(f"the no-op job {job.id} was {'not ' if forwarded else ''}forwarded")


def measure(sites: Sequence[Site], relays: RelayProcess, rounds: int, round_trip_s: float) -> Pairs:
    """Measures forwarded and local jobs in turn at one round-trip time."""
    relays.delay(round_trip_s / 2)
    pairs = Pairs()
    for number in range(_WARM_UP + rounds):
        relays.passed()
        away = run(sites[0], forwarded=True)
        passed = relays.passed()
        # Its results are fetched by now, but what it left at the other centre may still be cleared away.
        sites[1].centre.wait(away.there, timeout_s=_WAIT_S)
        here = run(sites[1], forwarded=False)
        if number < _WARM_UP:
            continue
        pairs.forwarded_start_s.append(away.started - away.submitted)
        pairs.forwarded_total_s.append(away.known - away.submitted)
        pairs.local_start_s.append(here.started - here.submitted)
        pairs.local_total_s.append(here.known - here.submitted)
        pairs.considered_s.append(away.at("FORWARDING") - away.submitted)
        pairs.bound_s.append(away.at("FORWARDED") - away.at("FORWARDING"))
        # The first centre asks over link 1, which leads to the other. What starts the command is sent before.
        asked = [one for one in passed if one.link == 1 and away.submitted <= one.at_s <= away.started]
        pairs.messages.append(round_trips(asked))
    return pairs


def trips(rounds: int, runtime: str) -> tuple[list[Figure], list[Aim], dict[str, str]]:
    """Measures what a forward adds at each round-trip time."""
    cards = [f"{CARD}:1", f"{CARD}:1"]
    found: dict[float, Pairs] = {}
    with federated(cards, runtime) as (sites, relays), fill(sites[0], WHOLE):
        for round_trip_s in ROUND_TRIPS_S:
            found[round_trip_s] = measure(sites, relays, rounds, round_trip_s)
        [node] = sites[1].centre.nodes()
        versions = {"runtime": node.inventory.runtime.version or "process", "driver": "emulated"}
    told = [figure for round_trip_s, pairs in found.items() for figure in figures(pairs, round_trip_s)]
    told.append(Figure("forward_round_trips_by_delay", trips_by_delay(found), "round trips"))
    told.append(Figure("rounds", rounds, "count"))
    longest = ROUND_TRIPS_S[-1]
    aim = Aim("forward_round_trips", trips_by_time(found[longest], longest), 4.0, "lower")
    return told, [aim], versions


def rates(peers: int, runtime: str) -> list[Figure]:
    """Measures how many jobs a second a full centre forwards, and how many a centre accepts and starts by itself."""
    cards = [f"{CARD}:1", *[f"{CARD}:8"] * peers]
    with federated(cards, runtime) as (sites, _), fill(sites[0], WHOLE):
        bundle = sites[0].centre.put_bundle(CODE).id
        for site in sites[1:]:
            site.centre.put_bundle(CODE)
        run(sites[0], forwarded=True)
        there = _many(sites[0], bundle, forwarded=True)
        here = _many(sites[1], bundle, forwarded=False)
    name = f"{peers}_peer" + ("s" if peers > 1 else "")
    return [
        Figure(f"{name}_forwards", there.bound, "1/s"),
        Figure(f"{name}_forwarded_starts", there.started, "1/s"),
        Figure(f"{name}_local_submissions", here.accepted, "1/s"),
        Figure(f"{name}_local_starts", here.started, "1/s"),
        Figure(f"{name}_forwarded_to_local_starts", there.started / here.started, "ratio"),
    ]


@dataclass(frozen=True)
class Rate:
    """Many jobs, each second."""

    accepted: float
    started: float
    bound: float
    """By peers; the same as `accepted` where there are none."""


def _many(site: Site, bundle: str, *, forwarded: bool) -> Rate:
    """Submits many no-op jobs, one after another, and waits for them all."""
    began = time.time()
    jobs = [site.centre.submit(SPEC, bundle) for _ in range(_MANY)]
    accepted = time.time()
    ran = []
    for job in jobs:
        ended = site.centre.wait(job.id, timeout_s=_WAIT_S)
        _require(ended, forwarded=forwarded)
        ran.append(Ran.of(site, ended, began, accepted))
    bound = max(one.at("FORWARDED") for one in ran) if forwarded else accepted
    started = max(one.started for one in ran)
    return Rate(*(_MANY / (at - began) for at in (accepted, started, bound)))


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description="What it costs to have another centre run a job, and what it gains.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=24, help="measured pairs at each round-trip time")
    parser.add_argument("--runtime", choices=("podman", "process"), default="podman", help="what runs the no-op jobs")
    parser.add_argument("--no-simulation", action="store_true", help="leave the simulation out")
    options = parser.parse_args()
    told, aims, versions = trips(options.rounds, options.runtime)
    for peers in _PEERS:
        told += rates(peers, options.runtime)
    least_s, most_s = Rules().first_delay_s
    notes = [
        "Cards are emulated with zero driver latency. Delay is emulated by a TCP relay that this benchmark runs: half "
        "of the round trip in each direction, for both centres' connections; bandwidth and loss are not emulated, and "
        "the connections are made before.",
        "forward_round_trips: how much later, in the median, the command starts when the job is forwarded than when it "
        "is submitted at the other centre itself, divided by the round-trip time of 80 ms. So all that a forward takes "
        f"counts as well as the way: a pause of {least_s:g} to {most_s:g} s before the first offer is asked for, "
        "decisions, writing down, and what holds the container to its lease.",
        "forward_round_trips_by_delay: the slope, over the round-trip time, of the quickest start among the forwarded "
        "jobs (the pause is random): what the way alone takes. It is about one and a half: an offer, and the way there "
        "of the job. waits_for_answers: how often the relay saw the first centre send a message after it had got one, "
        "before the command started; capacity that is told meanwhile may add to it.",
        f"forwards: {_MANY} no-op jobs are submitted one after another at a full centre, from the first submission "
        "until the last is bound at a peer (forwarded_starts: until its command has begun), without delay. "
        "local_submissions and local_starts: the same at a centre that has room, until the last is accepted, and has "
        "begun. Containers that have begun compete for the processors of this machine with all daemons of all "
        "centres; a centre asks for at most 32 offers a second.",
    ]
    if not options.no_simulation:
        more, promised, said = simulate()
        told, aims, notes = told + more, aims + promised, notes + said
    Report(bench="federation", figures=told, aims=aims, versions=versions, notes=notes).show(options.json)


if __name__ == "__main__":
    main()
