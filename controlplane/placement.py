"""Where a slice goes: occupancy in, decision out.

Best fit with best index: among the GPUs that can take the slice, the one that is left with the least free
room; on it, the placement that leaves the most other placements possible. GPUs with the same geometry and
the same mask are alike, so the cost of a decision grows with the number of different masks (at most 256 per
GPU model), not with the number of GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controlplane.fleet import Geometry, GpuKey, GpuView, Shape, span
from controlplane.reservations import AttemptKey
from puhui.v1 import prediction_pb2

__all__ = ["Decision", "Room", "fit", "most_slices", "room_left"]


@dataclass(frozen=True)
class Decision:
    """Where a slice goes."""

    gpu: GpuView
    shape: Shape
    start: int
    take_over: AttemptKey | None = None
    """Attempt whose warm slice it is; None when the slice is cut anew."""
    slice_uuid: str = ""
    """The warm slice that is taken over; "" when the slice is cut anew."""
    move: bool = False
    """It is on another node than the one where the job's container lives."""


@dataclass(frozen=True)
class Fit:
    """The best placement of one shape on GPUs with one mask."""

    start: int
    free_after: int
    kept: int
    """Placements, over all shapes, that stay possible."""


@functools.lru_cache(maxsize=65536)
def fit(geometry: Geometry, shape: Shape, held: int) -> Fit | None:
    """Returns the best placement of `shape` on a GPU of which `held` is not free; None when there is none."""
    best: Fit | None = None
    for start in shape.starts:
        mask = span(start, shape.size)
        if held & mask:
            continue
        after = held | mask
        candidate = Fit(start, geometry.memory_slices - after.bit_count(), room_left(geometry, after))
        if best is None or candidate.kept > best.kept:
            best = candidate
    return best


@functools.lru_cache(maxsize=65536)
def room_left(geometry: Geometry, held: int) -> int:
    """Returns how many (profile, placement) pairs are possible on a GPU of which `held` is not free."""
    return sum(not held & span(start, shape.size) for shape in geometry.shapes for start in shape.starts)


@functools.lru_cache(maxsize=65536)
def most_slices(shape: Shape, held: int) -> int:
    """Returns how many more slices of `shape`, and of nothing else, fit beside `held`."""
    count = 0
    # Placements of one shape have one length, so taking them from the left wastes nothing.
    for start in shape.starts:
        mask = span(start, shape.size)
        if not held & mask:
            held |= mask
            count += 1
    return min(count, shape.max_instances)


class Room:
    """The free room of a fleet while a plan is made: what the plan takes is no longer free for the rest of it."""

    def __init__(self, gpus: Iterable[GpuView]) -> None:
        self._held: dict[GpuKey, int] = {}
        self._alike: dict[tuple[Geometry, int], dict[GpuKey, GpuView]] = {}
        self._taken: dict[tuple[GpuKey, str], int] = {}
        for gpu in gpus:
            if gpu.usable:
                self._held[gpu.key] = gpu.held
                self._alike.setdefault((gpu.geometry, gpu.held), {})[gpu.key] = gpu

    def best(self, choices: Sequence[prediction_pb2.ProfileChoice]) -> Decision | None:
        """Returns where a slice of the first choice that fits anywhere goes; None when none fits."""
        for choice in choices:
            decision = self._best(choice)
            if decision is not None:
                return decision
        return None

    def _best(self, choice: prediction_pb2.ProfileChoice) -> Decision | None:
        best: Decision | None = None
        best_rank: tuple[int, int, str, int] | None = None
        for (geometry, held), gpus in self._alike.items():
            shape = geometry.by_profile.get(choice.profile)
            if shape is None or geometry.gpu_model != choice.gpu_model:
                continue
            found = fit(geometry, shape, held)
            if found is None:
                continue
            gpu = next((gpu for gpu in gpus.values() if self.count(gpu, shape) < shape.max_instances), None)
            if gpu is None:
                continue
            rank = (found.free_after, -found.kept, gpu.node_name, gpu.gpu_index)
            if best_rank is None or rank < best_rank:
                best, best_rank = Decision(gpu, shape, found.start), rank
        return best

    def held(self, gpu: GpuView) -> int:
        """Returns the bit mask of memory slices of a usable GPU that are not free for the rest of the plan."""
        return self._held[gpu.key]

    def count(self, gpu: GpuView, shape: Shape) -> int:
        """Returns how many slices of a shape are held on a GPU, with those of the plan."""
        return gpu.count(shape.profile) + self._taken.get((gpu.key, shape.profile), 0)

    def take(self, decision: Decision) -> None:
        """Takes the room of a decision."""
        key = (decision.gpu.key, decision.shape.profile)
        self._taken[key] = self._taken.get(key, 0) + 1
        self.block(decision.gpu, span(decision.start, decision.shape.size))

    def block(self, gpu: GpuView, mask: int) -> None:
        """Takes memory slices of a GPU."""
        before = self._held[gpu.key]
        if before | mask == before:
            return
        alike = self._alike[gpu.geometry, before]
        del alike[gpu.key]
        if not alike:
            del self._alike[gpu.geometry, before]
        self._held[gpu.key] = before | mask
        self._alike.setdefault((gpu.geometry, before | mask), {})[gpu.key] = gpu

    def nearest(self, choices: Sequence[prediction_pb2.ProfileChoice]) -> tuple[GpuView, int] | None:
        """Returns the GPU and mask at which one of `choices` is likely to fit soonest.

        That is where the fewest memory slices have still to become free. Room that is blocked for another
        waiting job is not counted on.
        """
        best: tuple[int, str, int, int] | None = None
        found: tuple[GpuView, int] | None = None
        for (geometry, held), gpus in self._alike.items():
            for choice in choices:
                shape = geometry.by_profile.get(choice.profile)
                if shape is None or geometry.gpu_model != choice.gpu_model:
                    continue
                for gpu in gpus.values():
                    blocked = held & ~gpu.held
                    for start in shape.starts:
                        mask = span(start, shape.size)
                        if mask & blocked:
                            continue
                        rank = ((mask & held).bit_count(), gpu.node_name, gpu.gpu_index, start)
                        if best is None or rank < best:
                            best, found = rank, (gpu, mask)
        return found
