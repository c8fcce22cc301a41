"""The shares that are held, mirrored in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

from controlplane.records import Reservation

__all__ = ["Reservations"]

_REMEMBERED = 10_000

AttemptKey = tuple[str, int]
"""(job id, attempt number)."""


class Reservations:
    """Every reservation that is held, and the attempts whose release a node has confirmed lately.

    The store is changed first, then this.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._held: dict[str, dict[AttemptKey, Reservation]] = {}
        self._node_of: dict[AttemptKey, str] = {}
        self._versions: dict[str, int] = {}
        self._released: OrderedDict[AttemptKey, None] = OrderedDict()
        self._changed = changed

    def load(self, held: Iterable[Reservation]) -> None:
        """Takes over what the store holds."""
        for reservation in held:
            self.hold(reservation)

    def held(self, node_id: str) -> list[Reservation]:
        """Returns every reservation that is held on a node."""
        return list(self._held.get(node_id, {}).values())

    def version(self, node_id: str) -> int:
        """Returns a number that changes whenever the reservations on a node do."""
        return self._versions.get(node_id, 0)

    @property
    def released(self) -> Collection[AttemptKey]:
        """Attempts that were released lately; a node's report that still shows them is old."""
        return self._released.keys()

    def holds(self, key: AttemptKey) -> bool:
        """Returns whether an attempt holds a share."""
        return key in self._node_of

    def hold(self, reservation: Reservation) -> None:
        """Notes a reservation."""
        self._held.setdefault(reservation.node_id, {})[reservation.key] = reservation
        self._node_of[reservation.key] = reservation.node_id
        self._count(reservation.node_id)

    def release(self, key: AttemptKey) -> None:
        """Notes that an attempt's share is free again."""
        node_id = self._node_of.pop(key, None)
        if node_id is None:
            return
        del self._held[node_id][key]
        self._released[key] = None
        while len(self._released) > _REMEMBERED:
            self._released.popitem(last=False)
        self._count(node_id)
        self._changed()

    def _count(self, node_id: str) -> None:
        self._versions[node_id] = self.version(node_id) + 1
