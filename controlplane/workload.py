"""What a job becomes on its node: the container that is asked for."""

from __future__ import annotations

from controlplane.idle_policy import watch_of
from puhui.v1 import card_pb2, job_pb2, node_service_pb2

__all__ = ["container_request", "stop_request"]

# Stays until it is told to end, in every image with a shell, and ends at once then.
_STAY = ["sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"]


def container_request(
    job: job_pb2.Job, owner: card_pb2.AttemptRef, piece: card_pb2.Slice, request_id: str
) -> node_service_pb2.CreateContainerRequest:
    """Returns the request for the container that runs `job` on slice `piece`."""
    spec = job.spec
    session = spec.kind == job_pb2.JOB_KIND_SESSION
    # A session's slice changes while its own command runs: each run is told of its own, and what the command starts
    # finds the one that is there.
    share = (
        {}
        if session
        else {
            "CUDA_VISIBLE_DEVICES": piece.uuid,
            "NVIDIA_VISIBLE_DEVICES": piece.uuid,
            "PUHUI_SLICE_PROFILE": piece.profile,
            "PUHUI_SLICE_MEMORY_MIB": str(piece.memory_mib),
        }
    )
    request = node_service_pb2.CreateContainerRequest(
        owner=owner,
        image=spec.image,
        command=spec.command or _STAY,
        env={
            "PYTHONUNBUFFERED": "1",
            **spec.env,
            **share,
            "PUHUI_CENTRE": owner.centre,
            "PUHUI_JOB_ID": job.id,
            **_origin(job),
            "PUHUI_ATTEMPT": str(owner.attempt),
            **({"PUHUI_EMULATED": "1"} if piece.emulated else {}),
        },
        bundle_id=job.bundle_id,
        slice_uuids=[piece.uuid],
        limits=node_service_pb2.ContainerLimits(
            cpus=spec.resources.cpus, host_memory_mib=spec.resources.host_memory_mib, pids=spec.resources.pids
        ),
        network=spec.resources.network,
        idle_watch=watch_of(job.idle_policy) if job.HasField("idle_policy") else None,
        request_id=request_id,
    )
    if spec.HasField("max_duration"):
        request.max_duration.CopyFrom(spec.max_duration)
    if spec.HasField("stop_grace"):
        request.stop_grace.CopyFrom(spec.stop_grace)
    return request


def _origin(job: job_pb2.Job) -> dict[str, str]:
    """Returns under which name its user knows a job that came from a peer."""
    if not job.HasField("guest"):
        return {}
    return {"PUHUI_ORIGIN_CENTRE": job.guest.peer, "PUHUI_ORIGIN_JOB_ID": job.guest.job_id}


def stop_request(
    job: job_pb2.Job, owner: card_pb2.AttemptRef, request_id: str
) -> node_service_pb2.StopContainerRequest:
    """Returns the request for the end of the command of `job`."""
    request = node_service_pb2.StopContainerRequest(owner=owner, request_id=request_id)
    if job.spec.HasField("stop_grace"):
        request.grace.CopyFrom(job.spec.stop_grace)
    return request
