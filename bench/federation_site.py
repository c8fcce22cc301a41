"""One simulated centre.

It places as the queue model does (`controlplane.queue_model.Play`, which a test holds against the scheduler's own
plans), and tells its own offer desk and its peers no more than a real one knows: how long a job has run, never how long
it will.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from bench.federation_load import Work
from controlplane.durations import Basis, Estimate, remaining
from controlplane.fleet import Geometry, GpuView, Shape, Use
from controlplane.forwarding import Rules
from controlplane.offer_desk import OfferDesk
from controlplane.outlook import Outlook
from controlplane.queue_model import Play
from controlplane.queued_job import QueuedJob
from controlplane.records import PeerRecord
from controlplane.reservations import AttemptKey
from controlplane.spill import Spill
from puhui.v1 import federation_service_pb2, job_pb2, peer_service_pb2

__all__ = ["BANDWIDTH", "PATIENCE_S", "FederatedSite", "Link", "Site", "Waiting", "link"]

_SLOWER = 20.0
"""The waits at a centre are worked out again after ten seconds, where a real one does that after half a second."""
PATIENCE_S = 60.0
"""As the control plane's own default."""
BANDWIDTH = 12.5e6
"""Bytes per second between centres, as is assumed of a peer that was never measured."""


@dataclass(frozen=True)
class Waiting:
    """A job at a centre."""

    work: Work
    since_s: float
    """There since."""
    visited: tuple[str, ...] = ()
    """Centres that it was at before."""


@dataclass
class Link:
    """What one centre knows of a peer: the `Neighbour` of its forwarder."""

    record: PeerRecord
    round_trip_s: float
    profiles: list[federation_service_pb2.CapacitySummary] = field(default_factory=list)
    in_contact: bool = True
    bytes_per_second: float = BANDWIDTH
    late_s: list[float] = field(default_factory=list)
    sent: int = 0

    @property
    def broken_s(self) -> float:
        """How late its work began lately, in the mean."""
        lately = self.late_s[-8:]
        return sum(lately) / len(lately) if lately else 0.0


def link(number: int, round_trip_s: float) -> Link:
    """Returns what is known of a peer at first."""
    terms = peer_service_pb2.PeerTerms(transit=True)
    return Link(PeerRecord(str(number), str(number), "a", b"", terms, 0.0), round_trip_s)


class Site(Play):
    """A centre.

    Args:
        number: which one.
        kind: what its GPUs can be cut into.
        gpus: how many it has.
        clock: seconds since the beginning.
        began: told of every job that begins.
    """

    def __init__(
        self, number: int, kind: Geometry, gpus: int, clock: Callable[[], float], began: Callable[[Waiting, int], None]
    ) -> None:
        self.name = str(number)
        self.clock = clock
        self._began = began
        self.waiting: dict[str, Waiting] = {}
        self.waiting_jobs: dict[str, QueuedJob] = {}
        self._running: dict[str, tuple[float, Work]] = {}
        self._uses: list[dict[int, Use]] = [{} for _ in range(gpus)]
        self._views = [
            GpuView(f"n-{at // 8}", f"n-{at // 8}", f"GPU-{at}", at, True, kind, (), True) for at in range(gpus)
        ]
        self._stale: set[int] = set()
        self._sequence = 0
        super().__init__(
            self._views,
            0.0,
            PATIENCE_S,
            lambda _: None,
            lambda job: self.waiting[job.id].work.length_s,
            most_kept=float("inf"),
            most_looked_at=gpus,
        )

    def submit(self, waiting: Waiting) -> None:
        """A job arrives, from a user or from a peer."""
        work = waiting.work
        self._sequence += 1
        job = QueuedJob(work.id, 0, self._sequence, work.profile, 0, waiting.since_s)
        self.waiting[work.id], self.waiting_jobs[work.id] = waiting, job
        self.arrive(job)

    def withdraw(self, job_id: str) -> Waiting:
        """A job goes elsewhere."""
        self.leave(self.waiting_jobs.pop(job_id))
        return self.waiting.pop(job_id)

    def placed(self, job: QueuedJob, number: int, shape: Shape, start: int) -> None:
        """A job has begun."""
        waiting = self.waiting.pop(job.id)
        self.waiting_jobs.pop(job.id)
        self._running[job.id] = self.clock(), waiting.work
        use = Use(shape.profile, start, shape.size, False, key=(job.id, 1))
        self._uses[number][use.mask] = use
        self._stale.add(number)
        self._began(waiting, int(self.name))

    def ended(self, number: int, mask: int) -> None:
        """A job has ended."""
        use = self._uses[number].pop(mask)
        if use.key is not None:
            del self._running[use.key[0]]
        self._stale.add(number)

    # -- what the control plane's own parts ask of it

    def gpus(self) -> list[GpuView]:
        """Returns its GPUs, with what is held of them."""
        for at in self._stale:
            old = self._views[at]
            self._views[at] = GpuView(
                old.node_id,
                old.node_name,
                old.gpu_uuid,
                old.gpu_index,
                True,
                old.geometry,
                tuple(self._uses[at].values()),
                True,
            )
        self._stale.clear()
        return self._views

    @property
    def queue(self) -> Sequence[QueuedJob]:
        """Every job that waits, in the order of the queue."""
        return list(self.waiting_jobs.values())

    def of_share(self, key: AttemptKey, at: float) -> Estimate:
        """Returns for how long a job is guessed to run yet, from how long it has run."""
        known = self._running.get(key[0])
        return remaining(at - known[0], None, ()) if known is not None else Estimate(None, Basis.UNKNOWN)

    def of_job(self, job_id: str) -> Estimate:
        """Returns how long a waiting job is guessed to take."""
        return remaining(0.0, None, ())

    def of_spec(self, spec: job_pb2.JobSpec) -> Estimate:
        """Returns how long a job is guessed to take."""
        return remaining(0.0, None, ())

    async def refresh(self, held: Collection[AttemptKey], queued: Iterable[str]) -> None:
        """Everything is known at once here."""


class FederatedSite(Site):
    """A centre with peers."""

    def __init__(
        self,
        number: int,
        kind: Geometry,
        gpus: int,
        clock: Callable[[], float],
        began: Callable[[Waiting, int], None],
        links: dict[str, Link],
        chance: random.Random,
        rules: Rules,
    ) -> None:
        super().__init__(number, kind, gpus, clock, began)
        self.links = links
        self.outlook = Outlook(self, self, self, PATIENCE_S, clock, lambda: clock() / _SLOWER)
        self.desk = OfferDesk(
            self.name,
            self.outlook,
            self,
            longest_lease_s=900.0,
            received=lambda _: 0,
            bundle_there=lambda _: False,
            is_open=lambda _, __: True,
            wall=clock,
            meter=clock,
            chance=chance,
        )
        self.spill = Spill(rules, chance)
        self.next_look_s = float("inf")

    def now(self) -> float:
        """Returns the lease clock."""
        return self.clock()
