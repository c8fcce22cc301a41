"""Clocks that differ by days prolong no lease and end none early, whichever centre is ahead.

The clocks that count from the start of a host are set apart by the kernel, in time namespaces; the lease clocks, which
begin at the wall clock, by what a wrong wall clock leaves in their files.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.federation.network import network
from tests.e2e.federation.sites import Pair, Work, eventually, pair

pytestmark = pytest.mark.timeout(120)

_LEASE_S = 6.0
_DAY_S = 86400
# Fewer than the days that a wrong clock is ahead, so that the two do not make up for each other.
_UP = 3 * _DAY_S
_WRONG = 40.0 * _DAY_S


@pytest.fixture(scope="module", params=["a", "b"])
def ahead(request: pytest.FixtureRequest) -> Iterator[tuple[str, Pair]]:
    host = str(request.param)
    with (
        network("a", "b", longer_up_s={host: _UP}) as hosts,
        pair(hosts, lease_s=_LEASE_S, wrong_s={host: _WRONG}) as made,
    ):
        yield host, made


@pytest.fixture
def centres(ahead: tuple[str, Pair]) -> Iterator[Pair]:
    _, made = ahead
    yield made
    made.in_contact()
    if not made.holders:
        made.fill()


def _lease_end(centres: Pair, work: Work) -> float:
    with centres.b.centre() as centre:
        return float(centre.get(centres.b.guest(work.id)).guest.lease_expire_time.ToMilliseconds()) / 1000


def test_the_lease_clocks_are_apart(ahead: tuple[str, Pair]) -> None:
    host, made = ahead
    work = made.submit()
    work.begun()
    with contextlib.closing(sqlite3.connect(made.a.folder / "centre" / "puhui.db")) as db:
        [(body,)] = db.execute("select body from forwards where job_id = ?", [work.id])
    # What a has stored is on the lease clock of b, which began at the wall clock that b had.
    apart_s = json.loads(body)["lease_end"] - work.runs()[0][0]
    assert apart_s == pytest.approx(_WRONG if host == "b" else 0.0, abs=600)
    pids = [site.daemons["controlplane"].process.pid for site in (made.a, made.b)]
    clocks = [Path(f"/proc/{pid}/ns/time").readlink() for pid in pids]
    assert clocks[0] != clocks[1]
    work.go()
    work.story.ended()


def test_a_lease_is_renewed_and_the_job_ends_once(centres: Pair, tmp_path: Path) -> None:
    work = centres.submit()
    work.begun()
    first = _lease_end(centres, work)
    eventually(lambda: _lease_end(centres, work) > first + 2 * _LEASE_S, "its lease is not renewed")
    work.go()
    assert work.finished(tmp_path / "result").attempts[0].peer == "b"


def test_a_lease_that_runs_out_ends_it_there_before_it_runs_here(centres: Pair, tmp_path: Path) -> None:
    work = centres.submit()
    work.begun()
    with centres.network.without("b"):
        work.story.heard("BROUGHT_BACK")
        assert work.is_still(), "it is brought back, and its process is alive"
        centres.clear()
        work.begun(times=2)
    work.go()
    work.finished(tmp_path / "result", attempts=2, runs=2)


def test_a_crash_of_both_moves_no_lease(centres: Pair, tmp_path: Path) -> None:
    work = centres.submit()
    work.begun()
    for site in (centres.a, centres.b):
        site.restart("controlplane")
    first = _lease_end(centres, work)
    eventually(lambda: _lease_end(centres, work) > first + _LEASE_S, "its lease is not renewed")
    work.go()
    work.finished(tmp_path / "result")
