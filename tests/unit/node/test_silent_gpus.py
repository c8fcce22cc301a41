"""A GPU that does not answer, or only in part, spoils nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Mig, Span
from nodedaemon.emulation import EmulatedDriver, Fault, installed, parse_cards
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.inventory import Inventory, Revision
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.process_runtime import ProcessRuntime
from nodedaemon.process_user import ProcessUser
from nodedaemon.records import SliceStage
from nodedaemon.slices import Slices
from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import MigMode
from tests.unit.node.test_containers import opened

_OWNER = Owner("centre", "j-1", 1)
_LOST = pynvml.NVML_ERROR_GPU_IS_LOST


@pytest.fixture
def emulated(tmp_path: Path) -> Iterator[EmulatedDriver]:
    with installed(EmulatedDriver(tmp_path / "emulation", parse_cards("A30-24GB:2"))) as driver:
        yield driver


@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetMigMode"])
async def test_a_lost_gpu_is_shown_with_a_notice_and_the_other_goes_on(
    emulated: EmulatedDriver, tmp_path: Path, function: str
) -> None:
    emulated.faults.add(Fault(function, _LOST, gpu=0))
    journal = Journal(tmp_path / "node.db")
    gpus = Gpus(Driver(), emulated=True)
    slices = Slices(gpus, journal, EventLog(journal), changed=lambda: None)
    runtime = ProcessRuntime(tmp_path / "processes", ProcessUser("me", os.geteuid(), os.getegid()), "")
    inventory = Inventory("node-1", "n-1", gpus, slices, runtime, Revision())
    emulated.faults.add(Fault(function, _LOST, gpu=0))
    lost, well = (await inventory.read()).gpus
    assert lost.mig_mode == MigMode.MIG_MODE_UNSPECIFIED
    assert "does not answer" in lost.notice
    assert lost.uuid
    assert not lost.profiles
    assert (well.mig_mode, well.notice) == (MigMode.MIG_MODE_ENABLED, "")
    # It comes back without a restart.
    assert [gpu.notice for gpu in (await inventory.read()).gpus] == ["", ""]
    journal.close()


def test_memory_that_may_not_be_read_is_that_of_the_largest_profile(emulated: EmulatedDriver) -> None:
    driver = Driver()
    emulated.faults.inject("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NO_PERMISSION)
    first, second = driver.gpus()
    assert first.mig is second.mig is Mig.ENABLED
    assert 0.9 * second.memory_mib < first.memory_mib <= second.memory_mib
    driver.close()


async def test_a_slice_on_a_silent_gpu_is_in_doubt_and_not_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        gpu = (await bench.gpus.refresh())[0].uuid
        one = await bench.slices.create(_OWNER, 1, gpu, "1g.6gb", Span(0, 1))
    async with opened(tmp_path, fault=("nvmlDeviceGetGpuInstances", _LOST)) as bench:
        (record,) = bench.journal.slices()
        assert (record.uuid, record.stage) == (one.uuid, SliceStage.ACTIVE)
        assert "does not answer" in record.notice
    async with opened(tmp_path) as bench:
        assert [one.uuid for one in bench.journal.slices()] == [one.uuid]


async def test_a_start_survives_a_gpu_of_the_journal_that_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        gpu = (await bench.gpus.refresh())[0].uuid
        await bench.slices.create(_OWNER, 1, gpu, "1g.6gb", Span(0, 1))
        (record,) = bench.journal.slices()
        bench.journal.update_slice(replace(record, stage=SliceStage.DESTROYED))
        bench.journal.add_slice(replace(record, id=0, uuid="MIG-gone", gpu_uuid="GPU-gone"))
    async with opened(tmp_path) as bench:
        assert bench.journal.slices() == []
        with pytest.raises(Refusal):
            bench.slices.book.owned(_OWNER, "MIG-gone")
