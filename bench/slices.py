"""What the node daemon adds to a slice: CreateSlice and DestroySlice over gRPC against the bare NVML calls.

The baseline makes and destroys the same slice with pynvml alone, in this process, on emulated cards of its own with
zero latency, in turn with the daemon's. It does what a script would: a GPU instance at a place, its full-width
compute instance, the UUID of the MIG device, and both destroyed again. The daemon journals, checks that the place is
free, verifies what the driver made, tells an event, and answers over gRPC.

Then one GPU's rate against four GPUs' at once, with a driver that takes 100 ms for each create and each destroy.

    python -m bench.slices [--json] [--rounds 300]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml

from bench.node import NodeDaemon, node_daemon
from bench.report import Aim, Figure, Report, quantile
from nodedaemon.emulation import EmulatedDriver, Latency, installed, parse_cards
from nodedaemon.emulation.operator import Operator
from puhui.rpc.channel import open_channel
from puhui.rpc.identity import new_id
from puhui.v1.card_pb2 import AttemptRef, Placement
from puhui.v1.node_service_pb2 import CreateSliceRequest, DestroySliceRequest, GetNodeRequest
from puhui.v1.node_service_pb2_grpc import NodeServiceStub

if TYPE_CHECKING:
    from puhui.v1.node_service_pb2_grpc import NodeServiceAsyncStub

CARDS = "H100-80GB-SXM5:4"
PROFILE = "3g.40gb"
START, SIZE = 4, 4
WARM_UP = 10
LATENCY_S = 0.1
SLOW_ROUNDS = 10
SLOW = ("nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlGpuInstanceDestroy")


@dataclass
class Times:
    """How long each create and each destroy took, in milliseconds."""

    created: list[float]
    destroyed: list[float]

    @property
    def whole(self) -> list[float]:
        """A create and its destroy together."""
        return [a + b for a, b in zip(self.created, self.destroyed, strict=True)]


@contextmanager
def bare() -> Iterator[Callable[[], tuple[float, float]]]:
    """Yields what makes and destroys a slice with pynvml alone, and says how long each took."""
    with tempfile.TemporaryDirectory() as folder, installed(EmulatedDriver(Path(folder), parse_cards(CARDS))):
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        profile = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, pynvml.NVML_GPU_INSTANCE_PROFILE_3_SLICE)
        shared = pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
        whole = pynvml.NVML_COMPUTE_INSTANCE_PROFILE_3_SLICE

        def run() -> tuple[float, float]:
            begun = time.perf_counter()
            place = pynvml.c_nvmlGpuInstancePlacement_t(START, SIZE)
            instance = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profile.id, byref(place))
            full = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, whole, shared)
            compute = pynvml.nvmlGpuInstanceCreateComputeInstance(instance, full.id)
            uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0))
            made = time.perf_counter()
            pynvml.nvmlComputeInstanceDestroy(compute)
            pynvml.nvmlGpuInstanceDestroy(instance)
            gone = time.perf_counter()
            if not str(uuid).startswith("MIG-"):
                raise RuntimeError(f"the slice has no UUID: {uuid}")
            return (made - begun) * 1000, (gone - made) * 1000

        try:
            yield run
        finally:
            pynvml.nvmlShutdown()


class Slices:
    """Makes and destroys slices through the daemon."""

    def __init__(self, node: NodeServiceAsyncStub) -> None:
        self._node = node

    async def gpus(self) -> list[str]:
        """Returns the UUIDs of the node's GPUs."""
        return [gpu.uuid for gpu in (await self._node.GetNode(GetNodeRequest())).node.gpus]

    async def run(self, gpu: str) -> tuple[float, float]:
        """Makes and destroys one slice, each time for another attempt, and says how long each took."""
        name = new_id("j")
        owner = AttemptRef(centre="bench", job_id=name, attempt=1, fencing_token=1)
        begun = time.perf_counter()
        made = await self._node.CreateSlice(
            CreateSliceRequest(
                owner=owner,
                gpu_uuid=gpu,
                profile=PROFILE,
                placement=Placement(start=START, size=SIZE),
                request_id=f"{name}/create",
            )
        )
        there = time.perf_counter()
        request = DestroySliceRequest(owner=owner, slice_uuid=made.slice.uuid, request_id=f"{name}/destroy")
        await self._node.DestroySlice(request)
        gone = time.perf_counter()
        return (there - begun) * 1000, (gone - there) * 1000


