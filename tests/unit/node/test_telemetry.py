"""One sampler for all watchers: what it keeps, whom it waits for, and what it gives back."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pynvml
import pytest

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import DriverError, GpuFacts, Mig
from nodedaemon.emulation import EmulatedDriver, Fault, installed, parse_cards
from nodedaemon.gpm import Gpm, GpmSample, Means
from nodedaemon.telemetry import Telemetry
from nodedaemon.utilization import Card, Look, Reading
from nodedaemon.utilization_meter import DriverMeter
from nodedaemon.utilization_watcher import Watcher
from puhui.rpc.errors import Refusal
from puhui.v1.node_service_pb2 import UtilizationSample, UtilizationSource

_GPM = UtilizationSource.UTILIZATION_SOURCE_GPM
_UNAVAILABLE = UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE


class _Cards:
    emulated = True

    def __init__(self, count: int) -> None:
        self.found = [GpuFacts(f"GPU-{n}", n, n, "model", 80 * 1024, "", Mig.ENABLED) for n in range(count)]

    def every(self) -> list[GpuFacts]:
        return self.found


class _CountingMeter:
    """Reads nothing, keeps count of its samples, and hangs or fails on demand."""

    def __init__(self) -> None:
        self.open: set[GpmSample] = set()
        self.made = 0
        self.failing: dict[str, Exception] = {}
        self.hanging: dict[str, threading.Event] = {}
        self.strange_means = False
        self._lock = threading.Lock()

    def look(self, gpu: GpuFacts) -> Look:
        if gpu.uuid in self.hanging:
            self.hanging[gpu.uuid].wait()
        if gpu.uuid in self.failing:
            raise self.failing[gpu.uuid]
        sample = GpmSample(object())
        with self._lock:
            self.open.add(sample)
            self.made += 1
        card = Card(gpu.uuid)
        return Look(gpu.uuid, {card: Reading(card, time.monotonic(), time.time(), processes=0, gpm=sample)})

    def means(self, first: GpmSample, second: GpmSample) -> Means:
        if self.strange_means:
            raise ZeroDivisionError
        assert {first, second} <= self.open
        return Means(1.0, 1.0)

    def free(self, sample: GpmSample) -> None:
        with self._lock:
            self.open.remove(sample)


@contextlib.asynccontextmanager
async def sampling(
    meter: _CountingMeter | DriverMeter, gpus: _Cards, patience_s: float = 3.0
) -> AsyncIterator[Telemetry]:
    telemetry = Telemetry(gpus, meter, patience_s=patience_s)
    task = asyncio.create_task(telemetry.run())
    try:
        yield telemetry
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_every_sample_is_given_back_also_under_faults() -> None:
    meter = _CountingMeter()
    async with sampling(meter, _Cards(2)) as telemetry:
        for trouble in (None, DriverError("nvmlGpmSampleGet", pynvml.NVML_ERROR_GPU_IS_LOST, "lost"), OSError("odd")):
            meter.failing = {"GPU-0": trouble} if trouble else {}
            fast, slow = telemetry.watch(0.1, ()), telemetry.watch(0.25, ())
            async with contextlib.aclosing(fast), contextlib.aclosing(slow):
                for _ in range(4):
                    await anext(fast)
                sources = {one.uuid: one.source for one in (await anext(fast)).samples}
                await anext(slow)
            assert telemetry.watchers == 0
            if trouble:
                assert sources.get("GPU-0", _UNAVAILABLE) == _UNAVAILABLE
            # A base for each watcher and a look under way, for each GPU, is the most there can be.
            assert len(meter.open) <= 2 * 3
    assert meter.made > 10
    assert not meter.open


async def test_what_goes_wrong_unexpectedly_is_told_and_does_not_end_the_sampler() -> None:
    meter = _CountingMeter()
    meter.strange_means = True
    async with sampling(meter, _Cards(1)) as telemetry, contextlib.aclosing(telemetry.watch(0.1, ())) as watch:
        await anext(watch)
        sample = (await anext(watch)).samples[0]
        assert sample.source == _UNAVAILABLE
        assert "ZeroDivisionError" in sample.notice
        meter.strange_means = False
        async for response in watch:
            if response.samples[0].source == _GPM:
                break
    assert not meter.open


async def test_a_gpu_that_hangs_delays_no_other_and_is_told_of() -> None:
    meter = _CountingMeter()
    release = meter.hanging["GPU-0"] = threading.Event()
    async with sampling(meter, _Cards(2), patience_s=0.2) as telemetry:
        heard: list[UtilizationSample] = []
        async with contextlib.aclosing(telemetry.watch(0.1, ())) as watch:
            async for response in watch:
                heard += response.samples
                if sum(one.uuid == "GPU-0" for one in heard) == 3:
                    break
        silent = [one for one in heard if one.uuid == "GPU-0"]
        assert all(one.source == _UNAVAILABLE and "has not answered" in one.notice for one in silent)
        assert sum(one.uuid == "GPU-1" for one in heard) >= 3
        release.set()
    assert not meter.open


async def test_a_sampler_that_ends_does_not_wait_for_a_gpu_that_hangs() -> None:
    meter = _CountingMeter()
    release = meter.hanging["GPU-0"] = threading.Event()
    async with (
        sampling(meter, _Cards(2), patience_s=0.2) as telemetry,
        contextlib.aclosing(telemetry.watch(0.1, ("GPU-0",))) as watch,
    ):
        assert (await anext(watch)).samples[0].source == _UNAVAILABLE
    release.set()


async def test_nobody_watches_more_than_the_limit_and_leaving_makes_room() -> None:
    async with sampling(_CountingMeter(), _Cards(1)) as telemetry, contextlib.AsyncExitStack() as stack:
        watches = [telemetry.watch(60, ()) for _ in range(64)]
        for watch in watches:
            await stack.enter_async_context(contextlib.aclosing(watch))
            await anext(watch)
        with pytest.raises(Refusal) as refused:
            await anext(telemetry.watch(60, ()))
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_LIMIT")
        await watches[0].aclose()
        async with contextlib.aclosing(telemetry.watch(60, ())) as watch:
            assert (await anext(watch)).samples


async def test_watchers_of_different_intervals_share_looks() -> None:
    meter = _CountingMeter()
    async with sampling(meter, _Cards(1)) as telemetry:
        fast, slow = telemetry.watch(0.1, ()), telemetry.watch(0.5, ())
        async with contextlib.aclosing(fast), contextlib.aclosing(slow):
            await anext(slow)
            looks = 0
            seen = asyncio.create_task(anext(slow))
            while not seen.done():
                await anext(fast)
                looks += 1
            assert meter.made <= looks + 2
            assert (await seen).samples[0].interval.ToMilliseconds() >= 200


async def test_a_reader_that_is_slow_loses_the_oldest_and_is_told_how_many() -> None:
    watcher = Watcher(0.1, frozenset())
    for number in range(1000):
        watcher.put([UtilizationSample(uuid=str(number)), UtilizationSample(uuid="other")])
    watcher.close()
    rounds = []
    while (response := await watcher.take()) is not None:
        rounds.append((response.samples[0].uuid, response.dropped_samples))
    assert rounds == [("996", 2 * 996), ("997", 0), ("998", 0), ("999", 0)]


@pytest.fixture
def emulated(tmp_path: Path) -> Iterator[EmulatedDriver]:
    with installed(EmulatedDriver(tmp_path / "emulation", parse_cards("H100-80GB-SXM5:1"))) as driver:
        yield driver


@pytest.mark.parametrize(
    "function", ["nvmlGpmSampleGet", "nvmlGpmMigSampleGet", "nvmlGpmMetricsGet", "nvmlDeviceGetUUID"]
)
def test_the_driver_gets_all_buffers_back(emulated: EmulatedDriver, function: str) -> None:
    driver = Driver()
    gpu = driver.gpus()[0]
    profile = next(one for one in driver.profiles(gpu.uuid) if one.compute_slices == 1)
    for span in profile.placements[:2]:
        gi = driver.create_gpu_instance(gpu.uuid, profile.profile_id, span)
        driver.create_compute_instance(gpu.uuid, gi, 1)
    meter, gpm = DriverMeter(), Gpm()
    for code in (pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_INVALID_ARGUMENT):
        for skip in range(3):
            emulated.faults.add(Fault(function, code, skip=skip))
            with contextlib.suppress(DriverError):
                first = meter.look(gpu)
                samples = first.samples()
                assert len(emulated.samples) == len(samples)
                if len(samples) > 1:
                    gpm.means(samples[0], samples[0])
                for sample in samples:
                    meter.free(sample)
            emulated.faults.clear()
            assert len(emulated.samples) == 0
    driver.close()
