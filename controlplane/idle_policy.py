"""When a job's unused share may be taken back: what the job says, or its tenant's default, or the centre's. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, seconds
from puhui.rpc.quantities import parse_duration, parse_percent
from puhui.v1 import idle_pb2, job_pb2

__all__ = [
    "SHORTEST_IDLE_AFTER_S",
    "CentrePolicy",
    "TenantPolicy",
    "TenantsFileError",
    "read_tenants",
    "resolve",
    "sampling_interval_s",
    "watch_of",
]

FEWEST_SAMPLES = 3
"""A share is idle after as many samples without use, at the least."""

SHORTEST_IDLE_AFTER_S = 0.3
"""So long do as many samples take at the shortest interval."""

_NAME = re.compile(r"[a-z0-9._-]{1,63}")
_LONGEST_LIMIT_S = 300.0
_DEFAULT_LIMIT_S = 10.0
_MOST_WORDS = 64
_MODES = {
    "detach": job_pb2.RECLAIM_MODE_DETACH,
    "checkpoint": job_pb2.RECLAIM_MODE_CHECKPOINT,
    "stop": job_pb2.RECLAIM_MODE_STOP,
    "never": job_pb2.RECLAIM_MODE_NEVER,
}


class TenantsFileError(ValueError):
    """The file with the tenants' defaults is not as it should be; the text names the key."""


@dataclass(frozen=True)
class TenantPolicy:
    """Defaults of one tenant; None is the centre's."""

    idle_after_s: float | None = None
    idle_below_percent: float | None = None
    start_grace_s: float | None = None
    reclaim_mode: job_pb2.ReclaimMode.ValueType | None = None
    warm_s: float | None = None


@dataclass(frozen=True)
class CentrePolicy:
    """Defaults and limits of a centre."""

    session_idle_after_s: float = 300.0
    """A session that has not used its share for this long is idle."""
    batch_idle_after_s: float = 900.0
    """A batch job likewise. Longer: nobody sits in front of it, and it may be loading data."""
    idle_below_percent: float = 1.0
    start_grace_s: float = 600.0
    """Setting up is not idleness. For batch jobs: a session's share comes back with its first run."""
    longest_idle_after_s: float = 86400.0
    """No job may keep an unused share for longer."""
    never_allowed: bool = True
    """A job may forbid that its share is taken back at all."""
    warm_s: float = 60.0
    """A slice that was taken back is kept for its tenant for this long; 0 is not at all."""
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict)

    def warm_for(self, tenant: str) -> float:
        """Returns for how long a slice that was taken back is kept for a tenant, in seconds."""
        own = self.tenants.get(tenant, TenantPolicy()).warm_s
        return self.warm_s if own is None else own


def sampling_interval_s(idle_after_s: float) -> float:
    """Returns how often a node looks at a container that is idle after `idle_after_s`, in seconds (see idle.proto)."""
    return min(5.0, max(0.1, idle_after_s / 5))


def resolve(spec: job_pb2.JobSpec, centre: CentrePolicy) -> job_pb2.IdlePolicy:
    """Returns a job's idle policy with everything filled in.

    Args:
        spec: what was asked for; its tenant is filled in.
        centre: defaults and limits.

    Raises:
        Refusal: INVALID_ARGUMENT with IDLE_AFTER_TOO_SHORT, IDLE_AFTER_TOO_LONG or SPEC_INVALID; FAILED_PRECONDITION
            with NEVER_NOT_ALLOWED.
    """
    asked, tenant = spec.idle, centre.tenants.get(spec.tenant, TenantPolicy())
    session = spec.kind == job_pb2.JOB_KIND_SESSION
    default_s = centre.session_idle_after_s if session else centre.batch_idle_after_s
    after_s = _first(tenant.idle_after_s, default_s)
    after_s = min(after_s, centre.longest_idle_after_s)
    if asked.HasField("idle_after"):
        after_s = seconds(asked.idle_after)
        _require_length(after_s, centre.longest_idle_after_s)
    below = asked.idle_below_percent or _first(tenant.idle_below_percent, centre.idle_below_percent)
    # NaN is in no range.
    _require(0 < below <= 100, "idle.idle_below_percent", "is more than 0 and at most 100 percent")
    grace_s = seconds(asked.start_grace) if asked.HasField("start_grace") else None
    default_s = _first(tenant.start_grace_s, 0.0 if session else centre.start_grace_s)
    grace_s = _first(grace_s, min(default_s, centre.longest_idle_after_s))
    _require(0 <= grace_s <= centre.longest_idle_after_s, "idle.start_grace", "is from 0 to the longest idle_after")
    _require(
        asked.reclaim_mode in job_pb2.ReclaimMode.values(), "idle.reclaim_mode", "is DETACH, CHECKPOINT, STOP or NEVER"
    )
    mode = asked.reclaim_mode or _first(tenant.reclaim_mode, job_pb2.RECLAIM_MODE_UNSPECIFIED)
    if mode == job_pb2.RECLAIM_MODE_NEVER and not centre.never_allowed:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "NEVER_NOT_ALLOWED",
            "this centre takes every unused share back; name DETACH, CHECKPOINT or STOP, or leave reclaim_mode out",
        )
    policy = job_pb2.IdlePolicy(
        idle_after=duration(after_s),
        idle_below_percent=below,
        start_grace=duration(grace_s),
        reclaim_mode=mode,
        warn_signal=asked.warn_signal,
        on_reclaim=asked.on_reclaim,
    )
    if asked.on_reclaim:
        _require_words(asked.on_reclaim)
        limit_s = seconds(asked.on_reclaim_limit) if asked.HasField("on_reclaim_limit") else _DEFAULT_LIMIT_S
        _require(0 < limit_s <= _LONGEST_LIMIT_S, "idle.on_reclaim_limit", "is more than 0 and at most 5 min")
        policy.on_reclaim_limit.CopyFrom(duration(limit_s))
    return policy


