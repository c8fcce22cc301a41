"""What a peer is told of an attempt that goes there."""

from __future__ import annotations

from controlplane.forwards import ForwardRecord
from controlplane.reach import Reach
from controlplane.records import JobRecord
from controlplane.store import Store
from puhui.rpc.moment import timestamp
from puhui.v1 import card_pb2, peer_service_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["MOST_HOPS", "forward_header", "guest_left_s", "hops_left", "lease_left", "origin_of", "visited"]

MOST_HOPS = 2
"""A job is forwarded at most so often."""


def origin_of(centre: str, forward: ForwardRecord) -> card_pb2.AttemptRef:
    """Returns the name of an attempt for a peer, with the right to command it."""
    return card_pb2.AttemptRef(
        centre=centre, job_id=forward.job_id, attempt=forward.attempt, fencing_token=forward.token
    )


def visited(record: JobRecord, centre_id: str) -> list[str]:
    """Returns the centres that a job has visited once it leaves this one, the origin first."""
    return [*record.job.guest.visited_centres, centre_id]


def hops_left(record: JobRecord) -> int:
    """Returns how often a job may be forwarded once it has left this centre; below 0, it may not leave."""
    before = record.job.guest.hops_left if record.job.HasField("guest") else MOST_HOPS
    return before - 1


def forward_header(
    record: JobRecord, forward: ForwardRecord, reach: Reach, terms: peer_service_pb2.PeerTerms
) -> wire.ForwardHeader:
    """Returns what a peer is told of an attempt, but for its bundle."""
    job = record.job
    header = wire.ForwardHeader(
        origin=origin_of(job.centre, forward),
        spec=job.spec,
        sizing=job.sizing,
        offer_id=forward.offer_id,
        visited_centres=visited(record, reach.centre_id),
        lease_expire_time=timestamp(forward.lease_end),
        hops_left=max(0, hops_left(record)),
        prediction=job.prediction if job.HasField("prediction") else None,
        idle_policy=job.idle_policy if job.HasField("idle_policy") else None,
    )
    header.spec.tenant = terms.tenants_out.get(job.spec.tenant, job.spec.tenant)
    return header


async def guest_left_s(store: Store, job_id: str, reach: Reach) -> float | None:
    """Returns how long this centre itself may still command a job, in seconds; None when it is the job's origin."""
    guest = await store.guest_of(job_id)
    return None if guest is None else guest.lease_end - reach.clock.now()


def lease_left(reach: Reach, guest_left: float | None) -> float:
    """Returns the length of lease to ask for, in seconds: what was forwarded to us ends elsewhere before it ends here.

    0 asks for nothing more than there is.

    Args:
        reach: with the length of leases.
        guest_left: how long this centre itself may command it; None for as long as it likes.
    """
    if guest_left is None:
        return reach.lease_s
    return max(0.0, min(reach.lease_s, guest_left - reach.margin_s))
