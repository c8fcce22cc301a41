"""What a forward costs, in milliseconds and in round trips: the arithmetic of `bench.federation`. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.report import Figure, quantile

__all__ = ["Pairs", "figures", "trips_by_delay", "trips_by_time"]

_MS = 1000.0


@dataclass
class Pairs:
    """No-op jobs that were forwarded, and local ones taken in turn with them, at one round-trip time."""

    forwarded_start_s: list[float] = field(default_factory=list)
    """From the submission until the command starts."""
    local_start_s: list[float] = field(default_factory=list)
    forwarded_total_s: list[float] = field(default_factory=list)
    """From the submission until the submitter knows the result."""
    local_total_s: list[float] = field(default_factory=list)
    considered_s: list[float] = field(default_factory=list)
    """From the submission until it is decided to send it away, the offers among it."""
    bound_s: list[float] = field(default_factory=list)
    """From that decision until it is known that the peer has bound it."""
    messages: list[int] = field(default_factory=list)
    """Waits for an answer before the command starts, as the relay counts them."""

    @property
    def start_overhead_s(self) -> float:
        """What a forward adds until the command starts, in the median."""
        return statistics.median(self.forwarded_start_s) - statistics.median(self.local_start_s)

    @property
    def total_overhead_s(self) -> float:
        """What a forward adds until the result is there, in the median."""
        return statistics.median(self.forwarded_total_s) - statistics.median(self.local_total_s)


def trips_by_time(pairs: Pairs, round_trip_s: float) -> float:
    """Returns all that a forward adds until the command starts, in round trips.

    Raises:
        ValueError: the round trip takes no time.
    """
    if round_trip_s <= 0:
        raise ValueError("a round trip must take some time")
    return pairs.start_overhead_s / round_trip_s


def trips_by_delay(by_round_trip_s: Mapping[float, Pairs]) -> float:
    """Returns how much later the command starts for each second that a round trip takes longer: the fitted slope.

    What a forward adds whatever the distance (it is decided, bound, stored) is not in it. It is that of the quickest
    start at each round-trip time: a centre pauses for a random time before it asks, and everything else that varies
    only adds to it.

    Raises:
        ValueError: there are not two different round-trip times.
    """
    if len(by_round_trip_s) < 2:
        raise ValueError("two round-trip times are needed")
    slope, _ = statistics.linear_regression(
        list(by_round_trip_s), [min(pairs.forwarded_start_s) for pairs in by_round_trip_s.values()]
    )
    return slope


def figures(pairs: Pairs, round_trip_s: float) -> list[Figure]:
    """Returns what was measured at one round-trip time."""
    name = f"at_{round_trip_s * _MS:.0f}_ms"
    found = [
        Figure(f"{name}_start_overhead", pairs.start_overhead_s * _MS, "ms"),
        Figure(f"{name}_total_overhead", pairs.total_overhead_s * _MS, "ms"),
    ]
    kinds: Sequence[tuple[str, Sequence[float]]] = (
        ("forwarded_start", pairs.forwarded_start_s),
        ("local_start", pairs.local_start_s),
        ("forwarded_total", pairs.forwarded_total_s),
        ("local_total", pairs.local_total_s),
        ("considered", pairs.considered_s),
        ("bound", pairs.bound_s),
    )
    for kind, values in kinds:
        found.append(Figure(f"{name}_{kind}_median", statistics.median(values) * _MS, "ms"))
    found.append(Figure(f"{name}_forwarded_start_p90", quantile(pairs.forwarded_start_s, 0.9) * _MS, "ms"))
    if pairs.messages:
        found.append(Figure(f"{name}_waits_for_answers", statistics.median(pairs.messages), "count"))
    return found
