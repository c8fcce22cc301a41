"""Containers over the process runtime: whatever step fails, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from nodedaemon.answers import Mutations
from nodedaemon.attachments import Attachments
from nodedaemon.bundles import Bundles
from nodedaemon.container_leases import ContainerLeases
from nodedaemon.containers import Containers
from nodedaemon.devices import CardDevices
from nodedaemon.driver import Driver
from nodedaemon.driver_facts import Span
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.hotplug import LinkPlug
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.process_runtime import ProcessRuntime
from nodedaemon.process_user import ProcessUser
from nodedaemon.records import ContainerStage
from nodedaemon.recovery import Recovery
from nodedaemon.results import Results
from nodedaemon.runtime import ContainerSpec, ContainerStatus
from nodedaemon.slice_recovery import SliceRecovery
from nodedaemon.slices import Slices
from nodedaemon.workspace import Attempts
from puhui.rpc.bundle import pack_files
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import digest_of
from puhui.rpc.lease_clock import LeaseClock
from puhui.rpc.moment import duration
from puhui.v1.node_service_pb2 import (
    ContainerLimits,
    CreateContainerRequest,
    NodeServicePutBundleRequest,
    RemoveContainerRequest,
    RemoveContainerResponse,
)
from puhui.v1.stream_pb2 import BundleHeader

_OWNER = Owner("centre", "j-1", 1)
_FAULT = Refusal(grpc.StatusCode.INTERNAL, "RUNTIME_REFUSED", "as the test asked")


class FaultyRuntime(ProcessRuntime):
    """Fails once at the step that a test names, before or after doing it."""

    fault = ""
    """Steps, with commas between them."""

    def _fail(self, step: str) -> None:
        if step in self.fault:
            self.fault = self.fault.replace(step, "")
            raise _FAULT

    async def create(self, spec: ContainerSpec) -> str:
        self._fail("before create")
        container_id = await super().create(spec)
        if self.fault == "after create":
            await self.remove(container_id)  # as the seam promises
        self._fail("after create")
        return container_id

    async def start(self, container_id: str) -> ContainerStatus:
        self._fail("before start")
        status = await super().start(container_id)
        self._fail("after start")
        return status

    async def signal(self, container_id: str, signal: int) -> None:
        self._fail("before signal")
        await super().signal(container_id, signal)

    async def remove(self, container_id: str) -> None:
        self._fail("before remove")
        await super().remove(container_id)
        self._fail("after remove")


@dataclass
class Bench:
    """The containers of one daemon and what lies under them."""

    folder: Path
    journal: Journal
    events: EventLog
    gpus: Gpus
    slices: Slices
    runtime: FaultyRuntime
    containers: Containers
    results: Results
    bundle_id: str

    async def create(self, *command: str, owner: Owner = _OWNER, max_duration_s: float | None = None) -> None:
        request = CreateContainerRequest(
            command=command or ("python3", "main.py"),
            bundle_id=self.bundle_id,
            max_duration=duration(max_duration_s) if max_duration_s is not None else None,
        )
        await self.containers.create(owner, 1, request)

    async def ended(self, owner: Owner = _OWNER) -> None:
        ended = self.containers.ends.ended(owner)
        assert ended is not None
        await ended.wait()

    def require_nothing_left(self) -> None:
        assert self.journal.containers() == []
        assert list((self.folder / "processes").iterdir()) == []
        assert list((self.folder / "attempts").iterdir()) == []


@contextlib.asynccontextmanager
async def opened(
    folder: Path, fault: tuple[str, int] | None = None, python: str = sys.executable
) -> AsyncIterator[Bench]:
    with installed(EmulatedDriver(folder / "emulation", parse_cards("A30-24GB:1"))) as emulated:
        journal = Journal(folder / "node.db")
        events = EventLog(journal)
        gpus = Gpus(Driver(), emulated=True)
        slices = Slices(gpus, journal, events, changed=lambda: None)
        user = ProcessUser("me", os.geteuid(), os.getegid())
        runtime = FaultyRuntime(folder / "processes", user, "")
        bundles = Bundles(folder / "bundles")
        attempts = Attempts(folder / "attempts", user.uid, user.gid)
        cards = CardDevices(emulated.caps.directory, emulated.caps.minors_file, True)
        kind = runtime.describe().kind
        attachments = Attachments(
            journal, events, gpus, slices, attempts, cards, LinkPlug(), kind, changed=lambda: None
        )
        leases = ContainerLeases(LeaseClock(folder / "clock.json"), runtime, journal, folder / "leases", python)
        containers = Containers(
            runtime, journal, events, slices, bundles, attempts, cards, "image", attachments, leases
        )
        if fault is not None:
            emulated.faults.inject(*fault)
        await Recovery(journal, events, containers, runtime, SliceRecovery(journal, events, gpus, slices)).run()
        watching = asyncio.create_task(containers.ends.watch())
        archive = folder / "bundle.tar.gz"
        archive.write_bytes(pack_files({"main.py": b"print('hello')", "wait.py": b"import time; time.sleep(60)"}))
        header = BundleHeader(bundle_id=digest_of(archive), size_bytes=archive.stat().st_size)

        async def parts() -> AsyncIterator[NodeServicePutBundleRequest]:
            yield NodeServicePutBundleRequest(header=header)
            yield NodeServicePutBundleRequest(chunk=archive.read_bytes())

        await bundles.put(parts(), set)
        results = Results(journal, attempts, runtime, containers.ends.ended)
        yield Bench(folder, journal, events, gpus, slices, runtime, containers, results, header.bundle_id)
        await leases.close()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await runtime.close()
        journal.close()


async def test_a_process_runs_behind_the_same_seam(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await bench.create()
        await bench.ended()
        (container,) = bench.containers.describe_all()
        assert container.exit_code == 0
        chunks = bench.results.read_log(_OWNER, offset=0, tail_lines=0, follow=True)
        assert [chunk.data async for chunk in chunks] == [b"hello\n"]
        await bench.containers.remove(_OWNER, discard_results=True)
        bench.require_nothing_left()


@pytest.mark.parametrize("step", ["before create", "after create", "before start", "after start"])
async def test_a_creation_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path: Path, step: str) -> None:
    async with opened(tmp_path) as bench:
        bench.runtime.fault = step
        with pytest.raises(Refusal) as caught:
            await bench.create()
        assert caught.value is _FAULT
        bench.require_nothing_left()
        await bench.create()
        await bench.ended()
        await bench.containers.remove(_OWNER, discard_results=True)


async def test_a_roll_back_that_fails_is_made_good_at_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        bench.runtime.fault = "after start, before remove"
        with pytest.raises(Refusal):
            await bench.create("python3", "wait.py")
        (record,) = bench.journal.containers()
        assert record.stage is ContainerStage.CREATING
    async with opened(tmp_path) as bench:
        # It runs: that its start failed was not true. It is adopted, and its owner decides.
        (container,) = bench.containers.describe_all()
        assert container.pid > 0
        await bench.containers.stop(_OWNER, 0)
        await bench.containers.remove(_OWNER, discard_results=True)
        bench.require_nothing_left()


@pytest.mark.parametrize("step", ["before remove", "after remove"])
async def test_a_removal_that_fails_is_completed_by_the_next(tmp_path: Path, step: str) -> None:
    async with opened(tmp_path) as bench:
        await bench.create()
        await bench.ended()
        bench.runtime.fault = step
        with pytest.raises(Refusal):
            await bench.containers.remove(_OWNER, discard_results=True)
        await bench.containers.remove(_OWNER, discard_results=True)
        bench.require_nothing_left()


async def test_a_running_process_is_removed_with_all_it_started(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await bench.create("python3", "wait.py")
        (container,) = bench.containers.describe_all()
        await bench.containers.stop(_OWNER, 0)
        await bench.containers.remove(_OWNER, discard_results=True)
        assert not Path(f"/proc/{container.pid}").exists()
        bench.require_nothing_left()


async def test_a_time_limit_outlasts_a_runtime_that_refuses_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        bench.runtime.fault = "before signal"
        await bench.create("python3", "wait.py", max_duration_s=0.05)
        await bench.ended()
        (container,) = bench.containers.describe_all()
        assert container.timed_out
        await bench.containers.remove(_OWNER, discard_results=True)


async def test_what_does_not_end_does_not_hold_up_a_shutdown(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        mutations = Mutations(bench.journal)
        go = asyncio.Event()

        async def act(owner: Owner, token: int) -> RemoveContainerResponse:
            await go.wait()
            return RemoveContainerResponse()

        request = RemoveContainerRequest(owner=_OWNER.ref(7))
        calling = asyncio.create_task(mutations.carry_out(request, RemoveContainerResponse, act))
        await mutations.settle(0.01)
        await asyncio.sleep(0)
        await mutations.settle(0.01)
        assert not calling.done()
        go.set()
        await calling


async def test_a_second_container_for_an_attempt_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await bench.create()
        await bench.ended()
        await bench.containers.remove(_OWNER, discard_results=False)
        with pytest.raises(Refusal) as caught:
            await bench.create()
        assert caught.value.reason == "CONTAINER_EXISTS"
        await bench.containers.remove(_OWNER, discard_results=True)


async def test_another_request_for_the_same_attempt_is_not_answered_with_the_old_container(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await bench.create("python3", "wait.py")
        await bench.create("python3", "wait.py")  # the same, as after a crash that swallowed the answer
        for differs in (
            CreateContainerRequest(command=["other"]),
            CreateContainerRequest(env={"A": "1"}),
            CreateContainerRequest(image="other"),
            CreateContainerRequest(network=True),
            CreateContainerRequest(limits=ContainerLimits(cpus=1)),
        ):
            request = CreateContainerRequest(command=["python3", "wait.py"], bundle_id=bench.bundle_id)
            request.MergeFrom(differs)
            with pytest.raises(Refusal) as caught:
                await bench.containers.create(_OWNER, 2, request)
            assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, "CONTAINER_DIFFERS")
        await bench.containers.stop(_OWNER, 0)
        await bench.containers.remove(_OWNER, discard_results=True)


async def test_a_process_without_a_bundle_begins_in_an_empty_directory(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        request = CreateContainerRequest(command=["sh", "-c", "ls -A; echo $CUDA_VISIBLE_DEVICES; ls -A ~"])
        await bench.containers.create(_OWNER, 1, request)
        await bench.ended()
        chunks = bench.results.read_log(_OWNER, offset=0, tail_lines=0, follow=True)
        assert b"".join([chunk.data async for chunk in chunks]) == b"\ncode\noutputs\n"
        await bench.containers.remove(_OWNER, discard_results=True)
        bench.require_nothing_left()


async def test_a_container_that_has_ended_sees_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        gpu = (await bench.gpus.refresh())[0]
        one = await bench.slices.create(_OWNER, 1, gpu.uuid, "1g.6gb", Span(0, 1))
        request = CreateContainerRequest(command=["true"], slice_uuids=[one.uuid])
        made = await bench.containers.create(_OWNER, 1, request)
        assert list(made.slice_uuids) == [one.uuid]
        await bench.ended()
        (container,) = bench.containers.describe_all()
        assert list(container.slice_uuids) == []
        await bench.containers.remove(_OWNER, discard_results=True)
        await bench.slices.destroy(_OWNER, one.uuid, bench.containers.holder_of)


async def test_a_caller_that_leaves_does_not_stop_a_mutation(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        mutations = Mutations(bench.journal)
        begun, go = asyncio.Event(), asyncio.Event()
        done = []

        async def act(owner: Owner, token: int) -> RemoveContainerResponse:
            begun.set()
            await go.wait()
            done.append((owner, token))
            return RemoveContainerResponse()

        request = RemoveContainerRequest(owner=_OWNER.ref(7), request_id="r")
        calling = asyncio.create_task(mutations.carry_out(request, RemoveContainerResponse, act))
        await begun.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        go.set()
        await mutations.settle(10)
        assert done == [(_OWNER, 7)]
        # Whoever asks again is answered, and nothing is done twice.
        assert await mutations.carry_out(request, RemoveContainerResponse, act) == RemoveContainerResponse()
        assert len(done) == 1
        request.discard_results = True
        with pytest.raises(Refusal) as caught:
            await mutations.carry_out(request, RemoveContainerResponse, act)
        assert caught.value.reason == "REQUEST_ID_REUSED"
        request.owner.fencing_token = 6
        with pytest.raises(Refusal) as caught:
            await mutations.carry_out(request, RemoveContainerResponse, act)
        assert caught.value.reason == "STALE_FENCING_TOKEN"
