"""What a peer asks for when it forwards an attempt: checked, and made a job of this centre. Pure."""

from __future__ import annotations

import grpc

from controlplane import happenings
from controlplane.fleet import Geometry
from controlplane.guests import GuestRecord
from controlplane.jobs import transition
from controlplane.peer_terms import TermsError, tenant_in
from controlplane.records import JobRecord, PeerRecord
from controlplane.sizing import size, size_of_session
from controlplane.spec import require_valid
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import request_digest
from puhui.rpc.moment import duration, now, seconds, timestamp
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_pb2, prediction_pb2

__all__ = ["digest_of_header", "invalid", "job_of", "require_allowed", "spec_here"]

_MOST_VISITED = 16
_MOST_HOPS = 8
_MOST_ID = 64
_MOST_HEADER = 2**20
_MOST_MIB = 2**40
_MOST_PREDICTION = 64 * 2**10
_MOST_ELAPSED_S = 86400.0


def require_allowed(centre_id: str, peer: PeerRecord, header: wire.ForwardHeader) -> None:
    """Refuses what may not come here.

    Raises:
        Refusal: FAILED_PRECONDITION with NOT_RECEIVING or FORWARDING_LOOP; INVALID_ARGUMENT with HEADER_INVALID.
    """
    if peer.terms.receive_off:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "NOT_RECEIVING",
            "this centre takes no work from you; its operator has turned that off",
        )
    if centre_id in header.visited_centres:
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "FORWARDING_LOOP", "this job has been at this centre before")
    if header.ByteSize() > _MOST_HEADER:
        raise invalid("HEADER_INVALID", "a header is at most 1 MiB long")
    visited = header.visited_centres
    too_long = any(len(one) > _MOST_ID for one in visited)
    if not 0 < len(visited) <= _MOST_VISITED or too_long or header.hops_left > _MOST_HOPS:
        raise invalid("HEADER_INVALID", "a job says which centres it has visited, the origin first")


def job_of(
    centre: str,
    peer: PeerRecord,
    header: wire.ForwardHeader,
    spec: job_pb2.JobSpec,
    policy: job_pb2.IdlePolicy,
    wanted: GuestRecord,
    geometries: list[Geometry],
) -> tuple[JobRecord, list[job_pb2.JobEvent]]:
    """Returns the job that a guest becomes, sized for the GPUs of this centre, and its first events.

    Raises:
        Refusal: INVALID_ARGUMENT with HEADER_INVALID; FAILED_PRECONDITION with TOO_LARGE.
    """
    at = now()
    job = job_pb2.Job(
        id=wanted.job_id,
        centre=centre,
        spec=spec,
        bundle_id=header.bundle.bundle_id,
        idle_policy=policy,
        state=job_pb2.JOB_STATE_QUEUED,
        create_time=timestamp(at),
        guest=job_pb2.Guest(
            peer=wanted.peer,
            job_id=wanted.origin_job,
            attempt=wanted.attempt,
            visited_centres=header.visited_centres,
            hops_left=header.hops_left if peer.terms.transit else 0,
        ),
    )
    prediction = _prediction(header)
    required_mib = header.sizing.required_mib or (prediction.required_mib if prediction is not None else 0)
    if required_mib > _MOST_MIB:
        raise invalid("HEADER_INVALID", "sizing.required_mib is an amount of memory in MiB")
    if spec.kind == job_pb2.JOB_KIND_SESSION:
        sizing = size_of_session(spec.resources, geometries, required_mib)
    else:
        # Its origin may have learned that it needs more than was predicted.
        sizing = size(spec.resources, prediction_pb2.Prediction(required_mib=required_mib), geometries)
    if geometries and not sizing.choices:
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "TOO_LARGE", sizing.reason)
    least_mib = sizing.required_mib if spec.kind == job_pb2.JOB_KIND_BATCH and not spec.resources.profile else 0
    record, submitted = transition(JobRecord(job, at_least_mib=least_mib), happenings.Submitted(), at)
    record, predicted = transition(record, happenings.Predicted(prediction, sizing), at)
    return record, [submitted, predicted]


def _prediction(header: wire.ForwardHeader) -> prediction_pb2.Prediction | None:
    """Returns what the code was predicted to need, as far as this version understands it."""
    if not header.HasField("prediction"):
        return None
    if header.prediction.ByteSize() > _MOST_PREDICTION:
        raise invalid("HEADER_INVALID", "a prediction is at most 64 KiB long")
    prediction = prediction_pb2.Prediction()
    prediction.CopyFrom(header.prediction)
    if prediction.tier not in prediction_pb2.PredictionTier.values():
        prediction.tier = prediction_pb2.PREDICTION_TIER_UNSPECIFIED
    if not 0 <= seconds(prediction.elapsed) <= _MOST_ELAPSED_S or not 0 <= prediction.elapsed.nanos < 10**9:
        prediction.ClearField("elapsed")
    return prediction


def spec_here(peer: PeerRecord, header: wire.ForwardHeader, longest_idle_after_s: float) -> job_pb2.JobSpec:
    """Returns what a guest asks for, as this centre takes it.

    Args:
        peer: whose it is.
        header: what is asked for.
        longest_idle_after_s: no job may keep an unused share here for longer, in seconds.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID or TENANT_INVALID.
    """
    spec = job_pb2.JobSpec()
    spec.CopyFrom(header.spec)
    terms = peer.terms
    try:
        spec.tenant = tenant_in(peer.name, terms, spec.tenant)
    except TermsError as error:
        raise invalid("TENANT_INVALID", str(error)) from error
    spec.priority = min(spec.priority, terms.highest_priority)
    spec.kind = spec.kind or job_pb2.JOB_KIND_BATCH
    if header.HasField("idle_policy"):
        spec.idle.CopyFrom(header.idle_policy)
        # Its origin has filled in its own defaults, which may be beyond what this centre allows.
        for name in ("idle_after", "start_grace"):
            asked = getattr(spec.idle, name)
            if seconds(asked) > longest_idle_after_s:
                asked.CopyFrom(duration(longest_idle_after_s))
    # Whom its origin meant by their names, nobody knows here; where it may not go, holds here too.
    spec.ClearField("peers")
    if header.spec.HasField("peers"):
        spec.peers.required_labels.update(header.spec.peers.required_labels)
        spec.peers.forbidden_labels.update(header.spec.peers.forbidden_labels)
    require_valid(spec)
    return spec


def digest_of_header(header: wire.ForwardHeader) -> str:
    """Returns what tells one request from another for the same attempt: not who asks, by what offer, or until when."""
    same = wire.ForwardHeader()
    same.CopyFrom(header)
    for field in ("offer_id", "lease", "lease_expire_time"):
        same.ClearField(field)
    same.origin.fencing_token = 0
    return request_digest(same.SerializeToString(deterministic=True))


def invalid(reason: str, message: str) -> Refusal:
    """Returns the refusal of a request that nobody can grant."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
