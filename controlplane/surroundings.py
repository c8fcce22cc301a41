"""What every driver of an attempt works with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from controlplane.bundles import Bundles
from controlplane.nodes import Nodes
from controlplane.reach import Reach
from controlplane.records import JobRecord
from controlplane.reservations import Reservations
from controlplane.results import Results
from controlplane.store import Store
from controlplane.wants import Wants
from controlplane.watch import Feed

__all__ = ["Surroundings"]


@dataclass(frozen=True)
class Surroundings:
    """What every driver works with."""

    centre: str
    store: Store
    nodes: Nodes
    reservations: Reservations
    bundles: Bundles
    results: Results
    feed: Feed
    wants: Wants
    queue: Callable[[JobRecord], None]
    """A living job waits for a share."""
    withdraw: Callable[[str], None]
    """A job waits for none any longer."""
    warm_s: Callable[[str], float]
    """For how long a slice that was taken back is kept for its tenant, in seconds, by tenant."""
    release_patience_s: float
    """A job whose share is not confirmed to be released within this time ends all the same."""
    collect_patience_s: float
    """Results that a node in contact has refused for this long, and several times, are given up."""
    reach: Reach | None = None
    """How peers are worked with; None when this centre has none."""
    offered: Callable[[], Mapping[str, Collection[str]]] = dict
    """The peers there are now, by name, each with the profiles that it has."""
