"""A bundle of model code: how it is packed, checked and unpacked.

A bundle is a gzip-compressed tar archive of regular files, directories and symbolic links that stay
inside it. Whoever receives one checks it before keeping it: every entry and every limit of
`puhui.rpc.bundle_rules` is looked at while the archive is read, so a bomb is noticed before it has gone off.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import grpc

from puhui.rpc.bundle_rules import (
    BundleContents,
    BundleEntries,
    BundleHeaderBlock,
    BundleLimits,
    normalized,
    too_large,
)
from puhui.rpc.errors import Refusal

__all__ = [
    "SKIPPED_FOLDERS",
    "BundleContents",
    "BundleLimits",
    "Contents",
    "check",
    "pack",
    "pack_files",
    "read_files",
    "survey",
    "unpack",
]

SKIPPED_FOLDERS = frozenset(
    {
        ".git",
        ".hg",
        ".svn",
        "__pycache__",
        ".venv",
        "venv",
        "node_modules",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
        ".ipynb_checkpoints",
    }
)
"""Names of folders that are never packed: version control, caches, environments."""

# The first moment that a zip archive can hold: code that zips itself up must find no earlier one.
_MTIME_S = 315_532_800


def survey(source: Path, limits: BundleLimits) -> BundleContents:
    """Looks at a directory, or one file, that is to be packed, without reading the files.

    Raises:
        Refusal: the tree holds something that no bundle may hold (INVALID_ARGUMENT), or too much
            (RESOURCE_EXHAUSTED); nearly always as `pack` and `check` would say.
        OSError: something cannot be looked at.
    """
    entries = BundleEntries(limits)
    total = 0
    with tarfile.open(fileobj=io.BytesIO(), mode="w|") as tar:
        for entry, _ in _entries(source, tar):
            entries.add(entry)
            total += entry.size
            if total > limits.unpacked_bytes:  # a home directory would take minutes to walk to its end
                raise too_large("code", total, limits.unpacked_bytes)
    return entries.contents()


def pack(source: Path, archive: IO[bytes]) -> BundleContents:
    """Packs a directory, or one file, into `archive`.

    Version control, caches and virtual environments are left out. The same tree packs to the same bytes, so
    that a centre recognizes what it already has.

    Raises:
        Refusal: the tree holds something that no bundle may hold (INVALID_ARGUMENT), or too much
            (RESOURCE_EXHAUSTED).
        OSError: something cannot be read, or changes while it is read.
    """
    entries = BundleEntries(BundleLimits())
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=archive, compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for entry, path in _entries(source, tar):
            entries.add(entry)
            if entry.isreg():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
    return entries.contents()


def _entries(source: Path, tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, Path]]:
    for path, name in _walk(source):
        entry = tar.gettarinfo(path, name)
        if entry is not None and entry.islnk():
            # A second name of a file that is packed already: two files to whoever unpacks it.
            entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
        if entry is None or not (entry.isreg() or entry.isdir() or entry.issym()):
            continue  # a socket or a pipe of some running program is not code
        # Who packed it, and when, must not change the digest.
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = _MTIME_S
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        yield entry, path


def _walk(source: Path) -> Iterator[tuple[Path, str]]:
    if not source.is_dir():
        yield source, source.name
        return

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(source, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        here = Path(folder)
        for name in sorted([*subfolders, *files]):
            path = here / name
            yield path, path.relative_to(source).as_posix()


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """Packs files given by path and content, and returns the archive.

    Raises:
        Refusal: INVALID_ARGUMENT, a path leaves the bundle, say (BUNDLE_PATH_OUTSIDE).
    """
    entries = BundleEntries(BundleLimits())
    archive = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=archive, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(normalized(name))
            entry.size = len(content)
            entry.mode = 0o644
            entry.mtime = _MTIME_S
            entries.add(entry)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def check(archive: Path, limits: BundleLimits) -> BundleContents:
    """Reads the whole archive and refuses it if it is not a harmless bundle. Writes nothing.

    Raises:
        Refusal: INVALID_ARGUMENT with reason BUNDLE_UNREADABLE, BUNDLE_PATH_OUTSIDE, BUNDLE_PATH_TWICE,
            BUNDLE_NAME_ENCODING, BUNDLE_LINK_OUTSIDE, BUNDLE_ENTRY_KIND or BUNDLE_EMPTY; RESOURCE_EXHAUSTED with
            BUNDLE_TOO_LARGE, BUNDLE_TOO_MANY_FILES or BUNDLE_RATIO.
    """
    entries = BundleEntries(limits)
    archive_bytes = archive.stat().st_size
    if archive_bytes > limits.archive_bytes:
        raise too_large("archive", archive_bytes, limits.archive_bytes)
    with _readable(), gzip.open(archive, "rb") as unzipped:
        # The guard sees every unpacked byte, headers and padding too, before tarfile does.
        guard = _Guard(cast("IO[bytes]", unzipped), archive_bytes, limits)
        with tarfile.open(fileobj=guard, mode="r|", errorlevel=2, tarinfo=BundleHeaderBlock) as tar:
            for entry in tar:
                entries.add(entry)
        # tarfile stops at the end mark; what follows is unpacked by others, and holds the checksum.
        while guard.read(2**20):
            pass
    return entries.contents()


def unpack(archive: Path, target: Path, limits: BundleLimits) -> BundleContents:
    """Checks the archive, then unpacks it into the empty directory `target`.

    Raises:
        Refusal: as `check` does; nothing has been unpacked then.
        OSError: the disk is full, or `target` cannot be written.
    """
    contents = check(archive, limits)
    with _readable(), tarfile.open(archive, "r:gz", errorlevel=2) as tar:
        # Python before 3.11.4 has no filters. What `check` let through needs none; two locks are better than one.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(target, members=_disowned(tar))  # noqa: S202 - every entry has been checked
    return contents


def _disowned(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for entry in tar:
        entry.uid, entry.gid = os.geteuid(), os.getegid()
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        yield entry


@dataclass(frozen=True)
class Contents:
    """What is in the regular files of a bundle, by normalized path."""

    files: dict[str, bytes]
    """Content of those that were read."""
    digests: dict[str, str]
    """SHA-256, in hex, of small ones that were not."""


def read_files(
    archive: Path, limits: BundleLimits, *, suffixes: tuple[str, ...], most_bytes: int, largest_digested: int = 0
) -> Contents:
    """Returns the content of regular files whose names end in one of `suffixes`, and digests of others.

    Args:
        archive: the bundle.
        limits: what a bundle may be.
        suffixes: how the names of files end that are read.
        most_bytes: of content; a file that is larger than what is left of it is not read.
        largest_digested: bytes of the largest file that has a digest where it is not read.

    Raises:
        Refusal: as `check` does.
    """
    check(archive, limits)
    found = Contents({}, {})
    left = most_bytes
    with _readable(), tarfile.open(archive, "r:gz", errorlevel=2) as tar:
        for entry in tar:
            wanted = entry.name.endswith(suffixes) and entry.size <= left
            if not entry.isreg() or not (wanted or entry.size <= largest_digested):
                continue
            file = tar.extractfile(entry)
            if file is None:
                continue
            content = file.read()
            if wanted:
                found.files[normalized(entry.name)] = content
                left -= entry.size
            else:
                found.digests[normalized(entry.name)] = hashlib.sha256(content).hexdigest()
    return found


class _readable:  # noqa: N801 - reads as a word in a with statement
    """Turns what gzip, zlib and tarfile raise on a damaged archive into one refusal."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, tarfile.TarError | gzip.BadGzipFile | zlib.error | EOFError | UnicodeError | ValueError):
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "BUNDLE_UNREADABLE",
                f"the bundle is not a whole gzip-compressed tar archive ({error})",
            ) from error


class _Guard(io.RawIOBase):
    """Counts what comes out of the decompressor and stops it at the limits."""

    def __init__(self, source: IO[bytes], archive_bytes: int, limits: BundleLimits) -> None:
        self._source = source
        self._archive_bytes = archive_bytes
        self._limits = limits
        self._seen = 0

    def readable(self) -> bool:
        """Returns True: tarfile asks."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes, or refuses."""
        data = self._source.read(size if size >= 0 else 2**20)
        self._seen += len(data)
        limits = self._limits
        if self._seen > limits.unpacked_bytes + limits.files * 2048:
            raise too_large("unpacked bundle", self._seen, limits.unpacked_bytes)
        if self._seen > limits.ratio_floor_bytes and self._seen > limits.ratio * self._archive_bytes:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "BUNDLE_RATIO",
                f"the bundle unpacks to more than {limits.ratio} times its size, as a decompression bomb does; "
                "leave out files that are nearly all the same byte",
            )
        return data
