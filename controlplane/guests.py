"""Attempts that peers have sent to this centre, and what may be done about them. Pure.

A guest is named by (peer, the peer's job id, attempt) and bound once: what comes again is answered as before. An end
that is asked for before the binding arrives leaves a record that keeps it from ever being bound. Leases are on this
centre's lease clock and never become shorter; one that has run out does not come back. A reboot ends every lease: how
long it took is not known for certain, so by this clock a lease might still hold that is over for its origin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import grpc

from puhui.rpc.errors import Refusal

__all__ = [
    "GuestKey",
    "GuestRecord",
    "GuestStage",
    "bind",
    "cancel",
    "expire",
    "has_lease",
    "renew",
    "require_command",
    "stop_ahead_s",
]

_STOP_S = 2.0
"""What stopping takes, beside the grace that a command is given."""
_STOP_SHARE = 0.25

GuestKey = tuple[str, str, int]
"""(name of the peer, job id there, attempt)."""


class GuestStage(StrEnum):
    """Where a guest is in its life."""

    LIVE = "live"
    """It waits, runs, or has ended by itself; the job says which."""
    CANCELLED = "cancelled"
    """Its origin has asked for its end. Without a job, it was never bound, and never will be."""
    EXPIRED = "expired"
    """Its lease ran out before it had ended."""


@dataclass(frozen=True)
class GuestRecord:
    """One attempt of a peer's job. Stored together with the job that it became."""

    peer: str
    origin_job: str
    attempt: int
    token: int
    """The highest fencing token with which its origin has commanded it."""
    digest: str = ""
    """Of what was asked for; the same attempt with another one is refused."""
    job_id: str = ""
    """The job that it became here; "" when it was never bound."""
    stage: GuestStage = GuestStage.LIVE
    lease_end: float = 0.0
    """On this centre's lease clock, in seconds."""
    boot: str = ""
    """`LeaseClock.boot` when the lease was given."""
    at: float = 0.0
    """Bound, or refused for ever, at, in seconds since the epoch."""
    lease_s: float = 0.0
    """Length of the lease when it was last prolonged, in seconds."""

    @property
    def key(self) -> GuestKey:
        """What names it."""
        return self.peer, self.origin_job, self.attempt


def require_command(known: GuestRecord | None, token: int) -> None:
    """Refuses who no longer commands an attempt at its origin.

    Raises:
        Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN.
    """
    if known is not None and token < known.token:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "STALE_FENCING_TOKEN",
            f"fencing token {token} is lower than {known.token}, the highest seen for {known.origin_job}/"
            f"{known.attempt}: another control plane commands this attempt now",
            highest_token=str(known.token),
        )


def bind(known: GuestRecord | None, wanted: GuestRecord, at: float, longest_s: float) -> GuestRecord:
    """Returns the guest after a request to bind it: `wanted`, or what it was bound to before.

    Args:
        known: what is known of it; None when nothing is.
        wanted: what was asked for, with the lease that was asked for, this centre's `LeaseClock.boot` now, and the job
            that it is to become.
        at: now, on this centre's lease clock.
        longest_s: the longest lease that is given, in seconds.

    Raises:
        Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN, GUEST_CANCELLED, or LEASE_EXPIRED; ALREADY_EXISTS with
            GUEST_DIFFERS.
    """
    require_command(known, wanted.token)
    if known is None:
        if wanted.lease_end <= at:
            raise _expired(wanted)
        lease_end = min(wanted.lease_end, at + longest_s)
        return replace(wanted, lease_end=lease_end, lease_s=lease_end - at)
    if known.stage is GuestStage.CANCELLED:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "GUEST_CANCELLED",
            f"the end of {known.origin_job}/{known.attempt} was asked for before; a retry is a new attempt",
        )
    if known.stage is GuestStage.EXPIRED or known.boot != wanted.boot:
        raise _expired(known)
    if known.digest != wanted.digest:
        raise Refusal(
            grpc.StatusCode.ALREADY_EXISTS,
            "GUEST_DIFFERS",
            f"{known.origin_job}/{known.attempt} is bound to something else; what is to run otherwise is a new attempt",
        )
    return replace(known, token=wanted.token)


def renew(
    known: GuestRecord | None, token: int, until: float, at: float, longest_s: float, *, boot: str
) -> GuestRecord:
    """Returns the guest after its origin has asked for a longer lease.

    Args:
        known: the guest.
        token: the origin's fencing token.
        until: what it asked for, on this centre's lease clock.
        at: now, likewise.
        longest_s: the longest lease that is given, in seconds.
        boot: `LeaseClock.boot` now.

    Raises:
        Refusal: NOT_FOUND with GUEST_NOT_FOUND; FAILED_PRECONDITION with STALE_FENCING_TOKEN or LEASE_EXPIRED.
    """
    require_command(known, token)
    if known is None or not known.job_id:
        raise Refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND", "this attempt was never bound here")
    if known.stage is GuestStage.EXPIRED or not has_lease(known, at, boot):
        raise _expired(known)
    lease_end = min(until, at + longest_s)
    if lease_end <= known.lease_end:
        return replace(known, token=token)
    return replace(known, token=token, lease_end=lease_end, lease_s=lease_end - at)


def cancel(known: GuestRecord | None, asked: GuestRecord) -> GuestRecord:
    """Returns the guest after its origin has asked for its end. One that was never bound never will be.

    Args:
        known: the guest; None when nothing is known of it.
        asked: the attempt that was named, with the origin's token.

    Raises:
        Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN.
    """
    require_command(known, asked.token)
    if known is None:
        return replace(asked, stage=GuestStage.CANCELLED)
    stage = GuestStage.CANCELLED if known.stage is GuestStage.LIVE else known.stage
    return replace(known, token=asked.token, stage=stage)


def has_lease(known: GuestRecord, at: float, boot: str) -> bool:
    """Returns whether a guest's lease still holds at a time of this centre's lease clock, whose boot is given."""
    return known.boot == boot and at < known.lease_end


def stop_ahead_s(known: GuestRecord, grace_s: float) -> float:
    """Returns how long before the end of a guest's lease its stop begins, so that nothing of it runs at the end.

    Args:
        known: the guest.
        grace_s: time between SIGTERM and SIGKILL, in seconds. Of a short lease, the larger part is not for stopping.
    """
    return min(grace_s + _STOP_S, known.lease_s * _STOP_SHARE)


def expire(known: GuestRecord, at: float, boot: str) -> GuestRecord:
    """Returns the guest as it is at a time: EXPIRED when its lease has run out while it was LIVE.

    Only for one whose job has not ended: what has ended keeps its result, whatever becomes of the lease.
    """
    if known.stage is GuestStage.LIVE and not has_lease(known, at, boot):
        return replace(known, stage=GuestStage.EXPIRED)
    return known


def _expired(known: GuestRecord) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "LEASE_EXPIRED",
        f"the lease of {known.origin_job}/{known.attempt} has run out, so it was stopped or never began; a retry is a "
        "new attempt",
    )
