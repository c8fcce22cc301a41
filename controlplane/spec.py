"""Is what the user asked for well-formed? One refusal for the first field that is not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import grpc

from controlplane.fleet import Geometry
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import seconds
from puhui.v1 import job_pb2

__all__ = ["require_known_peers", "require_offered", "require_valid", "require_valid_command"]

_NAME = re.compile(r"[a-z0-9._-]{0,63}")
_TENANT = re.compile(r"[a-z0-9._-]{0,63}")
_PROFILE = re.compile(r"\d{1,2}g\.\d{1,4}gb([+-][a-z.+-]{1,16})?")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LABEL = re.compile(r"[A-Za-z0-9._/-]{1,63}")
_OWN_ENV = ("PUHUI_", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")

_MOST_COMMAND_BYTES = 128 * 2**10
_MOST_ENV_BYTES = 128 * 2**10
_MOST_LABELS = 64
_MOST_PREFERRED = 16
_MOST_INPUTS = 256
_MOST_DURATION_S = 366 * 86400.0
_MOST_GRACE_S = 3600.0
_MOST_PRIORITY = 100
_MOST_MIB = 2**40


def require_valid(spec: job_pb2.JobSpec) -> None:
    """Refuses a spec with a field that no job can have.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID, its metadata naming the field.
    """
    _identity(spec)
    if spec.command or spec.kind != job_pb2.JOB_KIND_SESSION:
        _command(spec.command)
    _resources(spec.resources)
    _times(spec)
    _texts(spec)
    _peers(spec.peers)


def _identity(spec: job_pb2.JobSpec) -> None:
    _require(_NAME.fullmatch(spec.name), "name", "is lower-case letters, digits, '.', '_' and '-', at most 63 of them")
    _require(_TENANT.fullmatch(spec.tenant), "tenant", "is written as a job's name is")
    _require(spec.kind in job_pb2.JobKind.values(), "kind", "is BATCH or SESSION")
    _require(abs(spec.priority) <= _MOST_PRIORITY, "priority", "is from -100 to 100")
    _require(len(spec.image) <= 512 and not re.search(r"\s", spec.image), "image", "is an image reference")


def require_valid_command(command: Sequence[str], env: Mapping[str, str]) -> None:
    """Refuses a command, or an environment, that no container can be given.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID, its metadata naming the field.
    """
    _command(command)
    _env(env)


def _command(command: Sequence[str]) -> None:
    _require(command and command[0], "command", 'is needed: what to run, such as ["python", "train.py"]')
    _require(
        sum(len(word.encode()) + 1 for word in command) <= _MOST_COMMAND_BYTES,
        "command",
        "is at most 128 KiB long",
    )
    _require(not any("\0" in word for word in command), "command", "holds a NUL character")


def _resources(resources: job_pb2.Resources) -> None:
    _require(
        not resources.profile or _PROFILE.fullmatch(resources.profile),
        "resources.profile",
        'is the name of a MIG profile, such as "2g.20gb"',
    )
    _require(resources.memory_mib <= _MOST_MIB, "resources.memory_mib", "is an amount of memory in MiB")
    # NaN is in no range.
    _require(0 <= resources.cpus <= 4096, "resources.cpus", "is from 0 to 4096")
    _require(resources.host_memory_mib <= _MOST_MIB, "resources.host_memory_mib", "is an amount of memory in MiB")
    _require(resources.pids <= 4_194_304, "resources.pids", "is at most 4194304")


def _times(spec: job_pb2.JobSpec) -> None:
    if spec.HasField("max_duration"):
        _require(0 < seconds(spec.max_duration) <= _MOST_DURATION_S, "max_duration", "is more than 0 and under a year")
    if spec.HasField("stop_grace"):
        _require(0 <= seconds(spec.stop_grace) <= _MOST_GRACE_S, "stop_grace", "is from 0 to 1 h")


def _env(env: Mapping[str, str]) -> None:
    for key, value in env.items():
        _require(_ENV.fullmatch(key), f"env.{key[:64]}", "is no name of an environment variable")
        _require("\0" not in value, f"env.{key[:64]}", "holds a NUL character")
        _require(not key.startswith(_OWN_ENV), f"env.{key[:64]}", "is set by Puhui itself; leave it out")
    size = sum(len(key) + len(value.encode()) + 2 for key, value in env.items())
    _require(size <= _MOST_ENV_BYTES, "env", "is at most 128 KiB together")


def _texts(spec: job_pb2.JobSpec) -> None:
    _env(spec.env)
    _require(len(spec.labels) <= _MOST_LABELS, "labels", "are at most 64")
    for key, value in spec.labels.items():
        _require(_LABEL.fullmatch(key), f"labels.{key[:64]}", "has a key that is no label")
        _require(len(value) <= 256, f"labels.{key[:64]}", "is at most 256 characters")
    _require(
        len(spec.inputs) <= _MOST_INPUTS, "inputs", "are at most 256; give one for each data set, not for each file"
    )
    for number, data in enumerate(spec.inputs):
        _require(len(data.name) <= 256, f"inputs[{number}].name", "is at most 256 characters")
        _require(data.size_bytes <= 2**60, f"inputs[{number}].size_bytes", "is a size in bytes")


def _peers(policy: job_pb2.PeerPolicy) -> None:
    preferred = list(policy.preferred_peers)
    _require(len(preferred) <= _MOST_PREFERRED, "peers.preferred_peers", f"are at most {_MOST_PREFERRED}")
    for number, name in enumerate(preferred):
        field = f"peers.preferred_peers[{number}]"
        _require(name and _NAME.fullmatch(name), field, "is the name of a peer, as `puhui peers` shows it")
        _require(preferred.index(name) == number, field, "is there twice")
    _require(not (policy.here_only and preferred), "peers.preferred_peers", "are none when the job is to run here only")
    if policy.HasField("max_wait"):
        _require(0 <= seconds(policy.max_wait) <= _MOST_DURATION_S, "peers.max_wait", "is from 0 to a year")
    for field, labels in (
        ("peers.required_labels", policy.required_labels),
        ("peers.forbidden_labels", policy.forbidden_labels),
    ):
        _require(len(labels) <= _MOST_LABELS, field, "are at most 64")
        for key, value in labels.items():
            _require(_LABEL.fullmatch(key), f"{field}.{key[:64]}", "has a key that is no label")
            _require(len(value) <= 256, f"{field}.{key[:64]}", "is at most 256 characters")
    for key, value in policy.forbidden_labels.items():
        both = policy.required_labels.get(key) == value and key in policy.required_labels
        _require(not both, f"peers.forbidden_labels.{key[:64]}", "is required and forbidden at once")


def _require(holds: object, field: str, what: str) -> None:
    if not holds:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"{field} {what}", field=field)


def require_offered(
    resources: job_pb2.Resources, geometries: Collection[Geometry], elsewhere: Collection[str] = ()
) -> None:
    """Refuses a profile that no GPU of this centre offers. While no GPU is known, every profile may come yet.

    Args:
        resources: what is asked for.
        geometries: what the GPUs of this centre can be cut into.
        elsewhere: profiles that peers offer which may be asked.

    Raises:
        Refusal: FAILED_PRECONDITION with PROFILE_NOT_AVAILABLE.
    """
    if not resources.profile or not geometries or resources.profile in elsewhere:
        return
    if any(resources.profile in geometry.by_profile for geometry in geometries):
        return
    there = sorted({(shape.memory_mib, shape.profile) for geometry in geometries for shape in geometry.shapes})
    names = ", ".join(dict.fromkeys(name for _, name in there))
    raise Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "PROFILE_NOT_AVAILABLE",
        f"no GPU of this centre offers {resources.profile}; it has {names}; "
        "or leave the profile out and let the size be predicted",
        profile=resources.profile,
        available=names,
    )


def require_known_peers(policy: job_pb2.PeerPolicy, known: Collection[str]) -> None:
    """Refuses a preference for a peer that this centre does not have.

    Raises:
        Refusal: FAILED_PRECONDITION with PEER_NOT_FOUND.
    """
    for name in policy.preferred_peers:
        if name in known:
            continue
        names = ", ".join(sorted(known))
        there = f"its peers are {names}" if names else "it has none"
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "PEER_NOT_FOUND",
            f"this centre has no peer {name}; {there}; or leave the preference out, and the nearest are asked",
            peer=name,
            available=names,
        )
