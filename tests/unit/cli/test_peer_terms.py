"""What an operator is shown of the terms with a peer."""

from typing import Any

import pytest

from puhui.cli.peer_terms import agreed
from puhui.v1.peer_service_pb2 import PeerTerms

TERMS: dict[str, tuple[Any, str]] = {
    "send_off": (True, "nothing is sent"),
    "receive_off": (True, "nothing is taken"),
    "transit": (True, "may be passed on"),
    "tenants": (["astro", "bio"], "tenants astro, bio"),
    "tenants_out": ({"a": "b"}, "our a is their b"),
    "tenants_in": ({"c": "d"}, "their c is our d"),
    "most_sent": (1, "at most 1 of our jobs there"),
    "most_received": (2, "at most 2 of its jobs here"),
    "weight": (2.5, "weight 2.5"),
    "cost": (3.0, "cost 3"),
    "distance": (40.0, "distance 40"),
    "hours": ("mon-fri 20:00-08:00", "its work is taken mon-fri 20:00-08:00"),
    "labels": ({"region": "eu"}, "region=eu"),
    "most_bundle_bytes": (2**20, "bundles of at most 1.0 MiB"),
    "most_bytes_a_day": (2**30, "at most 1.0 GiB a day"),
    "most_result_bytes": (2**31, "results of at most 2.0 GiB"),
    "most_calls_a_second": (7, "at most 7 calls a second"),
    "highest_priority": (-5, "its jobs have at most priority -5"),
}


@pytest.mark.parametrize("name", PeerTerms.DESCRIPTOR.fields_by_name)
def test_every_term_that_is_not_the_usual_one_is_shown(name: str) -> None:
    value, said = TERMS[name]
    assert agreed(PeerTerms(**{name: value})) == [said]


def test_of_the_usual_terms_nothing_is_said() -> None:
    assert agreed(PeerTerms()) == []


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        ("mon 20:00-20:00", "mon 20:00-20:00 (24 hours)"),
        ("mon 8:00 - 08:00, sat 00:00-24:00", "mon 8:00 - 08:00 (24 hours), sat 00:00-24:00"),
    ],
)
def test_hours_that_end_when_they_begin_are_a_whole_day_and_that_is_said(hours: str, said: str) -> None:
    assert agreed(PeerTerms(hours=hours)) == [f"its work is taken {said}"]
