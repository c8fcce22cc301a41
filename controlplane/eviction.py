"""Which idle shares of a GPU have to go so that a slice fits: shares in, the cheapest way out.

Busy shares, foreign slices and room that is spoken for are never part of a way. The cheapest way takes the fewest
memory slices from idle shares (their owners are disturbed), then the fewest from warm ones (only cutting is lost).
What leaves already costs nothing.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from controlplane.fleet import Geometry, GpuKey, GpuView, Shape, Use, span
from controlplane.placement import Decision, room_left
from controlplane.reservations import AttemptKey

__all__ = ["Eviction", "Promise", "way_on"]


class _Kind(enum.IntEnum):
    WARM = 0
    IDLE = 1
    LEAVING = 2


_Loose = tuple[int, int, _Kind, bool]
"""First memory slice, number of memory slices, what it is, and whether it is of the profile that is wanted."""


@dataclass(frozen=True)
class _Way:
    cost: tuple[int, ...]
    """Memory slices of idle shares that have to go, of warm ones, of those that leave already; number of shares."""
    kept: int
    """Placements, over all shapes, that stay possible."""
    start: int
    evicted: tuple[int, ...]
    awaited: tuple[int, ...]


@dataclass(frozen=True)
class Promise:
    """Room that shares leave for a job, as the next plan needs to know it."""

    gpu: GpuKey
    profile: str
    start: int
    """First memory slice."""


@dataclass(frozen=True)
class Eviction:
    """A placement that becomes free when some shares have gone."""

    decision: Decision
    shares: tuple[Use, ...]
    """To be evicted now."""
    awaited: tuple[Use, ...]
    """In the way too, but they leave already."""
    rank: tuple[Any, ...]
    """The smallest is the cheapest, over all GPUs."""

    @property
    def promise(self) -> Promise:
        """What the job is promised."""
        return Promise(self.decision.gpu.key, self.decision.shape.profile, self.decision.start)


def way_on(
    gpu: GpuView,
    shape: Shape,
    spoken_for: int,
    promised: int,
    leaving: Collection[AttemptKey],
    taken_over: Collection[AttemptKey],
    starts: tuple[int, ...],
) -> Eviction | None:
    """Returns the cheapest way to have a slice of `shape` on a GPU; None when busy shares are in every way.

    Args:
        gpu: the GPU as the fleet has it.
        shape: what is wanted.
        spoken_for: bit mask of memory slices that the plan has given away or keeps for somebody.
        promised: slices of this shape that the plan has given away or keeps, which are not among the GPU's uses.
        leaving: shares that the plan evicts.
        taken_over: warm shares that the plan lets a job take over.
        starts: the placements that are looked at, by their first memory slice.
    """
    if not gpu.loose:
        return None
    loose = [use for use in gpu.loose if use.key not in taken_over]
    layout = tuple((use.start, use.size, _kind(use, leaving), use.profile == shape.profile) for use in loose)
    firm = gpu.count(shape.profile) - sum(use.profile == shape.profile for use in loose) + promised
    way = _cheapest(gpu.geometry, shape, starts, gpu.firm | spoken_for, layout, firm)
    if way is None:
        return None
    shares = tuple(loose[at] for at in way.evicted)
    age = max((use.idle_since for use in shares), default=0.0), max((use.warm_until for use in shares), default=0.0)
    return Eviction(
        Decision(gpu, shape, way.start),
        shares,
        tuple(loose[at] for at in way.awaited),
        (way.cost, age, -way.kept, gpu.node_name, gpu.gpu_index, way.start),
    )


def _kind(use: Use, leaving: Collection[AttemptKey]) -> _Kind:
    if use.leaving or use.key in leaving:
        return _Kind.LEAVING
    return _Kind.WARM if use.warm else _Kind.IDLE


@functools.lru_cache(maxsize=65536)
def _cheapest(
    geometry: Geometry,
    shape: Shape,
    starts: tuple[int, ...],
    firm: int,
    layout: tuple[_Loose, ...],
    firm_count: int,
) -> _Way | None:
    """Returns the cheapest way among some placements of a shape.

    Args:
        geometry: what the GPU can be cut into.
        shape: what is wanted.
        starts: the placements.
        firm: bit mask of memory slices that no eviction makes free.
        layout: what may leave or leaves, the oldest first.
        firm_count: slices of this shape that no eviction removes.
    """
    best: _Way | None = None
    best_rank: tuple[Any, ...] | None = None
    for start in starts:
        mask = span(start, shape.size)
        if mask & firm:
            continue
        inside = {at for at, (first, size, _, _) in enumerate(layout) if span(first, size) & mask}
        extra = _too_many(shape, layout, inside, firm_count)
        if extra is None:
            continue
        way = _way(geometry, firm, layout, mask, start, inside | extra)
        rank = (way.cost, max(way.evicted, default=-1), -way.kept, way.start)
        if best_rank is None or rank < best_rank:
            best, best_rank = way, rank
    return best


def _too_many(shape: Shape, layout: tuple[_Loose, ...], inside: set[int], firm_count: int) -> set[int] | None:
    """Returns what must leave besides `inside` so that there are not too many slices of a shape; None if too many stay.

    What leaves already is waited for before anything else is evicted.
    """
    same = [at for at, (_, _, _, wanted) in enumerate(layout) if wanted and at not in inside]
    excess = firm_count + len(same) + 1 - shape.max_instances
    if excess <= 0:
        return set()
    if excess > len(same):
        return None
    # All of one shape, so equally large: the kind decides, then the age.
    preference = (_Kind.LEAVING, _Kind.WARM, _Kind.IDLE)
    return set(sorted(same, key=lambda at: (preference.index(layout[at][2]), at))[:excess])


def _way(geometry: Geometry, firm: int, layout: tuple[_Loose, ...], mask: int, start: int, going: set[int]) -> _Way:
    slices = [0, 0, 0]
    after = firm | mask
    for at, (first, size, kind, _) in enumerate(layout):
        if at in going:
            slices[kind] += size
        else:
            after |= span(first, size)
    evicted = tuple(at for at in sorted(going) if layout[at][2] <= _Kind.IDLE)
    awaited = tuple(at for at in sorted(going) if layout[at][2] > _Kind.IDLE)
    cost = (slices[_Kind.IDLE], slices[_Kind.WARM], slices[_Kind.LEAVING], len(going))
    return _Way(cost, room_left(geometry, after), start, evicted, awaited)
