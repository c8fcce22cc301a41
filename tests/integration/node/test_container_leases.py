"""Containers die when their leases have run out, also while the daemon is dead, and at no other time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from nodedaemon.frozen import processes_in_namespace
from nodedaemon.lease_keeper import LeaseFile
from puhui.rpc.identity import new_id
from puhui.rpc.moment import moment, timestamp
from puhui.v1.card_pb2 import AttemptRef
from puhui.v1.node_pb2 import Container, ContainerState, NodeEvent
from puhui.v1.node_service_pb2 import (
    CreateContainerRequest,
    RenewContainerLeaseRequest,
    RenewContainerLeaseResponse,
)
from tests.integration.node.client import Node, refused
from tests.integration.node.conftest import Start, containers_of
from tests.integration.node.exec_call import Exec, request_id, run
from tests.integration.node.test_restart import connected
from tests.integration.node.test_suspend import resume, states, suspend

pytestmark = pytest.mark.podman

_SLEEPS = ["sleep", "600"]


async def renew(node: Node, owner: AttemptRef, expire_time: float | None = None) -> RenewContainerLeaseResponse:
    stamp = timestamp(expire_time) if expire_time is not None else None
    return await node.stub.RenewContainerLease(RenewContainerLeaseRequest(owner=owner, lease_expire_time=stamp))


async def clock(node: Node, owner: AttemptRef) -> float:
    """Returns the node's lease clock."""
    return moment((await renew(node, owner)).time)


async def leased(node: Node, lease_s: float, owner: AttemptRef | None = None) -> tuple[AttemptRef, Container, float]:
    """Makes a container with a lease. Returns the attempt, the container, and when it is to die (monotonic clock)."""
    owner = owner or node.attempt()
    at = await clock(node, owner)
    request = CreateContainerRequest(owner=owner, command=_SLEEPS, lease_expire_time=timestamp(at + lease_s))
    dies = time.monotonic() + lease_s
    return owner, (await node.stub.CreateContainer(request)).container, dies


