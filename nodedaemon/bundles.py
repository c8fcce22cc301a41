"""Bundles on this node: unpacked once, shared read-only by every container that runs their code."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import grpc
import structlog

from puhui.rpc.bundle import BundleLimits, unpack
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import DIGEST_PATTERN
from puhui.rpc.transfer import UploadPart, receive
from puhui.v1.stream_pb2 import Bundle

__all__ = ["Bundles", "StoredBundle", "evictions"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StoredBundle:
    """A bundle that this node has."""

    id: str
    unpacked_bytes: int
    used_time: float
    """When a container last asked for it, in seconds since the epoch."""


def evictions(stored: Sequence[StoredBundle], in_use: Collection[str], most_bytes: int) -> list[str]:
    """Returns the ids of the bundles to drop so that the others take at most `most_bytes`.

    The least recently used go first; those in use never go.
    """
    excess = sum(bundle.unpacked_bytes for bundle in stored) - most_bytes
    dropped = []
    for bundle in sorted(stored, key=lambda bundle: bundle.used_time):
        if excess <= 0:
            break
        if bundle.id not in in_use:
            dropped.append(bundle.id)
            excess -= bundle.unpacked_bytes
    return dropped


class Bundles:
    """The bundles of this node, by digest.

    Args:
        root: directory for them.
        most_bytes: unpacked size that bundles not in use are kept up to.
        limits: what one bundle may be at most.
    """

    def __init__(self, root: Path, most_bytes: int = 20 * 2**30, limits: BundleLimits | None = None) -> None:
        self._root = root
        self._most_bytes = most_bytes
        self._limits = limits or BundleLimits()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        root.mkdir(mode=0o755, exist_ok=True)
        for path in root.iterdir():
            if not (path / "bundle.json").exists():  # cut short by a crash
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    async def put(self, parts: AsyncIterator[UploadPart], in_use: Callable[[], Collection[str]]) -> tuple[Bundle, bool]:
        """Takes an upload. Returns the bundle, and whether it was here already.

        Args:
            parts: the upload.
            in_use: says which bundles must not be dropped to make room; asked after the upload, which takes long.

        Raises:
            Refusal: as `puhui.rpc.transfer.receive` and `puhui.rpc.bundle.unpack` do.
            OSError: the disk is full.
        """
        async with receive(parts, self._root, self._limits.archive_bytes) as upload:
            known = self._read(upload.bundle_id)
            if known is not None:
                return known, True
            await upload.finish()
            async with self._locks.setdefault(upload.bundle_id, asyncio.Lock()):
                known = self._read(upload.bundle_id)
                if known is not None:
                    return known, True
                bundle = await asyncio.to_thread(self._unpack, upload.bundle_id, upload.path)
        await asyncio.to_thread(self._drop_excess, {*in_use(), bundle.id})
        return bundle, False

    def _unpack(self, bundle_id: str, archive: Path) -> Bundle:
        place = self._place(bundle_id)
        partial = Path(tempfile.mkdtemp(prefix="unpack-", dir=self._root))
        try:
            code = partial / "code"
            code.mkdir()
            contents = unpack(archive, code, self._limits)
            for folder, _, files in os.walk(code):
                Path(folder).chmod(0o755)
                for name in files:
                    path = Path(folder, name)
                    if not path.is_symlink():
                        path.chmod(path.stat().st_mode & 0o755 | 0o444)
            bundle = Bundle(
                id=bundle_id,
                size_bytes=archive.stat().st_size,
                unpacked_bytes=contents.unpacked_bytes,
                file_count=contents.file_count,
            )
            (partial / "bundle.json").write_text(
                json.dumps({name: getattr(bundle, name) for name in ("size_bytes", "unpacked_bytes", "file_count")})
            )
            partial.chmod(0o755)
            partial.rename(place)
        except BaseException:
            shutil.rmtree(partial)
            raise
        return bundle

    def _drop_excess(self, in_use: Collection[str]) -> None:
        stored = []
        for path in self._root.glob("*/bundle.json"):
            bundle_id = "sha256:" + path.parent.name
            bundle = self._read(bundle_id)
            if bundle is not None:
                stored.append(StoredBundle(bundle_id, bundle.unpacked_bytes, path.stat().st_mtime))
        for bundle_id in evictions(stored, in_use, self._most_bytes):
            place = self._place(bundle_id)
            # Without its description it is no bundle any more, however far the removal comes.
            (place / "bundle.json").unlink(missing_ok=True)
            shutil.rmtree(place)
            _log.info("dropped a bundle to make room", bundle=bundle_id)

    def code(self, bundle_id: str) -> Path:
        """Returns the directory that a bundle's code is in.

        Raises:
            Refusal: FAILED_PRECONDITION with BUNDLE_NOT_FOUND.
        """
        if not DIGEST_PATTERN.fullmatch(bundle_id) or self._read(bundle_id) is None:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "BUNDLE_NOT_FOUND",
                f"this node does not have the bundle {bundle_id!r}; upload it with PutBundle first",
                bundle_id=bundle_id,
            )
        os.utime(self._place(bundle_id) / "bundle.json")
        return self._place(bundle_id) / "code"

    def _place(self, bundle_id: str) -> Path:
        return self._root / bundle_id.removeprefix("sha256:")

    def _read(self, bundle_id: str) -> Bundle | None:
        try:
            facts = json.loads((self._place(bundle_id) / "bundle.json").read_text())
        except FileNotFoundError:
            return None
        return Bundle(id=bundle_id, **facts)
