"""Where a slice goes: occupancy in, decision out.

Best fit with best index: among the GPUs that can take the slice, the one that is left with the least free
room; on it, the placement that leaves the most other placements possible. GPUs with the same geometry and
the same mask are alike, so the cost of a decision grows with the number of different masks (at most 256 per
GPU model), not with the number of GPUs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from controlplane.fleet import Geometry, GpuView, Shape, span
from controlplane.reservations import AttemptKey

__all__ = ["Decision", "fit", "most_slices", "room_left"]


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
