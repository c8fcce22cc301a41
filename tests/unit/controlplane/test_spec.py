from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from controlplane.spec import require_known_peers, require_offered, require_valid
from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2
from tests.unit.controlplane.samples import GEOMETRY


def spec(**fields: Any) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(**{"command": ["python", "x.py"], **fields})


def peers(**fields: Any) -> job_pb2.PeerPolicy:
    return job_pb2.PeerPolicy(**fields)


def test_a_full_spec_is_taken() -> None:
    require_valid(
        spec(
            name="a-job.1",
            image="localhost/puhui/base:latest",
            env={"LR": "0.1"},
            labels={"team/x": "y"},
            priority=-100,
            tenant="lab",
            resources=job_pb2.Resources(profile="1g.10gb+me", cpus=1.5, host_memory_mib=10, pids=5),
            inputs=[job_pb2.DataInput(name="data", size_bytes=2**40)],
            max_duration=Duration(seconds=60),
            stop_grace=Duration(),
            peers=peers(
                preferred_peers=["east", "west"],
                max_wait=Duration(),
                required_labels={"region": "eu"},
                forbidden_labels={"region": "us", "owner": ""},
            ),
        )
    )
    require_valid(spec(peers=peers(here_only=True)))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"command": []}, "command"),
        ({"command": [""]}, "command"),
        ({"command": ["a\0"]}, "command"),
        ({"command": ["x" * 200_000]}, "command"),
        ({"command": ["x", *[""] * 200_000]}, "command"),
        ({"inputs": [job_pb2.DataInput(name="x")] * 257}, "inputs"),
        ({"name": "Upper"}, "name"),
        ({"name": "x" * 64}, "name"),
        ({"kind": 77}, "kind"),
        ({"tenant": "a b"}, "tenant"),
        ({"priority": 101}, "priority"),
        ({"image": "a b"}, "image"),
        ({"env": {"1X": ""}}, "env.1X"),
        ({"env": {"X": "\0"}}, "env.X"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "env.CUDA_VISIBLE_DEVICES"),
        ({"env": {"PUHUI_JOB_ID": "j"}}, "env.PUHUI_JOB_ID"),
        ({"env": {"X": "y" * 200_000}}, "env"),
        ({"labels": {"": "y"}}, "labels."),
        ({"labels": {"k": "y" * 300}}, "labels.k"),
        ({"labels": {str(n): "" for n in range(65)}}, "labels"),
        ({"resources": job_pb2.Resources(profile="huge")}, "resources.profile"),
        ({"resources": job_pb2.Resources(memory_mib=2**50)}, "resources.memory_mib"),
        ({"resources": job_pb2.Resources(cpus=-1)}, "resources.cpus"),
        ({"resources": job_pb2.Resources(cpus=math.nan)}, "resources.cpus"),
        ({"resources": job_pb2.Resources(host_memory_mib=2**50)}, "resources.host_memory_mib"),
        ({"resources": job_pb2.Resources(pids=2**31)}, "resources.pids"),
        ({"max_duration": Duration()}, "max_duration"),
        ({"max_duration": Duration(seconds=-1)}, "max_duration"),
        ({"max_duration": Duration(seconds=10**9)}, "max_duration"),
        ({"stop_grace": Duration(seconds=4000)}, "stop_grace"),
        ({"peers": peers(preferred_peers=["a b"])}, "peers.preferred_peers[0]"),
        ({"peers": peers(preferred_peers=["a", ""])}, "peers.preferred_peers[1]"),
        ({"peers": peers(preferred_peers=["a", "a"])}, "peers.preferred_peers[1]"),
        ({"peers": peers(preferred_peers=[f"p{n}" for n in range(17)])}, "peers.preferred_peers"),
        ({"peers": peers(preferred_peers=["a"], here_only=True)}, "peers.preferred_peers"),
        ({"peers": peers(max_wait=Duration(seconds=-1))}, "peers.max_wait"),
        ({"peers": peers(max_wait=Duration(seconds=10**9))}, "peers.max_wait"),
        ({"peers": peers(required_labels={"a b": ""})}, "peers.required_labels.a b"),
        ({"peers": peers(required_labels={str(n): "" for n in range(65)})}, "peers.required_labels"),
        ({"peers": peers(forbidden_labels={"a": "y" * 257})}, "peers.forbidden_labels.a"),
        ({"peers": peers(required_labels={"a": "b"}, forbidden_labels={"a": "b"})}, "peers.forbidden_labels.a"),
        ({"inputs": [job_pb2.DataInput(name="x" * 300)]}, "inputs[0].name"),
        ({"inputs": [job_pb2.DataInput(size_bytes=2**62)]}, "inputs[0].size_bytes"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        require_valid(spec(**fields))
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID")
    assert refused.value.metadata == {"field": field}


def test_a_job_may_prefer_only_peers_that_there_are() -> None:
    require_known_peers(job_pb2.PeerPolicy(preferred_peers=["east"]), {"east", "west"})
    with pytest.raises(Refusal) as refused:
        require_known_peers(job_pb2.PeerPolicy(preferred_peers=["east", "north"]), {"west", "east"})
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PEER_NOT_FOUND")
    assert refused.value.metadata == {"peer": "north", "available": "east, west"}
    with pytest.raises(Refusal, match="it has none"):
        require_known_peers(job_pb2.PeerPolicy(preferred_peers=["north"]), ())


def test_a_session_needs_no_command() -> None:
    require_valid(spec(kind=job_pb2.JOB_KIND_SESSION, command=[]))
    with pytest.raises(Refusal) as refused:
        require_valid(spec(command=[]))
    assert refused.value.metadata == {"field": "command"}


def test_a_profile_that_no_gpu_offers_is_refused_with_what_there_is() -> None:
    with pytest.raises(Refusal) as refused:
        require_offered(job_pb2.Resources(profile="1g.5gb"), [GEOMETRY])
    assert (refused.value.code, refused.value.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "PROFILE_NOT_AVAILABLE",
    )
    assert refused.value.metadata["available"].startswith("1g.10gb, 1g.10gb+me, 1g.20gb")
    require_offered(job_pb2.Resources(profile="1g.5gb"), [])
    require_offered(job_pb2.Resources(profile="4g.40gb"), [GEOMETRY])
