"""Peers for the tests of forwarding, without a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from controlplane.forwarding import Candidate
from controlplane.offers import Offer
from controlplane.records import PeerRecord
from puhui.v1 import federation_service_pb2, job_pb2, peer_service_pb2


@dataclass
class FakeNeighbour:
    record: PeerRecord
    in_contact: bool = True
    profiles: list[federation_service_pb2.CapacitySummary] = field(default_factory=list)
    queued_jobs: int = 0
    round_trip_s: float = 0.01
    bytes_per_second: float = 1e6
    broken_s: float = 0.0
    emulated: bool = False


def neighbour(name: str = "b", address: str = "127.0.0.1:1", **fields: Any) -> FakeNeighbour:
    own = {key: fields.pop(key) for key in list(fields) if key in FakeNeighbour.__dataclass_fields__}
    terms = peer_service_pb2.PeerTerms(**fields)
    return FakeNeighbour(PeerRecord(name, f"c-{name}", address, b"", terms, 0.0), **own)


def summary(profile: str = "1g.10gb", free: int = 0, idle: int = 0) -> federation_service_pb2.CapacitySummary:
    return federation_service_pb2.CapacitySummary(profile=profile, free=free, idle=idle)


def candidate(job_id: str = "j-1", wait_s: float | None = 1000.0, **fields: Any) -> Candidate:
    policy = fields.pop("policy", job_pb2.PeerPolicy())
    profile = fields.pop("profile", "1g.10gb")
    return Candidate(job_id, profile, fields.pop("required_mib", 0), "lab", policy, wait_s, **fields)


def offer(peer: str = "b", wait_s: float = 0.0, **fields: Any) -> Offer:
    given: dict[str, Any] = {
        "transfer_s": 0.0,
        "cost": 1.0,
        "peer_time": 1.0,
        "read_at": 0.0,
        "expire_at": 1e9,
        "longest_lease_s": 900.0,
        "profile": "1g.10gb",
        "gpu_model": "x",
        "bundle_present": False,
        **fields,
    }
    return Offer(peer, f"o-{peer}", wait_s, **given)
