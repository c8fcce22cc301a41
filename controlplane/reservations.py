"""The shares that are held, mirrored in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from controlplane.records import Reservation

__all__ = ["Reservations"]

_REMEMBERED = 10_000


class Reservations:
    """Every reservation that is held, and the attempts whose release a node has confirmed lately.

    The store is changed first, then this.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._held: dict[tuple[str, int], Reservation] = {}
        self._released: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._changed = changed

    def load(self, held: Iterable[Reservation]) -> None:
        """Takes over what the store holds."""
        self._held = {reservation.key: reservation for reservation in held}

    @property
    def held(self) -> list[Reservation]:
        """Every reservation that is held."""
        return list(self._held.values())

    @property
    def released(self) -> Iterable[tuple[str, int]]:
        """Attempts that were released lately; a node's report that still shows them is old."""
        return self._released.keys()

    def holds(self, key: tuple[str, int]) -> bool:
        """Returns whether an attempt holds a share."""
        return key in self._held

    def hold(self, reservation: Reservation) -> None:
        """Notes a reservation."""
        self._held[reservation.key] = reservation

    def release(self, key: tuple[str, int]) -> None:
        """Notes that an attempt's share is free again."""
        if self._held.pop(key, None) is None:
            return
        self._released[key] = None
        while len(self._released) > _REMEMBERED:
            self._released.popitem(last=False)
        self._changed()
