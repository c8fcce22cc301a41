"""How long jobs still take. `remaining` is pure; `Durations` remembers what it needs.

In this order: what jobs with the same command took, of those that took longer than this one has run; else, as long
again as it has run. The latter is the median of what is left where lifetimes are spread as 1/T, which was found for
processes of Unix and has been found for jobs since: Harchol-Balter and Downey, "Exploiting process lifetime
distributions for dynamic load balancing", ACM TOCS 15(3), 1997. `max_duration` bounds both. What cannot be known is
None, and never 0.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from controlplane.records import JobQuery, JobRecord
from controlplane.reservations import AttemptKey
from puhui.rpc.moment import moment, seconds
from puhui.v1 import job_pb2

__all__ = ["JUST_BEGUN_S", "UNKNOWN", "Basis", "Durations", "Estimate", "History", "JobsStored", "remaining"]

JUST_BEGUN_S = 600.0
"""What is left of a job of which nothing is known, while it has run for less than this. The middle of what was found:
the median GPU job took 206 s at SenseTime (Hu et al., "Characterization and Prediction of Deep Learning Workloads in
Large-Scale GPU Datacenters", SC 2021) and 23 min at Alibaba (Weng et al., "MLaaS in the Wild", NSDI 2022); in the trace
of Weng et al., "Beware of Fragmentation", ATC 2023, it took 485 s."""

_MOST_KEYS = 4096
_MOST_DURATIONS = 64
_MOST_STARTS = 33
_FIRST_START_S = 1.0
"""What a start is taken to last before one was seen."""
_MOST_LOADED = 2000
_MOST_READ = 256
_FEWEST_ALIKE = 3
"""Durations of jobs that are not quite the same say something from this many on."""


class Basis(StrEnum):
    """On what an estimate rests."""

    LIMIT = "limit"
    """`max_duration`."""
    HISTORY = "history"
    """What jobs like it took."""
    AGE = "age"
    """As long again as it has run."""
    DEFAULT = "default"
    """It has just begun, and nothing is known of jobs like it."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Estimate:
    """How long something still takes."""

    seconds: float | None
    """None when it cannot be known."""
    basis: Basis


UNKNOWN = Estimate(None, Basis.UNKNOWN)


def remaining(age_s: float, limit_s: float | None, history: Sequence[float]) -> Estimate:
    """Returns how long a command still takes.

    Args:
        age_s: it has run for this long, in seconds; 0 when it has not begun.
        limit_s: it is ended after this long; None for no limit.
        history: what commands like it took, in seconds.
    """
    age_s = max(0.0, age_s)
    longer = [one for one in history if one > age_s]
    if longer:
        found = Estimate(statistics.median(longer) - age_s, Basis.HISTORY)
    elif age_s > JUST_BEGUN_S:
        found = Estimate(age_s, Basis.AGE)
    else:
        found = Estimate(JUST_BEGUN_S, Basis.DEFAULT)
    if limit_s is not None and found.seconds is not None and limit_s - age_s < found.seconds:
        return Estimate(max(0.0, limit_s - age_s), Basis.LIMIT)
    return found


class History:
    """What commands took, the newest of each kind: bounded, whatever is run."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def learn(self, spec: job_pb2.JobSpec, taken_s: float) -> None:
        """Notes what a command took, in seconds."""
        for key in _kinds(spec):
            kept = self._kept.setdefault(key, deque(maxlen=_MOST_DURATIONS))
            kept.append(taken_s)
            self._kept.move_to_end(key)
        while len(self._kept) > _MOST_KEYS:
            self._kept.popitem(last=False)

    def of(self, spec: job_pb2.JobSpec) -> Sequence[float]:
        """Returns what commands like it took: the same command, else the same program, of the same tenant."""
        for fewest, key in zip((1, _FEWEST_ALIKE), _kinds(spec), strict=True):
            kept = self._kept.get(key, ())
            if len(kept) >= fewest:
                return tuple(kept)
        return ()

    def __len__(self) -> int:
        return len(self._kept)


def _kinds(spec: job_pb2.JobSpec) -> tuple[Hashable, Hashable]:
    return (spec.tenant, hash(tuple(spec.command))), (spec.tenant, "program", hash(tuple(spec.command[:2])))


@dataclass
class _Known:
    """A job that waits or holds a share."""

    spec: job_pb2.JobSpec
    attempt: int = 0
    began: float | None = None
    """Its command started, or a session got its share, at this time; None while it has not."""


class JobsStored(Protocol):
    """The part of the store that is read."""

    async def job(self, job_id: str) -> JobRecord | None:
        """Returns a job."""

    async def jobs(self, query: JobQuery) -> list[JobRecord]:
        """Returns jobs, the newest first."""


class Durations:
    """How long the jobs of a centre still take.

    Args:
        store: where jobs are read.
    """

    def __init__(self, store: JobsStored) -> None:
        self._store = store
        self._history = History()
        self._known: dict[str, _Known] = {}
        self._starts: deque[float] = deque([_FIRST_START_S], maxlen=_MOST_STARTS)

    @property
    def start_s(self) -> float:
        """From a reservation until its command runs, in seconds: the median of the last ones here."""
        return statistics.median(self._starts)

    async def load(self) -> None:
        """Learns from the jobs that ended last."""
        ended = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED)
        records: list[JobRecord] = []
        while len(records) < _MOST_LOADED:
            before = records[-1].sequence if records else None
            page = await self._store.jobs(JobQuery(states=ended, before_sequence=before, limit=200))
            if not page:
                break
            records.extend(page)
        for record in reversed(records):
            self._learn(record)

    async def refresh(self, held: Collection[AttemptKey], queued: Iterable[str]) -> None:
        """Reads what is not known yet of those that hold shares, then of those that wait; a bounded number each time.

        Args:
            held: the attempts that hold shares.
            queued: ids of the jobs that wait, those first that come first.
        """
        wanted = dict(held)
        budget = _MOST_READ
        for job_id, number in wanted.items():
            known = self._known.get(job_id)
            if (known is None or known.began is None or known.attempt != number) and budget:
                budget -= 1
                await self._read(job_id)
        waiting = list(queued)
        for job_id in waiting:
            if job_id not in self._known and budget:
                budget -= 1
                await self._read(job_id)
        for job_id in self._known.keys() - wanted.keys() - set(waiting):
            del self._known[job_id]
            record = await self._store.job(job_id)
            if record is not None:
                self._learn(record)

    async def _read(self, job_id: str) -> None:
        record = await self._store.job(job_id)
        if record is not None:
            self._known[job_id] = _Known(record.job.spec, len(record.job.attempts), _began(record.job))

    def _learn(self, record: JobRecord) -> None:
        job = record.job
        if job.spec.kind == job_pb2.JOB_KIND_SESSION or not job.attempts or not job.HasField("exit_code"):
            return
        last = job.attempts[-1]
        if last.HasField("start_time") and last.HasField("end_time"):
            self._history.learn(job.spec, max(0.0, moment(last.end_time) - moment(last.start_time)))
        if last.HasField("start_time") and not last.peer:
            self._starts.append(max(0.0, moment(last.start_time) - moment(last.reserve_time)))

    def of_share(self, key: AttemptKey, at: float) -> Estimate:
        """Returns for how long an attempt still holds its share.

        A session holds it for as long as it uses it, about which the same is assumed as about commands.

        Args:
            key: the attempt.
            at: now, in seconds since the epoch.
        """
        known = self._known.get(key[0])
        if known is None:
            return UNKNOWN
        return self._of(known.spec, 0.0 if known.began is None or known.attempt != key[1] else at - known.began)

    def of_job(self, job_id: str) -> Estimate:
        """Returns how long a waiting job is going to take once it has begun."""
        known = self._known.get(job_id)
        return self._of(known.spec, 0.0) if known is not None else Estimate(JUST_BEGUN_S, Basis.DEFAULT)

    def of_spec(self, spec: job_pb2.JobSpec) -> Estimate:
        """Returns how long a job like this takes."""
        return self._of(spec, 0.0)

    def _of(self, spec: job_pb2.JobSpec, age_s: float) -> Estimate:
        limit_s = seconds(spec.max_duration) if spec.HasField("max_duration") else None
        if spec.kind == job_pb2.JOB_KIND_SESSION:
            return remaining(age_s, None, ())
        return remaining(age_s, limit_s, self._history.of(spec))


def _began(job: job_pb2.Job) -> float | None:
    if not job.attempts:
        return None
    last = job.attempts[-1]
    if job.spec.kind == job_pb2.JOB_KIND_SESSION and last.shares:
        return moment(last.shares[-1].hold_time)
    return moment(last.start_time) if last.HasField("start_time") else None
