"""Utilization as a control plane watches it: a real daemon, real processes that hold slices, and cards that fail."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pynvml
import pytest

from nodedaemon.emulation import Fault, Latency, Operator
from puhui.rpc.channel import open_channel
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import duration
from puhui.v1.node_service_pb2 import (
    UtilizationSample,
    UtilizationSource,
    WatchUtilizationRequest,
    WatchUtilizationResponse,
)
from tests.daemons import Daemon, daemon, open_folder
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import CARDS
from tests.integration.node.hands import cut_by_hand, driver_of

_GPM = UtilizationSource.UTILIZATION_SOURCE_GPM
_PROCESSES = UtilizationSource.UTILIZATION_SOURCE_PROCESSES
_UNAVAILABLE = UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE
_OFTEN = 100_000
_BURNS = "import sys; held = open(sys.argv[1]); print('holds', flush=True)\nwhile True: pass"
_WAITS = "import sys; held = open(sys.argv[1]); print('holds', flush=True); sys.stdin.read()"


@pytest.fixture
def state() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder / "state"


@pytest.fixture
def serving(state: Path) -> Iterator[Daemon]:
    arguments = ["--listen", "127.0.0.1:0", "--state", str(state), "--emulate", CARDS, "--runtime", "process"]
    with daemon("nodedaemon", arguments, state.parent / "node.log") as running:
        yield running


@pytest.fixture
async def node(serving: Daemon) -> AsyncIterator[Node]:
    async with open_channel(serving.address) as channel:
        yield Node(channel, new_id("centre"))


@pytest.fixture
def operator(node: Node, state: Path) -> Operator:
    return Operator.of_existing(state / "emulation")


@contextlib.contextmanager
def holder(operator: Operator, uuid: str, code: str) -> Iterator[None]:
    """A process that holds a slice, as a program that computes on it does."""
    command = [sys.executable, "-c", code, str(operator.cap_node(uuid))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"holds\n"
            yield
        finally:
            process.kill()


async def watch(node: Node, *uuids: str, interval_s: float = 0.2) -> AsyncGenerator[WatchUtilizationResponse, None]:
    request = WatchUtilizationRequest(interval=duration(interval_s), uuids=uuids)
    call = node.stub.WatchUtilization(request, timeout=30)
    try:
        async for response in call:
            yield response
    finally:
        call.cancel()  # what is only dropped would go on until its deadline


async def sampled(
    node: Node, uuid: str, wanted: Callable[[UtilizationSample], bool], interval_s: float = 0.2
) -> UtilizationSample:
    """Waits for a sample of a card like this."""
    async with contextlib.aclosing(samples(node, uuid, interval_s=interval_s)) as watched:
        async for sample in watched:
            if wanted(sample):
                return sample
    raise AssertionError("the watch ended")


async def samples(node: Node, *uuids: str, interval_s: float = 0.2) -> AsyncGenerator[UtilizationSample, None]:
    async with contextlib.aclosing(watch(node, *uuids, interval_s=interval_s)) as responses:
        async for response in responses:
            for sample in response.samples:
                yield sample


async def test_who_computes_is_busy_by_the_best_source_of_each_gpu(node: Node, operator: Operator) -> None:
    owner = node.attempt()
    hopper = await node.cut(owner, gpu=0, name="hopper")
    ampere = await node.cut(owner, gpu=1, name="ampere")
    with holder(operator, hopper.uuid, _BURNS), holder(operator, ampere.uuid, _BURNS):
        busy = await sampled(node, hopper.uuid, lambda one: one.engine_percent > 10)
        assert (busy.source, busy.processes, busy.emulated) == (_GPM, 1, True)
        assert busy.multiprocessor_percent > 0
        assert 100 <= busy.interval.ToMilliseconds() < 5000
        held = await sampled(node, ampere.uuid, lambda one: one.processes == 1)
        assert held.source == _PROCESSES
        # No figure where the driver has none: presence says busy, not how busy.
        assert not held.HasField("engine_percent")
        assert not held.HasField("interval")


async def test_an_idle_holder_is_there_and_uses_nothing(node: Node, operator: Operator) -> None:
    one = await node.cut(node.attempt())
    with holder(operator, one.uuid, _WAITS):
        idle = await sampled(node, one.uuid, lambda sample: sample.HasField("engine_percent"))
        assert (idle.source, idle.processes) == (_GPM, 1)
        assert idle.engine_percent < 5
        assert idle.HasField("memory_used_mib")


async def test_what_cannot_be_read_is_unavailable_with_a_reason_and_never_idle(node: Node, operator: Operator) -> None:
    one = await node.cut(node.attempt())
    with holder(operator, one.uuid, _BURNS):
        async with contextlib.aclosing(samples(node, one.uuid)) as watched:
            await anext(watched)
            for function, code in (
                ("nvmlGpmMigSampleGet", pynvml.NVML_ERROR_UNKNOWN),
                ("nvmlDeviceGetMigMode", pynvml.NVML_ERROR_GPU_IS_LOST),
                ("nvmlGpmMetricsGet", pynvml.NVML_ERROR_UNKNOWN),
            ):
                operator.inject(Fault(function, code, count=_OFTEN))
                silent = await _until(watched, lambda sample: sample.source == _UNAVAILABLE)
                assert silent.notice, function
                assert not silent.HasField("engine_percent")
                operator.clear_faults()
                back = await _until(watched, lambda sample: sample.source == _GPM)
                assert (back.notice, back.processes) == ("", 1)


async def test_without_permission_presence_stands_in_and_says_so(node: Node, operator: Operator) -> None:
    one = await node.cut(node.attempt())
    operator.inject(Fault("nvmlGpmMigSampleGet", pynvml.NVML_ERROR_NO_PERMISSION, count=_OFTEN))
    free = await sampled(node, one.uuid, lambda sample: True)
    assert (free.source, free.processes) == (_PROCESSES, 0)
    assert "nvidia-cap2" in free.notice
    operator.inject(Fault("nvmlDeviceGetComputeRunningProcesses", pynvml.NVML_ERROR_NO_PERMISSION, count=_OFTEN))
    unknown = await sampled(node, one.uuid, lambda sample: sample.source == _UNAVAILABLE)
    assert "processes" in unknown.notice


async def test_a_gpu_that_hangs_is_told_of_and_delays_nobody_else(node: Node, operator: Operator) -> None:
    hopper, ampere = [gpu.uuid for gpu in (await node.inventory()).gpus]
    operator.inject(Fault("nvmlDeviceGetMigMode", delay_seconds=6, gpu=0))
    heard: dict[str, list[UtilizationSample]] = {hopper: [], ampere: []}
    async with contextlib.aclosing(samples(node, interval_s=0.2)) as watched:
        async for sample in watched:
            heard[sample.uuid].append(sample)
            if sample.uuid == hopper and sample.source == _GPM:
                break
    assert heard[hopper][0].source == _UNAVAILABLE
    assert "has not answered for" in heard[hopper][0].notice
    times = [sample.time.ToMilliseconds() for sample in heard[ampere]]
    # The delay is 6 s; it would be a gap in those of the other GPU.
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 3000


async def test_slices_come_and_go_and_foreign_ones_are_told_of(node: Node, state: Path) -> None:
    owner = node.attempt()
    hopper = (await node.inventory()).gpus[0].uuid
    async with contextlib.aclosing(watch(node)) as responses:
        await anext(responses)
        one = await node.cut(owner)
        await _round(responses, lambda uuids: one.uuid in uuids)
        await node.destroy(owner, one)
        await _round(responses, lambda uuids: hopper in uuids and one.uuid not in uuids)
        with driver_of(state) as driver:
            _, _, foreign = cut_by_hand(driver, hopper, "1g.10gb", 3)
        await _round(responses, lambda uuids: foreign in uuids)


async def test_who_asks_for_one_slice_is_told_of_no_other(node: Node) -> None:
    owner = node.attempt()
    first = await node.cut(owner)
    await node.cut(node.attempt(), start=2)
    async with contextlib.aclosing(watch(node, first.uuid)) as responses:
        for _ in range(3):
            assert [sample.uuid for sample in (await anext(responses)).samples] == [first.uuid]


@pytest.mark.parametrize("interval_s", [0.0, 0.099, 60.001, -1.0])
async def test_an_interval_out_of_range_is_refused_with_the_range(node: Node, interval_s: float) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INTERVAL_INVALID") as refusal:
        await anext(watch(node, interval_s=interval_s))
    assert "100 ms to 60 s" in refusal.message


async def test_one_message_holds_a_round_at_the_shortest_interval(node: Node) -> None:
    one = await node.cut(node.attempt())
    gpus = {gpu.uuid for gpu in (await node.inventory()).gpus}
    whole = 0
    async with contextlib.aclosing(watch(node, interval_s=0.1)) as responses:
        for _ in range(10):
            response = await anext(responses)
            uuids = [sample.uuid for sample in response.samples]
            assert len(uuids) == len(set(uuids))
            assert set(uuids) <= {*gpus, one.uuid}
            whole += set(uuids) == {*gpus, one.uuid}
    # A GPU that takes longer than the rest may come in a message of its own, but not as a rule.
    assert whole >= 5


async def test_watchers_that_leave_make_room_for_others(node: Node) -> None:
    async with contextlib.AsyncExitStack() as watches:
        await asyncio.gather(*(watches.enter_async_context(_admitted(node)) for _ in range(64)))
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_LIMIT"):
            await anext(watch(node, interval_s=60))
    async with contextlib.AsyncExitStack() as watches:
        await asyncio.gather(*(watches.enter_async_context(_admitted(node)) for _ in range(64)))


async def test_the_watch_ends_when_the_daemon_stops(node: Node, serving: Daemon) -> None:
    async with contextlib.aclosing(watch(node)) as responses:
        await anext(responses)
        stopping = asyncio.get_running_loop().run_in_executor(None, serving.stop)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in responses:
                pass
        assert await stopping == 0
    assert "Traceback" not in serving.log.read_text()


async def test_the_daemon_stops_though_a_gpu_hangs(node: Node, operator: Operator, serving: Daemon) -> None:
    async with contextlib.aclosing(watch(node, interval_s=0.1)) as responses:
        await anext(responses)
        operator.set_latency(Latency(by_function_seconds={"nvmlDeviceGetMigMode": 600}))
        await _round_of(responses, _UNAVAILABLE)
        assert await asyncio.get_running_loop().run_in_executor(None, serving.stop) == 0


async def _until(
    watched: AsyncIterator[UtilizationSample], wanted: Callable[[UtilizationSample], bool]
) -> UtilizationSample:
    async for sample in watched:
        if wanted(sample):
            return sample
    raise AssertionError("the watch ended")


async def _round(responses: AsyncIterator[WatchUtilizationResponse], wanted: Callable[[set[str]], bool]) -> None:
    async for response in responses:
        if wanted({sample.uuid for sample in response.samples}):
            return
    raise AssertionError("the watch ended")


async def _round_of(responses: AsyncIterator[WatchUtilizationResponse], source: UtilizationSource.ValueType) -> None:
    async for response in responses:
        if any(sample.source == source for sample in response.samples):
            return
    raise AssertionError("the watch ended")


@contextlib.asynccontextmanager
async def _admitted(node: Node) -> AsyncIterator[None]:
    """A watch, begun as soon as the daemon has noticed that earlier ones have left."""
    while True:
        async with contextlib.aclosing(watch(node, interval_s=60)) as responses:
            try:
                await anext(responses)
            except grpc.aio.AioRpcError as error:
                if Refusal.of(error).reason != "WATCHER_LIMIT":
                    raise
                continue
            yield
            return
