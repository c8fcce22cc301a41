"""Output of a job, wherever it is: live on its node while it runs, in the results afterwards, without a seam."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import grpc

from controlplane.faults import retry_delay_s
from controlplane.jobs import FINAL_STATES
from controlplane.node_client import is_unreachable
from controlplane.nodes import Nodes
from controlplane.peer_client import is_away
from controlplane.peer_request import origin_of
from controlplane.peer_results import invalid_answer
from controlplane.reach import Reach
from controlplane.records import JobRecord
from controlplane.results import Results
from controlplane.store import Store
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_service_pb2, stream_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["LogReader", "attempt_number", "require_job", "require_not_lost"]

_LOOK_AGAIN_S = 5.0


async def require_job(store: Store, job_id: str) -> JobRecord:
    """Returns a job.

    Raises:
        Refusal: NOT_FOUND with JOB_NOT_FOUND.
    """
    record = await store.job(job_id)
    if record is None:
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "JOB_NOT_FOUND",
            f"no job {job_id[:80] or '(no id)'} in this centre; `puhui ps --all` lists what there is",
            job_id=job_id[:80],
        )
    return record


def attempt_number(record: JobRecord, asked: int) -> int:
    """Returns the attempt that is meant: `asked`, or the newest for 0 (0 when there is none yet).

    Raises:
        Refusal: NOT_FOUND with ATTEMPT_NOT_FOUND.
    """
    placed = len(record.job.attempts)
    if asked > placed:
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "ATTEMPT_NOT_FOUND",
            f"job {record.id} has {placed} attempts, and no number {asked}",
            job_id=record.id,
        )
    return asked or placed


def require_not_lost(record: JobRecord, number: int) -> None:
    """Refuses to give results of an attempt that are not here because they were lost.

    Raises:
        Refusal: DATA_LOSS with RESULTS_LOST.
    """
    if record.results_lost and number == len(record.job.attempts):
        raise Refusal(
            grpc.StatusCode.DATA_LOSS,
            "RESULTS_LOST",
            f"{record.results_lost}; submit the job again",
            job_id=record.id,
        )


class LogReader:
    """Reads logs for one centre.

    Args:
        centre: its name.
        store: where jobs are.
        feed: tells of what was stored.
        nodes: where output is while a command runs here.
        results: where it is afterwards.
        reach: where it is while a command runs at a peer.
    """

    def __init__(
        self, centre: str, store: Store, feed: Feed, nodes: Nodes, results: Results, reach: Reach | None = None
    ) -> None:
        self._centre = centre
        self._reach = reach
        self._store = store
        self._feed = feed
        self._nodes = nodes
        self._results = results

    async def read(self, request: job_service_pb2.ReadLogsRequest) -> AsyncIterator[stream_pb2.LogChunk]:
        """Yields output as the request asks for it.

        Raises:
            Refusal: NOT_FOUND with JOB_NOT_FOUND or ATTEMPT_NOT_FOUND; DATA_LOSS with RESULTS_LOST;
                UNAVAILABLE with NODE_UNREACHABLE when the output is on a node out of contact and not to be
                waited for.
        """
        attempt_number(await require_job(self._store, request.job_id), request.attempt)
        offset, tail_lines, tries = request.offset, request.tail_lines, 0
        with self._feed.watching(request.job_id) as news:
            while True:
                news.clear()
                record = await require_job(self._store, request.job_id)
                number = attempt_number(record, request.attempt)
                if number and self._results.has_log(record.id, number):
                    if tail_lines:
                        offset = await asyncio.to_thread(self._results.tail, record.id, number, tail_lines)
                    for chunk in self._results.log(record.id, number, offset):
                        yield chunk
                    return
                require_not_lost(record, number)
                over = record.state in FINAL_STATES or number < len(record.job.attempts)
                started = number > 0 and bool(record.job.attempts[number - 1].container_id)
                if not started:
                    if over or not request.follow:
                        return
                    await news.wait()
                    continue
                try:
                    async for chunk in self._live(record, number, offset, tail_lines, request.follow):
                        offset, tail_lines, tries = chunk.offset + len(chunk.data), 0, 0
                        yield chunk
                    return
                except Refusal as refusal:
                    tries += 1
                    await self._after(refusal, record, number, news, tries, request.follow)

    async def _live(
        self, record: JobRecord, number: int, offset: int, tail_lines: int, follow: bool
    ) -> AsyncIterator[stream_pb2.LogChunk]:
        attempt = record.job.attempts[number - 1]
        if attempt.peer:
            async with contextlib.aclosing(self._there(record, number, offset, tail_lines, follow)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        link = self._nodes.link(attempt.node_id)
        if link is None:
            return
        owner = card_pb2.AttemptRef(centre=self._centre, job_id=record.id, attempt=number)
        async with contextlib.aclosing(link.client.read_logs(owner, offset, tail_lines, follow)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _there(
        self, record: JobRecord, number: int, offset: int, tail_lines: int, follow: bool
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        """Yields output of an attempt at a peer."""
        forward = await self._store.forward(record.id, number)
        peer = self._reach.peers.get(forward.peer) if self._reach is not None and forward is not None else None
        if forward is None or peer is None or peer.record.create_time != forward.paired:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE, "PEER_UNKNOWN", "work with the peer that has the output was ended"
            )
        request = wire.ReadForwardedLogsRequest(
            origin=origin_of(self._centre, forward), offset=offset, tail_lines=tail_lines, follow=follow
        )
        at = None if tail_lines else offset
        async with contextlib.aclosing(peer.client.read_logs(request)) as chunks:
            async for chunk in chunks:
                if at is not None and chunk.offset != at:
                    raise invalid_answer("left out output, or sent it twice")
                at = chunk.offset + len(chunk.data)
                yield chunk

    async def _after(
        self, refusal: Refusal, record: JobRecord, number: int, news: asyncio.Event, tries: int, follow: bool
    ) -> None:
        """Waits until reading on makes sense after the node refused, or passes the refusal on."""
        if self._results.has_log(record.id, number):
            return  # it was collected while we read
        if record.job.attempts[number - 1].peer and is_away(refusal):
            await self._after_peer(refusal, record.job.attempts[number - 1].peer, tries, follow)
            return
        if is_unreachable(refusal):
            node_id = record.job.attempts[number - 1].node_id
            link = self._nodes.link(node_id)
            if not follow or link is None:
                raise Refusal(
                    grpc.StatusCode.UNAVAILABLE,
                    "NODE_UNREACHABLE",
                    f"the output is on node {self._nodes.name(node_id)}, which is out of contact; try again later",
                    retry_after_s=10.0,
                    node_id=node_id,
                ) from refusal
            await asyncio.sleep(retry_delay_s(tries))
            await link.contact()
            return
        if refusal.code != grpc.StatusCode.NOT_FOUND:
            raise refusal
        # The node has nothing (any more) and the results are not here yet: the next word about the job says more.
        if record.state in FINAL_STATES or not follow:
            raise refusal
        await news.wait()

    async def _after_peer(self, refusal: Refusal, name: str, tries: int, follow: bool) -> None:
        """Waits until reading on at a peer makes sense, or passes the refusal on."""
        peer = self._reach.peers.get(name) if self._reach is not None else None
        if not follow:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "PEER_UNREACHABLE",
                f"the output is at peer {name}, which is out of contact; it comes here when that is back",
                retry_after_s=10.0,
                peer=name,
            ) from refusal
        await asyncio.sleep(retry_delay_s(tries))
        if peer is not None and not peer.in_contact:
            with contextlib.suppress(TimeoutError):
                # The output may come here in another way meanwhile.
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await peer.contact()
