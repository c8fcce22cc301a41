"""Keeps the lease of a guest's container at its node no longer, and no shorter, than the guest's own.

This control plane may be dead when the lease runs out, and its node out of contact: what the origin waits for must come
true all the same. So the node ends the container by itself, by its own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.cutting import Placed
from controlplane.faults import retry_delay_s
from controlplane.forwards import CLOCK_DRIFT
from controlplane.node_asker import Fenced, GivenUp
from controlplane.reach import Clock
from controlplane.watch import Feed
from puhui.rpc.moment import moment, timestamp
from puhui.v1 import job_pb2, node_service_pb2

__all__ = ["ContainerLease", "node_lease_end"]

_log = structlog.get_logger(__name__)


def node_lease_end(node_s: float, lease_end: float, at: float) -> float:
    """Returns when a lease ends on a node's lease clock, in seconds: not later than here, however the clocks differ.

    Args:
        node_s: what the node's clock told.
        lease_end: when it ends on this centre's lease clock.
        at: when that had arrived, on this centre's lease clock; the node's clock was read before.
    """
    return node_s + (lease_end - at) * (1 - CLOCK_DRIFT)


class ContainerLease:
    """The lease of one attempt's container. Of a job that was submitted here, there is none.

    Args:
        placed: the attempt.
        feed: tells when the guest's lease was renewed.
        clock: this centre's lease clock; None when it works with no peers.
        cancel: set once the job's end was asked for.
    """

    def __init__(self, placed: Placed, feed: Feed, clock: Clock | None, cancel: asyncio.Event) -> None:
        self._placed = placed
        self._feed = feed
        self._clock = clock
        self._cancel = cancel
        self._given = 0.0
        """On this centre's lease clock: the node has been told of a lease until then."""

    async def first(self) -> Timestamp | None:
        """Returns until when a container that is about to be made may run, on its node's lease clock; None is for ever.

        Raises:
            Refusal: the node's; one that knows no leases takes no guests.
            GivenUp: the job's end was asked for, and the node cannot be asked, or the lease has run out.
        """
        ends = await self._ends()
        if ends is None:
            return None
        lease_end, clock = ends
        asked = node_service_pb2.RenewContainerLeaseRequest(owner=self._placed.owner)
        told = await self._placed.asker.ask(lambda client: client.renew_container_lease(asked), give_up=True)
        left = node_lease_end(moment(told.time), lease_end, clock.now())
        if left <= moment(told.time):
            await self._cancel.wait()  # whoever watches over leases is about to end it
            raise GivenUp
        self._given = lease_end
        return timestamp(left)

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Has the node's lease renewed whenever the guest's was, for as long as the block lasts."""
        if not self._placed.record.job.HasField("guest"):
            yield
            return
        keeper = asyncio.create_task(self._keep(), name=f"lease {self._placed.record.id}")
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _keep(self) -> None:
        job_id, tries = self._placed.record.id, 0
        with self._feed.watching(job_id) as news:
            if self._placed.record.state == job_pb2.JOB_STATE_STARTING:
                await news.wait()  # the container is made with its first lease
            while True:
                news.clear()
                try:
                    await self._renew()
                    tries = 0
                except Fenced:
                    return  # the attempt's driver meets that, too
                except Exception as error:  # noqa: BLE001 - a lease that is not kept ends a guest that is wanted
                    tries += 1
                    _log.warning("a container's lease is not renewed; trying again", job=job_id, why=repr(error))
                    await asyncio.sleep(retry_delay_s(tries))
                    continue
                await news.wait()

    async def _renew(self) -> None:
        """Tells the node of a longer lease, if the guest's is longer than what it was told."""
        ends = await self._ends()
        if ends is None or ends[0] <= self._given:
            return
        lease_end, clock = ends
        owner = self._placed.owner
        asked = node_service_pb2.RenewContainerLeaseRequest(owner=owner)
        told = await self._placed.asker.ask(lambda client: client.renew_container_lease(asked))
        left = node_lease_end(moment(told.time), lease_end, clock.now())
        if left > moment(told.time):
            longer = node_service_pb2.RenewContainerLeaseRequest(owner=owner, lease_expire_time=timestamp(left))
            await self._placed.asker.ask(lambda client: client.renew_container_lease(longer))
        self._given = lease_end

    async def _ends(self) -> tuple[float, Clock] | None:
        """Returns when the guest's lease ends, and by which clock; None when the job was submitted here."""
        record = self._placed.record
        if not record.job.HasField("guest"):
            return None
        guest = await self._placed.store.guest_of(record.id)
        if guest is None or self._clock is None:
            raise RuntimeError(f"job {record.id} is a peer's, and nothing is known of its lease")
        if guest.boot != self._clock.boot:
            return 0.0, self._clock  # a reboot has ended it
        return guest.lease_end, self._clock
