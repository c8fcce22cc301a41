"""The slice allocator on the emulated driver: whatever call fails, nothing is left behind and nothing is shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pynvml
import pytest

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Span
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.journal import Journal, SliceStage
from nodedaemon.owner import Owner
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import SliceState

_OWNER = Owner("centre", "j-1", 1)


@dataclass
class Bench:
    """The allocator and what lies under it."""

    emulated: EmulatedDriver
    driver: Driver
    journal: Journal
    slices: Slices
    gpu: str

    async def create(self, owner: Owner = _OWNER, profile: str = "3g.40gb", start: int = 4, size: int = 4) -> str:
        return (await self.slices.create(owner, 1, self.gpu, profile, Span(start, size))).uuid

    async def destroy(self, uuid: str, owner: Owner = _OWNER) -> None:
        await self.slices.destroy(owner, uuid, lambda _: None)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    emulated = EmulatedDriver(tmp_path / "emulation", parse_cards("H100-80GB-SXM5:1"))
    with installed(emulated):
        driver = Driver()
        journal = Journal(tmp_path / "node.db")
        gpus = Gpus(driver, emulated=True)
        slices = Slices(gpus, journal, EventLog(journal), changed=lambda: None, release_s=0.2)
        yield Bench(emulated, driver, journal, slices, driver.gpus()[0].uuid)
        journal.close()
        driver.close()


# Every call of a creation that can fail, and how it is told.
@pytest.mark.parametrize(
    ("function", "code", "reason"),
    [
        ("nvmlDeviceCreateGpuInstanceWithPlacement", pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES, "PLACEMENT_TAKEN"),
        ("nvmlDeviceCreateGpuInstanceWithPlacement", pynvml.NVML_ERROR_NO_PERMISSION, "DRIVER_PERMISSION"),
        ("nvmlDeviceCreateGpuInstanceWithPlacement", pynvml.NVML_ERROR_UNKNOWN, "DRIVER_REFUSED"),
        ("nvmlGpuInstanceGetInfo", pynvml.NVML_ERROR_UNKNOWN, "DRIVER_REFUSED"),
        ("nvmlDeviceGetGpuInstanceById", pynvml.NVML_ERROR_UNKNOWN, "DRIVER_REFUSED"),
        ("nvmlGpuInstanceCreateComputeInstance", pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES, "PLACEMENT_TAKEN"),
        ("nvmlGpuInstanceCreateComputeInstance", pynvml.NVML_ERROR_UNKNOWN, "DRIVER_REFUSED"),
        ("nvmlComputeInstanceGetInfo", pynvml.NVML_ERROR_UNKNOWN, "DRIVER_REFUSED"),
        ("nvmlDeviceGetUUID", pynvml.NVML_ERROR_GPU_IS_LOST, "DRIVER_REFUSED"),
    ],
)
async def test_a_creation_that_fails_is_rolled_back(bench: Bench, function: str, code: int, reason: str) -> None:
    bench.emulated.faults.inject(function, code)
    with pytest.raises(Refusal) as caught:
        await bench.create()
    assert caught.value.reason == reason
    bench.emulated.faults.clear()
    assert bench.driver.instances(bench.gpu) == []
    assert bench.journal.slices() == []
    await bench.destroy(await bench.create())


async def test_what_cannot_be_rolled_back_is_shown_and_removed_by_the_next_create(bench: Bench) -> None:
    bench.emulated.faults.inject("nvmlGpuInstanceCreateComputeInstance", pynvml.NVML_ERROR_UNKNOWN)
    bench.emulated.faults.inject("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(Refusal):
        await bench.create()
    (shown,) = await bench.slices.describe_all(foreign=True)
    assert shown.state == SliceState.SLICE_STATE_ERROR
    uuid = await bench.create(Owner("centre", "j-2", 1), "1g.10gb", 5, 1)
    assert [record.uuid for record in bench.journal.slices()] == [uuid]
    assert len(bench.driver.instances(bench.gpu)) == 1


async def test_the_holder_of_a_slice_is_named(bench: Bench) -> None:
    uuid = await bench.create()
    (instance,) = bench.driver.instances(bench.gpu)
    held = os.open(bench.emulated.caps.path(3 + 9 * instance.id + 1), os.O_RDONLY)
    try:
        with pytest.raises(Refusal) as caught:
            await bench.destroy(uuid)
    finally:
        os.close(held)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SLICE_IN_USE")
    assert f"process {os.getpid()} (" in caught.value.message
    (record,) = bench.journal.slices()
    assert (record.stage, record.notice) == (SliceStage.ERROR, caught.value.message)
    await bench.destroy(uuid)
    assert bench.driver.instances(bench.gpu) == []


async def test_a_destroy_that_stops_half_way_is_completed_by_the_next(bench: Bench) -> None:
    uuid = await bench.create()
    bench.emulated.faults.inject("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(Refusal, match="refused"):
        await bench.destroy(uuid)
    await bench.destroy(uuid)
    assert bench.driver.instances(bench.gpu) == []
    await bench.destroy(uuid)


async def test_a_card_without_mig_says_how_to_enable_it(tmp_path: Path) -> None:
    emulated = EmulatedDriver(tmp_path / "emulation", parse_cards("H100-80GB-SXM5:1"), mig_enabled=False)
    with installed(emulated):
        driver = Driver()
        journal = Journal(tmp_path / "node.db")
        slices = Slices(Gpus(driver, emulated=True), journal, EventLog(journal), changed=lambda: None)
        gpu = driver.gpus()[0].uuid
        with pytest.raises(Refusal, match="nvidia-smi -i 0 -mig 1") as caught:
            await slices.create(_OWNER, 1, gpu, "3g.40gb", Span(0, 4))
        assert caught.value.reason == "MIG_DISABLED"
        # The operator does so: no restart is needed.
        pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(0), 1)
        assert (await slices.create(_OWNER, 1, gpu, "3g.40gb", Span(0, 4))).uuid
        journal.close()
        driver.close()


async def test_who_holds_a_slice_may_stay_unnamed(bench: Bench) -> None:
    uuid = await bench.create()
    bench.emulated.faults.inject("nvmlComputeInstanceDestroy", pynvml.NVML_ERROR_IN_USE, 100)
    bench.emulated.faults.inject("nvmlDeviceGetComputeRunningProcesses", pynvml.NVML_ERROR_NO_PERMISSION, 100)
    with pytest.raises(Refusal, match="a process that the driver does not name") as caught:
        await bench.destroy(uuid)
    assert caught.value.reason == "SLICE_IN_USE"
    (record,) = bench.journal.slices()
    assert (record.stage, record.notice) == (SliceStage.ERROR, caught.value.message)
    bench.emulated.faults.clear()
    await bench.destroy(uuid)
