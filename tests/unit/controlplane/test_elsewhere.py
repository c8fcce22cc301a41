"""What is said of peers to somebody who asks what a job would get, and for whom there is no room here."""

from typing import Any

import pytest

from controlplane.elsewhere import elsewhere
from puhui.v1.job_pb2 import PeerPolicy
from tests.unit.controlplane.neighbours import FakeNeighbour, candidate, neighbour, summary

ROOMY = [summary("7g.80gb", free=2), summary("1g.10gb", free=14), summary("3g.40gb", free=3, idle=1)]


def said(*peers: FakeNeighbour, **job: Any) -> str:
    return elsewhere(candidate(wait_s=None, **job), peers)


def test_the_smallest_slice_that_is_enough_is_told_of_every_peer_that_has_one() -> None:
    peers = (neighbour("c", profiles=ROOMY, emulated=True), neighbour("b", profiles=[summary("7g.80gb", idle=1)]))
    assert said(*peers, profile="", required_mib=30_000) == (
        "as far as is known, peer b has 7g.80gb for it now: 1 idle; "
        "peer c has 3g.40gb (emulated) for it now: 3 free and 1 idle"
    )
    assert said(*peers, profile="7g.80gb") == (
        "as far as is known, peer b has 7g.80gb for it now: 1 idle; peer c has 7g.80gb (emulated) for it now: 2 free"
    )


@pytest.mark.parametrize(
    ("peers", "job", "told"),
    [
        ([], {}, ""),
        ([neighbour(profiles=ROOMY)], {"policy": PeerPolicy(here_only=True)}, ""),
        ([neighbour(profiles=[summary("1g.10gb")])], {}, "no peer that may be asked has room for it now"),
        ([neighbour(profiles=ROOMY)], {"profile": "7g.141gb"}, "no peer would be asked (b: it has no slice of this"),
        ([neighbour(profiles=ROOMY, in_contact=False)], {}, "no peer would be asked (b: out of contact)"),
        ([neighbour(profiles=ROOMY, send_off=True)], {}, "no peer would be asked (b: nothing is sent there)"),
        ([neighbour()], {}, "has room for it now; nothing is known of what there is at b"),
        ([neighbour("c"), neighbour()], {}, "what there is at b, c"),
    ],
)
def test_nothing_is_promised_that_is_not_known(peers: list[FakeNeighbour], job: dict[str, Any], told: str) -> None:
    assert told in said(*peers, **job)
    assert bool(said(*peers, **job)) == bool(told)


def test_of_many_peers_a_few_are_named() -> None:
    told = said(*(neighbour(f"p{number}", profiles=ROOMY) for number in range(9)))
    assert told.count("1g.10gb") == 5
    assert told.endswith("; 4 more")
