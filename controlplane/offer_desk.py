"""What this centre promises to its peers: gives offers, and remembers them until they are taken or expire.

An offer is no reservation: whoever waits here comes first, before and after. But what is promised to one peer is not
promised to another as long as the offer holds: an open offer counts as a job that waits, behind those that do.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import grpc

from controlplane.durations import JUST_BEGUN_S
from controlplane.offer_refusals import OfferRefusal
from controlplane.outlook import LAST, Outlook
from controlplane.peer_terms import is_open
from controlplane.queue_model import Wait
from controlplane.queued_job import QueuedJob
from controlplane.records import PeerRecord
from controlplane.sizing import choices_for, largest
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, now, seconds, timestamp
from puhui.v1 import card_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["Clock", "OfferDesk", "OfferedTo"]

HOLDS_S = 10.0
"""An offer holds for this long."""
_UPLOAD_S = 600.0
"""An offer that was taken stays promised at most this long, until its job is here."""
_SLOWEST_UPLOAD = 1e6  # bytes per second
_MOST_OPEN = 64
"""Open offers of one peer."""
_MOST_BUNDLES = 1024
"""Bundles of one peer that are remembered."""
_MOST_WAIT_S = 86400.0
_MOST_TEXT = 256
_MOST_RECEIVED = 100
_SHARE_OF_TIME = 0.2
"""Of the loop's time, for all offers together."""
_MOST_SAVED_S = 1.0
_NO_LABELS: Mapping[str, str] = {}


class Clock(Protocol):
    """The clock of leases; `LeaseClock` is one."""

    def now(self) -> float:
        """Returns the clock, in seconds."""


class OfferedTo(Protocol):
    """A peer, as far as an offer needs to know it."""

    @property
    def record(self) -> PeerRecord:
        """What is stored of it."""


@dataclass(frozen=True)
class _Open:
    """An offer that holds."""

    id: str
    peer: str
    origin: tuple[str, int]
    job: QueuedJob
    duration_s: float
    until: float
    """On the lease clock."""
    bundle_bytes: int
    taken: bool = False


@dataclass(frozen=True)
class _No:
    """Why there is no offer."""

    reason: OfferRefusal
    message: str
    retry_s: float


