"""Which stretches of time are counted as usage, and when they begin and end. Pure.

A job's change carries what it means for usage (`records.Change.usage`); the store applies it in the same transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from puhui.v1 import card_pb2, job_pb2

__all__ = [
    "AllEnded",
    "BusyCounted",
    "HoldBegun",
    "HoldEnded",
    "Kind",
    "Owner",
    "ReclaimedBegun",
    "ReclaimedEnded",
    "RunBegun",
    "RunEnded",
    "Stretch",
    "UsageChange",
    "gpu_slices",
    "meter",
]


class Kind(StrEnum):
    """What a stretch of time is."""

    HOLD = "hold"
    """A share was held."""
    RECLAIMED = "reclaimed"
    """The job lived without its share, because reclaim had taken it."""
    RUN = "run"
    """A command ran in the job's container."""


@dataclass(frozen=True)
class HoldBegun:
    """A share is held from now on. Ends what was held or reclaimed before."""

    at: float
    """In seconds since the epoch, as all of these."""
    attempt: int
    profile: str
    gpu_model: str
    compute_slices: int
    gpu_slices: int
    """Compute slices of the whole GPU, see `gpu_slices`."""
    emulated: bool
    counter_s: float | None = 0.0
    """The container's `Idleness.busy_seconds` now; 0 when it is new, None when it is not known."""


@dataclass(frozen=True)
class HoldEnded:
    """The share is held no longer. Nothing when none was."""

    at: float
    counter_s: float | None = None
    """The container's `Idleness.busy_seconds` now; None when it is not known."""
    reclaim_mode: job_pb2.ReclaimMode.ValueType = job_pb2.RECLAIM_MODE_UNSPECIFIED
    """How it was taken back; UNSPECIFIED when it was not."""


@dataclass(frozen=True)
class BusyCounted:
    """The node has told how long the container has used its card."""

    counter_s: float


@dataclass(frozen=True)
class ReclaimedBegun:
    """The job lives on without the share that it held last."""

    at: float


@dataclass(frozen=True)
class ReclaimedEnded:
    """The job lives no longer without its share."""

    at: float


@dataclass(frozen=True)
class RunBegun:
    """A run's command has started."""

    run_id: str
    at: float
    counter_s: float | None = None


@dataclass(frozen=True)
class RunEnded:
    """A run's command has ended. Nothing when it had not started."""

    run_id: str
    at: float
    counter_s: float | None = None


@dataclass(frozen=True)
class AllEnded:
    """The attempt is over: whatever was counted ends."""

    at: float
    counter_s: float | None = None


UsageChange = HoldBegun | HoldEnded | BusyCounted | ReclaimedBegun | ReclaimedEnded | RunBegun | RunEnded | AllEnded


@dataclass(frozen=True)
class Owner:
    """Whose usage it is."""

    job_id: str
    tenant: str
    job_name: str


@dataclass(frozen=True)
class Stretch:
    """A stretch of time that is counted. (job id, kind, number, run id) is unique."""

    job_id: str
    kind: Kind
    number: int
    """Of the hold, from 1 in each job; of a reclaimed stretch or a run, that of the hold before it."""
    run_id: str
    attempt: int
    tenant: str
    job_name: str
    profile: str
    gpu_model: str
    compute_slices: int
    gpu_slices: int
    emulated: bool
    start: float
    """In seconds since the epoch."""
    end: float | None
    """None while it lasts."""
    busy_s: float
    """Seconds in which the share was used, as far as known."""
    counter_s: float | None
    """The container's counter of busy seconds at its start; None when it was not known."""
    reclaim_mode: job_pb2.ReclaimMode.ValueType = job_pb2.RECLAIM_MODE_UNSPECIFIED

    @property
    def key(self) -> tuple[Kind, int, str]:
        """Tells it from the others of its job."""
        return self.kind, self.number, self.run_id


def gpu_slices(gpu: card_pb2.Gpu) -> int:
    """Returns the compute slices of a whole GPU: those of its largest profile (7 on an H100, 4 on an A30)."""
    return max((profile.compute_slices for profile in gpu.profiles), default=0)


