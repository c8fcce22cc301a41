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

from controlplane.fleet import Geometry, GpuView, Shape, Use, span
from controlplane.placement import fit
from controlplane.queued_job import QueuedJob
from controlplane.reservations import AttemptKey
from controlplane.sizing import choices_for
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["IDLE_LEAVES_S", "MOST_PLACED", "WARM_LEAVES_S", "Expectation", "Play", "Wait", "expect"]

IDLE_LEAVES_S = 5.0
"""An idle share is taken as gone after this long, once somebody waits for it."""
WARM_LEAVES_S = 1.0
"""A warm slice, likewise: nobody is on it."""
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


@dataclass(eq=False)
class _Card:
    """One GPU while time passes."""

    gpu: GpuView
    held: int
    counts: dict[str, int]
    ends: list[tuple[float, int]]
    """When each share on it ends, infinite when nobody knows, with its mask."""

    def fits(self, choice: ProfileChoice, kept: int) -> tuple[tuple[int, int], Shape, int] | None:
        """Returns the rank, the shape and the first slice of the best placement; None when there is none."""
        shape = _shape(self.gpu.geometry, choice)
        if shape is None or self.counts.get(shape.profile, 0) >= shape.max_instances:
            return None
        found = fit(self.gpu.geometry, shape, self.held | kept)
        return ((found.free_after, -found.kept), shape, found.start) if found is not None else None


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
        self._ends: list[tuple[float, int, int, str]] = []
        """(time from now, GPU, mask, profile)."""
        self._cards = [self._card(number, gpu, remaining_s) for number, gpu in enumerate(gpus)]
        self._alike: dict[tuple[Geometry, int], dict[int, None]] = {}
        self._of_node: dict[str, list[int]] = {}
        for number, card in enumerate(self._cards):
            self._alike.setdefault((card.gpu.geometry, card.held), {})[number] = None
            self._of_node.setdefault(card.gpu.node_id, []).append(number)
        heapq.heapify(self._ends)
        self._lines: dict[Hashable, _Line] = {}
        self._kept: dict[_Line, tuple[int, Shape, int]] = {}
        """For whose first job a placement is kept: GPU, shape, first slice."""
        self._keeps = most_kept
        self._most_looked_at = most_looked_at
        self._touched: dict[int, None] = {}
        """GPUs on which room has become free, and nobody has looked."""
        self._now_s = 0.0
        self._found = Expectation()

    def _card(self, number: int, gpu: GpuView, remaining_s: Callable[[AttemptKey], float | None]) -> _Card:
        counts: dict[str, int] = {}
        ends = []
        for use in gpu.uses:
            counts[use.profile] = counts.get(use.profile, 0) + 1
            left_s = _left_s(use, remaining_s)
            ends.append((left_s, use.mask))
            if left_s < math.inf:
                self._ends.append((left_s, number, use.mask, use.profile))
        return _Card(gpu, gpu.held, counts, ends)

    # -- playing

    def run(self, queue: Iterable[QueuedJob], wondering: Iterable[QueuedJob], most: int) -> Expectation:
        """Plays until everybody has a place, nothing ends any more, or `most` were placed."""
        for job in sorted((job for job in queue if not job.rest), key=lambda job: job.rank):
            self._join(job, asks=False)
        for job in wondering:
            self._join(job, asks=True)
        self._everywhere(self._lines.values())
        while self._ends and any(line.jobs for line in self._lines.values()) and self._found.placed < most:
            self.advance(self._ends[0][0])
        self._tell_the_rest(stopped=bool(self._ends))
        return self._found

    @property
    def next_end_s(self) -> float:
        """When the next share ends."""
        return self._ends[0][0] if self._ends else math.inf

    def advance(self, to_s: float) -> None:
        """Lets time pass, and places what fits whenever a share has ended."""
        while self._ends and self._ends[0][0] <= to_s:
            self._now_s = self._ends[0][0]
            while self._ends and self._ends[0][0] <= self._now_s:
                _, number, mask, profile = heapq.heappop(self._ends)
                self._free(number, mask, profile)
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
        for node in line.nodes:
            for choice in line.choices:
                best: tuple[tuple[int, int], int, Shape, int] | None = None
                for number in self._of_node.get(node, ()) if node else self._one_of_each(choice):
                    found = self._cards[number].fits(choice, self._kept_on(number, line))
                    if found is not None and (best is None or (found[0], number) < best[:2]):
                        best = found[0], number, found[1], found[2]
                if best is not None:
                    return best[1:]
        return None

    def _one_of_each(self, choice: ProfileChoice) -> Iterable[int]:
        """Yields, of GPUs that are alike, one that has not too many slices of the shape, and those with room kept."""
        kept = {number for number, _, _ in self._kept.values()}
        for (geometry, held), numbers in self._alike.items():
            shape = _shape(geometry, choice)
            if shape is None or fit(geometry, shape, held) is None:
                continue
            for number in numbers:
                if self._cards[number].counts.get(shape.profile, 0) < shape.max_instances:
                    yield number
                    if number not in kept:
                        break

    def _on(self, number: int) -> None:
        """Places what fits on one GPU; nothing fits on any other."""
        node = self._cards[number].gpu.node_id
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
        card = self._cards[number]
        own = self._kept.get(line)
        if own is not None and own[0] == number:
            _, shape, start = own
            room = not card.held & span(start, shape.size)
            if room and card.counts.get(shape.profile, 0) < shape.max_instances:
                return own
        for choice in line.choices:
            found = card.fits(choice, self._kept_on(number, line))
            if found is not None:
                return number, found[1], found[2]
        return None

    def _place(self, line: _Line, number: int, shape: Shape, start: int) -> None:
        job = line.jobs.popleft()
        own = self._kept.pop(line, None)
        self._found.waits[job.id] = Wait(self._now_s, shape.profile, self._cards[number].gpu.geometry.gpu_model)
        if line.asks:
            return
        self._found.placed += 1
        self._take(number, shape, start, self._duration_s(job))
        self.placed(job, number, shape, start)
        if own is not None and own[0] != number:
            self._touched[own[0]] = None  # what was kept there is no longer

    def _take(self, number: int, shape: Shape, start: int, duration_s: float | None) -> None:
        mask = span(start, shape.size)
        self._hold(number, self._cards[number].held | mask)
        card = self._cards[number]
        card.counts[shape.profile] = card.counts.get(shape.profile, 0) + 1
        end_s = math.inf if duration_s is None else self._now_s + max(0.001, duration_s)
        card.ends.append((end_s, mask))
        if end_s < math.inf:
            heapq.heappush(self._ends, (end_s, number, mask, shape.profile))

    def _free(self, number: int, mask: int, profile: str) -> None:
        card = self._cards[number]
        at = next(index for index, (end_s, held) in enumerate(card.ends) if held == mask and end_s <= self._now_s)
        del card.ends[at]
        card.counts[profile] -= 1
        self.ended(number, mask)
        held = 0
        for _, other in card.ends:  # what a node reports and what is reserved may overlap
            held |= other
        self._hold(number, held)

    def _hold(self, number: int, held: int) -> None:
        card = self._cards[number]
        alike = self._alike[card.gpu.geometry, card.held]
        del alike[number]
        if not alike:
            del self._alike[card.gpu.geometry, card.held]
        card.held = held
        self._alike.setdefault((card.gpu.geometry, held), {})[number] = None

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
        numbers = self._of_node.get(node, []) if node else range(len(self._cards))
        for number in numbers[: self._most_looked_at]:
            card = self._cards[number]
            kept = self._kept_on(number, line)
            for choice in line.choices:
                shape = _shape(card.gpu.geometry, choice)
                for start in shape.starts if shape is not None else ():
                    mask = span(start, shape.size) if shape is not None else 0
                    if shape is None or mask & kept:
                        continue
                    end_s = max((end_s for end_s, held in card.ends if held & mask), default=0.0)
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


def _left_s(use: Use, remaining_s: Callable[[AttemptKey], float | None]) -> float:
    if use.foreign or use.key is None:
        return math.inf
    if use.warm:
        return WARM_LEAVES_S
    if use.idle or use.leaving:
        return IDLE_LEAVES_S
    left_s = remaining_s(use.key)
    return math.inf if left_s is None else max(0.0, left_s)


def _shape(geometry: Geometry, choice: ProfileChoice) -> Shape | None:
    return geometry.by_profile.get(choice.profile) if geometry.gpu_model == choice.gpu_model else None
