"""A job in the middle of a transition; see `jobs`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.records import JobRecord
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import card_pb2, job_pb2

__all__ = ["MOST_SHARES", "Draft", "IllegalTransition", "current_share", "since_ms"]

MOST_SHARES = 16
"""So many of an attempt's shares are told of, the newest."""


class IllegalTransition(Exception):  # noqa: N818 - a name for what it is
    """Something was to happen to a job that cannot happen to it in its state."""


@dataclass
class Draft:
    """A job in the middle of a transition."""

    job: job_pb2.Job
    record: JobRecord
    at: float
    reason: str = ""
    message: str = ""
    details: dict[str, str] = field(default_factory=dict)
    attempt: int = 0
    peer: str = ""
    """Peer at which it happened; "" when it happened here."""

    def tell(self, reason: str, message: str, **details: object) -> None:
        """Sets what the event says; details that are empty are left out."""
        self.reason, self.message = reason, message
        self.details.update({key: str(value) for key, value in details.items() if value not in ("", None)})

    def begin_attempt(self, made: job_pb2.Attempt) -> None:
        """The job has another attempt, and nothing of the last one is in force."""
        attempt = self.job.attempts.add()
        attempt.CopyFrom(made)
        attempt.number = self.attempt = len(self.job.attempts)
        attempt.reserve_time.CopyFrom(timestamp(self.at))
        self.record = replace(
            self.record,
            ending=None,
            ran_out_of_mib=0,
            results_collected=False,
            results_lost="",
            take_over=None,
            wake="",
            busy_counted_s=0.0,
            busy_seen_s=None,
        )

    def end_attempt(self, attempt: job_pb2.Attempt) -> None:
        """An attempt is over, with whatever it had."""
        if not attempt.HasField("release_time"):
            attempt.release_time.CopyFrom(timestamp(self.at))
        self.end_share(attempt)

    def begin_share(self, piece: card_pb2.Slice) -> None:
        """The newest attempt has a slice from now on."""
        attempt = self.job.attempts[-1]
        attempt.slice_uuid = piece.uuid
        attempt.gpu_uuid = piece.gpu_uuid
        attempt.gpu_index = piece.gpu_index
        attempt.profile = piece.profile
        attempt.placement.CopyFrom(piece.placement)
        attempt.emulated = piece.emulated
        attempt.shares.add(
            slice_uuid=piece.uuid,
            gpu_uuid=piece.gpu_uuid,
            gpu_index=piece.gpu_index,
            profile=piece.profile,
            placement=piece.placement,
            hold_time=timestamp(self.at),
        )
        del attempt.shares[:-MOST_SHARES]

    def end_share(
        self,
        attempt: job_pb2.Attempt,
        mode: job_pb2.ReclaimMode.ValueType = job_pb2.RECLAIM_MODE_UNSPECIFIED,
        busy_s: float = 0.0,
    ) -> None:
        """An attempt has its slice no longer, if it had one."""
        share = current_share(attempt)
        if share is not None:
            share.release_time.CopyFrom(timestamp(self.at))
            share.reclaim_mode = mode
            share.busy_seconds = busy_s


def current_share(attempt: job_pb2.Attempt) -> job_pb2.Share | None:
    """Returns the share that an attempt has now; None when it has none."""
    if attempt.shares and not attempt.shares[-1].HasField("release_time"):
        return attempt.shares[-1]
    return None


def since_ms(start: Timestamp, end_s: float) -> str:
    """Returns the time from `start` to `end_s` (seconds since the epoch) in milliseconds, as text."""
    return str(max(0, round((end_s - moment(start)) * 1000)))
