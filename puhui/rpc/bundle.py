"""A bundle of model code: how it is packed, checked and unpacked.

A bundle is a gzip-compressed tar archive of regular files, directories and symbolic links that stay
inside it. Whoever receives one checks it before keeping it: every entry and every limit below is looked at
while the archive is read, so a bomb is noticed before it has gone off.
"""

from __future__ import annotations

import gzip
import io
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import grpc

from puhui.rpc.errors import Refusal

__all__ = ["BundleContents", "BundleLimits", "check", "pack", "pack_files", "read_files", "unpack"]


@dataclass(frozen=True)
class BundleLimits:
    """What a bundle may be at most."""

    archive_bytes: int = 512 * 2**20
    """Size of the archive."""
    unpacked_bytes: int = 4 * 2**30
    """Size of all files in it together."""
    files: int = 20_000
    """Number of entries."""
    ratio: int = 200
    """Unpacked size over archive size. Only asked of archives that unpack to more than `ratio_floor_bytes`."""
    ratio_floor_bytes: int = 64 * 2**20
    """Below this unpacked size any ratio is harmless."""
    path_bytes: int = 1024
    """Length of one path."""


@dataclass(frozen=True)
class BundleContents:
    """What an archive turned out to hold."""

    file_count: int
    """Regular files."""
    unpacked_bytes: int
    """Their size together."""
    sizes: Mapping[str, int]
    """Size of each regular file, in bytes, by its normalized path."""


_SKIPPED = frozenset(
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


def pack(source: Path, archive: IO[bytes]) -> BundleContents:
    """Packs a directory, or one file, into `archive`.

    Version control, caches and virtual environments are left out. The same tree packs to the same bytes, so
    that a centre recognizes what it already has.

    Raises:
        Refusal: the tree holds something that no bundle may hold (INVALID_ARGUMENT).
        OSError: something cannot be read.
    """
    sizes: dict[str, int] = {}
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=archive, compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path, name in _walk(source):
            entry = tar.gettarinfo(path, name)
            if entry is None or not (entry.isreg() or entry.isdir() or entry.issym()):
                continue  # a socket or a pipe of some running program is not code
            if entry.issym():
                _require_inside(name, entry.linkname)
            # Who packed it, and when, must not change the digest.
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = 0
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            if entry.isreg():
                sizes[name] = entry.size
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
    return BundleContents(len(sizes), sum(sizes.values()), sizes)


def _walk(source: Path) -> Iterator[tuple[Path, str]]:
    if source.is_file():
        yield source, source.name
        return
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED)
        here = Path(folder)
        for name in sorted([*subfolders, *files]):
            path = here / name
            yield path, path.relative_to(source).as_posix()


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """Packs files given by path and content, and returns the archive.

    Raises:
        Refusal: a path leaves the bundle (INVALID_ARGUMENT, BUNDLE_PATH_OUTSIDE).
    """
    archive = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=archive, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(_normalized(name))
            entry.size = len(content)
            entry.mode = 0o644
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def check(archive: Path, limits: BundleLimits) -> BundleContents:
    """Reads the whole archive and refuses it if it is not a harmless bundle. Writes nothing.

    Raises:
        Refusal: INVALID_ARGUMENT with reason BUNDLE_UNREADABLE, BUNDLE_PATH_OUTSIDE, BUNDLE_LINK_OUTSIDE,
            BUNDLE_ENTRY_KIND or BUNDLE_EMPTY; RESOURCE_EXHAUSTED with BUNDLE_TOO_LARGE, BUNDLE_TOO_MANY_FILES
            or BUNDLE_RATIO.
    """
    sizes: dict[str, int] = {}
    links: set[str] = set()
    archive_bytes = archive.stat().st_size
    if archive_bytes > limits.archive_bytes:
        raise _too_large("archive", archive_bytes, limits.archive_bytes)
    with _readable(), gzip.open(archive, "rb") as unzipped:
        # The guard sees every unpacked byte, headers and padding too, before tarfile does.
        guard = _Guard(cast("IO[bytes]", unzipped), archive_bytes, limits)
        with tarfile.open(fileobj=guard, mode="r|", errorlevel=2) as tar:
            for count, entry in enumerate(tar, start=1):
                if count > limits.files:
                    raise Refusal(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        "BUNDLE_TOO_MANY_FILES",
                        f"the bundle has more than {limits.files} entries; leave data out and declare it as an input",
                    )
                name = _checked(entry, limits, links)
                if entry.issym():
                    links.add(name)
                elif entry.isreg():
                    sizes[name] = entry.size
    if not sizes:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "BUNDLE_EMPTY",
            "the bundle holds no file; submit the code to run",
        )
    return BundleContents(len(sizes), sum(sizes.values()), sizes)


