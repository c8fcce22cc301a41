"""The lease of a container ends at its node no later than the guest's lease ends, whatever the clocks are like."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.container_lease import node_lease_end
from controlplane.forwards import CLOCK_DRIFT

HALF = CLOCK_DRIFT / 2.5
RATES = st.floats(1 - HALF, 1 + HALF)
"""Rates of two clocks that differ by less than the drift that is allowed for."""


@given(
    here_rate=RATES,
    node_rate=RATES,
    node_offset=st.floats(-1e6, 1e6),
    read_at=st.floats(0.0, 1e4),
    answer_s=st.floats(0.0, 600.0),
    left_s=st.floats(0.0, 3600.0),
)
def test_it_never_ends_later_than_here(
    here_rate: float, node_rate: float, node_offset: float, read_at: float, answer_s: float, left_s: float
) -> None:
    """Times are true seconds; each host's clock runs at its own rate."""
    arrived = read_at + answer_s
    lease_end = arrived * here_rate + left_s  # by this centre's clock
    node_s = read_at * node_rate + node_offset
    end = node_lease_end(node_s, lease_end, arrived * here_rate)
    true_end_at_node = read_at + (end - node_s) / node_rate
    assert true_end_at_node <= lease_end / here_rate + 1e-3
    if not answer_s:
        assert true_end_at_node >= lease_end / here_rate - left_s * 3 * CLOCK_DRIFT - 1e-3, "and not much earlier"


def test_a_lease_that_is_over_is_over_there() -> None:
    assert node_lease_end(7000.0, 100.0, 100.0) == 7000.0
    assert node_lease_end(7000.0, 100.0, 150.0) < 7000.0
