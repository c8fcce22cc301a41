"""Output of a job at a peer, read through its origin: whole, once, and without a seam."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from puhui.rpc.errors import Refusal
from puhui.v1 import job_service_pb2 as wire
from puhui.v1 import stream_pb2
from tests.unit.controlplane.carried import Ends, ends


def reading(both: Ends, **request: Any) -> AsyncIterator[stream_pb2.LogChunk]:
    return aiter(both.logs.read(wire.ReadLogsRequest(job_id=both.job_id, **request)))


async def text(chunks: AsyncIterator[stream_pb2.LogChunk]) -> bytes:
    async with asyncio.timeout(20):
        return b"".join([chunk.data async for chunk in chunks])


async def test_output_is_followed_over_a_cut_connection(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        chunks = reading(both, follow=True)
        await both.node.write(both.job_there, b"before\n")
        assert (await anext(chunks)).data == b"before\n"
        await both.peer.cut()
        rest = asyncio.create_task(text(chunks))
        await both.node.write(both.job_there, b"meanwhile\n")
        await both.peer.mend()
        await both.node.write(both.job_there, b"after\n")
        await both.node.exit(both.job_there, 0)
        assert await rest == b"meanwhile\nafter\n"


async def test_output_that_was_collected_meanwhile_goes_on_where_it_broke(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        chunks = reading(both, follow=True)
        await both.node.write(both.job_there, b"before\n")
        assert (await anext(chunks)).data == b"before\n"
        await both.peer.cut()
        rest = asyncio.create_task(text(chunks))
        with both.results.write_log(both.job_id, 1) as log:
            log.write(stream_pb2.LogChunk(offset=0, data=b"before\nand after\n"))
            log.keep()
        assert await rest == b"and after\n"
        assert not both.peer.in_contact


async def test_output_is_followed_from_before_the_job_is_there(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        rest = asyncio.create_task(text(reading(both, follow=True)))
        await both.node.write(both.job_there, b"all of it\n")
        await both.begin()
        await both.node.exit(both.job_there, 0)
        assert await rest == b"all of it\n"


async def test_parts_of_output_are_read(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        await both.node.write(both.job_there, b"one\ntwo\nthree\n")
        assert await text(reading(both)) == b"one\ntwo\nthree\n"
        assert await text(reading(both, offset=4)) == b"two\nthree\n"
        assert await text(reading(both, tail_lines=1)) == b"three\n"
        assert await text(reading(both, offset=99)) == b""


async def test_output_at_an_absent_peer_is_not_waited_for_unasked(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        await both.peer.cut()
        with pytest.raises(Refusal) as caught:
            await text(reading(both))
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "PEER_UNREACHABLE")
        assert caught.value.retry_after_s


async def test_output_that_a_peer_left_out_is_noticed(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.begin()
        await both.node.write(both.job_there, b"all of it\n")
        both.peer.spoil = lambda _: stream_pb2.LogChunk(offset=4, data=b"of it\n").SerializeToString()
        with pytest.raises(Refusal) as caught:
            await text(reading(both))
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DATA_LOSS, "PEER_ANSWER_INVALID")
