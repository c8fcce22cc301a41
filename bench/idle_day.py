"""A day of sessions: arrivals from a trace, runs and pauses drawn from published quantiles.

From the trace (Philly's job log, Jeon et al., ATC 2019, cut by virtual cluster, with the models that Gavel, OSDI 2020,
gave its jobs) come when a session begins and which model it works on. The trace has no sessions and no pauses, so these
are drawn, always alike for one seed:

- **Runs and pauses**: NotebookOS (Carver et al., ASPLOS 2026, doi 10.1145/3760250.3762230) tells of its trace of
  Adobe's notebooks: half of the runs take 2 minutes or less, three quarters 5 or less; the next run begins 5 minutes
  after the last one began (median), never less than 4; reserved GPUs are idle for more than 81 % of the time. The
  figures are taken from a published summary of the paper. A log-normal distribution goes through the two quantiles of
  a run; 4 minutes and a log-normal rest with a median of 1 minute make the time from run to run, the rest's width
  (`REST_SIGMA`) chosen so that its mean agrees with the idle time. The pause is what is left of it after the run.
- **Length of a session**: nothing published was found. It is taken as evenly distributed from 2 to 8 hours.
- **Memory of a model**: an estimate of this file (`required_mib`). A job that had several GPUs in the trace becomes a
  session with a whole card.
"""

from __future__ import annotations

import gzip
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["DAY_S", "Arrival", "Run", "Session", "arrivals_of", "busiest_day", "sessions_of", "slower"]

DAY_S = 86400.0
RUN_MEDIAN_S, RUN_P75_S = 120.0, 300.0
SHORTEST_PERIOD_S, MEDIAN_PERIOD_S = 240.0, 300.0
REST_SIGMA = 2.5
SHORTEST_SESSION_S, LONGEST_SESSION_S = 2 * 3600.0, 8 * 3600.0

_QUARTILE = 0.6744897501960817
"""Of the standard normal distribution."""
_RUN_SIGMA = math.log(RUN_P75_S / RUN_MEDIAN_S) / _QUARTILE
_BATCH = re.compile(r"\(batch size (\d+)\)")
_MIB_OF: dict[str, tuple[float, float]] = {
    "ResNet-18": (1500, 5),
    "ResNet-50": (1800, 85),
    "Transformer": (1500, 35),
    "LM": (1500, 40),
    "Recommendation": (2000, 1.1),
    "CycleGAN": (9000, 0),
    "A3C": (1500, 0),
}
"""Model: MiB without a batch, and for each example of one."""


@dataclass(frozen=True)
class Arrival:
    """One line of a trace."""

    at_s: float
    """Since the trace began."""
    model: str
    gpus: int


@dataclass(frozen=True)
class Run:
    """One run instruction of a session."""

    pause_s: float
    """From the end of the run before to this instruction; 0 for the first."""
    length_s: float


@dataclass(frozen=True)
class Session:
    """A person's session: it works through its runs, one after the other, and ends."""

    id: str
    tenant: str
    begins_s: float
    profile: str
    """Profile that it needs by name; "" for any with enough memory."""
    required_mib: int
    runs: tuple[Run, ...]
    closing_s: float
    """From the end of its last run to its own."""

    @property
    def busy_s(self) -> float:
        """How long it uses a share."""
        return sum(run.length_s for run in self.runs)


def required_mib(model: str) -> int:
    """Returns what a model of the trace needs, in MiB: an estimate.

    Raises:
        ValueError: the model is unknown.
    """
    name = model.split(" (")[0]
    if name not in _MIB_OF:
        raise ValueError(f"the trace has a model that is not known here: {model}")
    found = _BATCH.search(model)
    base, each = _MIB_OF[name]
    return round(base + each * (int(found[1]) if found else 0))


def arrivals_of(path: Path) -> list[Arrival]:
    """Returns what a trace file holds, in the order of arrival.

    Args:
        path: gzip, tab-separated: model, command, argument, whether it needs data, steps, seconds, number of GPUs.
    """
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            fields = line.rstrip("\n").split("\t")
            found.append(Arrival(float(fields[-2]), fields[0], int(fields[-1])))
    return sorted(found, key=lambda one: one.at_s)


def busiest_day(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Returns the arrivals of the day with the most of them, from 0 s on."""
    day, _ = max(Counter(int(one.at_s // DAY_S) for one in arrivals).items(), key=lambda pair: (pair[1], -pair[0]))
    return [replace(one, at_s=one.at_s - day * DAY_S) for one in arrivals if one.at_s // DAY_S == day]


def sessions_of(arrivals: Sequence[Arrival], tenant: str, whole: str, seed: int) -> list[Session]:
    """Returns a session for each arrival.

    Args:
        arrivals: when they begin, and with which model.
        tenant: whose they are.
        whole: profile of a whole card.
        seed: of what is drawn.
    """
    draw = random.Random(f"{seed}/{tenant}")
    sessions = []
    for number, arrival in enumerate(arrivals):
        runs, closing_s = _runs(draw)
        several = arrival.gpus > 1
        sessions.append(
            Session(
                f"{tenant}-{number}",
                tenant,
                arrival.at_s,
                whole if several else "",
                0 if several else required_mib(arrival.model),
                runs,
                closing_s,
            )
        )
    return sessions


def slower(sessions: Sequence[Session], factor: float) -> list[Session]:
    """Returns the same sessions with the same runs and every pause `factor` times as long."""
    return [
        replace(
            one,
            runs=tuple(replace(run, pause_s=run.pause_s * factor) for run in one.runs),
            closing_s=one.closing_s * factor,
        )
        for one in sessions
    ]


def _runs(draw: random.Random) -> tuple[tuple[Run, ...], float]:
    left_s = draw.uniform(SHORTEST_SESSION_S, LONGEST_SESSION_S)
    runs: list[Run] = []
    pause_s = 0.0
    while not runs or pause_s < left_s:
        length_s = draw.lognormvariate(math.log(RUN_MEDIAN_S), _RUN_SIGMA)
        runs.append(Run(pause_s, length_s))
        left_s -= pause_s + length_s
        rest_s = draw.lognormvariate(math.log(MEDIAN_PERIOD_S - SHORTEST_PERIOD_S), REST_SIGMA)
        pause_s = max(SHORTEST_PERIOD_S + rest_s - length_s, 0.0)
    return tuple(runs), max(left_s, 0.0)
