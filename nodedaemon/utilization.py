"""What is told of utilization, and when: readings in, samples and times out. Nothing here asks a driver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nodedaemon.gpm import GpmSample, Means
from puhui.rpc.moment import duration, timestamp
from puhui.v1.node_service_pb2 import UtilizationSample, UtilizationSource

__all__ = [
    "DEFAULT_INTERVAL_S",
    "LONGEST_S",
    "SHORTEST_S",
    "Card",
    "Look",
    "Reading",
    "describe",
    "describe_silent",
    "early_s",
    "next_due",
]

SHORTEST_S = 0.1
"""The shortest interval between samples, in seconds."""
DEFAULT_INTERVAL_S = 1.0
"""Time between samples when none is asked for, in seconds."""
LONGEST_S = 60.0
"""The longest interval between samples, in seconds."""
# GPM wants more than 100 ms between two samples, and a look takes a while.
_CLOSEST_S = 0.105


@dataclass(frozen=True)
class Card:
    """A GPU, or a slice of one. A slice that was cut anew may have its UUID or its ids, but seldom all of them."""

    uuid: str
    gi: int | None = None
    """Id of the GPU instance; None for a whole GPU."""
    ci: int | None = None
    """Id of the compute instance; None for a whole GPU."""


@dataclass(frozen=True)
class Reading:
    """One card at one instant."""

    card: Card
    at_s: float
    """When it was read, on the monotonic clock. Intervals are differences of these."""
    time_s: float
    """When it was read, by the wall clock, in seconds since the epoch: a label."""
    processes: int | None = None
    """How many processes hold the card; None is not known."""
    memory_used_mib: int | None = None
    gpm: GpmSample | None = None
    rate_percent: float | None = None
    """The driver's own utilization rate, of a GPU without MIG mode."""
    trouble: str = ""
    """Why its utilization is not known, in a sentence, when presence must not be believed either."""
    notices: tuple[str, ...] = ()
    """What else could not be read, in a sentence each."""


@dataclass(frozen=True, eq=False)
class Look:
    """All cards of one GPU, looked at once."""

    gpu_uuid: str
    readings: Mapping[Card, Reading]
    """The GPU itself first."""

    def samples(self) -> list[GpmSample]:
        """Returns the sample buffers that this look holds, each once: slices may share one."""
        return list({id(one.gpm): one.gpm for one in self.readings.values() if one.gpm is not None}.values())


def describe(reading: Reading, base: Reading | None, means: Means | None, *, emulated: bool) -> UtilizationSample:
    """Returns what is told of a reading.

    What is not known is said to be unavailable, never 0: an unknown signal is not an idle one.

    Args:
        reading: the card now.
        base: the same card when the interval began; None when nothing was read then.
        means: what GPM tells of the time between the two; None when it was not asked.
        emulated: whether the card is.
    """
    trouble = reading.trouble or (means.trouble if means is not None else "")
    sample = UtilizationSample(
        uuid=reading.card.uuid,
        time=timestamp(reading.time_s),
        memory_used_mib=reading.memory_used_mib,
        processes=reading.processes or 0,
        notice="; ".join(filter(None, (trouble, *reading.notices))),
        emulated=emulated,
    )
    if base is not None and means is not None and _told(means):
        sample.source = UtilizationSource.UTILIZATION_SOURCE_GPM
        sample.interval.CopyFrom(duration(reading.at_s - base.at_s))
        if means.multiprocessor_percent is not None:
            sample.multiprocessor_percent = means.multiprocessor_percent
        if means.engine_percent is not None:
            sample.engine_percent = means.engine_percent
    elif reading.rate_percent is not None:
        sample.source = UtilizationSource.UTILIZATION_SOURCE_DRIVER_RATES
        sample.engine_percent = reading.rate_percent
    elif trouble or reading.processes is None:
        sample.source = UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE
    else:
        sample.source = UtilizationSource.UTILIZATION_SOURCE_PROCESSES
    return sample


def describe_silent(card: Card, time_s: float, why: str, *, emulated: bool) -> UtilizationSample:
    """Returns what is told of a card that could not be looked at.

    Args:
        card: the card.
        time_s: now, in seconds since the epoch.
        why: why not, in a sentence.
        emulated: whether the card is.
    """
    return UtilizationSample(
        uuid=card.uuid,
        time=timestamp(time_s),
        source=UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE,
        notice=why,
        emulated=emulated,
    )


def next_due(now_s: float, interval_s: float) -> float:
    """Returns when a watcher wants its next sample.

    Times lie on multiples of the interval, so that watchers of one interval, and of multiples of it, are served by
    one look at the GPU. A watcher that came late skips a time rather than getting two samples close together: from
    one sample to the next it is half an interval to one and a half, and one on the mean.

    Args:
        now_s: when it got its last one, on the monotonic clock.
        interval_s: the time between samples that it asked for.
    """
    period_s = max(interval_s, _CLOSEST_S)
    return period_s * math.ceil((now_s + period_s / 2) / period_s)


def early_s(interval_s: float) -> float:
    """Returns how much too early a watcher takes part in a look that is made for another one, in seconds.

    Beside a watcher of the shortest interval there is always a look that is near enough, from 420 ms on.
    """
    return min(interval_s / 4, _CLOSEST_S)


def _told(means: Means) -> bool:
    return means.multiprocessor_percent is not None or means.engine_percent is not None