def watch_of(policy: job_pb2.IdlePolicy) -> idle_pb2.IdleWatch:
    """Returns what a node is to watch for under a policy; for one that never takes a share, too: use is metered."""
    return idle_pb2.IdleWatch(
        idle_after=policy.idle_after, idle_below_percent=policy.idle_below_percent, start_grace=policy.start_grace
    )


def read_tenants(text: str) -> dict[str, TenantPolicy]:
    """Returns the tenants' defaults that a TOML text holds: a table [tenants.NAME] each.

    Keys: idle_after, start_grace, warm_for (durations such as "5m"), idle_below ("1%"), reclaim ("checkpoint").

    Raises:
        TenantsFileError: it is no TOML, or holds a key or value that it must not.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TenantsFileError(f"it is no TOML: {error}") from error
    unknown = sorted(set(content) - {"tenants"})
    if unknown:
        raise TenantsFileError(f"it has a key {unknown[0]!r}; there is only [tenants.NAME]")
    tables = content.get("tenants", {})
    if not isinstance(tables, dict):
        raise TenantsFileError("`tenants` holds a table for each tenant: [tenants.NAME]")
    return {name: _tenant(name, table) for name, table in tables.items()}


def _tenant(name: str, table: Any) -> TenantPolicy:
    if not isinstance(table, dict):
        raise TenantsFileError(f"tenants.{name} is no table")
    if not _NAME.fullmatch(name):
        raise TenantsFileError(f"tenants.{name!r}: a tenant's name is lower-case letters, digits, '.', '_' and '-'")
    values: dict[str, Any] = {}
    for key, value in table.items():
        try:
            match key:
                case "idle_after" | "start_grace":
                    values[f"{key}_s"] = parse_duration(value)
                case "warm_for":
                    values["warm_s"] = parse_duration(value)
                case "idle_below":
                    values["idle_below_percent"] = _above_nothing(parse_percent(value))
                case "reclaim":
                    values["reclaim_mode"] = _MODES[value]
                case _:
                    raise TenantsFileError(
                        f"tenants.{name}.{key} is unknown; there are idle_after, idle_below, start_grace, reclaim "
                        "and warm_for"
                    )
        except TenantsFileError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TenantsFileError(f"tenants.{name}.{key}: {value!r} cannot be: {error}") from error
    policy = TenantPolicy(**values)
    if policy.idle_after_s is not None and policy.idle_after_s < FEWEST_SAMPLES * sampling_interval_s(
        policy.idle_after_s
    ):
        raise TenantsFileError(f"tenants.{name}.idle_after is shorter than three samples")
    return policy


def _above_nothing(percent: float) -> float:
    if not percent > 0:
        raise ValueError("nothing is below 0%")
    return percent


def _require_length(after_s: float, longest_s: float) -> None:
    interval_s = sampling_interval_s(after_s if after_s > 0 else 0.0)
    if not after_s >= FEWEST_SAMPLES * interval_s - 1e-9:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "IDLE_AFTER_TOO_SHORT",
            f"idle_after must be at least {FEWEST_SAMPLES * interval_s:g} s: a node samples every {interval_s:g} s, "
            f"and fewer than {FEWEST_SAMPLES} samples without use say nothing",
            field="idle.idle_after",
            shortest_s=f"{FEWEST_SAMPLES * interval_s:g}",
        )
    if after_s > longest_s:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "IDLE_AFTER_TOO_LONG",
            f"idle_after is at most {longest_s:g} s in this centre: shares that nobody uses are for everyone",
            field="idle.idle_after",
            longest_s=f"{longest_s:g}",
        )


def _require_words(words: Any) -> None:
    fits = len(words) <= _MOST_WORDS and words[0] and sum(len(word) for word in words) <= 4096
    _require(fits, "idle.on_reclaim", "is a command of at most 64 words and 4096 characters")
    _require(not any("\0" in word for word in words), "idle.on_reclaim", "holds a NUL character")


def _first(one: Any, other: Any) -> Any:
    return other if one is None else one


def _require(holds: object, name: str, what: str) -> None:
    if not holds:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID", f"{name} {what}", field=name)
