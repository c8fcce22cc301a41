"""What a centre and its node tell, with when it arrived here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from puhui.rpc.moment import duration, moment
from puhui.v1.job_pb2 import JobEvent
from puhui.v1.job_service_pb2 import WatchJobRequest
from puhui.v1.node_pb2 import NodeEventKind
from puhui.v1.node_service_pb2 import WatchEventsRequest, WatchUtilizationRequest

if TYPE_CHECKING:
    from puhui.v1.job_service_pb2_grpc import JobServiceAsyncStub
    from puhui.v1.node_service_pb2_grpc import NodeServiceAsyncStub

__all__ = ["Told", "Witness"]

_T = TypeVar("_T")
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Told:
    """An event of a job."""

    event: JobEvent
    arrived_s: float
    """Here, in seconds since the epoch."""


class Witness:
    """Follows jobs, and the cards of the node that they run on.

    Args:
        jobs: of the control plane.
        node: of the node daemon.
        interval_s: between two samples of a card.
    """

    def __init__(self, jobs: JobServiceAsyncStub, node: NodeServiceAsyncStub, interval_s: float) -> None:
        self._jobs = jobs
        self._node = node
        self._interval_s = interval_s
        self._told: dict[str, list[Told]] = defaultdict(list)
        self._idle_s: dict[str, list[float]] = defaultdict(list)
        self._samples_s: dict[str, list[float]] = defaultdict(list)
        self._news = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Follows the node until the block ends."""
        tasks = [asyncio.create_task(self._follow_node()), asyncio.create_task(self._follow_cards())]
        try:
            yield
        finally:
            await _end(tasks)

    @contextlib.asynccontextmanager
    async def following(self, job_id: str) -> AsyncIterator[None]:
        """Follows a job until the block ends."""
        task = asyncio.create_task(self._follow_job(job_id))
        try:
            yield
        finally:
            await _end([task])

    async def job_event(self, job_id: str, reason: str, after: int = 0, slice_uuid: str = "") -> Told:
        """Returns the first event of a job after a cursor with this reason, and of this slice if one is named.

        Raises:
            TimeoutError: it did not come in time.
        """
        return await self._wait(
            lambda: next(
                (
                    told
                    for told in self._told[job_id]
                    if told.event.cursor > after
                    and told.event.reason == reason
                    and slice_uuid in ("", told.event.details.get("slice_uuid", ""))
                ),
                None,
            ),
            f"{reason} of {job_id}",
        )

    async def crossing(self, job_id: str, slice_uuid: str, after_s: float) -> tuple[float, float]:
        """Returns the time of the sample by which a job's container first became idle, and that of the node's event.

        Both as the node tells them, in seconds since the epoch. It is the last sample of its card before the event:
        all who watch at one interval get the same samples.

        Args:
            job_id: the job.
            slice_uuid: its card.
            after_s: idle after this, in seconds since the epoch.

        Raises:
            TimeoutError: there was none in time.
        """
        idle_s = await self._wait(
            lambda: next((at_s for at_s in self._idle_s[job_id] if at_s > after_s), None), f"idleness of {job_id}"
        )
        crossed_s = await self._wait(
            lambda: max((at_s for at_s in self._samples_s[slice_uuid] if at_s <= idle_s), default=None),
            f"a sample of {slice_uuid}",
        )
        return crossed_s, idle_s

    async def _wait(self, find: Callable[[], _T | None], what: str) -> _T:
        try:
            async with asyncio.timeout(_PATIENCE_S), self._news:
                while (found := find()) is None:
                    await self._news.wait()
                return found
        except TimeoutError:
            raise TimeoutError(f"{what} did not come within {_PATIENCE_S:g} s") from None

    async def _tell(self, note: Callable[[], None]) -> None:
        async with self._news:
            note()
            self._news.notify_all()

    async def _follow_job(self, job_id: str) -> None:
        async for response in self._jobs.WatchJob(WatchJobRequest(job_id=job_id)):
            told = Told(response.event, time.time())
            await self._tell(lambda told=told: self._told[job_id].append(told))  # type: ignore[misc]

    async def _follow_node(self) -> None:
        async for response in self._node.WatchEvents(WatchEventsRequest()):
            event = response.event
            if event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_IDLE:
                job_id, at_s = event.owner.job_id, moment(event.time)
                await self._tell(lambda job_id=job_id, at_s=at_s: self._idle_s[job_id].append(at_s))  # type: ignore[misc]

    async def _follow_cards(self) -> None:
        request = WatchUtilizationRequest(interval=duration(self._interval_s))
        async for response in self._node.WatchUtilization(request):
            for sample in response.samples:
                at_s, uuid = moment(sample.time), sample.uuid
                await self._tell(lambda at_s=at_s, uuid=uuid: self._samples_s[uuid].append(at_s))  # type: ignore[misc]


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
