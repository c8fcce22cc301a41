"""One watcher of utilization: what it wants, when, and what lies ready for it to take."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from nodedaemon.utilization import LONGEST_S, SHORTEST_S, Look, early_s, next_due
from puhui.rpc.errors import Refusal
from puhui.v1.node_service_pb2 import UtilizationSample, WatchUtilizationResponse

__all__ = ["Watcher", "require_sound"]

_MOST_ROUNDS = 4
_MOST_UUIDS = 512


def require_sound(interval_s: float, uuids: Sequence[str]) -> None:
    """Refuses what cannot be watched.

    Raises:
        Refusal: INVALID_ARGUMENT with INTERVAL_INVALID or UUIDS_TOO_MANY.
    """
    if not SHORTEST_S <= interval_s <= LONGEST_S:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INTERVAL_INVALID",
            f"utilization cannot be told every {interval_s:g} s; choose an interval from 100 ms to 60 s",
            shortest_ms=f"{SHORTEST_S * 1000:g}",
            longest_ms=f"{LONGEST_S * 1000:g}",
        )
    if len(uuids) > _MOST_UUIDS:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "UUIDS_TOO_MANY",
            f"{len(uuids)} UUIDs are wanted, and at most {_MOST_UUIDS} can be; name none to watch all",
        )


@dataclass(eq=False)
class Watcher:
    """Who watches.

    Attributes:
        interval_s: time between its samples, in seconds.
        uuids: the GPUs and slices that it wants; empty is all.
    """

    interval_s: float
    uuids: frozenset[str]
    bases: dict[str, Look] = field(default_factory=dict)
    """What its next means begin with, by GPU."""
    _due: dict[str, float] = field(default_factory=dict)
    _served: dict[str, float] = field(default_factory=dict)
    _told: dict[str, float] = field(default_factory=dict)
    _rounds: deque[list[UtilizationSample]] = field(default_factory=deque)
    _dropped: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    def due_s(self, gpu_uuid: str) -> float:
        """Returns when it wants to hear of a GPU, on the monotonic clock; a new watcher at once."""
        return self._due.get(gpu_uuid, 0.0)

    def joins(self, gpu_uuid: str, at_s: float) -> bool:
        """Says whether it takes part in a look at a GPU that is made for another watcher."""
        half_s = self._served.get(gpu_uuid, 0.0) + self.interval_s / 2
        return max(self.due_s(gpu_uuid) - early_s(self.interval_s), half_s) <= at_s

    def served(self, gpu_uuid: str, now_s: float) -> None:
        """Notes that it heard of a GPU, or will very soon."""
        self._served[gpu_uuid] = now_s
        self._due[gpu_uuid] = next_due(now_s, self.interval_s)

    def hasten(self) -> None:
        """Wants to hear of every GPU now."""
        self._due.clear()

    def may_tell(self, uuid: str, at_s: float) -> bool:
        """Says whether it wants a card's sample of a time, and has heard nothing later of it; then it is told."""
        if (self.uuids and uuid not in self.uuids) or at_s <= self._told.get(uuid, 0.0):
            return False
        self._told[uuid] = at_s
        return True

    def forget(self, uuids: frozenset[str]) -> None:
        """Forgets all cards but these: slices come and go for as long as it watches."""
        self._told = {uuid: at_s for uuid, at_s in self._told.items() if uuid in uuids}

    def put(self, samples: list[UtilizationSample]) -> None:
        """Lays a round ready. A reader that is too slow loses the oldest ones."""
        if not samples:
            return
        if len(self._rounds) == _MOST_ROUNDS:
            self._dropped += len(self._rounds.popleft())
        self._rounds.append(samples)
        self._news.set()

    def close(self) -> None:
        """Ends the watch: what lies ready can still be taken."""
        self._closed = True
        self._news.set()

    async def take(self) -> WatchUtilizationResponse | None:
        """Returns the oldest round that lies ready, and waits for one; None when the watch has ended."""
        while not self._rounds:
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()
        dropped, self._dropped = self._dropped, 0
        return WatchUtilizationResponse(samples=self._rounds.popleft(), dropped_samples=dropped)
