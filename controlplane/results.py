"""What jobs leave: logs and artifacts, on disk, for good.

    RESULTS/<job>/<attempt>/log              frames of LogChunk messages, with their offsets, streams and times
    RESULTS/<job>/<attempt>/log.index        (offset in the output, position in `log`), every 256 KiB of long logs
    RESULTS/<job>/<attempt>/artifacts.tar.gz the archive, as the node made it
    RESULTS/<job>/<attempt>/artifacts.pb     its ArtifactManifest
    RESULTS/<job>/<attempt>/workspace.*      the same of a workspace, while it is on its way to another node

A file has its final name only when all of it is on disk.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from puhui.v1 import stream_pb2

__all__ = ["ArtifactWriter", "LogWriter", "Results", "sync_folder"]

_LENGTH = struct.Struct("<I")
_INDEX = struct.Struct("<QQ")
_INDEX_BYTES = 256 * 2**10


class Results:
    """The results of every job of a centre."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def folder(self, job_id: str, attempt: int) -> Path:
        """Returns the folder of an attempt."""
        return self._folder / job_id / str(attempt)

    def write_log(self, job_id: str, attempt: int) -> LogWriter:
        """Begins the log of an attempt anew.

        Raises:
            OSError: the disk is full.
        """
        return LogWriter(self._made(job_id, attempt) / "log")

    def write_artifacts(self, job_id: str, attempt: int) -> ArtifactWriter:
        """Begins the artifacts of an attempt anew.

        Raises:
            OSError: the disk is full.
        """
        return ArtifactWriter(self._made(job_id, attempt))

    def write_workspace(self, job_id: str, attempt: int) -> ArtifactWriter:
        """Begins the workspace of an attempt, on its way to another node, anew.

        Raises:
            OSError: the disk is full.
        """
        return ArtifactWriter(self._made(job_id, attempt), "workspace")

    def workspace(self, job_id: str, attempt: int) -> tuple[Path, stream_pb2.ArtifactManifest] | None:
        """Returns the archive of an attempt's workspace and what it holds; None when it is not here."""
        path = self.folder(job_id, attempt) / "workspace.pb"
        if not path.exists():
            return None
        return path.with_name("workspace.tar.gz"), stream_pb2.ArtifactManifest.FromString(path.read_bytes())

    def drop_workspace(self, job_id: str, attempt: int) -> None:
        """Forgets the workspace of an attempt: it has arrived."""
        for name in ("workspace.pb", "workspace.tar.gz"):
            (self.folder(job_id, attempt) / name).unlink(missing_ok=True)

    def _made(self, job_id: str, attempt: int) -> Path:
        folder = self.folder(job_id, attempt)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def has_log(self, job_id: str, attempt: int) -> bool:
        """Returns whether the whole log of an attempt is here."""
        return (self.folder(job_id, attempt) / "log").exists()

    def remove(self, job_id: str, attempt: int) -> None:
        """Removes what an attempt left.

        Raises:
            OSError: it cannot be removed.
        """
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder(job_id, attempt))

    def settle(self, job_id: str, attempt: int) -> None:
        """Makes what was kept of an attempt survive a power cut.

        Raises:
            OSError: the disk is full.
        """
        for folder in (self.folder(job_id, attempt), self._folder / job_id, self._folder):
            sync_folder(folder)

    def tail(self, job_id: str, attempt: int, lines: int) -> int:
        """Returns the byte offset at which the last lines of an attempt's log begin. It reads all of them.

        Args:
            job_id: the job.
            attempt: the number of its attempt.
            lines: how many, at least 1.
        """
        path = self.folder(job_id, attempt) / "log"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            return _offset_of_tail(file, _read_index(path), lines)

    def end_of_log(self, job_id: str, attempt: int, size_bytes: int, tail_bytes: int) -> bytes:
        """Returns the last bytes of an attempt's output, both streams; empty when there is no log.

        Args:
            job_id: the job.
            attempt: the number of its attempt.
            size_bytes: size of its whole output.
            tail_bytes: how many bytes, at most.
        """
        chunks = self.log(job_id, attempt, max(0, size_bytes - tail_bytes))
        return b"".join(chunk.data for chunk in chunks)[-tail_bytes:]

    def log(self, job_id: str, attempt: int, offset: int = 0) -> Iterator[stream_pb2.LogChunk]:
        """Yields the output of an attempt from a byte offset on; nothing when there is no log."""
        path = self.folder(job_id, attempt) / "log"
        if not path.exists():
            return
        index = _read_index(path)
        with path.open("rb") as file:
            file.seek(_position_of(index, offset))
            for chunk in _frames(file):
                end = chunk.offset + len(chunk.data)
                if end <= offset:
                    continue
                if chunk.offset < offset:
                    chunk.data = chunk.data[offset - chunk.offset :]
                    chunk.offset = offset
                yield chunk

    def manifest(self, job_id: str, attempt: int) -> stream_pb2.ArtifactManifest | None:
        """Returns what the artifact archive of an attempt holds; None when there is none."""
        path = self.folder(job_id, attempt) / "artifacts.pb"
        return stream_pb2.ArtifactManifest.FromString(path.read_bytes()) if path.exists() else None

    def archive(self, job_id: str, attempt: int) -> Path:
        """Returns the path of an attempt's artifact archive."""
        return self.folder(job_id, attempt) / "artifacts.tar.gz"


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut.

    Raises:
        OSError: it cannot be written.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Durable:
    """A file that gets its final name when all of it is on disk, or vanishes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: BinaryIO = self._partial.open("wb")

    def write(self, data: bytes | bytearray) -> None:
        self._file.write(data)

    def keep(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)

    def drop(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class LogWriter:
    """Writes one log. Leave the block without `keep`, and there is none."""

    def __init__(self, path: Path) -> None:
        self._log = _Durable(path)
        self._index_path = path.with_name("log.index")
        self._index_path.unlink(missing_ok=True)  # of an earlier try
        self._index = bytearray()
        self._position = 0
        self._indexed = 0
        self._kept = False
        self.size_bytes = 0
        """Bytes of output so far: the offset from which the next chunk is wanted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self._log.drop()

    def write(self, chunk: stream_pb2.LogChunk) -> None:
        """Appends a chunk; what of it is there already is left out.

        Raises:
            OSError: the disk is full.
        """
        skip = self.size_bytes - chunk.offset
        if skip > 0:
            chunk = stream_pb2.LogChunk(
                offset=self.size_bytes, data=chunk.data[skip:], stream=chunk.stream, time=chunk.time
            )
        if not chunk.data:
            return
        if chunk.offset >= self._indexed + _INDEX_BYTES:
            self._index += _INDEX.pack(chunk.offset, self._position)
            self._indexed = chunk.offset
        body = chunk.SerializeToString()
        self._log.write(_LENGTH.pack(len(body)) + body)
        self._position += _LENGTH.size + len(body)
        self.size_bytes = chunk.offset + len(chunk.data)

    def keep(self) -> None:
        """The log is whole: gives it its name.

        Raises:
            OSError: the disk is full.
        """
        if self._index:
            index = _Durable(self._index_path)
            index.write(self._index)
            index.keep()
        self._log.keep()
        self._kept = True


