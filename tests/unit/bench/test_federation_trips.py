from __future__ import annotations

import pytest

from bench.federation_trips import Pairs, figures, trips_by_delay, trips_by_time


def _pairs(round_trip_s: float, *, trips: float = 2.0, own_s: float = 0.15) -> Pairs:
    """Jobs that took so many round trips, what a centre takes for itself, and a pause that differs."""
    pauses = (0.1, 0.3, 0.5)
    starts = [0.1 + own_s + pause + trips * round_trip_s for pause in pauses]
    return Pairs(
        forwarded_start_s=starts,
        local_start_s=[0.1, 0.1, 0.1],
        forwarded_total_s=[start + 0.2 + round_trip_s for start in starts],
        local_total_s=[0.2, 0.2, 0.2],
        considered_s=[pause + round_trip_s for pause in pauses],
        bound_s=[0.01 + round_trip_s] * 3,
        messages=[2, 2, 3],
    )


def test_all_that_a_forward_adds_is_counted_in_round_trips() -> None:
    assert trips_by_time(_pairs(0.08), 0.08) == pytest.approx(2 + (0.15 + 0.3) / 0.08)
    with pytest.raises(ValueError, match="some time"):
        trips_by_time(_pairs(0.0), 0.0)


def test_the_way_alone_is_the_slope_whatever_the_centres_take_themselves() -> None:
    found = {round_trip_s: _pairs(round_trip_s) for round_trip_s in (0.0, 0.02, 0.08)}
    assert trips_by_delay(found) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="two"):
        trips_by_delay({0.08: _pairs(0.08)})


def test_figures_are_in_milliseconds() -> None:
    told = {figure.name: figure for figure in figures(_pairs(0.02), 0.02)}
    assert told["at_20_ms_start_overhead"].value == pytest.approx(490)
    assert told["at_20_ms_start_overhead"].unit == "ms"
    assert told["at_20_ms_total_overhead"].value == pytest.approx(610)
    assert told["at_20_ms_bound_median"].value == pytest.approx(30)
    assert told["at_20_ms_forwarded_start_p90"].value == pytest.approx(790)
    assert told["at_20_ms_waits_for_answers"].value == 2
    without = Pairs([0.2], [0.1], [0.4], [0.2], [0.1], [0.01])
    assert not any("waits" in figure.name for figure in figures(without, 0.0))
