"""What a job becomes on its node: the container that is asked for."""

from __future__ import annotations

from puhui.v1 import card_pb2, job_pb2, node_service_pb2

__all__ = ["container_request"]


def container_request(
    job: job_pb2.Job, owner: card_pb2.AttemptRef, piece: card_pb2.Slice, request_id: str
) -> node_service_pb2.CreateContainerRequest:
    """Returns the request for the container that runs `job` on slice `piece`."""
    spec = job.spec
    request = node_service_pb2.CreateContainerRequest(
        owner=owner,
        image=spec.image,
        command=spec.command,
        env={
            "PYTHONUNBUFFERED": "1",
            **spec.env,
            "CUDA_VISIBLE_DEVICES": piece.uuid,
            "NVIDIA_VISIBLE_DEVICES": piece.uuid,
            "PUHUI_CENTRE": owner.centre,
            "PUHUI_JOB_ID": job.id,
            "PUHUI_ATTEMPT": str(owner.attempt),
            "PUHUI_SLICE_PROFILE": piece.profile,
            "PUHUI_SLICE_MEMORY_MIB": str(piece.memory_mib),
            **({"PUHUI_EMULATED": "1"} if piece.emulated else {}),
        },
        bundle_id=job.bundle_id,
        slice_uuids=[piece.uuid],
        limits=node_service_pb2.ContainerLimits(
            cpus=spec.resources.cpus, host_memory_mib=spec.resources.host_memory_mib, pids=spec.resources.pids
        ),
        network=spec.resources.network,
        request_id=request_id,
    )
    if spec.HasField("max_duration"):
        request.max_duration.CopyFrom(spec.max_duration)
    if spec.HasField("stop_grace"):
        request.stop_grace.CopyFrom(spec.stop_grace)
    return request
