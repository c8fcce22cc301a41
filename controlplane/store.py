"""What a centre must not forget: the seam between the control plane and its database.

Every method is one transaction. A mutation has been made durable when it returns; if it raises, nothing of it was
stored. `tests/contract/store` says what every implementation promises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from controlplane.forwards import ForwardRecord
from controlplane.guests import GuestKey, GuestRecord
from controlplane.metering import Stretch
from controlplane.observing import ObservedAttempt
from controlplane.records import (
    BundleRecord,
    Decide,
    InvitationRecord,
    JobQuery,
    JobRecord,
    NodeRecord,
    PeerRecord,
    Request,
    Reservation,
)
from puhui.v1 import job_pb2, job_service_pb2

__all__ = ["DecideGuest", "RequestReused", "ShareTaken", "Store"]

DecideGuest = Callable[[GuestRecord | None], GuestRecord]
"""Pure: the stored guest in, the guest afterwards out."""


class RequestReused(Exception):  # noqa: N818 - a name for what it is
    """A request id came again with another body."""


class ShareTaken(Exception):  # noqa: N818 - a name for what it is
    """A reservation would overlap one that is held."""


class Store(Protocol):
    """The memory of one centre.

    Every mutation raises OSError (ENOSPC) when the disk is full.
    """

    async def centre_id(self) -> str:
        """Returns a random id that belongs to this store for ever."""

    async def add_job(
        self,
        record: JobRecord,
        events: Sequence[job_pb2.JobEvent],
        request: Request | None = None,
        bundle: BundleRecord | None = None,
        guest: DecideGuest | None = None,
    ) -> JobRecord:
        """Stores a new job with its first events and its bundle; returns it with its sequence and last cursor.

        If `request` was carried out before, nothing is stored and the job that it made comes back. If `guest` says
        that the guest is another job already, that one comes back, and only the guest is stored.

        Raises:
            RequestReused: the request id came with another body before.
            Exception: whatever `guest` raises; nothing is stored then.
        """

    async def change_job(self, job_id: str, decide: Decide) -> JobRecord:
        """Lets `decide` change a job, and returns the job afterwards.

        Raises:
            KeyError: there is no such job.
            RequestReused: the change carries a request id that came with another body before.
            ShareTaken: the change reserves what is held.
            Exception: whatever `decide` raises; nothing is changed then.
        """

    async def job(self, job_id: str) -> JobRecord | None:
        """Returns a job."""

    async def jobs(self, query: JobQuery) -> list[JobRecord]:
        """Returns jobs, the newest first."""

    async def unfinished_jobs(self) -> list[JobRecord]:
        """Returns every job that is not in a final state, the oldest first."""

    async def events(self, job_id: str, after_cursor: int, limit: int = 500) -> list[job_pb2.JobEvent]:
        """Returns events of a job, in order."""

    async def runs(self, job_id: str, before: int | None, limit: int) -> list[tuple[int, job_pb2.Run]]:
        """Returns runs of a job with their sequence, the newest first.

        Args:
            job_id: the job.
            before: only runs with a smaller sequence; None is all of them.
            limit: at most this many.
        """

    async def run(self, run_id: str) -> tuple[job_pb2.Run, job_service_pb2.RunStart] | None:
        """Returns a run, and what was asked for of it."""

    async def reservations(self) -> list[Reservation]:
        """Returns every reservation that is held."""

    async def usage(self, start: float, end: float, tenant: str = "", job_id: str = "") -> list[Stretch]:
        """Returns the stretches of usage that overlap a time, in the order in which they began.

        Args:
            start: in seconds since the epoch.
            end: likewise; what begins then is not meant.
            tenant: only those of this tenant; "" is all of them.
            job_id: only those of this job; "" is all of them.
        """

    async def attempts_at_peers(self, start: float, end: float) -> set[tuple[str, int]]:
        """Returns job and number of every attempt at a peer whose usage overlaps a time; see `usage`."""

    async def observations(self, tenant: str, fingerprint: str, limit: int = 50) -> list[ObservedAttempt]:
        """Returns what a tenant's own attempts showed of one piece of code, the newest first, at most `limit`."""

    async def request(self, request_id: str) -> tuple[Request, str] | None:
        """Returns a request that was carried out, with the id of the job that it was about."""

    async def put_node(self, record: NodeRecord) -> None:
        """Stores a node."""

    async def nodes(self) -> list[NodeRecord]:
        """Returns every node, by name."""

    async def put_bundle(self, bundle: BundleRecord) -> None:
        """Stores that a bundle is on disk."""

    async def bundle(self, bundle_id: str) -> BundleRecord | None:
        """Returns a bundle."""

    async def forwards(self) -> list[ForwardRecord]:
        """Returns every forward that is not settled."""

    async def forward(self, job_id: str, attempt: int) -> ForwardRecord | None:
        """Returns a forward."""

    async def guest(self, key: GuestKey) -> GuestRecord | None:
        """Returns a guest."""

    async def guests(self) -> list[GuestRecord]:
        """Returns every guest whose job has not ended."""

    async def guest_of(self, job_id: str) -> GuestRecord | None:
        """Returns the guest that a job is; None when it was submitted here."""

    async def unbound_guests(self, peer: str) -> int:
        """Returns how many guests of a peer were never bound, and never will be."""

    async def change_guest(self, key: GuestKey, decide: DecideGuest) -> GuestRecord:
        """Lets `decide` change a guest, and returns it afterwards.

        Raises:
            Exception: whatever `decide` raises; nothing is changed then.
        """

    async def old_guests(self, before: float) -> list[GuestRecord]:
        """Returns guests whose job ended before a time (seconds since the epoch), or that were refused before it."""

    async def forget_guest(self, key: GuestKey) -> None:
        """Forgets a guest."""

    async def put_peer(self, record: PeerRecord) -> None:
        """Stores a peer."""

    async def peers(self) -> list[PeerRecord]:
        """Returns every peer, by name."""

    async def remove_peer(self, name: str) -> None:
        """Removes a peer."""

    async def put_invitation(self, record: InvitationRecord) -> None:
        """Stores an invitation, and forgets those that hold no longer."""

    async def invitations(self) -> list[InvitationRecord]:
        """Returns the invitations that were not taken."""

    async def take_invitation(self, public_key: str, peer: PeerRecord) -> bool:
        """Stores a peer in exchange for its invitation. Returns False, and stores nothing, when that is gone."""

    async def forget_requests(self, before: float) -> None:
        """Forgets requests that were made before a time (seconds since the epoch)."""

    async def close(self) -> None:
        """Finishes what was begun, and closes."""
