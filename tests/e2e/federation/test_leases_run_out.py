"""A lease that runs out ends the job where it ran, before it runs elsewhere, whoever is dead meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.federation.network import network
from tests.e2e.federation.sites import LOG, Pair, Work, eventually, pair

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    with network("a", "b") as hosts, pair(hosts, lease_s=6.0) as made:
        yield made


@pytest.fixture
def centres(shared: Pair) -> Iterator[Pair]:
    yield shared
    shared.in_contact()
    if not shared.holders:
        shared.fill()


@pytest.mark.parametrize("dead", [(), ("controlplane", "nodedaemon")])
def test_it_comes_back_and_runs_here(centres: Pair, dead: tuple[str, ...], tmp_path: Path) -> None:
    work = centres.submit()
    work.begun()
    with centres.network.without("b"):
        for which in dead:
            centres.b.kill(which)
        try:
            work.story.heard("BROUGHT_BACK")
            assert work.is_still(), "it is brought back, and its process is alive"
            centres.clear()
            work.begun(times=2)
        finally:
            for which in dead:
                centres.b.start(which)
    work.go()
    work.finished(tmp_path / "result", attempts=2, runs=2)


def test_the_control_plane_of_the_origin_is_dead_while_it_runs_out(centres: Pair, tmp_path: Path) -> None:
    work = centres.submit()
    work.begun()
    centres.a.kill("controlplane")
    eventually(work.is_still, "it runs without a lease")
    centres.a.start("controlplane")
    work.story.heard("BROUGHT_BACK")
    work.begun(times=2)
    work.go()
    assert work.finished(tmp_path / "result", attempts=2, runs=2).attempts[1].peer == "b"


def _ends_behind_a_cut(centres: Pair) -> Work:
    work = centres.submit()
    work.begun()
    centres.network.cut("b")
    work.go()
    with centres.b.centre() as centre:
        assert centre.wait(centres.b.guest(work.id), timeout_s=30).exit_code == 5
    work.story.heard("BROUGHT_BACK")
    return work


def test_a_result_that_comes_late_is_taken(centres: Pair, tmp_path: Path) -> None:
    work = _ends_behind_a_cut(centres)
    centres.network.mend("b")
    work.story.heard("LATE_RESULT")
    work.finished(tmp_path / "result")


def test_a_result_that_comes_too_late_is_kept(centres: Pair, tmp_path: Path) -> None:
    work = _ends_behind_a_cut(centres)
    centres.clear()
    work.finished(tmp_path / "second", attempts=2, runs=2)
    centres.network.mend("b")
    centres.a.restart("controlplane")  # a connection that was cut takes its time to notice that it is whole again
    with centres.a.centre() as centre:
        eventually(
            lambda: "LATE_RESULT_KEPT" in [event.reason for event in centre.watch(work.id)],
            "what the first attempt left is not told of",
        )
        assert b"".join(chunk.data for chunk in centre.logs(work.id, attempt=1)) == LOG
        centre.pull(work.id, tmp_path / "first", attempt=1)
    assert (tmp_path / "first" / "result").read_text() != (tmp_path / "second" / "result").read_text()
