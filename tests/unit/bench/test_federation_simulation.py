from __future__ import annotations

import pytest

from bench.federation_load import MOST_NEIGHBOURS, neighbours, work_of
from bench.federation_simulation import HOPS, alone, as_peers, as_pool, gain_pct, simulate


@pytest.mark.parametrize("centres", [1, 2, 3, 9, 50])
def test_nobody_knows_more_than_eight_and_who_is_known_knows_back(centres: int) -> None:
    known = neighbours(centres, 3)
    for one, peers in enumerate(known):
        assert len(peers) <= MOST_NEIGHBOURS
        assert one not in peers
        for other, round_trip_s in peers.items():
            assert known[other][one] == round_trip_s
    if centres >= 9:
        assert sum(len(peers) for peers in known) / centres > 6


def test_every_job_begins_once_and_peers_are_between_nothing_and_one_pool() -> None:
    works = work_of(6, 2, seed=4)
    isolated, peers, pool = alone(works, 6, 2), as_peers(works, 6, 2, seed=4), as_pool(works, 6, 2)
    for outcome in (isolated, peers, pool):
        assert len(outcome.waits_s) == len(works)
        assert min(outcome.waits_s) >= 0
        assert 0 < outcome.utilization <= 1
    assert pool.mean_wait_s < peers.mean_wait_s < isolated.mean_wait_s
    assert 0 < peers.sent <= HOPS * len(works)
    assert peers.messages["forwards"] <= peers.messages["offers"]


def test_the_same_seed_gives_the_same_day() -> None:
    works = work_of(3, 2, seed=5)
    assert works == work_of(3, 2, seed=5)
    assert as_peers(works, 3, 2, seed=5) == as_peers(works, 3, 2, seed=5)


def test_a_gain_is_a_share_of_the_way() -> None:
    assert gain_pct(100.0, 55.0, 50.0) == 90.0
    assert gain_pct(5.0, 5.0, 5.0) == 100.0


def test_what_is_reported() -> None:
    figures, aims, notes = simulate(((2, 1), (3, 1)), (2, 1), gpus=1)
    names = {figure.name for figure in figures}
    assert {"2_centres_pool_mean_wait", "3_centres_pool_gain", "2_overloaded_centres_pool_gain"} <= names
    assert [aim.name for aim in aims] == ["pool_gain_pct"]
    assert notes
