"""The GPUs of a centre as placement sees them: what can be cut, and what is held.

A GPU's occupancy is a bit mask of its memory slices. It is derived from reservations and from what the
node last reported, whichever says that a slice is held: a share is never taken for free because one of the
two does not know of it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from controlplane.records import Reservation
from controlplane.reservations import AttemptKey
from puhui.v1 import card_pb2, fleet_service_pb2

__all__ = ["Geometry", "GpuKey", "GpuView", "Shape", "Use", "geometry_of", "gpu_views", "span"]


GpuKey = tuple[str, str]
"""(node id, GPU UUID). Emulated nodes may well have the same UUIDs."""

_NONE_IDLE: Mapping[AttemptKey, float] = {}


@dataclass(frozen=True)
class Shape:
    """One profile of a GPU model, with the placements that the driver reports."""

    profile: str
    memory_mib: int
    compute_slices: int
    max_instances: int
    size: int
    """Memory slices of one slice."""
    starts: tuple[int, ...]
    """First memory slice of every placement."""


@dataclass(frozen=True)
class Geometry:
    """What a GPU model can be cut into. Equal geometries are equal objects, so that they can be a key."""

    gpu_model: str
    shapes: tuple[Shape, ...]
    memory_slices: int

    @functools.cached_property
    def by_profile(self) -> Mapping[str, Shape]:
        """Shapes by profile name."""
        return {shape.profile: shape for shape in self.shapes}

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.gpu_model, self.shapes))


@dataclass(frozen=True)
class Use:
    """A part of a GPU that is not free."""

    profile: str
    start: int
    size: int
    foreign: bool
    """Nobody of this centre knows whose it is."""
    key: AttemptKey | None = None
    """Attempt that it is held for, or, while it is warm, was; None when it is foreign."""
    tenant: str = ""
    slice_uuid: str = ""
    """Its slice, where it is known that it is there and of which UUID."""
    warm_until: float = 0.0
    """Nobody is on it: it is kept for its tenant until then, in seconds since the epoch. 0 when it is not warm."""
    idle: bool = False
    """Its owner does not use it, so that it can be had by reclaiming it; a warm one is idle too."""
    idle_since: float = 0.0
    """Idle since, in seconds since the epoch; 0 where it is warm, busy, or nobody said."""
    leaving: bool = False
    """It is being evicted already."""

    @property
    def warm(self) -> bool:
        """Whether it is kept for its tenant, with nobody on it."""
        return self.warm_until > 0

    @property
    def evictable(self) -> bool:
        """Whether it may be evicted for another job: it is idle, it is ours, and it does not leave already."""
        return self.idle and not self.foreign and not self.leaving and self.key is not None

    @property
    def mask(self) -> int:
        """Bit mask of its memory slices."""
        return span(self.start, self.size)


@dataclass(frozen=True)
class GpuView:
    """One GPU that can be cut, and what is held of it."""

    node_id: str
    node_name: str
    gpu_uuid: str
    gpu_index: int
    emulated: bool
    geometry: Geometry
    uses: tuple[Use, ...]
    usable: bool
    """Something may be placed on it now: its node is in contact and not draining."""

    @functools.cached_property
    def key(self) -> GpuKey:
        """What tells it from every other GPU of the centre."""
        return self.node_id, self.gpu_uuid

    @functools.cached_property
    def held(self) -> int:
        """Bit mask of memory slices that are not free."""
        return _union(use.mask for use in self.uses)

    @functools.cached_property
    def foreign(self) -> int:
        """Bit mask of memory slices that are held by what is not of this centre."""
        return _union(use.mask for use in self.uses if use.foreign)

    @functools.cached_property
    def loose(self) -> tuple[Use, ...]:
        """What may be evicted or is being evicted, warm before idle, the oldest first."""
        found = [use for use in self.uses if use.evictable or (use.leaving and not use.foreign)]
        return tuple(sorted(found, key=lambda use: (not use.warm, use.warm_until, use.idle_since, use.start)))

    @functools.cached_property
    def firm(self) -> int:
        """Bit mask of memory slices that are held and stay so until their owner is done."""
        return _union(use.mask for use in self.uses if not use.leaving and not use.evictable)

    @functools.cached_property
    def warm(self) -> tuple[Use, ...]:
        """Warm slices that do not leave, the one that would be dropped first at the front."""
        found = (use for use in self.loose if use.warm and not use.leaving and use.slice_uuid)
        return tuple(sorted(found, key=lambda use: (use.warm_until, use.start)))

    def count(self, profile: str) -> int:
        """Number of slices of `profile` that are held."""
        return sum(use.profile == profile for use in self.uses)


def span(start: int, size: int) -> int:
    """Returns the bit mask of `size` memory slices from `start` on."""
    return ((1 << size) - 1) << start


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)


def geometry_of(gpu: card_pb2.Gpu) -> Geometry:
    """Returns what `gpu` can be cut into, as its driver reports it."""
    shapes = []
    for profile in gpu.profiles:
        if not profile.placements:
            continue
        shapes.append(
            Shape(
                profile.name,
                profile.memory_mib,
                profile.compute_slices,
                profile.max_instances,
                profile.placements[0].size,
                tuple(sorted(placement.start for placement in profile.placements)),
            )
        )
    extent = max((start + shape.size for shape in shapes for start in shape.starts), default=0)
    return Geometry(gpu.model, tuple(shapes), extent)


def gpu_views(
    nodes: Iterable[tuple[fleet_service_pb2.Node, bool]],
    reservations: Iterable[Reservation],
    centre: str,
    released: Collection[AttemptKey] = (),
    idle: Mapping[AttemptKey, float] = _NONE_IDLE,
    leaving: Collection[AttemptKey] = (),
) -> list[GpuView]:
    """Returns every GPU that can be cut, by node name and GPU index.

    Args:
        nodes: each with whether something may be placed on it now.
        reservations: every share that is held.
        centre: name of this centre, to tell its own slices from foreign ones.
        released: attempts whose slice a node has confirmed to be gone; a report that still shows it is old.
        idle: attempts that do not use their share, with since when, in seconds since the epoch.
        leaving: attempts whose share is being evicted.
    """
    held: dict[GpuKey, list[Reservation]] = {}
    for reservation in reservations:
        held.setdefault((reservation.node_id, reservation.gpu_uuid), []).append(reservation)
    views = []
    for node, usable in sorted(nodes, key=lambda pair: pair[0].inventory.name):
        reported: dict[str, list[card_pb2.Slice]] = {}
        for piece in node.inventory.slices:
            reported.setdefault(piece.gpu_uuid, []).append(piece)
        for gpu in sorted(node.inventory.gpus, key=lambda gpu: gpu.index):
            if gpu.mig_mode != card_pb2.MIG_MODE_ENABLED or not gpu.profiles:
                continue
            views.append(
                GpuView(
                    node.id,
                    node.inventory.name,
                    gpu.uuid,
                    gpu.index,
                    gpu.emulated,
                    _geometry_of(gpu),
                    (
                        *(_use(one, idle, leaving) for one in held.get((node.id, gpu.uuid), [])),
                        *_unreserved(held.get((node.id, gpu.uuid), []), reported.get(gpu.uuid, []), centre, released),
                    ),
                    usable,
                )
            )
    return views


def _use(held: Reservation, idle: Mapping[AttemptKey, float], leaving: Collection[AttemptKey]) -> Use:
    return Use(
        held.profile,
        held.start,
        held.size,
        foreign=False,
        key=held.key,
        tenant=held.tenant,
        slice_uuid=held.slice_uuid,
        warm_until=held.warm_until,
        idle=held.is_warm or held.key in idle,
        idle_since=0.0 if held.is_warm else idle.get(held.key, 0.0),
        leaving=held.key in leaving,
    )


def _unreserved(
    held: list[Reservation], reported: list[card_pb2.Slice], centre: str, gone: Collection[AttemptKey]
) -> Iterator[Use]:
    reserved = {reservation.key for reservation in held}
    for piece in reported:
        ours = piece.HasField("owner") and piece.owner.centre == centre
        key = (piece.owner.job_id, piece.owner.attempt)
        if ours and (key in reserved or key in gone):
            continue
        yield Use(
            piece.profile,
            piece.placement.start,
            piece.placement.size,
            foreign=not ours,
            key=key if ours else None,
            slice_uuid=piece.uuid,
        )


_known: dict[Hashable, Geometry] = {}


def _geometry_of(gpu: card_pb2.Gpu) -> Geometry:
    """Returns the geometry of a GPU; one object for all GPUs of a kind, read once."""
    kind = (
        gpu.model,
        tuple((one.profile_id, one.name, one.memory_mib, len(one.placements)) for one in gpu.profiles),
    )
    geometry = _known.get(kind)
    if geometry is None:
        geometry = _known[kind] = geometry_of(gpu)
    return geometry
