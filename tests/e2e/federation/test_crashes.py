"""Whoever is killed in whatever phase, a job at a peer runs once, and its result comes home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.federation.network import network
from tests.e2e.federation.sites import Pair, pair

pytestmark = pytest.mark.timeout(120)

PHASES = ["FORWARDING", "FORWARDED", "SLICE_CREATED", "CONTAINER_STARTED", "PEER_ENDED"]


@pytest.fixture(scope="module")
def centres() -> Iterator[Pair]:
    with network("a", "b") as hosts, pair(hosts) as made:
        yield made


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_control_plane_is_killed(centres: Pair, name: str, phase: str, tmp_path: Path) -> None:
    work = centres.submit()
    if phase == "PEER_ENDED":
        work.go()
    work.story.heard(phase)
    getattr(centres, name).restart("controlplane")
    work.go()
    # A centre that is killed before it has bound it may forget its offer, and is asked again.
    work.finished(tmp_path / "result", attempts=None if phase == "FORWARDING" else 1)


def test_its_node_daemon_is_killed_while_it_runs(centres: Pair, tmp_path: Path) -> None:
    work = centres.submit()
    work.begun()
    centres.b.restart("nodedaemon")
    work.go()
    work.finished(tmp_path / "result")


def test_all_are_killed_while_it_runs(centres: Pair, tmp_path: Path) -> None:
    work = centres.submit()
    work.begun()
    for site in (centres.a, centres.b):
        site.kill("controlplane")
        site.kill("nodedaemon")
    work.go()
    for site in (centres.b, centres.a):
        site.start("controlplane")
        site.start("nodedaemon")
    work.finished(tmp_path / "result")
