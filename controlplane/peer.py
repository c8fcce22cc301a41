"""Another centre, as this one sees it: what it told last, and how it kept its promises."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import grpc
from google.protobuf.duration_pb2 import Duration

from controlplane.peer_client import PeerClient
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, now, seconds, timestamp
from puhui.rpc.plain_text import plain_text
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import peer_service_pb2

__all__ = ["ASSUMED_BYTES_PER_SECOND", "ASSUMED_ROUND_TRIP_S", "Peer", "sound_capacity"]

ASSUMED_ROUND_TRIP_S = 0.05
ASSUMED_BYTES_PER_SECOND = 12.5e6
"""100 Mbit/s, until something was carried there."""
_SMALLEST_MEASURE = 256 * 1024
_MOST_LATE_S = 120.0
"""What is later says more about an outage than about its promises."""
_FORGIVEN_S = 300.0
_WEIGHT = 0.3
"""Of a new measurement in a running mean."""
_MOST_PROFILES = 512
_LONGEST_NAME = 64
_MOST_SLICES = 2**20
_LONGEST_WAIT_S = 365 * 86400.0


@dataclass
class Peer:
    """Another centre, as this one sees it."""

    record: PeerRecord
    round_trip_s: float = ASSUMED_ROUND_TRIP_S
    bytes_per_second: float = ASSUMED_BYTES_PER_SECOND
    profiles: Sequence[wire.CapacitySummary] = ()
    """Its capacity, as of its last word."""
    queued_jobs: int = 0
    emulated: bool = False
    """Emulated cards are among them."""
    last_contact: float = 0.0
    """In seconds since the epoch; 0 when it was never heard of."""
    asked: int = 0
    accepted: int = 0
    last_refusal: str = ""
    _late_s: float = 0.0
    _late_at: float = 0.0
    """How late its work began, in the mean of the last ones, in seconds, and when that was last so."""
    trouble: str = ""
    """Why it is not in contact."""
    _client: PeerClient | None = None
    _there: asyncio.Event = field(default_factory=asyncio.Event)
    _sequence: int = 0

    @classmethod
    def of(cls, record: PeerRecord, client: PeerClient | None) -> Peer:
        """Returns a peer that is not in contact yet.

        Args:
            record: what is known of it.
            client: the connection to it; None when it serves nobody.
        """
        return cls(
            record,
            round_trip_s=record.round_trip_s or ASSUMED_ROUND_TRIP_S,
            bytes_per_second=record.bytes_per_second or ASSUMED_BYTES_PER_SECOND,
            _client=client,
        )

    @property
    def client(self) -> PeerClient:
        """The connection to it.

        Raises:
            Refusal: UNAVAILABLE with PEER_NOT_CALLED.
        """
        if self._client is None:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "PEER_NOT_CALLED",
                f"peer {self.record.name} serves nobody: it sends work only, and cannot be asked for anything",
            )
        return self._client

    @property
    def is_called(self) -> bool:
        """Whether it serves its peers, so that it can be asked."""
        return self._client is not None

    @property
    def in_contact(self) -> bool:
        """Whether the connection to it stands."""
        return self._there.is_set()

    async def contact(self) -> None:
        """Returns when it is in contact."""
        await self._there.wait()

    def carried(self, size_bytes: int, elapsed_s: float) -> None:
        """So many bytes have gone there in so many seconds; what is small says more about the round trip."""
        if size_bytes >= _SMALLEST_MEASURE and elapsed_s > 0:
            measured = size_bytes / elapsed_s
            known = self.bytes_per_second if self.record.bytes_per_second else measured
            self.bytes_per_second = known + _WEIGHT * (measured - known)
            self.record = replace(self.record, bytes_per_second=self.bytes_per_second)

    def offered(self, accepted: bool, reason: str = "") -> None:
        """It has said what it would do, or not."""
        self.asked += 1
        self.accepted += accepted
        if not accepted:
            self.last_refusal = plain_text(reason, _LONGEST_NAME)

    def began(self, promised_s: float, actual_s: float) -> None:
        """Work there began so many seconds after it was sent."""
        late_s = min(max(0.0, actual_s - promised_s), _MOST_LATE_S)
        self._late_s = self.broken_s + _WEIGHT * (late_s - self.broken_s)
        self._late_at = time.monotonic()

    @property
    def broken_s(self) -> float:
        """How late its work begins, in seconds; halved every few minutes, or nobody would learn of its recovery."""
        return float(self._late_s * 0.5 ** ((time.monotonic() - self._late_at) / _FORGIVEN_S))

    def heard(self, said: wire.ExchangeCapacityRequest | wire.ExchangeCapacityResponse) -> bool:
        """It has told its capacity. Returns whether that is news; what is older than what it told last is not."""
        self.last_contact = now()
        if said.sequence <= self._sequence:
            return False
        self._sequence = said.sequence
        return self.told(said)

    def told(self, said: wire.ExchangeCapacityRequest | wire.ExchangeCapacityResponse) -> bool:
        """This is its newest word about its capacity. Returns whether that is another one."""
        profiles = sound_capacity(said.profiles)
        self.emulated = said.emulated
        news = (profiles, said.queued_jobs) != (list(self.profiles), self.queued_jobs)
        self.profiles, self.queued_jobs = profiles, said.queued_jobs
        return news

    def measured(self, round_trip_s: float) -> None:
        """A message and its answer took so long."""
        known = self.round_trip_s if self.record.round_trip_s else round_trip_s
        self.round_trip_s = known + _WEIGHT * (round_trip_s - known)
        self.record = replace(self.record, round_trip_s=self.round_trip_s)

    def connected(self) -> None:
        """Its answers come."""
        self.trouble = ""
        self.last_contact = now()
        self._there.set()

    def lost(self, why: str) -> None:
        """Its answers come no longer."""
        self.trouble = plain_text(why, 500)
        self._sequence = 0
        self._there.clear()

    def described(self, sent: int, received: int) -> peer_service_pb2.Peer:
        """Returns it for people.

        Args:
            sent: our attempts there.
            received: its attempts here.
        """
        record = self.record
        shown = peer_service_pb2.Peer(
            name=record.name,
            centre_id=record.centre_id,
            address=record.address,
            fingerprint=record.fingerprint,
            terms=record.terms,
            in_contact=self.in_contact,
            message=self.trouble,
            bytes_per_second=self.bytes_per_second if record.bytes_per_second else 0.0,
            profiles=self.profiles,
            queued_jobs=self.queued_jobs,
            emulated=self.emulated,
            sent=sent,
            received=received,
            offers_asked=self.asked,
            offers_accepted=self.accepted,
            last_refusal=self.last_refusal,
            create_time=timestamp(record.create_time),
            broken_promise=duration(self.broken_s),
        )
        if self.last_contact:
            shown.last_contact_time.CopyFrom(timestamp(self.last_contact))
        if record.round_trip_s:
            shown.round_trip.CopyFrom(duration(self.round_trip_s))
        return shown


def sound_capacity(told: Iterable[wire.CapacitySummary]) -> list[wire.CapacitySummary]:
    """Returns of what a peer tells about its capacity what can be, in words that people may be shown."""
    found: dict[tuple[str, str], wire.CapacitySummary] = {}
    for one in told:
        if len(found) >= _MOST_PROFILES:
            break
        key = plain_text(one.gpu_model, _LONGEST_NAME), plain_text(one.profile, _LONGEST_NAME)
        found.setdefault(
            key,
            wire.CapacitySummary(
                gpu_model=key[0],
                profile=key[1],
                free=min(one.free, _MOST_SLICES),
                idle=min(one.idle, _MOST_SLICES),
                expected_wait=_wait(one),
            ),
        )
    return list(found.values())


def _wait(one: wire.CapacitySummary) -> Duration | None:
    if not one.HasField("expected_wait"):
        return None
    told = seconds(one.expected_wait)
    return duration(min(max(told, 0.0), _LONGEST_WAIT_S)) if math.isfinite(told) else None
