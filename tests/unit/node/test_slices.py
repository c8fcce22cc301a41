"""The slice allocator on the emulated driver: whatever call fails, nothing is left behind and nothing is shared."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pynvml
import pytest

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Span
from nodedaemon.emulation import EmulatedDriver, Fault, When, installed, parse_cards
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.host import boot_id
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import SliceRecord, SliceStage
from nodedaemon.slice_recovery import SliceRecovery
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import SliceState
from puhui.v1.node_pb2 import NodeEvent

_OWNER = Owner("centre", "j-1", 1)


class FillingJournal(Journal):
    """A journal whose disk can be full."""

    full = False

    def _write(self, statement: str, values: Iterable[Any]) -> sqlite3.Cursor:
        if self.full:
            raise OSError(errno.ENOSPC, "the disk of the node daemon's state is full")
        return super()._write(statement, values)


@dataclass
class Bench:
    """The allocator and what lies under it."""

    emulated: EmulatedDriver
    driver: Driver
    journal: FillingJournal
    events: EventLog
    gpus: Gpus
    slices: Slices
    gpu: str

    async def create(self, owner: Owner = _OWNER, profile: str = "3g.40gb", start: int = 4, size: int = 4) -> str:
        return (await self.slices.create(owner, 1, self.gpu, profile, Span(start, size))).uuid

    async def destroy(self, uuid: str, owner: Owner = _OWNER) -> None:
        await self.slices.destroy(owner, uuid, lambda _: None)

    def recovery(self) -> SliceRecovery:
        return SliceRecovery(self.journal, self.events, self.gpus, self.slices)

    def reasons(self) -> list[str]:
        return [NodeEvent.FromString(message).reason for _, message in self.journal.events(0, 100)]

    def intended(self, profile_id: int) -> SliceRecord:
        """Returns what is written down before a 3g.40gb is made at 4."""
        return SliceRecord(
            id=0,
            owner=_OWNER,
            token=1,
            gpu_uuid=self.gpu,
            profile="3g.40gb",
            profile_id=profile_id,
            span=Span(4, 4),
            memory_mib=40448,
            stage=SliceStage.CREATING,
            create_time=0,
            boot_id=boot_id(),
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    emulated = EmulatedDriver(tmp_path / "emulation", parse_cards("H100-80GB-SXM5:1"))
    with installed(emulated):
        driver = Driver()
        journal = FillingJournal(tmp_path / "node.db")
        events = EventLog(journal)
        gpus = Gpus(driver, emulated=True)
        slices = Slices(gpus, journal, events, changed=lambda: None, release_s=0.2)
        yield Bench(emulated, driver, journal, events, gpus, slices, driver.gpus()[0].uuid)
        gpus.close()
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
    (shown,) = await bench.slices.book.describe_all(foreign=True)
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
        with pytest.raises(Refusal, match="puhui-nodedaemon emulation mig 0 on") as caught:
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


@pytest.mark.parametrize(
    "function",
    ["nvmlDeviceGetGpuInstances", "nvmlGpuInstanceGetComputeInstances", "nvmlDeviceGetMigDeviceHandleByIndex"],
)
async def test_lists_that_lag_behind_mislead_nobody(bench: Bench, function: str) -> None:
    bench.emulated.faults.add(Fault(function, count=2, stale=True))
    uuid = await bench.create()
    assert [compute.uuid for one in bench.driver.instances(bench.gpu) for compute in one.compute_instances] == [uuid]
    bench.emulated.faults.add(Fault(function, count=2, stale=True))
    # What the list hides keeps the GPU instance in use for a moment.
    await bench.destroy(uuid)
    assert bench.driver.instances(bench.gpu) == []
    assert bench.journal.slices() == []


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        "nvmlGpuInstanceCreateComputeInstance",
        "nvmlComputeInstanceDestroy",
        "nvmlGpuInstanceDestroy",
    ],
)
async def test_a_lost_answer_leaves_nothing_behind(bench: Bench, function: str) -> None:
    """The driver did it, and says that it failed."""
    bench.emulated.faults.add(Fault(function, pynvml.NVML_ERROR_UNKNOWN, when=When.AFTER))
    try:
        uuid = await bench.create()
    except Refusal:
        uuid = ""
    else:
        with pytest.raises(Refusal, match="refused"):
            await bench.destroy(uuid)
        await bench.destroy(uuid)
    assert bench.driver.instances(bench.gpu) == []
    assert bench.journal.slices() == []
    await bench.destroy(await bench.create())


async def test_what_could_not_be_destroyed_is_tried_again_and_told_once(bench: Bench) -> None:
    uuid = await bench.create()
    recovery = bench.recovery()
    (instance,) = bench.driver.instances(bench.gpu)
    with bench.emulated.caps.path(3 + 9 * instance.id + 1).open("rb"):
        with pytest.raises(Refusal, match="as soon as that ends"):
            await bench.destroy(uuid)
        for _ in range(3):
            await recovery.look()
        (shown,) = await bench.slices.book.describe_all(foreign=True)
        assert shown.state == SliceState.SLICE_STATE_ERROR
    await recovery.look()
    assert bench.driver.instances(bench.gpu) == []
    assert bench.reasons() == ["SLICE_CREATED", "SLICE_IN_USE", "SLICE_DESTROYED"]


async def test_a_slice_destroyed_by_hand_is_noticed_and_its_place_is_free(bench: Bench) -> None:
    uuid = await bench.create()
    (instance,) = bench.driver.instances(bench.gpu)
    bench.driver.destroy_compute_instance(bench.gpu, instance.id, 0)
    bench.driver.destroy_gpu_instance(bench.gpu, instance.id)
    await bench.recovery().look()
    assert bench.journal.slices() == []
    assert bench.reasons() == ["SLICE_CREATED", "SLICE_VANISHED"]
    assert await bench.create() != uuid


async def test_the_id_of_a_vanished_slice_is_given_only_once_its_container_sees_it_no_more(bench: Bench) -> None:
    uuid = await bench.create()
    (instance,) = bench.driver.instances(bench.gpu)
    bench.driver.destroy_compute_instance(bench.gpu, instance.id, 0)
    bench.driver.destroy_gpu_instance(bench.gpu, instance.id)
    seen = [uuid]

    async def hide(record: SliceRecord) -> None:
        if record.uuid in seen:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "HOTPLUG_UNAVAILABLE", "it cannot be reached")

    bench.slices.on_vanished = hide
    with pytest.raises(Refusal, match="still sees the nodes"):
        await bench.create(Owner("centre", "j-2", 1))
    assert bench.driver.instances(bench.gpu) == []
    seen.clear()
    assert await bench.create(Owner("centre", "j-2", 1))
    assert [record.owner.job_id for record in bench.journal.slices()] == ["j-2"]


@pytest.mark.parametrize("shown", [False, True])
async def test_what_somebody_made_where_the_daemon_was_about_to_is_not_taken(bench: Bench, shown: bool) -> None:
    """The daemon died between writing down what it meant to make and making it, and somebody was there first."""
    profile = next(one for one in bench.driver.profiles(bench.gpu) if one.name == "3g.40gb")
    bench.journal.add_slice(bench.intended(profile.profile_id))
    gi = bench.driver.create_gpu_instance(bench.gpu, profile.profile_id, Span(4, 4))
    if not shown:  # the list does not show their compute instance at first
        bench.emulated.faults.add(Fault("nvmlGpuInstanceGetComputeInstances", count=6, stale=True))
    bench.driver.create_compute_instance(bench.gpu, gi, profile.compute_slices)
    await bench.recovery().run()
    bench.emulated.faults.clear()
    theirs = bench.driver.instance(bench.gpu, gi)
    assert theirs is not None
    assert len(theirs.compute_instances) == 1
    assert bench.journal.slices() == []


async def test_a_full_disk_loses_no_slice(bench: Bench) -> None:
    bench.journal.full = True
    with pytest.raises(OSError, match="disk"):
        await bench.create()
    bench.journal.full = False
    assert bench.driver.instances(bench.gpu) == []
    uuid = await bench.create()
    bench.journal.full = True
    with pytest.raises(OSError, match="disk"):
        await bench.destroy(uuid)
    bench.journal.full = False
    await bench.destroy(uuid)
    assert bench.driver.instances(bench.gpu) == []


async def test_a_gpu_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    slow = "nvmlDeviceGetGpuInstances"
    with installed(EmulatedDriver(tmp_path / "emulation", parse_cards("A30-24GB:2"))) as emulated:
        driver = Driver()
        journal = Journal(tmp_path / "node.db")
        gpus = Gpus(driver, emulated=True, patience_s=0.1)
        events = EventLog(journal)
        slices = Slices(gpus, journal, events, changed=lambda: None)
        first, second = (gpu.uuid for gpu in driver.gpus())
        made = await slices.create(_OWNER, 1, first, "1g.6gb", Span(0, 1))
        emulated.faults.add(Fault(slow, delay_seconds=2.0, gpu=0))
        recovery = SliceRecovery(journal, events, gpus, slices)
        await recovery.look()
        (doubtful,) = journal.slices()
        assert (doubtful.uuid, doubtful.stage) == (made.uuid, SliceStage.ACTIVE)
        assert "does not answer" in doubtful.notice
        assert (await slices.create(_OWNER, 1, second, "1g.6gb", Span(0, 1))).uuid
        gpus.close()
        journal.close()
        driver.close()


async def test_a_slice_that_was_half_destroyed_by_hand_is_hidden_before_it_is_taken_apart(bench: Bench) -> None:
    uuid = await bench.create()
    (instance,) = bench.driver.instances(bench.gpu)
    bench.driver.destroy_compute_instance(bench.gpu, instance.id, 0)
    seen, hidden = True, []

    async def hide(record: SliceRecord) -> None:
        if seen:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "HOTPLUG_UNAVAILABLE", "it cannot be reached")
        hidden.append(record.uuid)

    bench.slices.on_vanished = hide
    await bench.recovery().look()
    assert len(bench.driver.instances(bench.gpu)) == 1, "its place was given free while a container saw its nodes"
    seen = False
    await bench.recovery().look()
    assert hidden == [uuid]
    assert bench.driver.instances(bench.gpu) == []


async def test_one_end_of_a_slice_is_told_once(bench: Bench) -> None:
    uuid = await bench.create()
    (instance,) = bench.driver.instances(bench.gpu)
    bench.driver.destroy_compute_instance(bench.gpu, instance.id, 0)
    bench.driver.destroy_gpu_instance(bench.gpu, instance.id)

    async def slowly(_: SliceRecord) -> None:
        await asyncio.sleep(0)

    bench.slices.on_vanished = slowly
    record = bench.journal.slice(uuid)
    assert record is not None
    await asyncio.gather(*(bench.slices.drop(record, "somebody else destroyed it") for _ in range(3)))
    assert bench.reasons() == ["SLICE_CREATED", "SLICE_VANISHED"]


async def test_looks_at_the_same_time_share_one_thread_per_gpu(bench: Bench) -> None:
    bench.emulated.faults.add(Fault("nvmlDeviceGetMigMode", count=1, delay_seconds=0.2))
    calls_before = threading.active_count()
    looks = [asyncio.create_task(bench.gpus.refresh()) for _ in range(20)]
    await asyncio.sleep(0.05)
    # One for the survey, one for the GPU.
    assert threading.active_count() <= calls_before + 2
    await asyncio.gather(*looks)
