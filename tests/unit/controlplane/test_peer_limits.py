"""What a peer may ask in a time."""

from __future__ import annotations

import contextlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.allowance import Allowance, DailyAllowance
from controlplane.peer_limits import PeerLimits, most_streams
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.server import MOST_STREAMS_OF_A_CONNECTION
from puhui.v1.peer_service_pb2 import PeerTerms

DAY_S = 86400.0


class Clock:
    """Shows what it is set to."""

    def __init__(self) -> None:
        self.at = 1e6

    def __call__(self) -> float:
        return self.at


def peer(name: str = "b", **terms: int) -> PeerRecord:
    return PeerRecord(name, "0" * 32, "", b"", PeerTerms(**terms), 0.0)  # type: ignore[arg-type]


def refused(reason: str) -> contextlib.AbstractContextManager[pytest.ExceptionInfo[Refusal]]:
    return pytest.raises(Refusal, check=lambda refusal: refusal.reason == reason)


def test_calls_come_at_the_agreed_rate_and_some_at_once() -> None:
    clock = Clock()
    limits, slow = PeerLimits(clock), peer(most_calls_a_second=2)
    for _ in range(10):
        limits.call(slow)
    with refused("PEER_RATE") as caught:
        limits.call(slow)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s == pytest.approx(0.5)
    limits.call(peer("c"))  # what one peer does is nothing to another
    clock.at += 0.5
    limits.call(slow)
    with refused("PEER_RATE"):
        limits.call(slow)
    limits.call(peer(most_calls_a_second=100))  # new terms hold at once


def test_bytes_of_a_day_are_taken_and_no_more() -> None:
    clock = Clock()
    limits, small = PeerLimits(clock), peer(most_bytes_a_day=1000)
    limits.bytes(small, 600)
    clock.at += DAY_S / 2
    limits.bytes(small, 400)
    with refused("PEER_BYTES") as caught:
        limits.bytes(small, 1)
    assert caught.value.retry_after_s is not None
    assert DAY_S / 2 <= caught.value.retry_after_s <= DAY_S / 2 + 3600
    clock.at += caught.value.retry_after_s
    limits.bytes(small, 600)
    with refused("PEER_BYTES"):
        limits.bytes(small, 1)
    with refused("PEER_BYTES"):
        limits.bytes(peer("c", most_bytes_a_day=5), 6)
    limits.bytes(peer("d"), 2**30)


def test_streams_are_counted_until_they_end() -> None:
    limits, one = PeerLimits(Clock()), peer(most_received=1)
    with contextlib.ExitStack() as stack:
        for _ in range(most_streams(one)):
            stack.enter_context(limits.stream(one))
        with refused("PEER_STREAMS"), limits.stream(one):
            pass
        with limits.stream(peer("c")):
            pass
    with limits.stream(one):
        pass


def test_streams_never_keep_short_calls_from_coming_through() -> None:
    assert most_streams(peer()) >= 4 * 100
    assert most_streams(peer(most_received=10**6)) < MOST_STREAMS_OF_A_CONNECTION


@given(
    st.lists(st.tuples(st.floats(0, 2 * 86400), st.integers(0, 1200)), max_size=60),
    st.integers(1, 1000),
)
def test_no_day_has_more_than_a_days_allowance(taken: list[tuple[float, int]], most: int) -> None:
    clock = Clock()
    allowance = DailyAllowance(clock)
    had: list[tuple[float, int]] = []
    for pause_s, count in taken:
        clock.at += pause_s
        wait_s = allowance.take(count, most)
        assert wait_s >= 0
        if not wait_s:
            had.append((clock.at, count))
        elif count <= most:
            # Who comes again when told to gets it, unless others were there before.
            clock.at += wait_s
            assert allowance.take(count, most) == 0
            had.append((clock.at, count))
    for end, _ in had:
        assert sum(count for at, count in had if end - DAY_S < at <= end) <= most


@given(st.lists(st.floats(0, 10), max_size=60), st.floats(0.1, 100), st.integers(1, 20))
def test_an_allowance_never_gives_more_than_its_rate_and_burst(pauses: list[float], rate: float, most: int) -> None:
    clock = Clock()
    allowance, began, given_away = Allowance(clock), clock.at, 0
    for pause_s in pauses:
        clock.at += pause_s
        wait_s = allowance.take(rate, most)
        given_away += not wait_s
        assert given_away <= most + (clock.at - began) * rate + 1e-6
        assert 0 <= wait_s <= 1 / rate + 1e-6
