"""The control plane is killed with SIGKILL at any point; a real node daemon runs real processes under it.

Every job ends right, none runs twice, none is lost, and nothing is left on the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from puhui.rpc.channel import open_channel
from puhui.v1 import fleet_service_pb2, job_pb2, node_service_pb2
from puhui.v1 import job_service_pb2 as wire
from puhui.v1.fleet_service_pb2_grpc import FleetServiceStub
from puhui.v1.job_service_pb2_grpc import JobServiceStub
from puhui.v1.node_service_pb2_grpc import NodeServiceStub
from tests.daemons import Daemon, daemon
from tests.unit.controlplane.centres import FINAL

if TYPE_CHECKING:
    from puhui.v1.job_service_pb2_grpc import JobServiceAsyncStub

CODE = """\
import os, sys, time
with open(sys.argv[1], "a") as diary:
    diary.write(os.environ["PUHUI_JOB_ID"] + "\\n")
time.sleep(float(sys.argv[2]))
print("done", os.environ["PUHUI_JOB_ID"])
with open(os.path.join(os.environ["PUHUI_OUTPUTS"], "out.txt"), "w") as out:
    out.write("result")
sys.exit(int(sys.argv[3]))
"""


@dataclass
class Site:
    """A control plane that can be killed and started again at the same address, and a node that stays."""

    folder: Path
    address: str
    stack: contextlib.ExitStack
    controlplane: Daemon
    node: Daemon

    def kill(self) -> None:
        self.controlplane.kill()

    def start(self) -> None:
        self.controlplane = self.stack.enter_context(controlplane(self.folder, self.address))

    @contextlib.asynccontextmanager
    async def jobs(self) -> AsyncIterator[JobServiceAsyncStub]:
        async with open_channel(self.address) as channel:
            yield JobServiceStub(channel)

    @property
    def diary(self) -> Path:
        return self.folder / "diary"

    def request(self, number: int, length_s: float = 0.05, code: int = 0) -> wire.SubmitJobRequest:
        return wire.SubmitJobRequest(
            spec=job_pb2.JobSpec(
                name=f"job-{number}",
                command=["python3", "work.py", str(self.diary), str(length_s), str(code)],
                resources=job_pb2.Resources(profile=["1g.10gb", "3g.40gb", "2g.20gb"][number % 3]),
            ),
            inline=wire.InlineCode(files={"work.py": CODE}),
            request_id=f"request-{number}",
        )

    async def ended(self, job_id: str) -> job_pb2.Job:
        """Waits for a job's end over any number of control planes."""
        async with asyncio.timeout(60), self.jobs() as jobs:
            while True:
                try:
                    async for _ in jobs.WatchJob(wire.WatchJobRequest(job_id=job_id), wait_for_ready=True):
                        pass
                    return (await jobs.GetJob(wire.GetJobRequest(job_id=job_id), wait_for_ready=True)).job
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise

    async def leftovers(self) -> tuple[int, int, int]:
        """(slices, containers) at the node, and memory slices that the control plane takes for held."""
        async with open_channel(self.node.address) as channel:
            node = NodeServiceStub(channel)
            slices = await node.ListSlices(node_service_pb2.ListSlicesRequest())
            containers = await node.ListContainers(node_service_pb2.ListContainersRequest())
        async with open_channel(self.address) as channel:
            capacity = await FleetServiceStub(channel).GetCapacity(
                fleet_service_pb2.GetCapacityRequest(), wait_for_ready=True
            )
        held = sum(card.memory_slices_total - card.memory_slices_free for card in capacity.gpus)
        return len(slices.slices), len(containers.containers), held


def controlplane(folder: Path, address: str) -> contextlib.AbstractContextManager[Daemon]:
    arguments = ["--listen", address, "--state", str(folder / "controlplane")]
    return daemon("controlplane", arguments, folder / "controlplane.log")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(controlplane(tmp_path, "127.0.0.1:0"))
        node = stack.enter_context(
            daemon(
                "nodedaemon",
                [
                    *("--listen", "127.0.0.1:0", "--state", str(tmp_path / "node"), "--name", "node-1"),
                    *("--control-plane", first.address),
                    *("--join-token-file", str(tmp_path / "controlplane" / "join-token")),
                    *("--emulate", "H100-80GB-SXM5:2", "--runtime", "process"),
                ],
                tmp_path / "node.log",
            )
        )
        yield Site(tmp_path, first.address, stack, first, node)