async def against_bare(node: NodeDaemon, rounds: int) -> tuple[Times, Times]:
    """Returns the times of the daemon and of the bare calls, taken in turn."""
    daemon, alone = Times([], []), Times([], [])
    async with open_channel(node.address) as channel:
        slices = Slices(NodeServiceStub(channel))
        gpu = (await slices.gpus())[0]
        with bare() as run_bare:
            for number in range(WARM_UP + rounds):
                # In turn, so that a machine that changes its speed changes it for both.
                pairs = [(daemon, await slices.run(gpu)), (alone, run_bare())]
                for times, (created, destroyed) in pairs if number >= WARM_UP else []:
                    times.created.append(created)
                    times.destroyed.append(destroyed)
    return daemon, alone


async def rate(node: NodeDaemon, gpus: int) -> float:
    """Returns how many slices per second are made and destroyed on this many GPUs at once, one at a time on each."""
    async with open_channel(node.address) as channel:
        slices = Slices(NodeServiceStub(channel))
        uuids = (await slices.gpus())[:gpus]

        async def one_after_another(uuid: str) -> None:
            for _ in range(SLOW_ROUNDS):
                await slices.run(uuid)

        begun = time.perf_counter()
        await asyncio.gather(*(one_after_another(uuid) for uuid in uuids))
        return SLOW_ROUNDS * len(uuids) / (time.perf_counter() - begun)


async def measure(rounds: int) -> Report:
    """Measures and reports."""
    with node_daemon(CARDS) as node:
        daemon, alone = await against_bare(node, rounds)
    with node_daemon(CARDS) as node:
        Operator(node.state / "emulation").set_latency(Latency(by_function_seconds=dict.fromkeys(SLOW, LATENCY_S)))
        one, four = await rate(node, 1), await rate(node, 4)
    added = {
        "create": (daemon.created, alone.created),
        "destroy": (daemon.destroyed, alone.destroyed),
        "both": (daemon.whole, alone.whole),
    }
    figures = [
        Figure(f"{name}_added_p{round(share * 100)}_ms", quantile(with_daemon, share) - quantile(without, share), "ms")
        for name, (with_daemon, without) in added.items()
        for share in (0.5, 0.99)
    ]
    # Of the two calls that a slice takes, the one to which more is added.
    slice_added = max(
        figure.value for figure in figures if figure.name in ("create_added_p50_ms", "destroy_added_p50_ms")
    )
    return Report(
        bench="slices",
        figures=[
            *figures,
            Figure("slice_daemon_p50_ms", statistics.median(daemon.whole), "ms"),
            Figure("slice_bare_p50_ms", statistics.median(alone.whole), "ms"),
            Figure("slice_p50_ratio", statistics.median(daemon.whole) / statistics.median(alone.whole), "ratio"),
            Figure("slices_per_second_per_gpu", 1000 * len(daemon.whole) / sum(daemon.whole), "1/s"),
            Figure("bare_slices_per_second_per_gpu", 1000 * len(alone.whole) / sum(alone.whole), "1/s"),
            Figure("slow_slices_per_second_1gpu", one, "1/s"),
            Figure("slow_slices_per_second_4gpu", four, "1/s"),
            Figure("rounds", len(daemon.whole), "count"),
        ],
        aims=[
            Aim("slice_added_p50_ms", slice_added, 3, "lower"),
            Aim("slice_scaling_4gpu", four / one, 3, "higher"),
        ],
        versions={"driver": "emulated"},
        notes=[
            "Cards are emulated. slice_added is what one call of the daemon takes beyond the bare NVML calls, gRPC on "
            "loopback included: that of CreateSlice or of DestroySlice, whichever is more. both_added is their sum.",
            f"slow: {LATENCY_S * 1000:g} ms of driver latency for each create and each destroy of a GPU instance.",
        ],
    )


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description="What the node daemon adds to a slice.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=300, help="measured pairs")
    options = parser.parse_args()
    asyncio.run(measure(options.rounds)).show(options.json)


if __name__ == "__main__":
    main()
