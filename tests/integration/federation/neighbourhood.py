"""Two centres in this process, peers over real mutual TLS, with real stores, on nodes that do what the test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlplane.centre import Centre, Settings
from controlplane.idle_policy import CentrePolicy
from puhui.rpc.channel import open_channel
from puhui.v1 import job_pb2, peer_service_pb2
from puhui.v1.peer_service_pb2_grpc import PeerServiceStub
from tests.unit.controlplane.centres import FixedPrediction, RunningCentre, eventually
from tests.unit.controlplane.fake_node import FakeNode

if TYPE_CHECKING:
    from puhui.v1.peer_service_pb2_grpc import PeerServiceAsyncStub


@dataclass
class Neighbour(RunningCentre):
    """A centre, its node, and what its operator can do."""

    node: FakeNode

    @property
    def operator(self) -> PeerServiceAsyncStub:
        return PeerServiceStub(self.channel)

    async def fill(self) -> list[str]:
        """Has jobs take all there is, and returns them."""
        jobs = [await self.submit(resources=job_pb2.Resources(profile="7g.80gb")) for _ in self.node.has.gpus]
        for job_id in jobs:
            await self.until(job_id, job_pb2.JOB_STATE_RUNNING)
        return jobs

    async def guest(self, name: str = "") -> job_pb2.Job:
        """Returns the newest job that a peer has sent here, once there is one."""
        found: list[job_pb2.Job] = []

        def look() -> bool:
            rows = self.centre._store._read.execute("select body from jobs order by sequence desc").fetchall()
            jobs = [job_pb2.Job.FromString(body) for (body,) in rows]
            found[:] = [job for job in jobs if job.HasField("guest") and job.spec.name == name]
            return bool(found)

        await eventually(look)
        return found[0]


@contextlib.asynccontextmanager
async def neighbour(name: str, folder: Path, gpus: int = 1, **settings: Any) -> AsyncIterator[Neighbour]:
    """Runs a centre that serves peers until the block ends."""
    node, state = FakeNode(f"node-of-{name}", gpus), folder / name
    node.exits_at_once = None
    listen = {"federation_listen": "127.0.0.1:0", **settings}
    centre = await Centre.start(
        Settings("127.0.0.1:0", state, name, state / "join-token", idle=CentrePolicy(), **listen),
        prediction=FixedPrediction(9000),
        connect=node.connect,
    )
    channel = open_channel(centre.address)
    try:
        client = Neighbour(centre, channel, state, node)
        await client.join(node)
        yield client
    finally:
        await channel.close(None)
        await centre.stop()


async def pair(one: Neighbour, other: Neighbour, **terms: Any) -> None:
    """Makes two centres peers, and waits until each is in contact with the other."""
    agreed = peer_service_pb2.PeerTerms(**terms)
    invited = await one.operator.InvitePeer(peer_service_pb2.InvitePeerRequest(terms=agreed))
    await other.operator.AddPeer(peer_service_pb2.AddPeerRequest(token=invited.token, terms=agreed))
    await in_contact(one)
    await in_contact(other)


async def in_contact(one: Neighbour) -> None:
    """Waits until a centre is in contact with its peers."""
    async with asyncio.timeout(20):
        for peer in one.centre._federation.peers.all():
            await peer.contact()
