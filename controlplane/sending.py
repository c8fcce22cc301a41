"""What it is to a waiting job that it goes to a peer. Pure."""

from __future__ import annotations

from controlplane import happenings
from controlplane.forwards import ForwardRecord
from controlplane.jobs import transition
from controlplane.offers import Offer
from controlplane.records import Change, JobRecord
from puhui.v1 import job_pb2

__all__ = ["send"]


def send(
    record: JobRecord, token: int, offer: Offer, *, at: float, clock_s: float, boot: str, lease_s: float
) -> Change | None:
    """Returns the change by which a job goes to the peer that made an offer; None when it waits no longer.

    Args:
        record: the job, as it is stored now.
        token: the next fencing token.
        offer: what is taken.
        at: now, in seconds since the epoch.
        clock_s: now, on this centre's lease clock.
        boot: `LeaseClock.boot`.
        lease_s: length of the lease, in seconds.
    """
    if record.state != job_pb2.JOB_STATE_QUEUED or record.cancel_requested:
        return None
    attempt = job_pb2.Attempt(fencing_token=token, peer=offer.peer, profile=offer.profile, gpu_model=offer.gpu_model)
    happening = happenings.Forwarding(attempt, offer.id, offer.expected_wait_s, offer.transfer_s)
    after, event = transition(record, happening, at)
    forward = ForwardRecord(
        job_id=record.id,
        attempt=len(after.job.attempts),
        peer=offer.peer,
        paired=offer.paired,
        token=token,
        offer_id=offer.id,
        lease_end=offer.peer_time + (clock_s - offer.read_at) + min(lease_s, offer.longest_lease_s),
        peer_time=offer.peer_time,
        read_at=offer.read_at,
        boot=boot,
        promised_wait_s=offer.total_s,
        sent_at=at,
        bundle_there=offer.bundle_present,
    )
    # Those that waited with it have ended here; at the peer they begin anew.
    runs = tuple(run for run in after.job.runs if run not in record.job.runs)
    return Change(after, (event,), forward=forward, runs=runs, token_taken=True)
