"""What a centre and its node tell, with when it arrived here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from puhui.rpc.moment import moment
from puhui.v1.job_pb2 import JobEvent
from puhui.v1.job_service_pb2 import WatchJobRequest
from puhui.v1.node_pb2 import NodeEventKind
from puhui.v1.node_service_pb2 import WatchEventsRequest

if TYPE_CHECKING:
    from puhui.v1.job_service_pb2_grpc import JobServiceAsyncStub
    from puhui.v1.node_service_pb2_grpc import NodeServiceAsyncStub

__all__ = ["Crossing", "Told", "Witness"]

_T = TypeVar("_T")
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Told:
    """An event of a job."""

    event: JobEvent
    arrived_s: float
    """Here, in seconds since the epoch."""


@dataclass(frozen=True)
class Crossing:
    """When a session became idle, as its node tells it; in seconds since the epoch."""

    threshold_s: float
    """Unused for exactly as long as its threshold: at the latest when the sample that told so was taken."""
    told_s: float
    """The node's event."""


class Witness:
    """Follows jobs, and what the node that they run on tells of their use of its cards.

    It does not watch the cards itself: that would have the node look at them at other times than it does alone.

    Args:
        jobs: of the control plane.
        node: of the node daemon.
        idle_after_s: threshold of the jobs, in seconds.
    """

    def __init__(self, jobs: JobServiceAsyncStub, node: NodeServiceAsyncStub, idle_after_s: float) -> None:
        self._jobs = jobs
        self._node = node
        self._idle_after_s = idle_after_s
        self._told: dict[str, list[Told]] = defaultdict(list)
        self._idle: dict[str, list[Crossing]] = defaultdict(list)
        self._news = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Follows the node until the block ends."""
        task = asyncio.create_task(self._follow_node())
        try:
            yield
        finally:
            await _end(task)

    @contextlib.asynccontextmanager
    async def following(self, job_id: str) -> AsyncIterator[None]:
        """Follows a job until the block ends."""
        task = asyncio.create_task(self._follow_job(job_id))
        try:
            yield
        finally:
            await _end(task)

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

    async def crossing(self, job_id: str, after_s: float) -> Crossing:
        """Returns when a job first became idle after a time, in seconds since the epoch.

        Raises:
            TimeoutError: it did not in time.
        """
        return await self._wait(
            lambda: next((one for one in self._idle[job_id] if one.told_s > after_s), None), f"idleness of {job_id}"
        )

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
                unused_s = moment(event.container.idleness.unused_since)
                one = Crossing(unused_s + self._idle_after_s, moment(event.time))
                idle = self._idle[event.owner.job_id]
                await self._tell(lambda one=one, idle=idle: idle.append(one))  # type: ignore[misc]


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
