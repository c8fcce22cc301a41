"""What the store keeps, beside the messages of the contract.

Messages inside a record are never changed in place: who changes one copies it first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from controlplane.endings import Ending
from controlplane.forwards import ForwardRecord
from controlplane.metering import Stretch, UsageChange
from controlplane.observing import ObservedAttempt
from puhui.v1 import card_pb2, fleet_service_pb2, job_pb2, job_service_pb2, peer_service_pb2

__all__ = [
    "BundleRecord",
    "Change",
    "Decide",
    "InvitationRecord",
    "JobQuery",
    "JobRecord",
    "NodeRecord",
    "PeerRecord",
    "Request",
    "Reservation",
    "TakeOver",
]


@dataclass(frozen=True)
class TakeOver:
    """A warm slice that goes from one attempt to another of the same tenant."""

    job_id: str
    attempt: int
    slice_uuid: str

    @property
    def key(self) -> tuple[str, int]:
        """(job id, attempt number) of whom it is taken from."""
        return self.job_id, self.attempt


@dataclass(frozen=True)
class JobRecord:
    """A job and what the control plane remembers about it that users need not see."""

    job: job_pb2.Job
    sequence: int = 0
    """Order of submission in this centre, from 1; 0 until it is stored."""
    cancel_requested: bool = False
    cancel_message: str = ""
    cancel_reason: str = "CANCELLED"
    """Why its end was asked for, UPPER_SNAKE."""
    ending: Ending | None = None
    results_collected: bool = False
    """Log and artifacts of the newest attempt are in this centre's results, or given up."""
    results_lost: str = ""
    """What of them was given up and why, in a sentence; "" when nothing was."""
    failed_starts: int = 0
    """Attempts in a row that their node could not start."""
    failed_resumes: int = 0
    """Shares in a row that its node could not give to its living container."""
    busy_seen_s: float | None = None
    """For how long its container had used its cards when its command ended; None when that was not told."""
    busy_counted_s: float = 0.0
    """Of the time in which the container has used its cards, so much is counted with shares that it gave up."""
    reclaiming: str = ""
    """Why its share is being taken back, see `happenings.ReclaimBegun`; "" when it is not."""
    hardest: job_pb2.ReclaimMode.ValueType = job_pb2.RECLAIM_MODE_UNSPECIFIED
    """The hardest rung that this reclaim may take."""
    reclaims: int = 0
    """Number of reclaims that were begun; tells their request ids apart."""
    suspend: job_pb2.ReclaimMode.ValueType = job_pb2.RECLAIM_MODE_UNSPECIFIED
    """The hardest rung that somebody allowed who wants its share taken back now; UNSPECIFIED when nobody does."""
    resumes: int = 0
    """Number of shares that were reserved for it after the first; tells their request ids apart."""
    wake: str = ""
    """Why it is RESUMING, see `happenings.ResumeRequested`."""
    rests: int = 0
    """Times in a row that it was taken back for being idle and came back by itself, as it would again."""
    parked: bool = False
    """Somebody had its share taken back: it does not come back by itself."""
    idle_at: float = 0.0
    """IDLE since, in seconds since the epoch."""
    restart: bool = False
    """Its command was ended by reclaim: going on means a new attempt with its workspace."""
    carry_from: int = 0
    """Attempt whose workspace the newest one takes over; 0 when none, or when it has."""
    take_over: TakeOver | None = None
    """The warm slice that the newest attempt is going to take over."""
    not_at: tuple[str, ...] = ()
    """Peers that are not asked again for this job: they could not run it, or ended it by themselves."""
    fingerprint: str = ""
    """Of its code and what it is asked to do; "" when nothing is learnt from it."""
    ran_out_of_mib: int = 0
    """Memory of the slice on which its newest attempt ran out of it; 0 when it did not."""
    at_least_mib: int = 0
    """Memory that its slice has to have at least: an attempt ran out of less, or its origin says so. 0 for none."""
    grows: bool = False
    """Its newest attempt ran out of memory, and when that is released it is tried again on a larger slice."""

    @property
    def id(self) -> str:
        """Job id."""
        return self.job.id

    @property
    def state(self) -> job_pb2.JobState.ValueType:
        """Where the job is in its life."""
        return self.job.state

    @property
    def attempt(self) -> job_pb2.Attempt:
        """The newest attempt.

        Raises:
            IndexError: it was never placed.
        """
        return self.job.attempts[-1]


