"""The load of simulated centres: who submits what, where and when, and who knows whom.

Durations are log-normal with the median and the 90th percentile of the jobs in the trace of Weng et al., "Beware of
Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient Descent", USENIX ATC 2023 (485 s and 6518
s), ended after four hours. Arrivals are a Poisson process whose rate follows the hour of the day as a sine, with half
of its mean as amplitude, as the submissions of Hu et al., "Characterization and Prediction of Deep Learning Workloads
in Large-Scale GPU Datacenters", SC 2021 do between night and day; centres are spread over the time zones. How load is
spread over centres is an assumption, and the point of the exercise: from a fifth to nearly twice of the mean, so that
some centres have more than they can do while others are almost idle. So is the mix of sizes: the trace asks for whole
GPUs in three of four cases, but what is cut into slices is asked for in slices.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

__all__ = ["HORIZON_S", "LOAD", "MOST_NEIGHBOURS", "Work", "neighbours", "work_of"]

HORIZON_S = 4 * 3600.0
"""Jobs arrive for this long."""
_MEDIAN_S = 485.0
_P90_S = 6518.0
_LONGEST_S = 4 * 3600.0
_Z90 = 1.2815515655446004
_DAY_S = 86400.0
_SIZES = (("1g.10gb", 1, 0.4), ("2g.20gb", 2, 0.25), ("3g.40gb", 4, 0.2), ("7g.80gb", 8, 0.15))
"""Profile, memory slices, share of the jobs."""
LOAD = 0.9
"""Of all centres together, as a share of what they could do."""
MOST_NEIGHBOURS = 8


@dataclass(frozen=True)
class Work:
    """One job."""

    id: str
    centre: int
    at_s: float
    profile: str
    slices: int
    """Memory slices of that profile."""
    length_s: float


def work_of(centres: int, gpus: int, seed: int, total: float = LOAD, gpu_slices: int = 8) -> list[Work]:
    """Returns the jobs of all centres, by time.

    Args:
        centres: how many there are.
        gpus: GPUs of each.
        seed: of all that is random.
        total: load of all centres together, as a share of what they could do.
        gpu_slices: memory slices of a GPU.
    """
    chance = random.Random(seed)
    lengths = [_length_s(chance) for _ in range(20_000)]
    mean_s = sum(lengths) / len(lengths)
    mean_slices = sum(slices * share for _, slices, share in _SIZES)
    full_rate = gpus * gpu_slices / (mean_s * mean_slices)
    # Evenly spread from cold to hot, so that every number of centres has the same skew.
    loads = [0.2 + 1.6 * (number + 0.5) / centres for number in range(centres)]
    chance.shuffle(loads)
    found: list[Work] = []
    for centre, load in enumerate(loads):
        phase = chance.random() * 2 * math.pi
        at_s = 0.0
        most = full_rate * total * load * 1.5
        while True:
            at_s += chance.expovariate(most)
            if at_s >= HORIZON_S:
                break
            now = 1 + 0.5 * math.sin(phase + 2 * math.pi * at_s / _DAY_S)
            if chance.random() * 1.5 > now:
                continue
            profile, slices, _ = chance.choices(_SIZES, [share for *_, share in _SIZES])[0]
            found.append(Work(f"{centre}-{len(found)}", centre, at_s, profile, slices, chance.choice(lengths)))
    return sorted(found, key=lambda work: work.at_s)


def _length_s(chance: random.Random) -> float:
    sigma = math.log(_P90_S / _MEDIAN_S) / _Z90
    return min(_LONGEST_S, max(1.0, chance.lognormvariate(math.log(_MEDIAN_S), sigma)))


def neighbours(centres: int, seed: int) -> list[dict[int, float]]:
    """Returns whom each centre knows, with the round-trip time in seconds: the nearest on a ring, and some far away.

    At most eight each, and each knows who knows it.
    """
    chance = random.Random(seed)
    known: list[dict[int, float]] = [{} for _ in range(centres)]

    def join(one: int, other: int, round_trip_s: float) -> None:
        if one != other and len(known[one]) < MOST_NEIGHBOURS and len(known[other]) < MOST_NEIGHBOURS:
            known[one][other] = known[other][one] = round_trip_s

    for step in (1, 2):
        for one in range(centres):
            join(one, (one + step) % centres, chance.uniform(0.005, 0.03))
    for one in range(centres):
        for other in chance.sample(range(centres), min(centres, 16)):
            if len(known[one]) >= MOST_NEIGHBOURS:
                break
            if other not in known[one]:
                join(one, other, chance.uniform(0.03, 0.15))
    return known
