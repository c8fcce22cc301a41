"""Fetches what an attempt left at a peer. A broken connection is taken up where it broke."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import grpc

from controlplane.collect import Collected, collect
from controlplane.peer_client import PeerClient, is_away
from controlplane.results import Results
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_pb2, node_service_pb2, stream_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["collect_from_peer", "invalid_answer"]

_MOST_BREAKS = 20
_SILENT_S = 60.0
_T = TypeVar("_T")


def invalid_answer(what: str) -> Refusal:
    """Returns the refusal to take an answer of a peer that no peer may give."""
    return Refusal(
        grpc.StatusCode.DATA_LOSS,
        "PEER_ANSWER_INVALID",
        f"the peer {what}; if this lasts, end work with it (`puhui peers set NAME --no-send`) and ask its operator",
    )


class _Left:
    """What an attempt left at a peer, read as what it leaves at a node is."""

    def __init__(
        self,
        client: Callable[[], PeerClient],
        origin: card_pb2.AttemptRef,
        job: job_pb2.Job,
        again: Callable[[int], Awaitable[None]],
    ) -> None:
        self._client = client
        self._origin = origin
        self._job = job
        self._again = again

    async def read_logs(
        self, owner: card_pb2.AttemptRef, offset: int, tail_lines: int, follow: bool
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        """Yields the output."""
        breaks = 0
        while True:
            request = wire.ReadForwardedLogsRequest(origin=self._origin, offset=offset, follow=follow)
            try:
                async with contextlib.aclosing(self._client().read_logs(request)) as chunks:
                    async for chunk in _timely(chunks):
                        if chunk.offset > offset:
                            raise invalid_answer("left out output")
                        offset = max(offset, chunk.offset + len(chunk.data))
                        if offset > self._job.log_size_bytes:
                            raise invalid_answer("sends more output than it told of")
                        breaks = 0 if chunk.data else self._idle(breaks)
                        yield chunk
                if offset >= self._job.log_size_bytes:
                    return
                if breaks >= _MOST_BREAKS:
                    raise invalid_answer("sends less output than it told of")
                breaks += 1
                await self._again(breaks)
            except Refusal as refusal:
                breaks = await self._broke(refusal, breaks)

    async def read_artifacts(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.NodeServiceGetArtifactsResponse, None]:
        """Yields the manifest, then the archive."""
        breaks, manifest = 0, None
        while True:
            request = wire.GetForwardedArtifactsRequest(origin=self._origin, offset=offset)
            try:
                async with contextlib.aclosing(self._client().read_artifacts(request)) as parts:
                    async for part in _timely(parts):
                        if part.HasField("manifest"):
                            if part.manifest.digest != self._job.artifacts.digest:
                                raise invalid_answer("has other artifacts than it told of")
                            if manifest is not None and part.manifest.digest != manifest.digest:
                                raise invalid_answer("tells of other artifacts than before")
                            if manifest is None:
                                yield node_service_pb2.NodeServiceGetArtifactsResponse(manifest=part.manifest)
                            manifest = part.manifest
                            continue
                        offset += len(part.chunk)
                        if manifest is None or offset > manifest.size_bytes:
                            raise invalid_answer("sends more artifacts than it told of")
                        breaks = 0 if part.chunk else self._idle(breaks)
                        yield node_service_pb2.NodeServiceGetArtifactsResponse(chunk=part.chunk)
                return
            except Refusal as refusal:
                breaks = await self._broke(refusal, breaks)

    def _idle(self, breaks: int) -> int:
        """Counts a message that brings nothing."""
        if breaks >= _MOST_BREAKS:
            raise invalid_answer("sends nothing, again and again")
        return breaks + 1

    async def _broke(self, refusal: Refusal, breaks: int) -> int:
        if refusal.code == grpc.StatusCode.NOT_FOUND and (self._job.log_size_bytes or self._job.artifacts.digest):
            # To have nothing is an answer only of one that has told of nothing.
            raise Refusal(
                grpc.StatusCode.DATA_LOSS, "RESULTS_LOST", "the peer has no longer what it told of"
            ) from refusal
        if not is_away(refusal) or breaks >= _MOST_BREAKS:
            raise refusal
        await self._again(breaks + 1)
        return breaks + 1


async def _timely(messages: AsyncGenerator[_T, None]) -> AsyncGenerator[_T, None]:
    """Yields messages that come; one that does not in time is a connection that broke."""
    while True:
        try:
            async with asyncio.timeout(_SILENT_S):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED, "UNKNOWN", f"the peer has sent nothing for {_SILENT_S:.0f} s"
            ) from error
        yield message


async def collect_from_peer(
    client: Callable[[], PeerClient],
    origin: card_pb2.AttemptRef,
    job: job_pb2.Job,
    results: Results,
    again: Callable[[int], Awaitable[None]],
    most_bytes: int,
    before: Collected | None = None,
) -> Collected:
    """Fetches log and artifacts of an attempt that has ended at a peer; see `collect`.

    Nothing is fetched when the peer tells of more than `most_bytes`: it would fill the disk on which everything is.

    Args:
        client: returns the connection to the peer.
        origin: the attempt, by its name here.
        job: the job as the peer knows it.
        results: where to.
        again: waits, after so many failures in a row, until asking again makes sense.
        most_bytes: so much is taken, log and artifacts together.
        before: what came before; what of it came whole is not fetched again.
    """
    told = job.log_size_bytes + job.artifacts.size_bytes
    if told > most_bytes:
        why = invalid_answer(f"has {told} bytes of results, and {most_bytes} are taken of one job")
        return Collected(0, job_pb2.JobArtifacts(), {"log": why, "artifacts": why})
    return await collect(_Left(client, origin, job, again), origin, results, before)