@dataclass(frozen=True)
class Reservation:
    """A share of a GPU that is spoken for, from before its slice is made until the node confirms that it is gone."""

    job_id: str
    attempt: int
    node_id: str
    gpu_uuid: str
    profile: str
    start: int
    """First memory slice."""
    size: int
    """Number of memory slices."""
    compute_slices: int
    memory_mib: int
    tenant: str = ""
    slice_uuid: str = ""
    """The slice, where it is known that it is there and of which UUID."""
    warm_until: float = 0.0
    """Its owner no longer has it: the slice is kept for its tenant until then, in seconds since the epoch. 0 when its
    owner has it."""

    @property
    def is_warm(self) -> bool:
        """Whether it is kept for its tenant, with nobody on it."""
        return self.warm_until > 0

    @property
    def key(self) -> tuple[str, int]:
        """(job id, attempt number)."""
        return self.job_id, self.attempt

    @property
    def placement(self) -> card_pb2.Placement:
        """Where it sits."""
        return card_pb2.Placement(start=self.start, size=self.size)


@dataclass(frozen=True)
class Request:
    """A mutation that carried a request id."""

    id: str
    digest: str
    """Digest of the RPC's name and the request's body."""
    at: float
    """When, in seconds since the epoch."""


@dataclass(frozen=True)
class Change:
    """What one transaction does to a job. Either all of it is stored, or nothing."""

    record: JobRecord
    events: tuple[job_pb2.JobEvent, ...] = ()
    """In order; the store gives them their cursors."""
    reserve: Reservation | None = None
    """A reservation that begins, or takes the place of the attempt's own."""
    release: tuple[int, ...] = ()
    """Attempts whose reservation ends."""
    release_warm: Reservation | None = None
    """A warm reservation that ends, if it is still as it was."""
    take_over: tuple[str, int] | None = None
    """The warm reservation (job id, attempt) that ends because `reserve` takes its slice."""
    runs: tuple[job_pb2.Run, ...] = ()
    """Runs as they are now."""
    run_start: job_service_pb2.RunStart | None = None
    """What was asked for of the one run that is new."""
    token_taken: bool = False
    """The fencing token that was offered is used, and never offered again."""
    request: Request | None = None
    usage: tuple[UsageChange, ...] = ()
    """What it means for the job's usage, in order."""
    usage_there: tuple[Stretch, ...] = ()
    """Stretches of usage at a peer, as they are now."""
    forward: ForwardRecord | None = None
    """What was sent to a peer, as it is now."""
    observed: tuple[ObservedAttempt, ...] = ()
    """What is learnt from attempts that are over."""


Decide = Callable[[JobRecord, int], Change | None]
"""Pure: the stored record and the next fencing token in, the change out; None changes nothing."""


@dataclass(frozen=True)
class JobQuery:
    """Which jobs, the newest first."""

    states: tuple[job_pb2.JobState.ValueType, ...] = ()
    tenant: str = ""
    name_prefix: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    created_since: float = 0.0
    before_sequence: int | None = None
    limit: int = 50


@dataclass(frozen=True)
class NodeRecord:
    """A node, as last heard of."""

    node: fleet_service_pb2.Node
    event_cursor: int = 0
    """Its events up to here have been looked at."""


@dataclass(frozen=True)
class BundleRecord:
    """A bundle that is on disk, checked."""

    id: str
    size_bytes: int
    unpacked_bytes: int
    sizes: Mapping[str, int]
    """Size of every regular file in it, in bytes, by its normalized path."""


@dataclass(frozen=True)
class PeerRecord:
    """Another centre that this one works with."""

    name: str
    """Name by which it is known here."""
    centre_id: str
    address: str
    """Where it serves its peers; "" when it is never called."""
    certificate: bytes
    """DER; pinned."""
    terms: peer_service_pb2.PeerTerms
    create_time: float
    """In seconds since the epoch."""
    round_trip_s: float = 0.0
    """Measured; 0 while it is not known."""
    bytes_per_second: float = 0.0
    """Measured; 0 while it is not known."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its certificate, in hexadecimal."""
        return hashlib.sha256(self.certificate).hexdigest()


@dataclass(frozen=True)
class InvitationRecord:
    """An invitation that was given out and not taken yet."""

    public_key: str
    """Its public key, uncompressed point in hexadecimal."""
    expires: float
    """In seconds since the epoch."""
    name: str
    """Name that the new peer gets; "" is its own."""
    terms: peer_service_pb2.PeerTerms
    secret_certificate: bytes
    """Certificate of the invitation's key, with which whoever was invited comes in: DER."""
