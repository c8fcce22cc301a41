"""GPUs while time passes: what is held of each, and when that ends. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from controlplane.fleet import Geometry, GpuView, Shape, Use, span
from controlplane.placement import fit
from controlplane.reservations import AttemptKey
from puhui.v1.prediction_pb2 import ProfileChoice

__all__ = ["IDLE_LEAVES_S", "WARM_LEAVES_S", "GpuTimeline", "TimedGpu", "shape_of"]

IDLE_LEAVES_S = 5.0
"""An idle share is taken as gone after this long, once somebody waits for it."""
WARM_LEAVES_S = 1.0
"""A warm slice, likewise: nobody is on it."""


@dataclass(eq=False)
class TimedGpu:
    """One GPU while time passes."""

    gpu: GpuView
    held: int
    """Memory slices that are held, as a mask."""
    counts: dict[str, int]
    """Slices of it by profile."""
    ends: list[tuple[float, int]]
    """When each share on it ends, infinite when nobody knows, with its mask."""

    def fits(self, choice: ProfileChoice, kept: int) -> tuple[tuple[int, int], Shape, int] | None:
        """Returns the rank, the shape and the first slice of the best placement; None when there is none."""
        shape = shape_of(self.gpu.geometry, choice)
        if shape is None or self.counts.get(shape.profile, 0) >= shape.max_instances:
            return None
        found = fit(self.gpu.geometry, shape, self.held | kept)
        return ((found.free_after, -found.kept), shape, found.start) if found is not None else None


class GpuTimeline:
    """GPUs while time passes.

    Args:
        gpus: the GPUs on which something may be placed.
        remaining_s: for how long an attempt still holds its share, in seconds; None when that is not known.

    Attributes:
        gpus: each as it is now, numbered in this order.
    """

    def __init__(self, gpus: Sequence[GpuView], remaining_s: Callable[[AttemptKey], float | None]) -> None:
        self._ends: list[tuple[float, int, int, str]] = []
        """(time from the beginning, GPU, mask, profile)."""
        self.gpus = [self._timed(number, gpu, remaining_s) for number, gpu in enumerate(gpus)]
        self._alike: dict[tuple[Geometry, int], dict[int, None]] = {}
        self._of_node: dict[str, list[int]] = {}
        for number, timed in enumerate(self.gpus):
            self._alike.setdefault((timed.gpu.geometry, timed.held), {})[number] = None
            self._of_node.setdefault(timed.gpu.node_id, []).append(number)
        heapq.heapify(self._ends)

    def _timed(self, number: int, gpu: GpuView, remaining_s: Callable[[AttemptKey], float | None]) -> TimedGpu:
        counts: dict[str, int] = {}
        ends = []
        for use in gpu.uses:
            counts[use.profile] = counts.get(use.profile, 0) + 1
            left_s = _left_s(use, remaining_s)
            ends.append((left_s, use.mask))
            if left_s < math.inf:
                self._ends.append((left_s, number, use.mask, use.profile))
        return TimedGpu(gpu, gpu.held, counts, ends)

    @property
    def next_end_s(self) -> float:
        """When the next share ends, in seconds from the beginning; infinite when nobody knows of any that does."""
        return self._ends[0][0] if self._ends else math.inf

    def of_node(self, node_id: str) -> Sequence[int]:
        """Returns the GPUs of a node."""
        return self._of_node.get(node_id, ())

    def one_of_each(self, choice: ProfileChoice, kept: Collection[int]) -> Iterable[int]:
        """Yields, of GPUs that are alike, one that has not too many slices of the shape, and those with room kept.

        Args:
            choice: what is to be placed.
            kept: the GPUs on which room is kept.
        """
        for (geometry, held), numbers in self._alike.items():
            shape = shape_of(geometry, choice)
            if shape is None or fit(geometry, shape, held) is None:
                continue
            for number in numbers:
                if self.gpus[number].counts.get(shape.profile, 0) < shape.max_instances:
                    yield number
                    if number not in kept:
                        break

    def take(self, number: int, shape: Shape, start: int, end_s: float) -> None:
        """A share of a GPU is held from now on.

        Args:
            number: the GPU.
            shape: what is held of it.
            start: its first memory slice.
            end_s: until when, in seconds from the beginning; infinite when nobody knows.
        """
        mask = span(start, shape.size)
        timed = self.gpus[number]
        self._hold(number, timed.held | mask)
        timed.counts[shape.profile] = timed.counts.get(shape.profile, 0) + 1
        timed.ends.append((end_s, mask))
        if end_s < math.inf:
            heapq.heappush(self._ends, (end_s, number, mask, shape.profile))

    def end_next(self) -> tuple[int, int]:
        """Ends the share that ends next; returns its GPU and its mask.

        Raises:
            IndexError: none ends.
        """
        now_s, number, mask, profile = heapq.heappop(self._ends)
        timed = self.gpus[number]
        at = next(index for index, (end_s, held) in enumerate(timed.ends) if held == mask and end_s <= now_s)
        del timed.ends[at]
        timed.counts[profile] -= 1
        held = 0
        for _, other in timed.ends:  # what a node reports and what is reserved may overlap
            held |= other
        self._hold(number, held)
        return number, mask

    def _hold(self, number: int, held: int) -> None:
        timed = self.gpus[number]
        alike = self._alike[timed.gpu.geometry, timed.held]
        del alike[number]
        if not alike:
            del self._alike[timed.gpu.geometry, timed.held]
        timed.held = held
        self._alike.setdefault((timed.gpu.geometry, held), {})[number] = None


def _left_s(use: Use, remaining_s: Callable[[AttemptKey], float | None]) -> float:
    if use.foreign or use.key is None:
        return math.inf
    if use.warm:
        return WARM_LEAVES_S
    if use.idle or use.leaving:
        return IDLE_LEAVES_S
    left_s = remaining_s(use.key)
    return math.inf if left_s is None else max(0.0, left_s)


def shape_of(geometry: Geometry, choice: ProfileChoice) -> Shape | None:
    """Returns the shape of a choice on a GPU; None when it is not for GPUs of this kind."""
    return geometry.by_profile.get(choice.profile) if geometry.gpu_model == choice.gpu_model else None