@contextlib.contextmanager
def watched(container: Container) -> Iterator[int]:
    """A descriptor of the container's first process."""
    descriptor = os.pidfd_open(container.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def ended(descriptor: int, limit_s: float = 20) -> float:
    """Waits until a process has ended. Returns when, on this test's clock."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        async with asyncio.timeout(limit_s):
            await over.wait()
        return time.monotonic()
    finally:
        loop.remove_reader(descriptor)


def keeper_of(home: Path, container: Container) -> int:
    lease = LeaseFile(str(home / "node" / "leases" / container.id))
    try:
        return lease.read()[1]
    finally:
        lease.close()


def require_expired(event: NodeEvent) -> None:
    assert event.reason == "LEASE_EXPIRED"
    assert event.container.lease_expired
    assert not event.container.timed_out
    assert event.container.exit_code == 128 + signal.SIGKILL


async def test_a_container_dies_when_its_lease_has_run_out(node: Node, state: Path) -> None:
    owner, container, dies = await leased(node, 2.5)
    with watched(container) as init:
        async with Exec(node, owner, ["sh", "-c", "echo up; sleep 600"], request_id=request_id()) as call:
            await call.until(b"up\n")
            inside = processes_in_namespace(container.pid)
            assert len(inside) >= 3
            at = await ended(init)
    assert -0.05 < at - dies < 1
    require_expired(await node.exited(owner))
    assert states(container) == []
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"):
        await renew(node, owner, await clock(node, owner) + 60)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING"):
        await run(node, owner, "true")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING"):
        await resume(node, owner)
    assert list((state / "leases").iterdir()) == []


async def test_the_keeper_kills_while_the_daemon_is_dead(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner, container, dies = await leased(node, 3)
            keeper = os.pidfd_open(keeper_of(home, container))
        first.kill()
    with watched(container) as init:
        at = await ended(init)
    assert -0.05 < at - dies < 1
    await ended(keeper)
    os.close(keeper)
    with start() as second:
        async with connected(second, centre) as node:
            require_expired(await node.exited(owner))
            await node.clear()
    assert containers_of(centre) == []
    assert list((home / "node" / "leases").iterdir()) == []


async def another_keeper(home: Path, container: Container, before: int) -> int:
    """Waits until another keeper stays with a container than before; nothing tells of it."""
    async with asyncio.timeout(20):
        while (keeper := keeper_of(home, container)) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return keeper


async def test_a_restarted_daemon_takes_the_keeper_over_and_replaces_it_when_it_dies(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner, container, _ = await leased(node, 12)
            before = await clock(node, owner)
            keeper = keeper_of(home, container)
        first.kill()
    with start() as second, watched(container) as init:
        async with connected(second, centre) as node:
            assert before <= await clock(node, owner) < before + 11
            assert keeper_of(home, container) == keeper
            os.kill(keeper, signal.SIGKILL)
            keeper = await another_keeper(home, container, keeper)
            told = await renew(node, owner, moment((await renew(node, owner)).lease_expire_time) + 1)
            dies = time.monotonic() + moment(told.lease_expire_time) - moment(told.time)
            second.kill()
        # Not before its time, and without any daemon.
        assert await ended(init, 40) - dies == pytest.approx(0.4, abs=0.6)
    with start() as third:
        async with connected(third, centre) as node:
            require_expired(await node.exited(owner))
            await node.clear()
    assert containers_of(centre) == []


async def test_a_lease_that_ran_out_while_nobody_kept_it_ends_at_the_next_start(start: Start, home: Path) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner, container, dies = await leased(node, 2)
            keeper = keeper_of(home, container)
        first.kill()
    os.kill(keeper, signal.SIGKILL)
    await asyncio.sleep(max(0.0, dies - time.monotonic()))  # nobody is left who could tell
    assert states(container) != []
    with start() as second:
        async with connected(second, centre) as node:
            require_expired(await node.exited(owner))
            assert states(container) == []
            await node.clear()


async def test_a_lease_that_is_renewed_just_before_its_end_lives(node: Node) -> None:
    owner, container, dies = await leased(node, 2)
    with watched(container) as init:
        end = moment((await renew(node, owner)).lease_expire_time)
        for _ in range(3):
            await asyncio.sleep(dies - time.monotonic() - 0.3)
            end, dies = end + 1, dies + 1
            assert moment((await renew(node, owner, end)).lease_expire_time) == pytest.approx(end, abs=1e-3)
        # Asked for again, and for less: nothing changes.
        assert moment((await renew(node, owner, end)).lease_expire_time) == pytest.approx(end, abs=1e-3)
        assert moment((await renew(node, owner, end - 2)).lease_expire_time) == pytest.approx(end, abs=1e-3)
        at = await ended(init)
    assert -0.05 < at - dies < 1
    require_expired(await node.exited(owner))


async def test_only_who_commands_the_attempt_renews(node: Node) -> None:
    owner, container, _ = await leased(node, 2, node.attempt(token=5))
    stale = AttemptRef(centre=owner.centre, job_id=owner.job_id, attempt=1, fencing_token=4)
    newer = AttemptRef(centre=owner.centre, job_id=owner.job_id, attempt=1, fencing_token=6)
    with watched(container) as init:
        at = await clock(node, owner)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
            await renew(node, stale, at + 60)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
            await renew(node, stale)
        await renew(node, newer)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
            await renew(node, owner, at + 60)
        await ended(init)
    require_expired(await node.exited(owner))


async def test_a_suspended_container_dies_too(node: Node) -> None:
    owner, container, dies = await leased(node, 2.5)
    with watched(container) as init:
        assert (await suspend(node, owner)).state == ContainerState.CONTAINER_STATE_SUSPENDED
        at = await ended(init)
    assert -0.05 < at - dies < 1
    require_expired(await node.exited(owner))
    assert states(container) == []


async def test_a_suspended_container_dies_while_the_daemon_is_dead(start: Start) -> None:
    centre = new_id("centre")
    with start() as first:
        async with connected(first, centre) as node:
            owner, container, dies = await leased(node, 3)
            await suspend(node, owner)
        first.kill()
    with watched(container) as init:
        at = await ended(init)
    assert -0.05 < at - dies < 1
    with start() as second:
        async with connected(second, centre) as node:
            require_expired(await node.exited(owner))
            await node.clear()
    assert containers_of(centre) == []


async def test_a_lease_is_kept_for_a_container_that_is_not_there_yet(node: Node) -> None:
    owner = node.attempt()
    at = await clock(node, owner)
    assert not (await renew(node, owner)).HasField("lease_expire_time")
    end = at + 3
    assert moment((await renew(node, owner, end)).lease_expire_time) == pytest.approx(end, abs=1e-3)
    # What is asked for with the container is shorter, and a lease never becomes shorter.
    request = CreateContainerRequest(owner=owner, command=_SLEEPS, lease_expire_time=timestamp(at + 0.5))
    dies = time.monotonic() + end - await clock(node, owner)
    container = (await node.stub.CreateContainer(request)).container
    with watched(container) as init:
        assert -0.05 < await ended(init) - dies < 1
    require_expired(await node.exited(owner))
    late = node.attempt()
    past = CreateContainerRequest(owner=late, command=_SLEEPS, lease_expire_time=timestamp(at))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "LEASE_EXPIRED"):
        await node.stub.CreateContainer(past)
    wrong = RenewContainerLeaseRequest(owner=late)
    wrong.lease_expire_time.nanos = -1
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "SPEC_INVALID"):
        await node.stub.RenewContainerLease(wrong)


async def test_a_container_without_a_lease_gets_none(node: Node) -> None:
    owner = node.attempt()
    await node.start(owner, bare=True, command=_SLEEPS)
    told = await renew(node, owner, await clock(node, owner) + 0.1)
    assert not told.HasField("lease_expire_time")
    (container,) = await node.containers()
    assert container.state == ContainerState.CONTAINER_STATE_RUNNING


async def test_what_ends_by_itself_under_a_lease_is_told_as_that(node: Node, state: Path) -> None:
    owner = node.attempt()
    end = timestamp(await clock(node, owner) + 60)
    request = CreateContainerRequest(owner=owner, command=["sh", "-c", "exit 3"], lease_expire_time=end)
    await node.stub.CreateContainer(request)
    event = await node.exited(owner)
    assert (event.reason, event.container.exit_code, event.container.lease_expired) == ("COMMAND_ENDED", 3, False)
    assert list((state / "leases").iterdir()) == []


async def test_a_keeper_needs_little_memory(node: Node, state: Path) -> None:
    owner, container, _ = await leased(node, 60)
    lease = LeaseFile(str(state / "leases" / container.id))
    keeper = lease.read()[1]
    lease.close()
    rollup = Path(f"/proc/{keeper}/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
    assert kib["Rss"] < 16 * 1024
    assert kib["Private_Dirty"] < 8 * 1024
    assert os.getsid(keeper) == keeper
    await node.stop(owner, 0)
