"""Leases over the process runtime, their files, and the keepers beside them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path

import grpc
import pytest

from nodedaemon.answers import Mutations
from nodedaemon.journal import Journal
from nodedaemon.lease_hold import KeeperFailedError, LeaseHold, ran_out
from nodedaemon.lease_keeper import LeaseFile
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.runtime import ExecSpec
from nodedaemon.suspension import living_container
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, timestamp
from puhui.v1.node_service_pb2 import CreateContainerRequest, RenewContainerLeaseRequest
from tests.unit.node.test_containers import Bench, opened

_OWNER = Owner("centre", "j-1", 1)


def _renew(bench: Bench, expire_time: float | None = None, token: int = 1) -> tuple[float, float | None]:
    """Returns the clock and the lease."""
    stamp = timestamp(expire_time) if expire_time is not None else None
    request = RenewContainerLeaseRequest(owner=_OWNER.ref(token), lease_expire_time=stamp)
    told = bench.containers.leases.renew(request, Mutations(bench.journal))
    lease = moment(told.lease_expire_time) if told.HasField("lease_expire_time") else None
    return moment(told.time), lease


async def _create(bench: Bench, lease_s: float | None, *command: str) -> None:
    end = timestamp(_renew(bench)[0] + lease_s) if lease_s is not None else None
    command = command or ("sleep", "600")
    await bench.containers.create(_OWNER, 1, CreateContainerRequest(command=command, lease_expire_time=end))


def _record(bench: Bench) -> ContainerRecord:
    record = bench.journal.container(_OWNER)
    assert record is not None
    return record


async def _dead(process: int) -> None:
    """Waits until a process has ended."""
    descriptor, over = os.pidfd_open(process), asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, over.set)
    try:
        async with asyncio.timeout(20):
            await over.wait()
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


def _read(path: Path) -> tuple[float, int, bool]:
    with contextlib.closing(LeaseFile(str(path))) as lease:
        return lease.read()


def _keeper(bench: Bench) -> int:
    return _read(bench.folder / "leases" / _record(bench).container_id)[1]


# The file -----------------------------------------------------------------------------------------------------


def test_a_lease_is_renewed_or_has_run_out_and_never_both(tmp_path: Path) -> None:
    daemon, keeper = LeaseFile(str(tmp_path / "c"), make=True), LeaseFile(str(tmp_path / "c"))
    assert daemon.read() == (0.0, 0, False)
    assert daemon.extend(100.0)
    keeper.note_keeper(77)
    assert daemon.extend(90.0)  # never shorter
    assert daemon.read() == keeper.read() == (100.0, 77, False)
    assert not keeper.run_out(99.9)
    assert daemon.extend(101.5)
    assert not keeper.run_out(100.5)
    assert not ran_out(tmp_path / "c")
    assert keeper.run_out(101.5)
    assert ran_out(tmp_path / "c")
    assert not daemon.extend(200.0)
    assert daemon.run_out(0.0)
    assert daemon.read() == (101.5, 77, True)
    daemon.close()
    keeper.close()


def test_a_file_that_is_not_there_tells_of_nothing(tmp_path: Path) -> None:
    assert not ran_out(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        LeaseFile(str(tmp_path / "c"))


def test_nobody_is_held_who_is_not_the_containers_first_process(tmp_path: Path) -> None:
    hold = LeaseHold(tmp_path / "process-abc", group=True)
    with subprocess.Popen(["sleep", "600"]) as other:
        with pytest.raises(KeeperFailedError, match="not a child"):
            hold.find(other.pid)
        assert not hold.kill()
        assert other.poll() is None
        other.kill()
        other.wait()
        assert not hold.find(other.pid)
    hold.remove()
    assert not (tmp_path / "process-abc").exists()


# The journal --------------------------------------------------------------------------------------------------


def test_leases_of_containers_that_never_came_are_forgotten_a_day_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "node.db")
    there, gone = Owner("c", "j-1", 1), Owner("c", "j-2", 1)
    with journal.atomic():
        assert journal.leases.extend(there, 50.0) == 50.0
        assert journal.leases.extend(there, 40.0) == 50.0
        journal.leases.extend(gone, 60.0)
        journal.put_container(ContainerRecord(there, 1, ContainerStage.RUNNING, "image", "", (), 1.0, 1.0))
        journal.leases.prune(55.0)
    assert journal.leases.get(there) == 50.0
    with journal.atomic():
        journal.leases.prune(61.0)
    assert (journal.leases.get(there), journal.leases.get(gone)) == (50.0, None)
    journal.close()


# Containers ---------------------------------------------------------------------------------------------------


async def test_a_process_dies_with_all_that_is_beside_it_when_its_lease_has_run_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await _create(bench, 1.0, "sh", "-c", "sleep 600 & sleep 600")
        record = _record(bench)
        beside = tmp_path / "beside"
        (beside / "exit").mkdir(parents=True)
        process = await bench.runtime.start_exec(record.container_id, ExecSpec(beside, ["sleep", "600"], {}))
        assert process is not None
        exec_pid = int((beside / "pid").read_text())
        await asyncio.gather(_dead(record.pid), _dead(exec_pid))
        process.close()
        await bench.ended()
        record = _record(bench)
        assert (record.stage, record.exit_code, record.lease_expired) == (ContainerStage.EXITED, 137, True)
        (container,) = bench.containers.describe_all()
        assert container.lease_expired
        with pytest.raises(Refusal) as caught:
            _renew(bench, _renew(bench)[0] + 60)
        assert caught.value.reason == "LEASE_EXPIRED"
        await bench.containers.remove(_OWNER, discard_results=True)
        bench.require_nothing_left()
        assert list((tmp_path / "leases").iterdir()) == []


async def test_nothing_is_begun_in_a_container_whose_lease_has_run_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await _create(bench, 60)
        record = bench.journal.put_container(ContainerRecord(**{**_record(bench).__dict__, "lease_expired": True}))
        with pytest.raises(Refusal) as caught:
            living_container(bench.journal, _OWNER)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED")
        with pytest.raises(Refusal) as caught:
            await bench.containers.suspension.resume(_OWNER)
        assert caught.value.reason == "LEASE_EXPIRED"
        with pytest.raises(Refusal) as caught:
            _renew(bench, _renew(bench)[0] + 90)
        assert caught.value.reason == "LEASE_EXPIRED"
        assert not bench.containers.describe_all()[0].lease_expired  # not before it has died of it
        await bench.containers.remove(record.owner, discard_results=True)


async def test_the_keeper_kills_without_the_daemon_and_the_next_one_tells_why(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await _create(bench, 1.0)
        record, keeper = _record(bench), _keeper(bench)
    await asyncio.gather(_dead(record.pid), _dead(keeper))
    async with opened(tmp_path) as bench:
        await bench.ended()
        assert _record(bench).lease_expired
        await bench.containers.remove(_OWNER, discard_results=True)
        bench.require_nothing_left()


async def test_a_keeper_that_is_killed_is_replaced_and_the_daemon_kills_in_any_case(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await _create(bench, 60)
        first = _keeper(bench)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(20):
            while (second := _keeper(bench)) == first:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.01)
        record = _record(bench)
    # A daemon that finds no keeper and cannot start one still kills at the end of the lease.
    os.kill(second, signal.SIGKILL)
    async with opened(tmp_path, python="/bin/false") as bench:
        assert _record(bench).stage is ContainerStage.RUNNING
        await bench.containers.stop(_OWNER, 0)
        assert not _record(bench).lease_expired
        assert _record(bench).container_id == record.container_id
        await bench.containers.remove(_OWNER, discard_results=True)


async def test_a_daemon_without_keepers_still_kills(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await _create(bench, 2.0)
        keeper = _keeper(bench)
        pid = _record(bench).pid
    os.kill(keeper, signal.SIGKILL)
    async with opened(tmp_path, python="/bin/false") as bench:
        await _dead(pid)
        await bench.ended()
        assert _record(bench).lease_expired
        await bench.containers.remove(_OWNER, discard_results=True)


async def test_a_lease_clock_that_began_anew_gives_a_container_no_more_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as bench:
        await _create(bench, 60)
        record = _record(bench)
        path = tmp_path / "leases" / record.container_id
        deadline, keeper, _ = _read(path)
    with contextlib.closing(Journal(tmp_path / "node.db")) as journal, journal.atomic():
        journal.leases.extend(_OWNER, 4e9)  # as if the lease clock had gone back
    async with opened(tmp_path) as bench:
        assert _read(path)[:2] == (deadline, keeper)
    path.unlink()
    async with opened(tmp_path) as bench:
        assert _read(path)[0] > deadline
        await bench.containers.stop(_OWNER, 0)
        await bench.containers.remove(_OWNER, discard_results=True)


async def test_a_container_that_nothing_would_hold_is_not_left_running(tmp_path: Path) -> None:
    async with opened(tmp_path, python="/bin/false") as bench:
        with pytest.raises(Refusal) as caught:
            await _create(bench, 60)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INTERNAL, "LEASE_NOT_KEPT")
        bench.require_nothing_left()
        assert list((tmp_path / "leases").iterdir()) == []
        # The attempt has its lease still: a container that asks for none is not made to run for ever.
        with pytest.raises(Refusal) as caught:
            await _create(bench, None)
        assert caught.value.reason == "LEASE_NOT_KEPT"
        bench.require_nothing_left()
