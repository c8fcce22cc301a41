"""Bundles on disk, by content: BUNDLES/<hex digest>.tar.gz. What is there has been checked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from controlplane.lasting import Lasting
from controlplane.records import BundleRecord
from controlplane.results import sync_folder
from controlplane.store import Store
from puhui.rpc.bundle import BundleLimits, Contents, check, read_files
from puhui.rpc.errors import Refusal
from puhui.rpc.transfer import UploadPart, receive
from puhui.v1 import stream_pb2

__all__ = ["Bundles", "InlineBundle"]

_SOURCES = (".py", ".sh", ".yaml", ".yml", ".json", ".toml", ".txt", ".cfg", ".ipynb")
_MOST_SOURCE_BYTES = 32 * 2**20
_LARGEST_DIGESTED = 2**20
"""A larger file is data, of which the size counts."""


class InlineBundle:
    """A bundle that came inside a request, in a temporary file until it is kept."""

    def __init__(self, record: BundleRecord, path: Path) -> None:
        self.record = record
        self.path = path


class Bundles:
    """The bundles of a centre."""

    def __init__(self, folder: Path, store: Store, lasting: Lasting, limits: BundleLimits | None = None) -> None:
        self._folder = folder
        self._store = store
        self._lasting = lasting
        self._placing = Counter[str]()
        self.limits = limits or BundleLimits()
        folder.mkdir(parents=True, exist_ok=True)
        # What an upload left when the process was killed.
        for stale in folder.glob("upload-*"):
            stale.unlink(missing_ok=True)

    async def receive(self, parts: AsyncIterator[UploadPart], *, prove: bool = False) -> tuple[BundleRecord, bool]:
        """Receives an upload. Returns the bundle, and whether it was there already.

        Args:
            parts: the upload.
            prove: whoever uploads must have all of it, also when it is here: to know its name is not to have it.

        Raises:
            Refusal: the upload is malformed, or the bundle is not harmless.
            OSError: the disk is full.
        """
        async with receive(parts, self._folder, self.limits.archive_bytes) as upload:
            known = await self.find(upload.bundle_id)
            if known is not None and not prove:
                return known, True
            await upload.finish()
            if known is not None:
                return known, True
            record = await self._checked(upload.bundle_id, upload.path)
            await self._lasting.do(self._keep(record, upload.path))
            return record, False

    async def _keep(self, record: BundleRecord, upload: Path) -> None:
        async with self.placed(record.id, upload):
            await self._store.put_bundle(record)

    async def write_inline(self, archive: bytes) -> InlineBundle:
        """Writes a packed bundle into a temporary file, which goes with `drop_inline`, and checks it.

        Raises:
            Refusal: the bundle is not harmless.
            OSError: the disk is full.
        """
        handle, name = tempfile.mkstemp(prefix="upload-", dir=self._folder)
        path = Path(name)
        try:
            digest = await self._lasting.do(asyncio.to_thread(_write, handle, archive))
            return InlineBundle(await self._checked("sha256:" + digest, path), path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def drop_inline(self, bundle: InlineBundle) -> None:
        """Removes the temporary file, if it is still there."""
        bundle.path.unlink(missing_ok=True)

    async def _checked(self, bundle_id: str, path: Path) -> BundleRecord:
        contents = await asyncio.to_thread(check, path, self.limits)
        return BundleRecord(bundle_id, path.stat().st_size, contents.unpacked_bytes, dict(contents.sizes))

    @contextlib.asynccontextmanager
    async def placed(self, bundle_id: str, upload: Path) -> AsyncIterator[None]:
        """Gives a checked archive its name, and takes it away again if the block, which stores it, fails.

        To be cancelled is not to fail: the block may be stored all the same. Use it inside `Lasting.do`.

        Raises:
            OSError: the disk is full.
        """
        place = self.path(bundle_id)
        if await self.find(bundle_id) is not None:
            yield
            return
        upload.replace(place)
        self._placing[bundle_id] += 1
        failed = False
        try:
            await asyncio.to_thread(sync_folder, self._folder)
            yield
        except Exception:
            failed = True
            raise
        finally:
            self._placing[bundle_id] -= 1
            # Another upload of the same bundle may be about to store it.
            if not self._placing[bundle_id]:
                del self._placing[bundle_id]
                if failed and await self._store.bundle(bundle_id) is None:
                    place.unlink(missing_ok=True)

    def path(self, bundle_id: str) -> Path:
        """Returns where a bundle is, or would be."""
        return self._folder / (bundle_id.removeprefix("sha256:") + ".tar.gz")

    async def find(self, bundle_id: str) -> BundleRecord | None:
        """Returns a bundle; None when it is not here."""
        record = await self._store.bundle(bundle_id)
        return record if record is not None and self.path(bundle_id).exists() else None

    async def require(self, bundle_id: str) -> BundleRecord:
        """Returns a bundle.

        Raises:
            Refusal: NOT_FOUND with BUNDLE_NOT_FOUND.
        """
        record = await self.find(bundle_id)
        if record is None:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "BUNDLE_NOT_FOUND",
                "this centre does not have that bundle; upload it with PutBundle first",
                bundle_id=bundle_id[:80],
            )
        return record

    async def locate(self, bundle_id: str) -> tuple[stream_pb2.BundleHeader, Path]:
        """Returns what announces a bundle to a node, and its archive.

        Raises:
            Refusal: NOT_FOUND with BUNDLE_NOT_FOUND.
        """
        record = await self.require(bundle_id)
        return stream_pb2.BundleHeader(bundle_id=record.id, size_bytes=record.size_bytes), self.path(bundle_id)

    async def sources(self, path: Path) -> Contents:
        """Returns the text files of a bundle that say what its code needs, and what tells its other small files."""
        return await asyncio.to_thread(
            read_files,
            path,
            self.limits,
            suffixes=_SOURCES,
            most_bytes=_MOST_SOURCE_BYTES,
            largest_digested=_LARGEST_DIGESTED,
        )


def _write(handle: int, archive: bytes) -> str:
    """Writes an archive and closes it, and returns its digest in hex."""
    with os.fdopen(handle, "wb") as file:
        file.write(archive)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(archive).hexdigest()