class OfferDesk:
    """Gives offers to peers.

    Args:
        centre_id: this centre's id, which visits are written down with.
        outlook: what this centre could do.
        clock: on which leases, and offers, are written.
        longest_lease_s: the longest lease that is given, in seconds.
        received: number of attempts of a peer, by its name, that are here and have not ended.
        bundle_there: whether a bundle, by its id, is on disk here.
        is_open: whether a time, in seconds since the epoch, is within hours as terms write them.
        start_s: from a share that is found until the command runs, in seconds.
        labels: what this centre's operator says of it; who requires another value of one is refused.
        most_bundle_bytes: the largest bundle that this centre takes from anybody.
        cost: what work costs here, against the origin's own 1.
        wall: seconds since the epoch.
        meter: seconds that only grow, to measure what an offer costs.
    """

    def __init__(
        self,
        centre_id: str,
        outlook: Outlook,
        clock: Clock,
        *,
        longest_lease_s: float,
        received: Callable[[str], int],
        bundle_there: Callable[[str], bool],
        is_open: Callable[[str, float], bool] = is_open,
        start_s: Callable[[], float] = lambda: 0.0,
        labels: Mapping[str, str] = _NO_LABELS,
        most_bundle_bytes: int = 2**33,
        cost: float = 1.0,
        wall: Callable[[], float] = now,
        meter: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self._centre_id = centre_id
        self._outlook = outlook
        self._clock = clock
        self._longest_lease_s = longest_lease_s
        self._received = received
        self._bundle_there = bundle_there
        self._is_open = is_open
        self._start_s = start_s
        self._labels = labels
        self._most_bundle_bytes = most_bundle_bytes
        self._cost = cost
        self._wall = wall
        self._meter = meter
        self._chance = chance or random.Random()  # noqa: S311 - only spreads retries
        self._open: dict[str, _Open] = {}
        self._bundles: dict[str, OrderedDict[str, None]] = {}
        self._number = 0
        self._saved_s, self._saved_at = _MOST_SAVED_S, meter()

    # -- giving

    def give(self, request: wire.GetOfferRequest, peer: OfferedTo) -> wire.GetOfferResponse:
        """Returns an offer, or why there is none."""
        self._forget()
        refused = self._terms(request, peer.record)
        if refused is None and not self._affordable():
            refused = _No(OfferRefusal.BUSY, "more offers are asked for than this centre can work out; ask again", 1.0)
        if refused is not None:
            return self._refusal(refused)
        began = self._meter()
        try:
            refused = self._need(request)
            return self._refusal(refused) if refused is not None else self._offer(request, peer.record)
        finally:
            self._saved_s -= self._meter() - began

    def _offer(self, request: wire.GetOfferRequest, peer: PeerRecord) -> wire.GetOfferResponse:
        origin = request.origin.job_id, request.origin.attempt
        # Who asks again for the same attempt has lost the first answer, or does not want it.
        for one in [one for one in self._open.values() if one.peer == peer.name and one.origin == origin]:
            if not one.taken:
                del self._open[one.id]
        job = self._queued(request, peer)
        others = sorted(self._open.values(), key=lambda one: one.job.sequence)
        wait = self._outlook.expect(
            [one.job for one in others], {one.job.id: one.duration_s for one in others}, [job]
        ).of(job.id)
        if wait.seconds is None or wait.seconds > _MOST_WAIT_S:
            return self._refusal(self._full(wait))
        if sum(one.peer == peer.name for one in self._open.values()) >= _MOST_OPEN:
            return self._refusal(
                _No(
                    OfferRefusal.TOO_MANY_OFFERS,
                    f"{_MOST_OPEN} offers to you are open; take them, or let them expire",
                    HOLDS_S,
                )
            )
        expected_s = seconds(request.expected_duration) if request.HasField("expected_duration") else JUST_BEGUN_S
        offer = _Open(
            secrets.token_urlsafe(18),
            peer.name,
            origin,
            job,
            max(0.001, expected_s),
            self._clock.now() + HOLDS_S,
            request.bundle_bytes,
        )
        self._open[offer.id] = offer
        return wire.GetOfferResponse(
            accepted=True,
            offer_id=offer.id,
            expire_time=timestamp(offer.until),
            expected_wait=duration(wait.seconds + self._start_s()),
            cost=self._cost,
            time=timestamp(self._clock.now()),
            longest_lease=duration(self._longest_lease_s),
            profile=wait.profile,
            gpu_model=wait.gpu_model,
            bundle_present=self.has_sent(peer.name, request.bundle_id),
        )

    def _queued(self, request: wire.GetOfferRequest, peer: PeerRecord) -> QueuedJob:
        profile, required_mib = _asked(request)
        self._number += 1
        return QueuedJob(
            f"offer {self._number}",
            min(0, peer.terms.highest_priority),
            LAST + self._number,
            profile,
            required_mib,
            self._wall(),
        )

    # -- refusing

    def _terms(self, request: wire.GetOfferRequest, peer: PeerRecord) -> _No | None:
        terms, name = peer.terms, peer.name
        if terms.receive_off:
            return _No(
                OfferRefusal.NOT_RECEIVING, "this centre takes no work from you; its operator has turned that off", 60.0
            )
        if self._centre_id in request.visited_centres:
            return _No(OfferRefusal.LOOP, "this job has been at this centre before", 86400.0)
        if terms.hours and not self._is_open(terms.hours, self._wall()):
            return _No(
                OfferRefusal.OUT_OF_HOURS, f"this centre takes your work only at these times: {terms.hours}", 600.0
            )
        for label, value in request.required_labels.items():
            if self._labels.get(label, value) != value:
                return _No(OfferRefusal.LABELS_DIFFER, f"{label[:64]} of this centre is {self._labels[label]}", 86400.0)
        there = self._received(name) + sum(one.peer == name for one in self._open.values())
        most = terms.most_received or _MOST_RECEIVED
        if there >= most:
            return _No(
                OfferRefusal.TOO_MANY_GUESTS,
                f"{there} jobs of yours are here or promised; this centre takes {most}",
                30.0,
            )
        bundle = min(self._most_bundle_bytes, terms.most_bundle_bytes or self._most_bundle_bytes)
        if request.bundle_bytes > bundle:
            return _No(
                OfferRefusal.BUNDLE_TOO_LARGE, f"this centre takes bundles of at most {bundle} bytes from you", 86400.0
            )
        return None

    def _need(self, request: wire.GetOfferRequest) -> _No | None:
        profile, required_mib = _asked(request)
        gpus = self._outlook.gpus
        geometries = self._outlook.geometries
        if choices_for(profile, required_mib, geometries):
            return None
        if choices_for(profile, required_mib, {gpu.geometry for gpu in gpus}):
            return _No(OfferRefusal.DRAINING, "the nodes that could run this take no work now", 60.0)
        if not gpus:
            return _No(OfferRefusal.NO_GPUS, "no node of this centre has a GPU that can be cut", 300.0)
        top = largest(gpu.geometry for gpu in gpus)
        has = f"; its largest slice is {top.profile} ({top.memory_mib} MiB)" if top is not None else ""
        if profile:
            return _No(OfferRefusal.PROFILE_NOT_AVAILABLE, f"no GPU of this centre offers {profile[:32]}{has}", 3600.0)
        return _No(OfferRefusal.TOO_LARGE, f"no slice of this centre has {required_mib} MiB{has}", 3600.0)

    @staticmethod
    def _full(wait: Wait) -> _No:
        if wait.seconds is None:
            return _No(OfferRefusal.FULL, "there is no room for this, and nobody knows when there will be", 30.0)
        return _No(OfferRefusal.FULL, f"there is room for this only in {wait.seconds / 3600:.0f} h", 300.0)

    def _refusal(self, no: _No) -> wire.GetOfferResponse:
        # Spread, so that those who are refused together do not come again together.
        retry_s = no.retry_s * self._chance.uniform(0.5, 1.5)
        return wire.GetOfferResponse(
            reason=no.reason,
            message=no.message,
            retry_after=duration(retry_s),
            time=timestamp(self._clock.now()),
        )

    def _affordable(self) -> bool:
        at = self._meter()
        self._saved_s = min(_MOST_SAVED_S, self._saved_s + (at - self._saved_at) * _SHARE_OF_TIME)
        self._saved_at = at
        return self._saved_s > 0

    # -- taking

    def take(self, offer_id: str, peer: str, origin: card_pb2.AttemptRef) -> None:
        """Takes an offer for the attempt that it was given for; again, when its upload is tried again.

        From then on it stays promised until `settle`, or for as long as the upload may take.

        Raises:
            Refusal: FAILED_PRECONDITION with OFFER_EXPIRED.
        """
        self._forget()
        offer = self._open.get(offer_id)
        if offer is None or offer.peer != peer or offer.origin != (origin.job_id, origin.attempt):
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "OFFER_EXPIRED",
                "there is no such offer for this attempt, or no longer; ask for another with GetOffer",
            )
        if not offer.taken:
            upload_s = min(_UPLOAD_S, HOLDS_S + offer.bundle_bytes / _SLOWEST_UPLOAD)
            self._open[offer_id] = replace(offer, taken=True, until=self._clock.now() + upload_s)

    def settle(self, peer: str, origin: card_pb2.AttemptRef) -> None:
        """Ends the promises for an attempt: it is bound, or will never be."""
        key = origin.job_id, origin.attempt
        for one in [one for one in self._open.values() if one.peer == peer and one.origin == key]:
            del self._open[one.id]

    @property
    def open(self) -> Collection[str]:
        """Ids of the offers that hold now."""
        self._forget()
        return self._open.keys()

    def _forget(self) -> None:
        at = self._clock.now()
        for one in [one for one in self._open.values() if one.until <= at]:
            del self._open[one.id]

    # -- bundles that were sent before

    def note_bundle(self, peer: str, bundle_id: str) -> None:
        """Notes that a peer has sent a bundle, whole and checked."""
        sent = self._bundles.setdefault(peer, OrderedDict())
        sent[bundle_id] = None
        sent.move_to_end(bundle_id)
        while len(sent) > _MOST_BUNDLES:
            sent.popitem(last=False)

    def has_sent(self, peer: str, bundle_id: str) -> bool:
        """Returns whether a peer has sent a bundle that is here still."""
        # Never for a bundle that another peer sent: that would tell who has what.
        return bool(bundle_id) and bundle_id in self._bundles.get(peer, ()) and self._bundle_there(bundle_id)

    def forget_peer(self, peer: str) -> None:
        """Forgets what was promised to a peer that is one no longer, and what it has sent."""
        self._bundles.pop(peer, None)
        for one in [one for one in self._open.values() if one.peer == peer]:
            del self._open[one.id]


def _asked(request: wire.GetOfferRequest) -> tuple[str, int]:
    """Returns the profile that is named, or "", and the memory that is needed, in MiB."""
    if request.resources.profile:
        return request.resources.profile[:_MOST_TEXT], 0
    return "", request.resources.memory_mib or request.sizing.required_mib
