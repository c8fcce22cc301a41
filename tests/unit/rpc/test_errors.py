"""A refusal arrives as it was raised, whatever kind of RPC it was raised in."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from puhui.rpc.channel import open_channel
from puhui.rpc.errors import Refusal, unimplemented
from puhui.v1.job_pb2 import JobSpec
from puhui.v1.job_service_pb2 import (
    GetJobRequest,
    PredictJobRequest,
    PutBundleRequest,
    RunJobRequest,
    WatchJobRequest,
)
from puhui.v1.job_service_pb2_grpc import JobServiceStub
from puhui.v1.stream_pb2 import BundleHeader
from tests.unit.rpc.echo import serving

HEADER = BundleHeader(bundle_id="sha256:" + "0" * 64, size_bytes=1)


async def unary(stub: Any) -> None:
    await stub.GetJob(GetJobRequest(job_id="j-1"))


async def server_stream(stub: Any) -> None:
    async for _ in stub.WatchJob(WatchJobRequest()):
        pass


async def client_stream(stub: Any) -> None:
    await stub.PutBundle(iter([PutBundleRequest(header=HEADER), PutBundleRequest(chunk=b"x")]))


async def both_streams(stub: Any) -> None:
    async for _ in stub.RunJob(iter([RunJobRequest(stdin=b"x")])):
        pass


KINDS = [unary, server_stream, client_stream, both_streams]


def failing(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


async def caught_from(call: Callable[[Any], Awaitable[None]], stub: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(stub)
    return Refusal.of(caught.value)


@pytest.mark.parametrize("call", KINDS)
async def test_a_refusal_arrives_whole(call: Callable[[Any], Awaitable[None]], tmp_path: Path) -> None:
    async with serving(tmp_path) as (echo, stub, _):
        echo.act = failing(
            Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUOTA",
                "no more than 3 jobs, 普惠; cancel one",
                retry_after_s=1.5,
                limit="3",
            )
        )
        refusal = await caught_from(call, stub)
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (refusal.reason, refusal.message) == ("QUOTA", "no more than 3 jobs, 普惠; cancel one")
    assert (refusal.metadata, refusal.retry_after_s) == ({"limit": "3"}, 1.5)


@pytest.mark.parametrize("call", KINDS)
async def test_what_nobody_foresaw_is_internal_and_says_nothing_of_the_inside(
    call: Callable[[Any], Awaitable[None]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) as (echo, stub, _):
        echo.act = failing(KeyError("secret"))
        refusal = await caught_from(call, stub)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "KeyError" in refusal.message
    assert "secret" not in refusal.message
    assert "secret" in "".join(capfd.readouterr())  # the server's log has it


async def test_a_huge_refusal_still_fits_the_wire(tmp_path: Path) -> None:
    async with serving(tmp_path) as (echo, stub, _):
        echo.act = failing(Refusal(grpc.StatusCode.NOT_FOUND, "LONG", "普" * 50_000, path="x" * 50_000, odd="\udcff"))
        refusal = await caught_from(unary, stub)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "LONG")
    assert refusal.message.startswith("普普")
    assert refusal.message.endswith("…")
    assert refusal.metadata["odd"] == "?"


async def test_metadata_may_be_called_anything(tmp_path: Path) -> None:
    refusal = Refusal(grpc.StatusCode.NOT_FOUND, "ODD", "odd")
    refusal.metadata = {"code": "1", "reason": "2", "message": "3", "self": "4", "retry_after_s": "5"}
    async with serving(tmp_path) as (echo, stub, _):
        echo.act = failing(refusal)
        assert (await caught_from(unary, stub)).metadata == refusal.metadata


async def test_a_server_that_is_not_there_has_no_reason() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        refusal = await caught_from(unary, JobServiceStub(channel))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "UNKNOWN")


async def test_what_is_not_served_yet_says_so(tmp_path: Path) -> None:
    async with serving(tmp_path) as (echo, stub, _):
        echo.act = failing(unimplemented("JobService.GetJob"))
        refusal = await caught_from(unary, stub)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "RPC_NOT_IMPLEMENTED")
    assert refusal.metadata == {"rpc": "JobService.GetJob"}


async def test_a_client_that_leaves_is_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with serving(tmp_path) as (_, stub, _):
        call = stub.WatchJob(WatchJobRequest())
        await call.read()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        await unary(stub)
    assert "unforeseen" not in "".join(capfd.readouterr())


async def test_a_message_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, stub, _):
        request = PredictJobRequest(spec=JobSpec(env={"A": "x" * 9 * 2**20}))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PredictJob(request)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
