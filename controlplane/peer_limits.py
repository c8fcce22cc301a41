"""What a peer may ask of this centre in a time: calls, streams, bytes. In memory; a restart begins anew."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from controlplane.peer_terms import DEFAULT_BYTES_A_DAY, DEFAULT_CALLS_A_SECOND
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal

__all__ = ["MOST_STREAMS", "PeerLimits"]

MOST_STREAMS = 256
"""Streams of one peer that are open at once."""
_BURST_S = 5.0
"""So many seconds' worth of calls may come at once."""
_DAY_S = 86400.0


@dataclass
class _Bucket:
    """What is left of an allowance that grows with time."""

    left: float
    at: float

    def take(self, count: float, rate: float, most: float, at: float) -> float:
        """Takes something away; returns 0, or for how many seconds there is not enough."""
        self.left = min(most, self.left + (at - self.at) * rate)
        self.at = at
        if self.left < count:
            return max(0.001, (min(count, most) - self.left) / rate)
        self.left -= count
        return 0.0


class PeerLimits:
    """Counts what peers ask.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: dict[str, _Bucket] = {}
        self._bytes: dict[str, _Bucket] = {}
        self._streams: dict[str, int] = {}

    def call(self, peer: PeerRecord) -> None:
        """A call has come.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_RATE, and when to come again.
        """
        rate = float(peer.terms.most_calls_a_second or DEFAULT_CALLS_A_SECOND)
        wait_s = self._bucket(self._calls, peer, rate * _BURST_S).take(1, rate, rate * _BURST_S, self._clock())
        if wait_s:
            raise _refused("PEER_RATE", f"{rate:g} calls a second are taken from {peer.name}; come more slowly", wait_s)

    def bytes(self, peer: PeerRecord, count: int) -> None:
        """So many bytes have come.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_BYTES, and when to come again.
        """
        most = float(peer.terms.most_bytes_a_day or DEFAULT_BYTES_A_DAY)
        wait_s = self._bucket(self._bytes, peer, most).take(count, most / _DAY_S, most, self._clock())
        if wait_s:
            raise _refused("PEER_BYTES", f"{most:g} bytes a day are taken from {peer.name}, and they have come", wait_s)

    @contextlib.contextmanager
    def stream(self, peer: PeerRecord) -> Iterator[None]:
        """A stream is open for as long as the block lasts.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_STREAMS.
        """
        known = self._streams.get(peer.name, 0)
        if known >= MOST_STREAMS:
            raise _refused("PEER_STREAMS", f"{known} streams of {peer.name} are open, and more may not be", 1.0)
        self._streams[peer.name] = known + 1
        try:
            yield
        finally:
            self._streams[peer.name] -= 1

    def _bucket(self, buckets: dict[str, _Bucket], peer: PeerRecord, most: float) -> _Bucket:
        return buckets.setdefault(peer.name, _Bucket(most, self._clock()))


def _refused(reason: str, message: str, wait_s: float) -> Refusal:
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after_s=wait_s)
