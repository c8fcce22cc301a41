"""Fetches what an attempt left at a peer. A broken connection is taken up where it broke."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

import grpc

from controlplane.collect import Collected, collect
from controlplane.peer_client import PeerClient, is_away
from controlplane.results import Results
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_pb2, node_service_pb2, stream_pb2
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["collect_from_peer", "invalid_answer"]

_MOST_BREAKS = 20


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
                    async for chunk in chunks:
                        if chunk.offset > offset:
                            raise invalid_answer("left out output")
                        offset = max(offset, chunk.offset + len(chunk.data))
                        if offset > self._job.log_size_bytes:
                            raise invalid_answer("sends more output than it told of")
                        breaks = 0
                        yield chunk
                return
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
                    async for part in parts:
                        if part.HasField("manifest"):
                            if manifest is not None and part.manifest.digest != manifest.digest:
                                raise invalid_answer("tells of other artifacts than before")
                            if manifest is None:
                                yield node_service_pb2.NodeServiceGetArtifactsResponse(manifest=part.manifest)
                            manifest = part.manifest
                            continue
                        offset += len(part.chunk)
                        if manifest is None or offset > manifest.size_bytes:
                            raise invalid_answer("sends more artifacts than it told of")
                        breaks = 0
                        yield node_service_pb2.NodeServiceGetArtifactsResponse(chunk=part.chunk)
                return
            except Refusal as refusal:
                breaks = await self._broke(refusal, breaks)

    async def _broke(self, refusal: Refusal, breaks: int) -> int:
        if not is_away(refusal) or breaks >= _MOST_BREAKS:
            raise refusal
        await self._again(breaks + 1)
        return breaks + 1


async def collect_from_peer(
    client: Callable[[], PeerClient],
    origin: card_pb2.AttemptRef,
    job: job_pb2.Job,
    results: Results,
    again: Callable[[int], Awaitable[None]],
) -> Collected:
    """Fetches log and artifacts of an attempt that has ended at a peer; see `collect`.

    Args:
        client: returns the connection to the peer.
        origin: the attempt, by its name here.
        job: the job as the peer knows it.
        results: where to.
        again: waits, after so many failures in a row, until asking again makes sense.
    """
    return await collect(_Left(client, origin, job, again), origin, results)
