"""What a node's refusal means for the attempt that it met."""

from __future__ import annotations

import enum

import grpc

from controlplane.node_client import is_unreachable
from puhui.rpc.errors import Refusal

__all__ = ["MOST_ATTEMPTS", "Verdict", "retry_delay_s", "verdict"]

MOST_ATTEMPTS = 5
"""A job whose start failed at its node this often is not tried again."""


class Verdict(enum.Enum):
    """What to do about a refusal."""

    WAIT = "wait"
    """Nothing is known: the node could not be asked. Ask again."""
    REQUEUE = "requeue"
    """The node's fault, or somebody was faster there: roll back and try another slice."""
    FAIL = "fail"
    """The job's fault: it would be refused everywhere."""
    FENCED = "fenced"
    """Somebody else commands this attempt. Hands off."""


# Refused so, no node would take it.
_JOBS_FAULT = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.OUT_OF_RANGE})
_JOBS_REASONS = frozenset({"IMAGE_NOT_FOUND", "ENTRYPOINT_NOT_FOUND", "COMMAND_NOT_FOUND"})
# The node is not what it was when the share was reserved.
_CHANGED_REASONS = frozenset({"PLACEMENT_INVALID", "PROFILE_NOT_FOUND", "GPU_NOT_FOUND", "MIG_DISABLED"})


def verdict(refusal: Refusal) -> Verdict:
    """Returns what a node's refusal means."""
    if is_unreachable(refusal):
        return Verdict.WAIT
    if refusal.reason == "STALE_FENCING_TOKEN":
        return Verdict.FENCED
    if refusal.reason in _CHANGED_REASONS:
        return Verdict.REQUEUE
    if refusal.reason in _JOBS_REASONS or refusal.code in _JOBS_FAULT:
        return Verdict.FAIL
    return Verdict.REQUEUE


def retry_delay_s(tries: int) -> float:
    """Returns how long to wait after the `tries`-th failure, in seconds: doubling, half a minute at most."""
    return float(min(30.0, 0.25 * 2 ** min(tries, 10)))
