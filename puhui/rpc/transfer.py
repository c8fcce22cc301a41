"""Files in chunks, up and down."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import grpc

from puhui.rpc.errors import Refusal
from puhui.rpc.identity import DIGEST_PATTERN
from puhui.v1.stream_pb2 import BundleHeader

__all__ = ["CHUNK_BYTES", "Upload", "UploadPart", "read_chunks", "receive"]

CHUNK_BYTES = 256 * 2**10
"""Size of the chunks that Puhui sends. Receivers take up to 1 MiB."""

_MOST_CHUNK_BYTES = 2**20
_HEARD_BYTES = 4 * 2**20
_HEARD_S = 1.0


class UploadPart(Protocol):
    """A message of an upload stream: first a header, then chunks."""

    @property
    def header(self) -> BundleHeader:
        """What is being uploaded, in the first message."""

    @property
    def chunk(self) -> bytes:
        """A piece of it, in every later one."""


class Upload:
    """An upload that is being received into a temporary file beside its place.

    Usage::

        async with receive(parts, folder, most_bytes) as upload:
            if already_have(upload.bundle_id): return ...
            await upload.finish()                 # all bytes are here and match the digest
            check(upload.path); os.replace(upload.path, place)

    Whatever happens, nothing is left behind but what the caller moved away.
    """

    def __init__(self, header: BundleHeader, parts: AsyncIterator[UploadPart], path: Path) -> None:
        self.bundle_id = header.bundle_id
        self.size_bytes = header.size_bytes
        self.path = path
        self._parts = parts

    async def finish(self) -> None:
        """Receives all bytes.

        Raises:
            Refusal: INVALID_ARGUMENT with UPLOAD_INCOMPLETE, UPLOAD_MALFORMED or UPLOAD_DIGEST.
            OSError: the disk is full.
        """
        digest = hashlib.sha256()
        received = 0
        with self.path.open("wb") as file:
            async for part in self._parts:
                chunk = part.chunk
                if not chunk or len(chunk) > _MOST_CHUNK_BYTES:
                    raise _malformed("after the header, every message holds a chunk of 1 B to 1 MiB")
                received += len(chunk)
                if received > self.size_bytes:
                    raise _malformed("more bytes arrived than the header announced")
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())  # half a GiB takes seconds, and others wait
        if received < self.size_bytes:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "UPLOAD_INCOMPLETE",
                f"{received} of {self.size_bytes} bytes arrived; upload the bundle again",
            )
        if "sha256:" + digest.hexdigest() != self.bundle_id:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "UPLOAD_DIGEST",
                "the bytes that arrived do not have the digest that the header announced; upload the bundle again",
            )


@contextlib.asynccontextmanager
async def receive(parts: AsyncIterator[UploadPart], folder: Path, most_bytes: int) -> AsyncIterator[Upload]:
    """Reads the header of an upload, and removes what the caller leaves of it.

    Args:
        parts: the stream of messages.
        folder: where the temporary file goes; the same file system as the file's final place.
        most_bytes: largest archive that is taken.

    Raises:
        Refusal: INVALID_ARGUMENT with UPLOAD_MALFORMED; RESOURCE_EXHAUSTED with BUNDLE_TOO_LARGE.
    """
    try:
        header = _header(await anext(parts, None), most_bytes)
        handle, name = tempfile.mkstemp(prefix="upload-", dir=folder)
        os.close(handle)
        path = Path(name)
        try:
            yield Upload(header, parts, path)
        finally:
            path.unlink(missing_ok=True)
    except (Refusal, OSError):
        await _hear_out(parts)
        raise
    await _hear_out(parts)


def _header(first: UploadPart | None, most_bytes: int) -> BundleHeader:
    if first is None or not first.header.bundle_id:
        raise _malformed("the first message must be the header, with bundle_id and size_bytes")
    header = first.header
    if not DIGEST_PATTERN.fullmatch(header.bundle_id):
        raise _malformed('bundle_id must be "sha256:" and 64 hex digits')
    if header.size_bytes > most_bytes:
        raise Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "BUNDLE_TOO_LARGE",
            f"the archive is larger than {most_bytes // 2**20} MiB; leave out what the code does not need",
            size_bytes=str(header.size_bytes),
            limit_bytes=str(most_bytes),
        )
    return header


async def _hear_out(parts: AsyncIterator[UploadPart]) -> None:
    """Reads on, for a while, what a caller still sends though its answer is known.

    gRPC's asynchronous client takes the end of a call that it is writing to for a fault of its own, "Internal error
    from Core", and tells that instead of the answer.
    """
    left = _HEARD_BYTES
    with contextlib.suppress(TimeoutError, Refusal, grpc.RpcError):
        async with asyncio.timeout(_HEARD_S):
            async for part in parts:
                left -= len(part.chunk)
                if left < 0:
                    return


def read_chunks(path: Path, offset: int = 0) -> Iterator[bytes]:
    """Yields a file from `offset` on in chunks of CHUNK_BYTES.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _malformed(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, "UPLOAD_MALFORMED", message)
