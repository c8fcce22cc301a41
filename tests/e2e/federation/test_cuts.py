"""Whatever is cut between two centres, and whoever dies, a job runs once at a time and its result comes home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.federation.network import network
from tests.e2e.federation.sites import Pair, Work, pair

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def centres() -> Iterator[Pair]:
    with network("a", "b") as hosts, pair(hosts) as made:
        yield made


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "result"


def _ends_there(centres: Pair, work: Work) -> None:
    """Lets it end at b, and waits until b knows that."""
    work.go()
    with centres.b.centre() as centre:
        assert centre.wait(centres.b.guest(work.id), timeout_s=30).exit_code == 5


@pytest.mark.parametrize("phase", ["FORWARDING", "FORWARDED", "SLICE_CREATED", "CONTAINER_STARTED"])
def test_the_link_goes_down_in_a_phase(centres: Pair, phase: str, result: Path) -> None:
    work = centres.submit()
    work.story.heard(phase)
    with centres.network.without("b"):
        if phase != "FORWARDING":  # then b may know nothing of it yet
            _ends_there(centres, work)
    work.go()
    work.finished(result)


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("b", "a")])
def test_one_direction_is_lost(centres: Pair, source: str, target: str, result: Path) -> None:
    work = centres.submit()
    work.begun()
    with centres.network.dropping(source, target):
        _ends_there(centres, work)
    work.finished(result)


def test_the_link_flaps(centres: Pair, result: Path) -> None:
    work = centres.submit()
    for phase in ("FORWARDING", "FORWARDED", "SLICE_CREATED", "CONTAINER_STARTED"):
        centres.network.cut("b")
        centres.network.mend("b")
        work.story.heard(phase)
    for lines in range(2, 8):
        centres.network.cut("b")
        work.seen(10 * lines)
        centres.network.mend("b")
        work.seen(10 * lines + 5)
    work.go()
    work.finished(result)
