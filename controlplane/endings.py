"""How jobs end, and why."""

from __future__ import annotations

from dataclasses import dataclass

from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2, node_pb2
from puhui.v1.job_pb2 import JOB_STATE_CANCELLED, JOB_STATE_FAILED, JOB_STATE_SUCCEEDED

__all__ = ["CONTAINER_LOST", "Ending", "cancelled", "ending_of", "not_started"]


@dataclass(frozen=True)
class Ending:
    """How a job is going to end, decided before its results are collected and its share is released."""

    state: job_pb2.JobState.ValueType
    """SUCCEEDED, FAILED or CANCELLED."""
    reason: str
    message: str


CONTAINER_LOST = Ending(
    JOB_STATE_FAILED,
    "CONTAINER_LOST",
    "its node is in contact but no longer has its container: the node was reset, or somebody removed it by hand; "
    "submit the job again",
)
"""What it ran in is gone."""


def ending_of(container: node_pb2.Container) -> Ending:
    """Returns how a job ends whose command ended like this."""
    code = container.exit_code
    if container.lease_expired:
        return Ending(
            JOB_STATE_CANCELLED,
            "LEASE_EXPIRED",
            "its lease ran out at its node, which had not been told that its origin still wants it, so it was ended",
        )
    if container.timed_out:
        return Ending(
            JOB_STATE_FAILED,
            "TIMED_OUT",
            "the command was ended because it ran longer than max_duration; raise max_duration if it needs more time",
        )
    if container.oom_killed:
        return Ending(
            JOB_STATE_FAILED,
            "HOST_OUT_OF_MEMORY",
            "the host's memory limit killed the command; ask for more with host_memory_mib",
        )
    if not container.HasField("exit_code"):
        return Ending(
            JOB_STATE_FAILED,
            "EXIT_CODE_UNKNOWN",
            "the command has ended, but its node does not know how; read the log to see how far it came",
        )
    if code == 0:
        return Ending(JOB_STATE_SUCCEEDED, "SUCCEEDED", "the command ended with exit code 0")
    signal = f" (signal {code - 128})" if 128 < code < 193 else ""
    return Ending(JOB_STATE_FAILED, "EXIT_CODE", f"the command ended with exit code {code}{signal}; its log says more")


def not_started(refusal: Refusal) -> Ending:
    """Returns how a job ends that its node refused to start."""
    return Ending(JOB_STATE_FAILED, refusal.reason, f"it cannot start: {refusal.message}")


def cancelled(message: str, reason: str = "CANCELLED") -> Ending:
    """Returns how a job ends whose end was asked for, with what was said about it."""
    return Ending(JOB_STATE_CANCELLED, reason, "cancelled by request" + (f": {message}" if message else ""))
