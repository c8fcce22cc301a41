"""What a peer may ask of this centre in a time: calls, streams, bytes. In memory; a restart begins anew."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import grpc

from controlplane.allowance import Allowance, DailyAllowance
from controlplane.peer_terms import DEFAULT_BYTES_A_DAY, DEFAULT_CALLS_A_SECOND, DEFAULT_MOST
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.server import MOST_STREAMS_OF_A_CONNECTION

__all__ = ["PeerLimits", "most_streams"]

_BURST_S = 5.0
"""So many seconds' worth of calls may come at once."""
_STREAMS_OF_AN_ATTEMPT = 4
"""Its events, its log for its user and for its origin's results, and a call."""
_STREAMS_BESIDE = 64
_LEFT_FOR_SHORT_CALLS = 256


def most_streams(peer: PeerRecord) -> int:
    """Returns how many streams of a peer may be open at once: enough for as many attempts as it may have here.

    Never all that fit into one connection: a stream that waits for others to end would keep leases from being renewed.
    """
    wanted = _STREAMS_BESIDE + _STREAMS_OF_AN_ATTEMPT * (peer.terms.most_received or DEFAULT_MOST)
    return min(wanted, MOST_STREAMS_OF_A_CONNECTION - _LEFT_FOR_SHORT_CALLS)


class PeerLimits:
    """Counts what peers ask.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: dict[str, Allowance] = {}
        self._bytes: dict[str, DailyAllowance] = {}
        self._streams: dict[str, int] = {}

    def call(self, peer: PeerRecord) -> None:
        """A call has come.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_RATE, and when to come again.
        """
        rate = float(peer.terms.most_calls_a_second or DEFAULT_CALLS_A_SECOND)
        allowance = self._calls.get(peer.name) or self._calls.setdefault(peer.name, Allowance(self._clock))
        wait_s = allowance.take(rate, rate * _BURST_S)
        if wait_s:
            raise _refused("PEER_RATE", f"{rate:g} calls a second are taken from {peer.name}; come more slowly", wait_s)

    def bytes(self, peer: PeerRecord, count: int) -> None:
        """So many bytes have come.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_BYTES, and when to come again.
        """
        most = peer.terms.most_bytes_a_day or DEFAULT_BYTES_A_DAY
        allowance = self._bytes.get(peer.name) or self._bytes.setdefault(peer.name, DailyAllowance(self._clock))
        wait_s = allowance.take(count, most)
        if wait_s:
            raise _refused("PEER_BYTES", f"{most} bytes a day are taken from {peer.name}, and they have come", wait_s)

    @contextlib.contextmanager
    def stream(self, peer: PeerRecord) -> Iterator[None]:
        """A stream is open for as long as the block lasts.

        Raises:
            Refusal: RESOURCE_EXHAUSTED with PEER_STREAMS.
        """
        known = self._streams.get(peer.name, 0)
        if known >= most_streams(peer):
            raise _refused("PEER_STREAMS", f"{known} streams of {peer.name} are open, and more may not be", 1.0)
        self._streams[peer.name] = known + 1
        try:
            yield
        finally:
            self._streams[peer.name] -= 1


def _refused(reason: str, message: str, wait_s: float) -> Refusal:
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_after_s=wait_s)
