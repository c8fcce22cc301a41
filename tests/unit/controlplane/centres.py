"""A centre in this process: real store, real gRPC server, a fake node at the seam."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from controlplane.centre import Centre, Settings
from controlplane.fleet import Geometry
from controlplane.idle_policy import CentrePolicy
from controlplane.observing import ObservedAttempt
from controlplane.prediction import Code, DryStep, with_history
from controlplane.profile_outlook import Pace
from puhui.rpc.channel import open_channel
from puhui.rpc.errors import Refusal
from puhui.v1 import fleet_service_pb2, job_pb2, prediction_pb2
from puhui.v1 import job_service_pb2 as wire
from puhui.v1.federation_service_pb2_grpc import FederationServiceStub
from puhui.v1.fleet_service_pb2_grpc import FleetServiceStub
from puhui.v1.job_service_pb2_grpc import JobServiceStub
from tests.unit.controlplane.fake_node import FakeNode

if TYPE_CHECKING:
    from puhui.v1.federation_service_pb2_grpc import FederationServiceAsyncStub
    from puhui.v1.fleet_service_pb2_grpc import FleetServiceAsyncStub
    from puhui.v1.job_service_pb2_grpc import JobServiceAsyncStub

FINAL = {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED}


class FixedPrediction:
    """Says that all code needs the same."""

    def __init__(self, required_mib: int) -> None:
        self.required_mib = required_mib

    async def of(
        self, code: Code, budget_s: float | None = None, dry_run: DryStep | None = None
    ) -> prediction_pb2.Prediction:
        return prediction_pb2.Prediction(tier=prediction_pb2.PREDICTION_TIER_STATIC, required_mib=self.required_mib)

    async def fingerprint(self, code: Code) -> str:
        return hashlib.sha256(repr((sorted(code.files.items()), list(code.command))).encode()).hexdigest()

    async def paces(self, code: Code, geometries: Sequence[Geometry]) -> dict[tuple[str, str], Pace]:
        return {}

    def with_history(
        self, prediction: prediction_pb2.Prediction, observed: Sequence[ObservedAttempt]
    ) -> prediction_pb2.Prediction:
        return with_history(prediction, observed)

    async def close(self) -> None:
        return None


@dataclass
class RunningCentre:
    """A client's view of it."""

    centre: Centre
    channel: grpc.aio.Channel
    state: Path

    @property
    def jobs(self) -> JobServiceAsyncStub:
        return JobServiceStub(self.channel)

    @property
    def fleet(self) -> FleetServiceAsyncStub:
        return FleetServiceStub(self.channel)

    @property
    def federation(self) -> FederationServiceAsyncStub:
        return FederationServiceStub(self.channel)

    async def join(self, node: FakeNode) -> str:
        token = (self.state / "join-token").read_text()
        request = fleet_service_pb2.RegisterNodeRequest(
            join_token=token, address="127.0.0.1:1", inventory=await node.inventory()
        )
        response = await self.fleet.RegisterNode(request)
        link = self.centre._nodes.link(response.node_id)
        assert link is not None
        await asyncio.wait_for(link.contact(), 10)
        return response.node_id

    async def cut(self, node: FakeNode) -> None:
        """The node goes out of contact, and the centre has noticed."""
        await node.set_reachable(False)
        links = [member.link for member in self.centre._nodes._members.values()]
        await eventually(lambda: not any(link.in_contact for link in links))

    async def submit(self, **spec: object) -> str:
        fields = {"command": ["python3", "x.py"], **spec}
        response = await self.jobs.SubmitJob(
            wire.SubmitJobRequest(
                spec=job_pb2.JobSpec(**fields),  # type: ignore[arg-type]
                inline=wire.InlineCode(files={"x.py": "print(1)\n"}),
            )
        )
        return response.job.id

    async def job(self, job_id: str) -> job_pb2.Job:
        return (await self.jobs.GetJob(wire.GetJobRequest(job_id=job_id))).job

    async def until(self, job_id: str, *states: job_pb2.JobState.ValueType) -> job_pb2.Job:
        """Follows a job's events until it is in one of the states."""
        async for told in self.jobs.WatchJob(wire.WatchJobRequest(job_id=job_id), timeout=30):
            if told.event.state in states:
                return await self.job(job_id)
        raise AssertionError(f"it ended otherwise: {await self.job(job_id)}")

    async def until_runs(self, job_id: str, attempt: int) -> job_pb2.Job:
        """Waits until an attempt of a job runs."""
        with self.centre._feed.watching(job_id) as news:
            async with asyncio.timeout(20):
                while True:
                    news.clear()
                    job = await self.job(job_id)
                    if len(job.attempts) == attempt and job.state == job_pb2.JOB_STATE_RUNNING:
                        return job
                    await news.wait()

    async def until_told(self, job_id: str, reason: str) -> job_pb2.JobEvent:
        """Follows a job's events until one has this reason; past the end of the job, too."""
        with self.centre._feed.watching(job_id) as news:
            while True:
                news.clear()
                for event in await self.centre._store.events(job_id, 0):
                    if event.reason == reason:
                        return event
                await asyncio.wait_for(news.wait(), 20)

    async def ended(self, job_id: str) -> job_pb2.Job:
        return await self.until(job_id, *FINAL)

    async def reasons(self, job_id: str) -> list[str]:
        return [event.reason for event in await self.centre._store.events(job_id, 0)]

    async def cancel(self, job_id: str) -> job_pb2.Job:
        return (await self.jobs.CancelJob(wire.CancelJobRequest(job_id=job_id, message="enough"))).job

    async def log(self, job_id: str, **request: object) -> bytes:
        read = self.jobs.ReadLogs(wire.ReadLogsRequest(job_id=job_id, **request), timeout=30)  # type: ignore[arg-type]
        return b"".join([response.chunk.data async for response in read])

    def files(self) -> list[str]:
        """Every file of bundles and results."""
        return sorted(
            str(path.relative_to(self.state))
            for folder in ("bundles", "results")
            for path in (self.state / folder).rglob("*")
            if path.is_file()
        )

    async def unchanged(self) -> tuple[object, ...]:
        """All that a refused request must not change."""
        db = self.centre._store._read
        tables = ("jobs", "job_events", "reservations", "bundles", "requests", "nodes", "centre")
        return (self.files(), *(db.execute(f"select * from {table}").fetchall() for table in tables))


async def eventually(condition: Callable[[], bool]) -> None:
    """Lets the event loop turn until something is so that no event tells of."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(
    state: Path,
    node: FakeNode | None = None,
    required_mib: int = 9000,
    *,
    join: bool = True,
    idle: CentrePolicy | None = None,
    **settings: Any,
) -> AsyncIterator[RunningCentre]:
    """Runs a centre until the block ends. A second time on the same state goes on where the first was."""
    fake = node or FakeNode()
    centre = await Centre.start(
        Settings("127.0.0.1:0", state, "here", state / "join-token", idle=idle or CentrePolicy(), **settings),
        prediction=FixedPrediction(required_mib),
        connect=fake.connect,
    )
    channel = open_channel(centre.address)
    try:
        client = RunningCentre(centre, channel, state)
        if join:
            await client.join(fake)
        yield client
    finally:
        await channel.close(None)
        await centre.stop()


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, reason: str, **metadata: str) -> AsyncIterator[None]:
    """The call in the block is refused so."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        refusal = Refusal.of(error)
        assert (refusal.code, refusal.reason) == (code, reason), refusal
        assert refusal.metadata.items() >= metadata.items(), refusal.metadata
        assert refusal.message
    else:
        raise AssertionError(f"not refused with {reason}")
