"""The shares that are held, mirrored in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping

from controlplane.records import Reservation

__all__ = ["AttemptKey", "Reservations"]

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
        self._idle: dict[AttemptKey, float] = {}
        self._leaving: dict[AttemptKey, str] = {}
        self.spoken_for: set[AttemptKey] = set()
        """Warm shares that are being taken over: nobody else takes or drops them meanwhile."""
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

    def get(self, key: AttemptKey) -> Reservation | None:
        """Returns what an attempt holds; None when it holds nothing."""
        node_id = self._node_of.get(key)
        return self._held[node_id][key] if node_id is not None else None

    def warm(self) -> list[Reservation]:
        """Returns every share that is kept for its tenant, with nobody on it."""
        return [one for held in self._held.values() for one in held.values() if one.is_warm]

    def holds(self, key: AttemptKey) -> bool:
        """Returns whether an attempt holds a share."""
        return key in self._node_of

    @property
    def idle(self) -> Mapping[AttemptKey, float]:
        """Attempts that do not use the share that they hold, with since when, in seconds since the epoch."""
        return self._idle

    @property
    def leaving(self) -> Mapping[AttemptKey, str]:
        """Attempts whose share is being taken back, with the id of the job that it is taken back for ("" for none)."""
        return self._leaving

    def hold(self, reservation: Reservation) -> None:
        """Notes a reservation that begins, or that takes the place of the attempt's own."""
        key, node_id = reservation.key, reservation.node_id
        before = self._node_of.get(key)
        if before is not None and before != node_id:
            del self._held[before][key]
            self._count(before)
        self._forget_marks(key)
        self._released.pop(key, None)
        self._held.setdefault(node_id, {})[key] = reservation
        self._node_of[key] = node_id
        self._count(node_id)
        if reservation.is_warm:
            self._changed()

    def release(self, key: AttemptKey) -> None:
        """Notes that an attempt's share is free again."""
        node_id = self._node_of.pop(key, None)
        if node_id is None:
            return
        del self._held[node_id][key]
        self._forget_marks(key)
        self._released[key] = None
        while len(self._released) > _REMEMBERED:
            self._released.popitem(last=False)
        self._count(node_id)
        self._changed()

    def mark_idle(self, key: AttemptKey, idle: bool, since: float = 0.0) -> None:
        """Notes whether an attempt uses the share that it holds; for one that holds none, nothing.

        Args:
            key: whose share.
            idle: it can be had by reclaiming it.
            since: unused since, in seconds since the epoch; of idle shares, the oldest is evicted first.
        """
        node_id = self._node_of.get(key)
        if node_id is None or self._idle.get(key) == (since if idle else None):
            return
        if idle:
            self._idle[key] = since
        else:
            del self._idle[key]
        self._count(node_id)
        self._changed()

    def mark_leaving(self, key: AttemptKey, for_job: str = "", *, leaving: bool = True) -> None:
        """Notes that an attempt's share is being taken back, or, with `leaving` false, that it stays after all.

        Args:
            key: whose share.
            for_job: job that waits for it, where it is for one.
            leaving: whether it is.
        """
        node_id = self._node_of.get(key)
        if node_id is None or self._leaving.get(key) == (for_job if leaving else None):
            return
        if leaving:
            self._leaving[key] = for_job
        else:
            del self._leaving[key]
        self._count(node_id)
        self._changed()

    def _forget_marks(self, key: AttemptKey) -> None:
        self._idle.pop(key, None)
        self._leaving.pop(key, None)

    def _count(self, node_id: str) -> None:
        self._versions[node_id] = self.version(node_id) + 1
