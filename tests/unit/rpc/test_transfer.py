"""An upload arrives whole or leaves nothing."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import pytest

from puhui.rpc.errors import Refusal
from puhui.rpc.transfer import CHUNK_BYTES, read_chunks
from puhui.v1.job_service_pb2 import PutBundleRequest
from puhui.v1.stream_pb2 import BundleHeader
from tests.unit.rpc.echo import Echo, serving

DATA = bytes(range(256)) * 4000
ID = "sha256:" + hashlib.sha256(DATA).hexdigest()
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def header(bundle_id: str = ID, size: int = len(DATA)) -> PutBundleRequest:
    return PutBundleRequest(header=BundleHeader(bundle_id=bundle_id, size_bytes=size))


def chunks(data: bytes = DATA, size: int = 100_000) -> list[PutBundleRequest]:
    return [PutBundleRequest(chunk=data[start : start + size]) for start in range(0, len(data), size)]


WRONG: dict[str, tuple[Iterable[PutBundleRequest], grpc.StatusCode, str]] = {
    "nothing": ([], INVALID, "UPLOAD_MALFORMED"),
    "no header": (chunks(), INVALID, "UPLOAD_MALFORMED"),
    "an empty header": ([header(""), *chunks()], INVALID, "UPLOAD_MALFORMED"),
    "an id that is no digest": ([header("sha256:../../x"), *chunks()], INVALID, "UPLOAD_MALFORMED"),
    "an id in capitals": ([header(ID.upper()), *chunks()], INVALID, "UPLOAD_MALFORMED"),
    "two headers": ([header(), header(), *chunks()], INVALID, "UPLOAD_MALFORMED"),
    "an empty chunk": ([header(), PutBundleRequest(chunk=b"")], INVALID, "UPLOAD_MALFORMED"),
    "an empty message": ([header(), PutBundleRequest()], INVALID, "UPLOAD_MALFORMED"),
    "a chunk over 1 MiB": ([header(size=2**21), *chunks(bytes(2**21), 2**20 + 1)], INVALID, "UPLOAD_MALFORMED"),
    "more than announced": ([header(size=len(DATA) - 1), *chunks()], INVALID, "UPLOAD_MALFORMED"),
    "less than announced": ([header(), *chunks()[:-1]], INVALID, "UPLOAD_INCOMPLETE"),
    "no chunk": ([header()], INVALID, "UPLOAD_INCOMPLETE"),
    "other bytes": ([header(), *chunks(DATA[:-1] + b"!")], INVALID, "UPLOAD_DIGEST"),
    "too much": ([header(size=10**7)], grpc.StatusCode.RESOURCE_EXHAUSTED, "BUNDLE_TOO_LARGE"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_upload_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    parts, code, reason = WRONG[case]
    async with serving(tmp_path) as (echo, stub, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PutBundle(iter(parts))
        refusal = Refusal.of(caught.value)
        assert (refusal.code, refusal.reason) == (code, reason)
        assert echo.received == []
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [chunks(), []])
async def test_whoever_never_stops_sending_is_told_why_it_is_refused(
    code: list[PutBundleRequest], tmp_path: Path
) -> None:
    never = asyncio.Event()

    async def parts() -> AsyncIterator[PutBundleRequest]:
        yield header("sha256:../../x")
        for part in code:
            yield part
        await never.wait()

    async with serving(tmp_path) as (_, stub, _):
        call = stub.PutBundle(parts())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 30)
        assert Refusal.of(caught.value).reason == "UPLOAD_MALFORMED"
        assert list(tmp_path.iterdir()) == []


async def test_a_right_upload_arrives(tmp_path: Path) -> None:
    async with serving(tmp_path) as (echo, stub, _):
        echo.most_bytes = len(DATA)
        response = await stub.PutBundle(iter([header(), *chunks()]))
        assert response.bundle.id == ID
        assert echo.received == [ID]
        assert list(tmp_path.iterdir()) == []  # the test moves nothing away


async def test_a_client_that_vanishes_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (echo, stub, _):
        never = asyncio.Event()

        async def parts() -> AsyncIterator[PutBundleRequest]:
            yield header()
            yield chunks()[0]
            await never.wait()

        call = stub.PutBundle(parts())
        await echo.begun.wait()
        assert len(list(tmp_path.iterdir())) == 1
        call.cancel()
        await asyncio.wait_for(echo.ended.wait(), 10)
        assert list(tmp_path.iterdir()) == []
        assert echo.received == []


async def test_a_failure_of_the_receiver_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (echo, stub, _):
        echo.act = lambda: fail(echo)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.PutBundle(iter([header(), *chunks()]))
        assert list(tmp_path.iterdir()) == []


def fail(echo: Echo) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, len(DATA) - 1, len(DATA), len(DATA) + 1])
def test_a_file_is_read_from_any_offset(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    read = list(read_chunks(path, offset))
    assert b"".join(read) == DATA[offset:]
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in read)
