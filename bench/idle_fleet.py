"""A simulated fleet: whole GPUs in nodes of eight, and what is on them. It knows no time but what it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from controlplane.fleet import Geometry, GpuView, Shape, Use
from controlplane.placement import Decision
from controlplane.reservations import AttemptKey
from nodedaemon.emulation.geometry import card_models

__all__ = ["Fleet", "geometry"]

GPUS_PER_NODE = 8


def geometry(model: str) -> Geometry:
    """Returns what a card can be cut into, as recorded from real ones.

    Raises:
        KeyError: there is no such card.
    """
    card = card_models()[model]
    shapes = [
        Shape(
            row.name,
            row.memory_mib,
            row.compute_slices,
            row.max_instances,
            row.placements[0].size,
            tuple(sorted(place.start for place in row.placements)),
        )
        for row in card.profiles
        if row.memory_mib is not None and row.placements
    ]
    return Geometry(model, tuple(shapes), card.memory_slices)


class Fleet:
    """The GPUs and their shares.

    Args:
        kind: what each GPU can be cut into.
        gpus: how many there are.
    """

    def __init__(self, kind: Geometry, gpus: int) -> None:
        self.kind = kind
        self._views: list[GpuView] = []
        self._at: dict[AttemptKey, int] = {}
        for _ in range(gpus):
            self.grow()

    def __len__(self) -> int:
        return len(self._views)

    @property
    def views(self) -> Sequence[GpuView]:
        """The GPUs as placement sees them."""
        return self._views

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return -(-len(self._views) // GPUS_PER_NODE)

    @property
    def slices_held(self) -> int:
        """Memory slices that somebody holds; warm ones are nobody's."""
        return sum(use.size for use in self._uses() if not use.warm)

    @property
    def gpus_held(self) -> int:
        """GPUs on which somebody holds a share."""
        return sum(any(not use.warm for use in view.uses) for view in self._views)

    def grow(self) -> None:
        """Adds a GPU."""
        number = len(self._views)
        node = f"n-{number // GPUS_PER_NODE:05}"
        self._views.append(
            GpuView(node, node, f"GPU-{number}", number % GPUS_PER_NODE, True, self.kind, uses=(), usable=True)
        )

    def take(self, key: AttemptKey, tenant: str, decision: Decision) -> Use:
        """Puts a share where a plan has placed it; a warm slice that it takes over is its own from now on."""
        if decision.take_over is not None:
            self.remove(decision.take_over)
        at = int(decision.gpu.gpu_uuid.removeprefix("GPU-"))
        shape = decision.shape
        use = Use(shape.profile, decision.start, shape.size, False, key, tenant, slice_uuid=f"MIG-{key[0]}-{key[1]}")
        view = self._views[at]
        if view.held & use.mask:
            raise RuntimeError(f"{key} was placed where something is already")
        self._views[at] = replace(view, uses=(*view.uses, use))
        self._at[key] = at
        return use

    def warm(self, key: AttemptKey, until_s: float) -> None:
        """Keeps a share's slice for its tenant, with nobody on it."""
        view = self._views[self._at[key]]
        uses = tuple(replace(use, warm_until=until_s, idle=True) if use.key == key else use for use in view.uses)
        self._views[self._at[key]] = replace(view, uses=uses)

    def remove(self, key: AttemptKey) -> None:
        """Destroys a share's slice."""
        at = self._at.pop(key)
        view = self._views[at]
        self._views[at] = replace(view, uses=tuple(use for use in view.uses if use.key != key))

    def find(self, key: AttemptKey) -> Use | None:
        """Returns a share; None when it is gone."""
        at = self._at.get(key)
        if at is None:
            return None
        return next(use for use in self._views[at].uses if use.key == key)

    def _uses(self) -> Iterator[Use]:
        return (use for view in self._views for use in view.uses)
