"""Two centres that are far apart do what near ones do. The delay is emulated, see `bench.delay_relay`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.federation.network import network
from tests.e2e.federation.sites import PORT, pair

pytestmark = pytest.mark.timeout(120)


def test_results_come_home_from_far_away(tmp_path: Path) -> None:
    with network("a", "b") as hosts, hosts.far_apart(PORT) as delay, pair(hosts) as centres:
        for one_way_s in (0.01, 0.04, 1.0):
            delay(one_way_s)
            work = centres.submit()
            work.begun()
            work.go()
            work.finished(tmp_path / f"{one_way_s}")
        delay(0.0)
