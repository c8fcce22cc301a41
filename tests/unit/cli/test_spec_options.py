from __future__ import annotations

import re
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from puhui.cli.spec_options import SpecOptions
from puhui.cli.terminal import Mistake
from puhui.v1 import job_pb2


def test_where_a_job_may_run() -> None:
    spec = job_pb2.JobSpec()
    SpecOptions(
        prefer=["east", "west"],
        max_wait="10m",
        peer_label=["region=eu", "owner="],
        not_peer_label=["region=us"],
    ).apply(spec)
    assert spec.peers == job_pb2.PeerPolicy(
        preferred_peers=["east", "west"],
        max_wait=Duration(seconds=600),
        required_labels={"region": "eu", "owner": ""},
        forbidden_labels={"region": "us"},
    )


def test_what_is_not_said_about_peers_stays_as_the_file_has_it() -> None:
    spec = job_pb2.JobSpec(peers=job_pb2.PeerPolicy(preferred_peers=["east"], required_labels={"region": "eu"}))
    before = job_pb2.PeerPolicy()
    before.CopyFrom(spec.peers)
    SpecOptions().apply(spec)
    assert spec.peers == before
    SpecOptions(prefer=["west"], peer_label=["region=us"]).apply(spec)
    assert spec.peers == job_pb2.PeerPolicy(preferred_peers=["west"], required_labels={"region": "us"})
    untouched = job_pb2.JobSpec()
    SpecOptions().apply(untouched)
    assert not untouched.HasField("peers")


def test_a_file_that_keeps_a_job_here_is_overruled() -> None:
    spec = job_pb2.JobSpec(peers=job_pb2.PeerPolicy(here_only=True))
    SpecOptions(here_only=False).apply(spec)
    assert not spec.peers.here_only
    SpecOptions(here_only=True).apply(spec)
    assert spec.peers.here_only


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SpecOptions(max_wait="soon"), "--max-wait"),
        (SpecOptions(peer_label=["eu"]), "--peer-label eu: write it as KEY=VALUE"),
        (SpecOptions(not_peer_label=["=eu"]), "--not-peer-label =eu: write it as KEY=VALUE"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: SpecOptions, said: str) -> None:
    with pytest.raises(Mistake, match=said):
        options.apply(job_pb2.JobSpec())


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ({}, SpecOptions(here_only=True, prefer=["b"]), "--here-only and --prefer"),
        ({"here_only": True}, SpecOptions(prefer=["b"]), "leave out one of --here-only and --prefer, or of here_only"),
        ({"preferred_peers": ["b"]}, SpecOptions(here_only=True), "to prefer b: it cannot be both"),
        ({}, SpecOptions(prefer=["b", "c", "b"]), "--prefer b is there twice"),
        ({}, SpecOptions(peer_label=["a=b"], not_peer_label=["a=b"]), "--peer-label and --not-peer-label a=b"),
        ({"required_labels": {"a": "b"}}, SpecOptions(not_peer_label=["a=b"]), "leave out one of --peer-label and"),
    ],
)
def test_what_is_said_both_ways_is_refused_in_the_words_of_the_command_line(
    file: dict[str, Any], options: SpecOptions, said: str
) -> None:
    spec = job_pb2.JobSpec(peers=job_pb2.PeerPolicy(**file))
    with pytest.raises(Mistake, match=re.escape(said)) as refused:
        options.apply(spec)
    assert not re.search(r"peers\.|_peers|_labels\.", refused.value.message)