def meter(known: Sequence[Stretch], owner: Owner, changes: Sequence[UsageChange]) -> list[Stretch]:
    """Returns the stretches of a job that are new or other than before.

    Args:
        known: those of the job that last still, and the last one that it held.
        owner: whose they are.
        changes: what happened, in order.
    """
    book = _Book(known, owner)
    for change in changes:
        book.apply(change)
    before = {stretch.key: stretch for stretch in known}
    return [stretch for stretch in book.stretches.values() if before.get(stretch.key) != stretch]


class _Book:
    def __init__(self, known: Sequence[Stretch], owner: Owner) -> None:
        self.stretches = {stretch.key: stretch for stretch in known}
        self._owner = owner

    def apply(self, change: UsageChange) -> None:
        match change:
            case HoldBegun():
                self._end((Kind.HOLD, Kind.RECLAIMED), change.at, None)
                self._hold(change)
            case HoldEnded():
                for hold in self._open(Kind.HOLD):
                    self._put(replace(_ended(hold, change.at, change.counter_s), reclaim_mode=change.reclaim_mode))
            case BusyCounted():
                for stretch in self._open(Kind.HOLD, Kind.RUN):
                    self._put(_counted(stretch, change.counter_s))
            case ReclaimedBegun():
                self._reclaimed(change.at)
            case ReclaimedEnded():
                self._end((Kind.RECLAIMED,), change.at, None)
            case RunBegun():
                self._run(change)
            case RunEnded():
                self._run_ended(change)
            case AllEnded():
                self._end(tuple(Kind), change.at, change.counter_s)

    def _open(self, *kinds: Kind) -> list[Stretch]:
        return [stretch for stretch in self.stretches.values() if stretch.end is None and stretch.kind in kinds]

    def _put(self, stretch: Stretch) -> None:
        self.stretches[stretch.key] = stretch

    def _run_ended(self, ended: RunEnded) -> None:
        for run in self._open(Kind.RUN):
            if run.run_id == ended.run_id:
                self._put(_ended(run, ended.at, ended.counter_s))

    def _end(self, kinds: tuple[Kind, ...], at: float, counter_s: float | None) -> None:
        for stretch in self._open(*kinds):
            self._put(_ended(stretch, at, counter_s))

    def _last_hold(self) -> Stretch | None:
        holds = [stretch for stretch in self.stretches.values() if stretch.kind is Kind.HOLD]
        return max(holds, key=lambda hold: hold.number, default=None)

    def _hold(self, begun: HoldBegun) -> None:
        last = self._last_hold()
        self._put(
            Stretch(
                self._owner.job_id,
                Kind.HOLD,
                last.number + 1 if last is not None else 1,
                "",
                begun.attempt,
                self._owner.tenant,
                self._owner.job_name,
                begun.profile,
                begun.gpu_model,
                begun.compute_slices,
                begun.gpu_slices,
                begun.emulated,
                begun.at,
                None,
                0.0,
                begun.counter_s,
            )
        )

    def _reclaimed(self, at: float) -> None:
        last = self._last_hold()
        if last is None or self._open(Kind.RECLAIMED):
            return
        unspecified = job_pb2.RECLAIM_MODE_UNSPECIFIED
        stretch = replace(
            last, kind=Kind.RECLAIMED, start=at, end=None, busy_s=0.0, counter_s=None, reclaim_mode=unspecified
        )
        self._put(stretch)

    def _run(self, begun: RunBegun) -> None:
        last = self._last_hold()
        if last is None or any(run.run_id == begun.run_id for run in self._open(Kind.RUN)):
            return
        self._put(
            replace(
                last,
                kind=Kind.RUN,
                run_id=begun.run_id,
                start=begun.at,
                end=None,
                busy_s=0.0,
                counter_s=begun.counter_s,
                reclaim_mode=job_pb2.RECLAIM_MODE_UNSPECIFIED,
            )
        )


def _counted(stretch: Stretch, counter_s: float | None) -> Stretch:
    if counter_s is None or stretch.counter_s is None:
        return stretch
    # A counter only grows; one that is smaller than before was told late.
    return replace(stretch, busy_s=max(counter_s - stretch.counter_s, stretch.busy_s))


def _ended(stretch: Stretch, at: float, counter_s: float | None) -> Stretch:
    counted = _counted(stretch, counter_s)
    # The clock of a machine may be set back.
    end = max(at, stretch.start)
    return replace(counted, end=end, busy_s=min(counted.busy_s, end - stretch.start))
