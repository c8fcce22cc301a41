"""What containers see agrees with the journal again, wherever the daemon is cut short."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest

from nodedaemon.attachments import Attachments
from nodedaemon.checkpoint import Process
from nodedaemon.devices import CardDevices
from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Span
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.runtime import Mount
from nodedaemon.slices import Slices
from nodedaemon.workspace import Attempts
from puhui.rpc.errors import Refusal
from puhui.v1.card_pb2 import Slice, SliceState
from puhui.v1.node_pb2 import NodeEvent, RuntimeKind

_OWNER = Owner("centre", "j-1", 1)
_REFUSED = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "HOTPLUG_UNAVAILABLE", "as the test asked")


class CrashError(BaseException):
    """The daemon is gone: nothing of it runs on, not even what cleans up."""


@dataclass
class FakePlug:
    """Shows nodes by remembering them, as the kernel does over the end of a daemon."""

    seen: dict[str, Path] = field(default_factory=dict)
    """What the container sees."""
    busy: list[int] = field(default_factory=list)
    """Who holds something."""
    faults: list[BaseException | None] = field(default_factory=list)
    """What each next call meets; None goes well."""
    late: bool = False
    """Whether faults strike after the call has done its work."""

    def _meet(self) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, CrashError):
            self.faults = [fault] * 100
        if fault is not None:
            raise fault

    def place(self, folder: Path) -> str:
        return "/dev/nvidia-caps"

    async def prepare(self, folder: Path, nodes: Mapping[str, Path]) -> list[Mount]:
        self.seen = dict(nodes)
        return []

    async def show(self, folder: Path, nodes: Mapping[str, Path], pid: int) -> bool:
        if not self.late:
            self._meet()
        changed = self.seen != nodes
        self.seen = dict(nodes)
        if self.late:
            self._meet()
        return changed

    async def holders(self, pid: int, files: Collection[Path]) -> list[int]:
        self._meet()
        assert all(file.exists() for file in files)
        return self.busy

    async def signal(self, pid: int, number: int, processes: Collection[Process] | None) -> list[int]:
        return sorted(one.pid for one in processes or ())

    async def close(self) -> None:
        pass


@dataclass
class Bench:
    """The attachments of one daemon, and what lies under them."""

    journal: Journal
    gpus: Gpus
    slices: Slices
    attachments: Attachments
    plug: FakePlug
    emulated: EmulatedDriver

    async def cut(self, start: int) -> Slice:
        gpu = (await self.gpus.refresh())[0]
        return await self.slices.create(_OWNER, 1, gpu.uuid, "1g.6gb", Span(start, 1))

    def begin(self, *slices: Slice, stage: ContainerStage = ContainerStage.RUNNING) -> None:
        """Writes down a container that sees these slices."""
        self.journal.put_container(
            ContainerRecord(
                owner=_OWNER,
                token=1,
                stage=stage,
                image="image",
                bundle_id="bundle",
                slice_uuids=tuple(one.uuid for one in slices),
                stop_grace_s=1,
                create_time=1,
                container_id="c" * 64,
                pid=os.getpid(),
            )
        )

    def attached(self) -> tuple[str, ...]:
        record = self.journal.container(_OWNER)
        assert record is not None
        return record.slice_uuids

    def require_agreement(self) -> None:
        """What is seen is what the journal says."""
        wanted = [self.slices.book.owned(_OWNER, uuid) for uuid in self.attached()]
        assert self.plug.seen == self.attachments.nodes.require(wanted)

    def told(self) -> list[NodeEvent]:
        return [NodeEvent.FromString(message) for _, message in self.journal.events(0, 1000)]

    def reasons(self) -> list[str]:
        return [event.reason for event in self.told() if event.reason != "SLICE_CREATED"]


@contextlib.contextmanager
def opened(folder: Path, plug: FakePlug) -> Iterator[Bench]:
    with installed(EmulatedDriver(folder / "emulation", parse_cards("A30-24GB:1"))) as emulated:
        journal = Journal(folder / "node.db")
        events = EventLog(journal)
        driver = Driver()
        gpus = Gpus(driver, emulated=True)
        slices = Slices(gpus, journal, events, changed=lambda: None)
        attempts = Attempts(folder / "attempts", os.geteuid(), os.getegid())
        cards = CardDevices(emulated.caps.directory, emulated.caps.minors_file, True)
        kind = RuntimeKind.RUNTIME_KIND_PODMAN
        attachments = Attachments(journal, events, gpus, slices, attempts, cards, plug, kind, changed=lambda: None)
        yield Bench(journal, gpus, slices, attachments, plug, emulated)
        driver.close()
        journal.close()


async def test_attached_and_detached_and_told_once(tmp_path: Path) -> None:
    with opened(tmp_path, FakePlug()) as bench:
        one, two = await bench.cut(0), await bench.cut(1)
        bench.begin()
        for _ in range(2):
            container = await bench.attachments.attach(_OWNER, one.uuid)
            assert list(container.slice_uuids) == [one.uuid]
            bench.require_agreement()
        assert list((await bench.attachments.attach(_OWNER, two.uuid)).slice_uuids) == [one.uuid, two.uuid]
        for _ in range(2):
            assert list((await bench.attachments.detach(_OWNER, one.uuid)).slice_uuids) == [two.uuid]
            bench.require_agreement()
        assert bench.reasons() == ["SLICE_ATTACHED", "SLICE_ATTACHED", "SLICE_DETACHED"]
        states = [event.slice.state for event in bench.told()[2:]]
        assert states == [SliceState.SLICE_STATE_ACTIVE] * 2 + [SliceState.SLICE_STATE_IDLE]


@pytest.mark.parametrize("late", [False, True], ids=["before it is shown", "after it is shown"])
@pytest.mark.parametrize("crash", [False, True], ids=["refused", "crashed"])
async def test_an_attach_that_fails_changes_nothing_and_one_cut_short_is_completed(
    tmp_path: Path, late: bool, crash: bool
) -> None:
    plug = FakePlug(late=late)
    with opened(tmp_path, plug) as bench:
        one, two = await bench.cut(0), await bench.cut(1)
        bench.begin()
        await bench.attachments.attach(_OWNER, one.uuid)
        plug.faults = [CrashError() if crash else _REFUSED]
        with pytest.raises(CrashError if crash else Refusal):
            await bench.attachments.attach(_OWNER, two.uuid)
        if not crash:
            assert bench.attached() == (one.uuid,)
            bench.require_agreement()
            assert bench.reasons() == ["SLICE_ATTACHED"]
    plug.faults = []
    with opened(tmp_path, plug) as bench:
        await bench.attachments.restore()
        bench.require_agreement()
        # Whoever repeats the request after the crash gets what it asked for.
        await bench.attachments.attach(_OWNER, two.uuid)
        assert bench.attached() == (one.uuid, two.uuid)
        bench.require_agreement()


@pytest.mark.parametrize("good", range(3), ids=["hiding", "looking for holders", "after both"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
async def test_a_detach_that_is_cut_short_anywhere_agrees_after_the_restart(
    tmp_path: Path, good: int, late: bool
) -> None:
    plug = FakePlug(late=late)
    with opened(tmp_path, plug) as bench:
        one = await bench.cut(0)
        bench.begin()
        await bench.attachments.attach(_OWNER, one.uuid)
        plug.faults = [*[None] * good, CrashError()]
        with contextlib.suppress(CrashError):
            await bench.attachments.detach(_OWNER, one.uuid)
    plug.faults = []
    with opened(tmp_path, plug) as bench:
        await bench.attachments.restore()
        bench.require_agreement()
        await bench.attachments.detach(_OWNER, one.uuid)
        assert plug.seen == {}


async def test_a_slice_that_is_held_is_shown_again_and_the_holder_is_named(tmp_path: Path) -> None:
    with opened(tmp_path, FakePlug()) as bench:
        one = await bench.cut(0)
        bench.begin()
        await bench.attachments.attach(_OWNER, one.uuid)
        bench.plug.busy = [os.getpid()]
        with pytest.raises(Refusal, match=rf"process {os.getpid()} \(.+\) in container {'c' * 12}") as caught:
            await bench.attachments.detach(_OWNER, one.uuid)
        assert (caught.value.reason, caught.value.metadata["container_id"]) == ("SLICE_IN_USE", "c" * 64)
        bench.require_agreement()
        assert bench.attached() == (one.uuid,)
        bench.plug.busy = []
        await bench.attachments.detach(_OWNER, one.uuid)


async def test_unknown_holders_are_not_taken_for_none(tmp_path: Path) -> None:
    unknown = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "HOLDERS_UNKNOWN", "process 7 cannot be seen")
    with opened(tmp_path, FakePlug()) as bench:
        one = await bench.cut(0)
        bench.begin(one)
        bench.plug.faults = [None, unknown]
        with pytest.raises(Refusal) as caught:
            await bench.attachments.detach(_OWNER, one.uuid)
        assert caught.value is unknown
        bench.require_agreement()


async def test_the_open_files_decide_when_the_driver_does_not_name_holders(tmp_path: Path) -> None:
    with opened(tmp_path, FakePlug()) as bench:
        one = await bench.cut(0)
        bench.begin(one)
        for busy in ([os.getpid()], []):
            bench.plug.busy = busy
            bench.emulated.faults.inject("nvmlDeviceGetComputeRunningProcesses", 4)
            with pytest.raises(Refusal, match="held by process") if busy else contextlib.nullcontext():
                await bench.attachments.detach(_OWNER, one.uuid)
        assert bench.attached() == ()


async def test_slices_that_vanish_are_taken_out_and_what_is_left_is_shown(tmp_path: Path) -> None:
    with opened(tmp_path, FakePlug()) as bench:
        one, two, three = await bench.cut(0), await bench.cut(1), await bench.cut(2)
        bench.begin(one, two, three)
        await bench.attachments.restore()
        bench.slices.on_vanished = bench.attachments.let_go
        for gone in (one, two):
            # Both are gone for the driver before anybody notices the first.
            bench.gpus.driver.destroy_compute_instance(gone.gpu_uuid, gone.gpu_instance_id, gone.compute_instance_id)
            bench.gpus.driver.destroy_gpu_instance(gone.gpu_uuid, gone.gpu_instance_id)
        for gone in (one, two):
            record = bench.journal.slice(gone.uuid)
            assert record is not None
            await bench.slices.drop(record, "somebody else destroyed it")
        assert bench.attached() == (three.uuid,)
        bench.require_agreement()
        assert bench.reasons() == ["ATTACHMENTS_RESTORED", *["SLICE_VANISHED"] * 4]


async def test_a_vanished_slice_that_cannot_be_taken_out_stays_written_down(tmp_path: Path) -> None:
    with opened(tmp_path, FakePlug()) as bench:
        one = await bench.cut(0)
        bench.begin(one)
        bench.slices.on_vanished = bench.attachments.let_go
        bench.plug.faults = [_REFUSED]
        record = bench.journal.slice(one.uuid)
        assert record is not None
        await bench.slices.drop(record, "somebody else destroyed it")
        assert bench.attached() == (one.uuid,)
        await bench.slices.drop(record, "somebody else destroyed it")
        assert bench.attached() == ()


async def test_what_cannot_be_restored_is_told_and_holds_up_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, FakePlug(faults=[_REFUSED])) as bench:
        bench.begin(await bench.cut(0))
        await bench.attachments.restore()
        assert bench.reasons() == ["HOTPLUG_UNAVAILABLE"]


@pytest.mark.parametrize("stage", [ContainerStage.CREATING, ContainerStage.EXITED, ContainerStage.REMOVED])
async def test_only_a_living_container_can_be_changed(tmp_path: Path, stage: ContainerStage) -> None:
    with opened(tmp_path, FakePlug()) as bench:
        one = await bench.cut(0)
        bench.begin(one, stage=stage)
        for change in (bench.attachments.attach, bench.attachments.detach):
            with pytest.raises(Refusal) as caught:
                await change(_OWNER, one.uuid)
            assert caught.value.reason == "CONTAINER_NOT_RUNNING"
        await bench.attachments.restore()
        assert bench.plug.seen == {}
        (described,) = await bench.slices.book.describe_all(foreign=False)
        assert described.state == SliceState.SLICE_STATE_IDLE


async def test_an_end_meanwhile_is_not_undone(tmp_path: Path) -> None:
    class EndingPlug(FakePlug):
        async def show(self, folder: Path, nodes: Mapping[str, Path], pid: int) -> bool:
            record = bench.journal.container(_OWNER)
            assert record is not None
            bench.journal.put_container(replace(record, stage=ContainerStage.EXITED, exit_code=0))
            raise _REFUSED

    with opened(tmp_path, EndingPlug()) as bench:
        one = await bench.cut(0)
        bench.begin()
        with pytest.raises(Refusal):
            await bench.attachments.attach(_OWNER, one.uuid)
        record = bench.journal.container(_OWNER)
        assert record is not None
        assert (record.stage, record.slice_uuids) == (ContainerStage.EXITED, ())
