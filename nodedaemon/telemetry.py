"""Samples the GPUs for whoever watches their utilization.

One sampler serves all watchers. It looks at a GPU when the first of them is due, and at no GPU while nobody
watches. Each GPU is looked at on a thread of its own, so that a slow one delays no other and not the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import grpc
import structlog

from nodedaemon.driver_facts import DriverError, GpuFacts
from nodedaemon.gpm import Means
from nodedaemon.threads import on_thread
from nodedaemon.utilization import Card, Look, describe, describe_silent
from nodedaemon.utilization_meter import Meter
from nodedaemon.utilization_watcher import Watcher, require_sound
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1.node_service_pb2 import UtilizationSample, WatchUtilizationResponse

__all__ = ["GpuList", "Telemetry"]

_log = structlog.get_logger(__name__)

_MOST_WATCHERS = 64
_EARLY_S = 0.001
_LONGEST_ROUND_S = 0.5
_SHARE_OF_ROUND = 0.9
_SETTLE_S = 1.0


class GpuList(Protocol):
    """Knows which GPUs the node has."""

    emulated: bool

    def every(self) -> list[GpuFacts]:
        """Returns the GPUs, as they were known last."""


@dataclass(frozen=True, eq=False)
class _Measured:
    """A look at a GPU, and the means since each base that was asked for."""

    look: Look
    means: dict[Look, dict[Card, Means]]


@dataclass(eq=False)
class _Flight:
    """A look that is under way."""

    gpu: GpuFacts
    watchers: list[Watcher]
    since_s: float
    bases: frozenset[Look]
    outcome: asyncio.Future[_Measured]


@dataclass(eq=False)
class _Round:
    """What there is to tell each watcher."""

    samples: dict[Watcher, list[UtilizationSample]] = field(default_factory=dict)

    def add(self, watcher: Watcher, sample: UtilizationSample) -> None:
        self.samples.setdefault(watcher, []).append(sample)


class Telemetry:
    """The sampler of one daemon.

    Usage::

        task = asyncio.create_task(telemetry.run())
        async for response in telemetry.watch(1.0, ()):
            ...

    Args:
        gpus: which GPUs there are.
        meter: reads one.
        patience_s: after how long without an answer a GPU is said to be unavailable, in seconds.
        monotonic: seconds that never jump.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        gpus: GpuList,
        meter: Meter,
        *,
        patience_s: float = 3.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = now,
    ) -> None:
        self._gpus = gpus
        self._meter = meter
        self._patience_s = patience_s
        self._monotonic = monotonic
        self._wall = wall
        self._watchers: dict[Watcher, None] = {}
        self._flights: dict[str, _Flight] = {}
        self._looks: set[Look] = set()
        self._cards: dict[str, tuple[Card, ...]] = {}
        self._change = asyncio.Event()
        self._closed = False

    # For watchers -----------------------------------------------------------------------------------------

    @property
    def watchers(self) -> int:
        """How many watch now."""
        return len(self._watchers)

    async def watch(self, interval_s: float, uuids: Sequence[str]) -> AsyncGenerator[WatchUtilizationResponse, None]:
        """Yields samples until the daemon stops.

        Args:
            interval_s: time between samples, in seconds.
            uuids: the GPUs and slices wanted; none is all there are at any time.

        Raises:
            Refusal: INVALID_ARGUMENT with INTERVAL_INVALID or UUIDS_TOO_MANY; RESOURCE_EXHAUSTED with
                WATCHER_LIMIT.
        """
        require_sound(interval_s, uuids)
        if len(self._watchers) >= _MOST_WATCHERS:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "WATCHER_LIMIT",
                f"{_MOST_WATCHERS} watches of utilization run on this node already; end one, or share one",
                retry_after_s=10.0,
            )
        with self.serving(Watcher(interval_s, frozenset(uuids))) as watcher:
            while (response := await watcher.take()) is not None:
                yield response

    @contextlib.contextmanager
    def serving(self, watcher: Watcher) -> Iterator[Watcher]:
        """Samples for a watcher for as long as the block lasts. The daemon's own are not limited in number."""
        self._watchers[watcher] = None
        if self._closed:
            watcher.close()
        self._change.set()
        try:
            yield watcher
        finally:
            self._watchers.pop(watcher)
            watcher.bases.clear()
            self._change.set()

    def hasten(self, watcher: Watcher) -> None:
        """Has a watcher get its next sample now, or as soon as a look that is under way has ended."""
        watcher.hasten()
        self._change.set()

    def close(self) -> None:
        """Ends every watch: the daemon is stopping."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()

    # The sampler ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Samples until cancelled."""
        try:
            while True:
                await self._pause()
                begun = self._begin()
                if begun:
                    # Those who answer quickly are told of in one message.
                    shortest_s = min((watcher.interval_s for watcher in self._watchers), default=0.0)
                    most_s = min(shortest_s * _SHARE_OF_ROUND, _LONGEST_ROUND_S)
                    await asyncio.wait([flight.outcome for flight in begun], timeout=most_s)
                told = _Round()
                for flight in [one for one in self._flights.values() if one.outcome.done()]:
                    del self._flights[flight.gpu.uuid]
                    self._land(flight, told)
                for flight in self._flights.values():
                    self._tell_silence(flight, told)
                for watcher, samples in told.samples.items():
                    watcher.put(samples)
                self._sweep()
        finally:
            self.close()
            await self._settle()

    async def _pause(self) -> None:
        """Waits until somebody is due, a GPU that took long has answered, or a watcher came or went."""
        changed = asyncio.ensure_future(self._change.wait())
        try:
            waited: list[asyncio.Future[Any]] = [changed, *(flight.outcome for flight in self._flights.values())]
            due = [due_s for gpu in self._gpus.every() for due_s in self._wanted_s(gpu)]
            left_s = max(min(due) - self._monotonic(), 0) if due else None
            await asyncio.wait(waited, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        self._change.clear()

    def _wanted_s(self, gpu: GpuFacts) -> list[float]:
        """Returns when each watcher wants something done about a GPU, on the monotonic clock."""
        flight = self._flights.get(gpu.uuid)
        # While a GPU is being looked at there is nothing to be done for it, but to say so after a while.
        earliest_s = 0.0 if flight is None else flight.since_s + self._patience_s
        return [max(one.due_s(gpu.uuid), earliest_s) for one in self._concerned(gpu)]

    def _due(self, gpu: GpuFacts, at_s: float) -> list[Watcher]:
        """Returns who is due; if anybody is, also whoever will be soon and saves the GPU a look by coming along."""
        concerned = self._concerned(gpu)
        due = {one for one in concerned if one.due_s(gpu.uuid) <= at_s + _EARLY_S}
        return [one for one in concerned if due and (one in due or one.joins(gpu.uuid, at_s))]

    def _concerned(self, gpu: GpuFacts) -> list[Watcher]:
        """Returns who wants to hear of a GPU or a slice of it. A slice that is nowhere yet may come anywhere."""
        here = {gpu.uuid, *(card.uuid for card in self._cards.get(gpu.uuid, ()))}
        anywhere = {one.uuid for one in self._gpus.every()} | {
            card.uuid for cards in self._cards.values() for card in cards
        }
        return [one for one in self._watchers if not one.uuids or one.uuids & here or one.uuids - anywhere]

    def _begin(self) -> list[_Flight]:
        """Sends for every GPU of which somebody is due to hear."""
        at_s = self._monotonic()
        begun = []
        for gpu in self._gpus.every():
            due = [] if gpu.uuid in self._flights else self._due(gpu, at_s)
            if not due:
                continue
            bases = frozenset(one.bases[gpu.uuid] for one in due if gpu.uuid in one.bases)
            # Whoever is not due keeps its base for its own, longer interval.
            kept = {one.bases[gpu.uuid] for one in self._watchers if gpu.uuid in one.bases and one not in due}
            spent = bases - kept
            measure = partial(_measure, self._meter, gpu, bases, spent)
            flight = _Flight(gpu, due, at_s, bases, asyncio.wrap_future(on_thread(measure, f"gpu-{gpu.index}-use")))
            self._looks -= spent
            self._flights[gpu.uuid] = flight
            begun.append(flight)
            for one in due:
                one.served(gpu.uuid, at_s)
        return begun

    def _land(self, flight: _Flight, told: _Round) -> None:
        """Tells what a look found."""
        gpu = flight.gpu
        try:
            measured = flight.outcome.result()
        except DriverError as error:
            for watcher in flight.watchers:
                watcher.bases.pop(gpu.uuid, None)
            self._tell_unavailable(gpu, flight.watchers, told, f"GPU {gpu.index} does not answer ({error})")
            return
        except Exception as error:  # noqa: BLE001 - what is wrong with one look must not stop the daemon
            _log.error("a look at a GPU failed", gpu=gpu.uuid, exc_info=error)
            for watcher in flight.watchers:
                watcher.bases.pop(gpu.uuid, None)
            why = f"what GPU {gpu.index} answers is not understood ({error!r}); see the daemon's log"
            self._tell_unavailable(gpu, flight.watchers, told, why)
            return
        look = measured.look
        self._looks.add(look)
        self._cards[gpu.uuid] = tuple(look.readings)
        described: dict[tuple[Card, Look | None], UtilizationSample] = {}
        for watcher in flight.watchers:
            if watcher not in self._watchers:
                continue
            base = watcher.bases.get(gpu.uuid)
            watcher.bases[gpu.uuid] = look
            for card, reading in look.readings.items():
                if not watcher.may_tell(card.uuid, reading.at_s):
                    continue
                key = card, base
                if key not in described:
                    first = base.readings.get(card) if base is not None else None
                    means = measured.means[base].get(card) if base is not None else None
                    described[key] = describe(reading, first, means, emulated=self._gpus.emulated)
                told.add(watcher, described[key])
        here = frozenset(card.uuid for cards in self._cards.values() for card in cards)
        for watcher in flight.watchers:
            watcher.forget(here)

    def _tell_silence(self, flight: _Flight, told: _Round) -> None:
        """Says of a GPU that it has not answered for long, as often as its watchers want to hear of it."""
        at_s = self._monotonic()
        silent_s = at_s - flight.since_s
        if silent_s < self._patience_s:
            return
        due = self._due(flight.gpu, at_s)
        for watcher in due:
            watcher.served(flight.gpu.uuid, at_s)
        why = f"GPU {flight.gpu.index} has not answered for {silent_s:.1f} s; see `dmesg`"
        self._tell_unavailable(flight.gpu, due, told, why)

    def _tell_unavailable(self, gpu: GpuFacts, watchers: Iterable[Watcher], told: _Round, why: str) -> None:
        at_s, time_s = self._monotonic(), self._wall()
        for card in self._cards.get(gpu.uuid, (Card(gpu.uuid),)):
            sample = describe_silent(card, time_s, why, emulated=self._gpus.emulated)
            for watcher in watchers:
                if watcher.may_tell(card.uuid, at_s):
                    told.add(watcher, sample)

    # Buffers ----------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Gives back the buffers of looks that are nobody's base any more."""
        wanted = {look for watcher in self._watchers for look in watcher.bases.values()}
        wanted |= {look for flight in self._flights.values() for look in flight.bases}
        unwanted = self._looks - wanted
        if unwanted:
            self._looks -= unwanted
            on_thread(partial(_free, self._meter, unwanted), "gpu-use-free")

    async def _settle(self) -> None:
        """Gives all buffers back but those of a GPU that hangs: its thread may still be using them."""
        flights = self._flights.values()
        if flights:
            await asyncio.wait([flight.outcome for flight in flights], timeout=_SETTLE_S)
        for flight in flights:
            if not flight.outcome.done():
                flight.outcome.cancel()
                self._looks -= flight.bases
            elif flight.outcome.exception() is None:
                self._looks.add(flight.outcome.result().look)
        self._flights.clear()
        freed = asyncio.wrap_future(on_thread(partial(_free, self._meter, frozenset(self._looks)), "gpu-use-free"))
        self._looks.clear()
        for watcher in self._watchers:
            watcher.bases.clear()
        await asyncio.wait([freed], timeout=_SETTLE_S)


def _measure(meter: Meter, gpu: GpuFacts, bases: frozenset[Look], spent: frozenset[Look]) -> _Measured:
    """Looks at a GPU, and computes the means since each base.

    Args:
        meter: reads it.
        gpu: the GPU.
        bases: the looks that intervals began with.
        spent: those of them that nobody needs any more afterwards; their buffers are given back.

    Raises:
        DriverError: the GPU does not answer.
    """
    try:
        look = meter.look(gpu)
        try:
            return _Measured(look, {base: dict(_means(meter, base, look)) for base in bases})
        except BaseException:
            _free(meter, [look])
            raise
    finally:
        _free(meter, spent)


def _means(meter: Meter, base: Look, look: Look) -> Iterable[tuple[Card, Means]]:
    for card, reading in look.readings.items():
        first = base.readings.get(card)
        if first is not None and first.gpm is not None and reading.gpm is not None:
            yield card, meter.means(first.gpm, reading.gpm)


def _free(meter: Meter, looks: Iterable[Look]) -> None:
    for look in looks:
        for sample in look.samples():
            try:
                meter.free(sample)
            except DriverError as error:
                _log.warning("the driver does not take a sample back", gpu=look.gpu_uuid, error=str(error))