def unpack(archive: Path, target: Path, limits: BundleLimits) -> BundleContents:
    """Checks the archive, then unpacks it into the empty directory `target`.

    Raises:
        Refusal: as `check` does; nothing has been unpacked then.
        OSError: the disk is full, or `target` cannot be written.
    """
    contents = check(archive, limits)
    with _readable(), tarfile.open(archive, "r:gz", errorlevel=2) as tar:
        tar.extractall(target, filter="data")
    return contents


def read_files(archive: Path, limits: BundleLimits, *, suffixes: tuple[str, ...], most_bytes: int) -> dict[str, bytes]:
    """Returns the content of regular files whose names end in one of `suffixes`, by normalized path.

    A file that is larger than what is left of `most_bytes` is left out.

    Raises:
        Refusal: as `check` does.
    """
    contents = check(archive, limits)
    found: dict[str, bytes] = {}
    left = most_bytes
    with _readable(), tarfile.open(archive, "r:gz", errorlevel=2) as tar:
        for entry in tar:
            if not entry.isreg() or not entry.name.endswith(suffixes) or entry.size > left:
                continue
            file = tar.extractfile(entry)
            name = _normalized(entry.name)
            if file is not None and name in contents.sizes:
                found[name] = file.read()
                left -= entry.size
    return found


def _checked(entry: tarfile.TarInfo, limits: BundleLimits, links: set[str]) -> str:
    if len(entry.name.encode()) > limits.path_bytes:
        raise _outside(entry.name[:80] + "…", "is too long a path")
    name = _normalized(entry.name)
    if not (entry.isreg() or entry.isdir() or entry.issym()):
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "BUNDLE_ENTRY_KIND",
            f"{entry.name}: a bundle holds files, directories and symbolic links only",
            path=entry.name,
        )
    parents = name.split("/")
    for depth in range(1, len(parents)):
        if "/".join(parents[:depth]) in links:
            raise _outside(entry.name, "goes through a symbolic link")
    if entry.issym():
        _require_inside(name, entry.linkname)
    return name


def _normalized(name: str) -> str:
    normal = posixpath.normpath(name)
    if name.startswith("/") or "\\" in name or "\0" in name or normal == ".." or normal.startswith("../"):
        raise _outside(name, "leaves the bundle")
    return normal


def _require_inside(name: str, target: str) -> None:
    resolved = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if target.startswith("/") or resolved == ".." or resolved.startswith("../"):
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "BUNDLE_LINK_OUTSIDE",
            f"{name}: this symbolic link leads out of the bundle, to {target}; put a copy of the file there instead",
            path=name,
        )


def _outside(name: str, what: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "BUNDLE_PATH_OUTSIDE",
        f"{name}: this path {what}; every path in a bundle must be relative and stay inside it",
        path=name,
    )


def _too_large(what: str, size: int, limit: int) -> Refusal:
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "BUNDLE_TOO_LARGE",
        f"the {what} is larger than {limit // 2**20} MiB; leave data out and declare it as an input",
        size_bytes=str(size),
        limit_bytes=str(limit),
    )


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
            raise _too_large("unpacked bundle", self._seen, limits.unpacked_bytes)
        if self._seen > limits.ratio_floor_bytes and self._seen > limits.ratio * self._archive_bytes:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "BUNDLE_RATIO",
                f"the bundle unpacks to more than {limits.ratio} times its size, as a decompression bomb does",
            )
        return data