def require_right(site: Site, job: job_pb2.Job, code: int) -> None:
    ran = site.diary.read_text().split()
    assert ran.count(job.id) == 1, f"{job.id} ran {ran.count(job.id)} times\n{job}"
    assert job.state == (job_pb2.JOB_STATE_FAILED if code else job_pb2.JOB_STATE_SUCCEEDED), job
    assert (job.exit_code, job.artifacts.file_count) == (code, 1)
    assert job.log_size_bytes == len(f"done {job.id}\n")


@pytest.mark.parametrize(
    "reason", ["PREDICTED", "RESERVED", "SLICE_CREATED", "CONTAINER_STARTED", "COMMAND_ENDED", "RESULTS_COLLECTED"]
)
async def test_killed_right_after(site: Site, reason: str) -> None:
    async with site.jobs() as jobs:
        job_id = (await jobs.SubmitJob(site.request(0))).job.id
        async for told in jobs.WatchJob(wire.WatchJobRequest(job_id=job_id)):
            if told.event.reason == reason:
                break
    site.kill()
    site.start()
    require_right(site, await site.ended(job_id), 0)
    assert await site.leftovers() == (0, 0, 0)


async def test_killed_again_and_again_while_jobs_come_and_go(site: Site) -> None:
    count = 24
    dice = random.Random(7)
    codes = [dice.choice([0, 0, 3]) for _ in range(count)]

    async def submit(number: int) -> str:
        """A client that sends its request again, with the same id, until it is answered."""
        async with asyncio.timeout(60), site.jobs() as jobs:
            while True:
                try:
                    request = site.request(number, dice.uniform(0.0, 0.8), codes[number])
                    request = sent.setdefault(number, request)
                    return (await jobs.SubmitJob(request, wait_for_ready=True)).job.id
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise

    sent: dict[int, wire.SubmitJobRequest] = {}
    submitting = [asyncio.create_task(submit(number)) for number in range(count)]
    for _ in range(8):
        await asyncio.sleep(dice.uniform(0.02, 0.25))  # the moment of the crash is the point
        site.kill()
        await asyncio.to_thread(site.start)
    ids = await asyncio.gather(*submitting)
    assert len(set(ids)) == count
    for number, job_id in enumerate(ids):
        require_right(site, await site.ended(job_id), codes[number])
    assert await site.leftovers() == (0, 0, 0)


async def test_a_cancel_that_was_answered_survives(site: Site) -> None:
    async with site.jobs() as jobs:
        job_id = (await jobs.SubmitJob(site.request(0, length_s=60))).job.id
        async for told in jobs.WatchJob(wire.WatchJobRequest(job_id=job_id)):
            if told.event.reason == "CONTAINER_STARTED":
                break
        await jobs.CancelJob(wire.CancelJobRequest(job_id=job_id))
    site.kill()
    site.start()
    assert (await site.ended(job_id)).state == job_pb2.JOB_STATE_CANCELLED
    assert await site.leftovers() == (0, 0, 0)


async def test_a_node_daemon_that_is_killed_costs_no_job(site: Site) -> None:
    async with site.jobs() as jobs:
        job_id = (await jobs.SubmitJob(site.request(0, length_s=1.0))).job.id
        async for told in jobs.WatchJob(wire.WatchJobRequest(job_id=job_id)):
            if told.event.reason == "CONTAINER_STARTED":
                break
        site.node.kill()
        node = daemon(
            "nodedaemon",
            [
                *("--listen", site.node.address, "--state", str(site.folder / "node"), "--name", "node-1"),
                *("--control-plane", site.address),
                *("--join-token-file", str(site.folder / "controlplane" / "join-token")),
                *("--emulate", "H100-80GB-SXM5:2", "--runtime", "process"),
            ],
            site.folder / "node.log",
        )
        site.node = site.stack.enter_context(node)
        job = await site.ended(job_id)
    require_right(site, job, 0)
    assert await site.leftovers() == (0, 0, 0)


async def test_the_control_plane_stops_at_once_when_asked(site: Site) -> None:
    async with site.jobs() as jobs:
        job_id = (await jobs.SubmitJob(site.request(0, length_s=1.0))).job.id
        watching = jobs.WatchJob(wire.WatchJobRequest(job_id=job_id))
        await anext(aiter(watching))
        assert await asyncio.to_thread(site.controlplane.stop, 10) == 0
    site.start()
    job = await site.ended(job_id)
    assert job.state in FINAL
    require_right(site, job, 0)