class ArtifactWriter:
    """Writes one archive and its manifest. Leave the block without `keep`, and there is none.

    Args:
        folder: where.
        name: "artifacts" or "workspace".
    """

    def __init__(self, folder: Path, name: str = "artifacts") -> None:
        self._manifest = folder / f"{name}.pb"
        self._archive = _Durable(folder / f"{name}.tar.gz")
        self._digest = hashlib.sha256()
        self._kept = False
        self.size_bytes = 0
        """Bytes of archive so far: the offset from which the next chunk is wanted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self._archive.drop()

    def write(self, chunk: bytes) -> None:
        """Appends a chunk.

        Raises:
            OSError: the disk is full.
        """
        self._archive.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def matches(self, manifest: stream_pb2.ArtifactManifest) -> bool:
        """Returns whether what was written is what the manifest says."""
        if not manifest.digest:
            return self.size_bytes == 0
        return self.size_bytes == manifest.size_bytes and "sha256:" + self._digest.hexdigest() == manifest.digest

    def keep(self, manifest: stream_pb2.ArtifactManifest) -> None:
        """The archive is whole: gives it its name.

        Raises:
            OSError: the disk is full.
        """
        self._archive.keep()
        words = _Durable(self._manifest)
        words.write(manifest.SerializeToString())
        words.keep()
        self._kept = True


def _frames(file: BinaryIO) -> Iterator[stream_pb2.LogChunk]:
    while head := file.read(_LENGTH.size):
        yield stream_pb2.LogChunk.FromString(file.read(_LENGTH.unpack(head)[0]))


def _read_index(log: Path) -> list[tuple[int, int]]:
    index = log.with_name("log.index")
    return [(0, 0), *(_INDEX.iter_unpack(index.read_bytes()) if index.exists() else ())]


def _position_of(index: list[tuple[int, int]], offset: int) -> int:
    return index[bisect.bisect_right(index, (offset, 2**64)) - 1][1]


def _offset_of_tail(file: BinaryIO, index: list[tuple[int, int]], lines: int) -> int:
    """Returns the offset at which the last `lines` lines begin."""
    file.seek(0, os.SEEK_END)
    end_position = file.tell()
    last_end = 0
    for _, position in reversed(index):
        file.seek(position)
        here = list(_frames_until(file, end_position))
        for chunk in reversed(here):
            last_end = last_end or chunk.offset + len(chunk.data)
            # The newline that ends the last line begins no other.
            at = chunk.data.rfind(b"\n", 0, last_end - 1 - chunk.offset)
            while at >= 0:
                lines -= 1
                if not lines:
                    return chunk.offset + at + 1
                at = chunk.data.rfind(b"\n", 0, at)
        end_position = position
    return 0


def _frames_until(file: BinaryIO, end: int) -> Iterator[stream_pb2.LogChunk]:
    while file.tell() < end:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        yield stream_pb2.LogChunk.FromString(file.read(length))
