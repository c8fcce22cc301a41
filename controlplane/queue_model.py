"""How long waiting jobs will wait, and how long one more would: fleet, queue and durations in, waits out. Pure.

Events are played in the order of time: a share ends, and what waits is placed on its GPU in the order of the queue,
which is best fit with best index, as `schedule` places. A job that does not fit is overtaken, until its patience is
over; then the placement that becomes free soonest is kept for it. Where the schedule is finer, this is coarser: only
the first of the jobs with one need keeps a placement, what rests is left out, and so is the time between two tries of
one job.

What it costs does not grow with the queue. When nothing fits anywhere, only a GPU on which something ended can take
a job, and of all jobs with one need only the first has to be tried. Playing stops after `most` placements; who is
further behind is told a wait by the rate at which places were had until then.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from controlplane.fleet import Geometry, GpuView, Shape, span
from controlplane.gpu_timeline import GpuTimeline, shape_of
from controlplane.queued_job import QueuedJob
from controlplane.reservations import AttemptKey
from controlplane.sizing import choices_for
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["MOST_PLACED", "Expectation", "Play", "Wait", "expect"]

MOST_PLACED = 500
"""Placements that are played."""
_MOST_LOOKED_AT = 64
"""GPUs among which a placement to keep is looked for."""
_MOST_KEPT = 64
"""Placements that are kept, one after the other."""


@dataclass(frozen=True)
class Wait:
    """How long one job will wait."""

    seconds: float | None
    """None when that cannot be known: nobody knows when what is in its way ends, or it fits nowhere."""
    profile: str = ""
    """What it would get."""
    gpu_model: str = ""
    played: bool = True
    """False when it is so far behind that its wait was told by the rate of those before it."""


@dataclass
class Expectation:
    """What was found."""

    waits: dict[str, Wait] = field(default_factory=dict)
    """By job id."""
    placed: int = 0
    """Placements that were played."""

    def of(self, job_id: str) -> Wait:
        """Returns the wait of a job; unknown for one that was not asked about."""
        return self.waits.get(job_id, _NOT_KNOWN)


_NOT_KNOWN = Wait(None)


def expect(
    gpus: Sequence[GpuView],
    queue: Iterable[QueuedJob],
    at: float,
    *,
    patience_s: float,
    remaining_s: Callable[[AttemptKey], float | None],
    duration_s: Callable[[QueuedJob], float | None],
    wondering: Iterable[QueuedJob] = (),
    most: int = MOST_PLACED,
) -> Expectation:
    """Returns how long jobs will wait.

    Args:
        gpus: every GPU that can be cut, with what is held of it.
        queue: every job that waits.
        at: now, in seconds since the epoch.
        patience_s: how long a job lets itself be overtaken, in seconds.
        remaining_s: for how long an attempt still holds its share, in seconds; None when that is not known.
        duration_s: how long a waiting job takes once it has begun, in seconds; None when that is not known.
        wondering: jobs that do not wait, but ask how long they would; they take nothing.
        most: placements that are played.
    """
    return Play([gpu for gpu in gpus if gpu.usable], at, patience_s, remaining_s, duration_s).run(
        queue, wondering, most
    )


@dataclass(eq=False)
class _Line:
    """Waiting jobs with one need, in the order of the queue."""

    choices: Sequence[ProfileChoice]
    nodes: tuple[str, ...]
    asks: bool
    """They take nothing."""
    number: int
    jobs: deque[QueuedJob] = field(default_factory=deque)

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        return self.jobs[0].rank


_Turn = tuple[tuple[bool, bool, int, int], int, _Line]


class Play:
    """A centre while time passes: `run` plays what is known to the end, `arrive` and `advance` step by step.

    Args:
        gpus: the GPUs on which something may be placed.
        at: when it begins, in seconds since the epoch; all other times are from then on.
        patience_s: how long a job lets itself be overtaken, in seconds.
        remaining_s: for how long an attempt still holds its share, in seconds; None when that is not known.
        duration_s: how long a waiting job takes once it has begun, in seconds; None when that is not known.
        most_kept: placements that are kept for jobs whose patience is over, one after the other.
        most_looked_at: GPUs among which such a placement is looked for.
    """

    def __init__(
        self,
        gpus: Sequence[GpuView],
        at: float,
        patience_s: float,
        remaining_s: Callable[[AttemptKey], float | None],
        duration_s: Callable[[QueuedJob], float | None],
        *,
        most_kept: float = _MOST_KEPT,
        most_looked_at: int = _MOST_LOOKED_AT,
    ) -> None:
        self._at = at
        self._patience_s = patience_s
        self._duration_s = duration_s
        self._geometries = tuple(dict.fromkeys(gpu.geometry for gpu in gpus))
        self._timeline = GpuTimeline(gpus, remaining_s)
        self._lines: dict[Hashable, _Line] = {}
        self._kept: dict[_Line, tuple[int, Shape, int]] = {}
        """For whose first job a placement is kept: GPU, shape, first slice."""
        self._keeps = most_kept
        self._most_looked_at = most_looked_at
        self._touched: dict[int, None] = {}
        """GPUs on which room has become free, and nobody has looked."""
        self._now_s = 0.0
        self._found = Expectation()

    # -- playing

    def run(self, queue: Iterable[QueuedJob], wondering: Iterable[QueuedJob], most: int) -> Expectation:
        """Plays until everybody has a place, nothing ends any more, or `most` were placed."""
        for job in sorted((job for job in queue if not job.rest), key=lambda job: job.rank):
            self._join(job, asks=False)
        for job in wondering:
            self._join(job, asks=True)
        self._everywhere(self._lines.values())
        while (
            self.next_end_s < math.inf and any(line.jobs for line in self._lines.values()) and self._found.placed < most
        ):
            self.advance(self.next_end_s)
        self._tell_the_rest(stopped=self.next_end_s < math.inf)
        return self._found

    @property
    def next_end_s(self) -> float:
        """When the next share ends."""
        return self._timeline.next_end_s

    def advance(self, to_s: float) -> None:
        """Lets time pass, and places what fits whenever a share has ended."""
        while self.next_end_s < math.inf and self.next_end_s <= to_s:
            self._now_s = self.next_end_s
            while self.next_end_s <= self._now_s:
                number, mask = self._timeline.end_next()
                self.ended(number, mask)
                self._touched[number] = None
            self._look()
        self._now_s = max(self._now_s, to_s)

    def arrive(self, job: QueuedJob) -> None:
        """One more job waits, and is placed if it fits now."""
        self._everywhere([self._join(job, asks=False)])
        self._look()

    def leave(self, job: QueuedJob) -> None:
        """A job waits no longer."""
        for line in self._lines.values():
            if job in line.jobs:
                line.jobs.remove(job)
                own = self._kept.pop(line, None) if not line.jobs else None
                if own is not None:
                    self._touched[own[0]] = None
        self._look()

    def placed(self, job: QueuedJob, number: int, shape: Shape, start: int) -> None:
        """A job has begun on a GPU; for whoever wants to know."""

    def ended(self, number: int, mask: int) -> None:
        """A share of a GPU has ended; likewise."""

    def _look(self) -> None:
        while self._touched:
            self._on(self._touched.popitem()[0])

    def _join(self, job: QueuedJob, *, asks: bool) -> _Line:
        key = (job.need, job.nodes, job.priority if asks else None, job.id if asks else None)
        line = self._lines.get(key)
        if line is None:
            found = _choices(job.profile, job.required_mib, self._geometries)
            choices = [one for one in found if job.gpu_model in {"", one.gpu_model}]
            line = self._lines[key] = _Line(choices, job.nodes, asks, len(self._lines))
        line.jobs.append(job)
        return line

    def _everywhere(self, lines: Iterable[_Line]) -> None:
        """Places what fits now, anywhere."""
        turn = self._turn(line for line in lines if line.choices)
        while turn:
            *_, line = heapq.heappop(turn)
            found = self._anywhere(line)
            if found is None:
                self._keep(line)
                continue
            self._place(line, *found)
            if line.jobs:
                heapq.heappush(turn, (line.rank, line.number, line))

    @staticmethod
    def _turn(lines: Iterable[_Line]) -> list[_Turn]:
        turn = [(line.rank, line.number, line) for line in lines if line.jobs]
        heapq.heapify(turn)
        return turn

    def _anywhere(self, line: _Line) -> tuple[int, Shape, int] | None:
        rooms = {number for number, _, _ in self._kept.values()}
        for node in line.nodes:
            for choice in line.choices:
                best: tuple[tuple[int, int], int, Shape, int] | None = None
                for number in self._timeline.of_node(node) if node else self._timeline.one_of_each(choice, rooms):
                    found = self._timeline.gpus[number].fits(choice, self._kept_on(number, line))
                    if found is not None and (best is None or (found[0], number) < best[:2]):
                        best = found[0], number, found[1], found[2]
                if best is not None:
                    return best[1:]
        return None

    def _on(self, number: int) -> None:
        """Places what fits on one GPU; nothing fits on any other."""
        node = self._timeline.gpus[number].gpu.node_id
        turn = self._turn(line for line in self._lines.values() if line.choices and {"", node} & set(line.nodes))
        while turn:
            *_, line = heapq.heappop(turn)
            placement = self._fitting(line, number)
            if placement is None:
                self._keep(line)
                continue
            self._place(line, *placement)
            if line.jobs:
                heapq.heappush(turn, (line.rank, line.number, line))

    def _fitting(self, line: _Line, number: int) -> tuple[int, Shape, int] | None:
        timed = self._timeline.gpus[number]
        own = self._kept.get(line)
        if own is not None and own[0] == number:
            _, shape, start = own
            room = not timed.held & span(start, shape.size)
            if room and timed.counts.get(shape.profile, 0) < shape.max_instances:
                return own
        for choice in line.choices:
            found = timed.fits(choice, self._kept_on(number, line))
            if found is not None:
                return number, found[1], found[2]
        return None

    def _place(self, line: _Line, number: int, shape: Shape, start: int) -> None:
        job = line.jobs.popleft()
        own = self._kept.pop(line, None)
        self._found.waits[job.id] = Wait(self._now_s, shape.profile, self._timeline.gpus[number].gpu.geometry.gpu_model)
        if line.asks:
            return
        self._found.placed += 1
        duration_s = self._duration_s(job)
        end_s = math.inf if duration_s is None else self._now_s + max(0.001, duration_s)
        self._timeline.take(number, shape, start, end_s)
        self.placed(job, number, shape, start)
        if own is not None and own[0] != number:
            self._touched[own[0]] = None  # what was kept there is no longer

    # -- patience

    def _keep(self, line: _Line) -> None:
        """Keeps the placement that becomes free soonest for a job whose patience is over."""
        if (
            line.asks
            or line in self._kept
            or not self._keeps
            or self._at + self._now_s - line.jobs[0].since < self._patience_s
        ):
            return
        self._keeps -= 1
        best: tuple[float, int, Shape, int] | None = None
        node = line.nodes[-1]
        numbers = self._timeline.of_node(node) if node else range(len(self._timeline.gpus))
        for number in numbers[: self._most_looked_at]:
            timed = self._timeline.gpus[number]
            kept = self._kept_on(number, line)
            for choice in line.choices:
                shape = shape_of(timed.gpu.geometry, choice)
                for start in shape.starts if shape is not None else ():
                    mask = span(start, shape.size) if shape is not None else 0
                    if shape is None or mask & kept:
                        continue
                    end_s = max((end_s for end_s, held in timed.ends if held & mask), default=0.0)
                    if end_s < math.inf and (best is None or end_s < best[0]):
                        best = end_s, number, shape, start
        if best is not None:
            self._kept[line] = best[1:]

    def _kept_on(self, number: int, line: _Line) -> int:
        """Returns the memory slices of a GPU that are kept for others."""
        mask = 0
        for whose, (where, shape, start) in self._kept.items():
            if where == number and whose is not line:
                mask |= span(start, shape.size)
        return mask

    # -- who was not placed

    def _tell_the_rest(self, *, stopped: bool) -> None:
        rest = sorted(
            ((job, line.asks) for line in self._lines.values() if line.choices for job in line.jobs),
            key=lambda one: one[0].rank,
        )
        rate = self._found.placed / self._now_s if stopped and self._now_s > 0 else 0.0
        before = 0
        for job, asks in rest:
            wait_s = self._now_s + (before + 1) / rate if rate else None
            self._found.waits[job.id] = Wait(wait_s, played=False)
            before += not asks
        for line in self._lines.values():
            if not line.choices:
                self._found.waits.update({job.id: _NOT_KNOWN for job in line.jobs})


@functools.lru_cache(maxsize=4096)
def _choices(profile: str, required_mib: int, geometries: tuple[Geometry, ...]) -> Sequence[ProfileChoice]:
    return choices_for(profile, required_mib, geometries)
