"""What a request for a container says, checked and put into the terms of the runtime. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import grpc

from nodedaemon.owner import Owner
from nodedaemon.records import SliceRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import request_digest
from puhui.rpc.moment import seconds
from puhui.v1.node_service_pb2 import CreateContainerRequest

__all__ = ["container_name", "environment", "identity", "require_sound"]


def container_name(node_id: str, owner: Owner) -> str:
    """Returns the name of an attempt's container, unique on the host."""
    tail = hashlib.sha256(f"{node_id}/{owner}".encode()).hexdigest()[:12]
    return f"puhui-{owner.job_id}-{owner.attempt}-{tail}"


def identity(request: CreateContainerRequest) -> str:
    """Returns the digest of what must be the same when a request is repeated.

    The slices are left out: they change while a container lives.
    """
    same = CreateContainerRequest()
    same.CopyFrom(request)
    for name in ("request_id", "slice_uuids"):
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
    problem = ""
    if not request.command or not request.command[0]:
        field, problem = "command", "names nothing to run"
    elif any("\0" in word for word in request.command):
        field, problem = "command", "holds a NUL character"
    elif any(not name or "=" in name or "\0" in name + value for name, value in request.env.items()):
        field, problem = "env", "has a name that is empty or holds '=', or a NUL character"
    elif not 0 <= request.limits.cpus < float("inf"):
        field, problem = "limits.cpus", "must be a number, and not negative"
    elif request.HasField("max_duration") and seconds(request.max_duration) <= 0:
        field, problem = "max_duration", "must be longer than nothing"
    elif request.HasField("stop_grace") and seconds(request.stop_grace) < 0:
        field, problem = "stop_grace", "must not be negative"
    if problem:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"{field} {problem}", field=field)
