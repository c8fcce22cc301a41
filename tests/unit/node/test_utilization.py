"""What is told of utilization, and when."""

from __future__ import annotations

import pytest

from nodedaemon.gpm import Means
from nodedaemon.utilization import Card, Reading, describe, next_due
from puhui.v1.node_service_pb2 import UtilizationSource

_CARD = Card("MIG-1", 1, 0)


def test_what_is_not_known_is_unavailable_and_never_idle() -> None:
    sample = describe(Reading(_CARD, 1.0, 2.0, notices=("not allowed",)), None, None, emulated=True)
    assert sample.source == UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE
    assert not sample.HasField("engine_percent")
    assert (sample.notice, sample.emulated) == ("not allowed", True)


def test_an_interval_is_what_really_passed() -> None:
    base = Reading(_CARD, 10.0, 500.0, processes=1)
    later = Reading(_CARD, 10.25, 100.0, processes=1)  # the wall clock jumped
    sample = describe(later, base, Means(40.0, 50.0), emulated=False)
    assert sample.source == UtilizationSource.UTILIZATION_SOURCE_GPM
    assert sample.interval.ToMilliseconds() == 250
    assert (sample.multiprocessor_percent, sample.engine_percent) == (40.0, 50.0)


@pytest.mark.parametrize("interval_s", [0.1, 0.25, 1.0, 60.0])
def test_the_next_sample_is_neither_close_nor_far(interval_s: float) -> None:
    for late in range(200):
        now_s = 1000.0 + late * 0.37
        wait_s = next_due(now_s, interval_s) - now_s
        assert interval_s * 0.49 <= wait_s <= max(interval_s, 0.105) * 1.51
