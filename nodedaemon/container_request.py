"""What a request for a container says, checked and put into the terms of the runtime. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from nodedaemon.commands import command_problem, env_problem, is_image_name
from nodedaemon.owner import Owner
from nodedaemon.records import SliceRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import request_digest
from puhui.rpc.moment import seconds
from puhui.v1.node_service_pb2 import CreateContainerRequest

__all__ = ["container_name", "duration_problem", "environment", "identity", "require_sound"]

_MOST_SECONDS = 315_576_000_000  # of a protobuf Duration


def container_name(node_id: str, owner: Owner) -> str:
    """Returns the name of an attempt's container, unique on the host."""
    tail = hashlib.sha256(f"{node_id}/{owner}".encode()).hexdigest()[:12]
    return f"puhui-{owner.job_id}-{owner.attempt}-{tail}"


def identity(request: CreateContainerRequest) -> str:
    """Returns the digest of what must be the same when a request is repeated.

    The slices and the lease are left out: they change while a container lives.
    """
    same = CreateContainerRequest()
    same.CopyFrom(request)
    for name in ("request_id", "slice_uuids", "lease_expire_time"):
        same.ClearField(name)
    same.owner.fencing_token = 0
    return request_digest(same.SerializeToString(deterministic=True))


def environment(owner: Owner, slices: Sequence[SliceRecord], *, emulated: bool, caps: str = "") -> dict[str, str]:
    """Returns what Puhui adds to the environment of a command.

    Args:
        owner: whose command it is.
        slices: the slices that it is given.
        emulated: whether the cards are emulated.
        caps: where it finds the cap nodes of its slices; empty leaves that out.
    """
    visible = ",".join(one.uuid for one in slices)
    env = {
        # Empty hides every card; unset would show them all.
        "CUDA_VISIBLE_DEVICES": visible,
        "NVIDIA_VISIBLE_DEVICES": visible or "void",
        "PUHUI_CENTRE": owner.centre,
        "PUHUI_JOB_ID": owner.job_id,
        "PUHUI_ATTEMPT": str(owner.attempt),
        "PYTHONUNBUFFERED": "1",
    }
    if slices:
        env["PUHUI_SLICE_PROFILE"] = ",".join(one.profile for one in slices)
        env["PUHUI_SLICE_MEMORY_MIB"] = str(sum(one.memory_mib for one in slices))
    if caps:
        env["PUHUI_CAPS"] = caps
    if emulated:
        env["PUHUI_EMULATED"] = "1"
    return env


def require_sound(request: CreateContainerRequest) -> None:
    """Refuses a request that no node could carry out.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID, naming the field.
    """
    for field, problem in (
        ("command", command_problem(request.command)),
        ("env", env_problem(request.env)),
        (
            "image",
            "" if not request.image or is_image_name(request.image) else f"{request.image[:80]!r} names no image",
        ),
        ("limits.cpus", "" if 0 <= request.limits.cpus < float("inf") else "must be a number, and not negative"),
        ("max_duration", duration_problem(request, "max_duration")),
        ("stop_grace", duration_problem(request, "stop_grace")),
    ):
        if problem:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"{field} {problem}", field=field)
    if request.HasField("max_duration") and seconds(request.max_duration) <= 0:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
            "max_duration must be longer than nothing",
            field="max_duration",
        )


def duration_problem(request: Message, name: str) -> str:
    """Returns what is wrong with a duration of a request that must not be negative; empty when nothing is."""
    if not request.HasField(name):
        return ""
    length: Duration = getattr(request, name)
    if not 0 <= length.nanos < 10**9 or length.seconds > _MOST_SECONDS:
        return "is no duration: its nanos must be 0 to 999999999, and its seconds at most 315576000000"
    return "must not be negative" if length.seconds < 0 else ""
