"""What a bundle may hold: the limits, and the judgement of its entries one after the other."""

from __future__ import annotations

import posixpath
import tarfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import grpc

from puhui.rpc.errors import Refusal

__all__ = ["BundleContents", "BundleEntries", "BundleHeaderBlock", "BundleLimits", "normalized", "too_large"]


@dataclass(frozen=True)
class BundleLimits:
    """What a bundle may be at most."""

    archive_bytes: int = 512 * 2**20
    """Size of the archive."""
    unpacked_bytes: int = 4 * 2**30
    """Size of all files in it together."""
    files: int = 20_000
    """Number of files, folders and links."""
    links: int = 2_000
    """Number of symbolic links."""
    ratio: int = 200
    """Unpacked size over archive size. Only asked of archives that unpack to more than `ratio_floor_bytes`."""
    ratio_floor_bytes: int = 64 * 2**20
    """Below this unpacked size any ratio is harmless."""
    path_bytes: int = 1024
    """Length of one path, and of the target of a link."""
    least_files: int = 1
    """Regular files that it must hold."""


@dataclass(frozen=True)
class BundleContents:
    """What an archive turned out to hold."""

    file_count: int
    """Regular files."""
    unpacked_bytes: int
    """Their size together."""
    sizes: Mapping[str, int]
    """Size of each regular file, in bytes, by its normalized path."""


_MOST_NAME_BYTES = 255  # one component of a path, on every Linux file system
_MOST_HOPS = 8  # links that one link may lead through
_MOST_EXTENSION_BYTES = 64 * 2**10
_EXTENSIONS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)


class BundleHeaderBlock(tarfile.TarInfo):
    """A header of an archive, refused when it announces an extended header that would fill the memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Reads one 512-byte header block.

        Raises:
            Refusal: INVALID_ARGUMENT with BUNDLE_PATH_OUTSIDE.
        """
        block = super().frombuf(buf, encoding, errors)
        if block.type in _EXTENSIONS and not 0 <= block.size <= _MOST_EXTENSION_BYTES:
            raise _outside(block.name, "is too long a path")
        return block


class BundleEntries:
    """The entries of one bundle, each judged as it comes.

    No path may lead outside, lead through a link, or be two things; so whoever unpacks what was let through
    into an empty folder writes nowhere else.
    """

    def __init__(self, limits: BundleLimits) -> None:
        self._limits = limits
        self._sizes: dict[str, int] = {}
        self._folders: set[str] = set()
        self._links: dict[str, str] = {}

    def add(self, entry: tarfile.TarInfo) -> str:
        """Judges an entry, and returns its normalized path.

        Raises:
            Refusal: INVALID_ARGUMENT with BUNDLE_PATH_OUTSIDE, BUNDLE_PATH_TWICE, BUNDLE_NAME_ENCODING,
                BUNDLE_LINK_OUTSIDE or BUNDLE_ENTRY_KIND; RESOURCE_EXHAUSTED with BUNDLE_TOO_LARGE or
                BUNDLE_TOO_MANY_FILES.
        """
        name = self._judged_name(entry.name)
        # A sparse file of a few bytes can claim any size.
        if entry.issparse() or not (entry.isreg() or entry.isdir() or entry.issym()):
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "BUNDLE_ENTRY_KIND",
                f"{entry.name}: a bundle holds plain files, folders and symbolic links only",
                path=entry.name,
            )
        if name == ".":
            if not entry.isdir():
                raise _outside(entry.name or "(empty)", "is no name of a file")
            return name
        self._enter_parents(name)
        if name in self._sizes or name in self._links or (name in self._folders and not entry.isdir()):
            raise _twice(name)
        if entry.isdir():
            self._folders.add(name)
        elif entry.issym():
            self._links[name] = self._judged_target(name, entry.linkname)
        else:
            self._sizes[name] = entry.size
        self._require_room()
        return name

    def contents(self) -> BundleContents:
        """Returns what was let in, after all of it is known.

        Raises:
            Refusal: INVALID_ARGUMENT with BUNDLE_LINK_OUTSIDE or BUNDLE_EMPTY; RESOURCE_EXHAUSTED with
                BUNDLE_TOO_LARGE.
        """
        for name, target in self._links.items():
            if not self._stays_inside(name):
                raise _link_outside(name, target)
        if len(self._sizes) < self._limits.least_files:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, "BUNDLE_EMPTY", "the bundle holds no file; submit the code to run"
            )
        total = sum(self._sizes.values())
        if total > self._limits.unpacked_bytes:
            raise too_large("unpacked bundle", total, self._limits.unpacked_bytes)
        return BundleContents(len(self._sizes), total, self._sizes)

    def _judged_name(self, name: str) -> str:
        length = len(_encoded(name))
        if length > self._limits.path_bytes or any(len(part.encode()) > _MOST_NAME_BYTES for part in name.split("/")):
            raise _outside(name, "is too long a path")
        return normalized(name)

    def _judged_target(self, name: str, target: str) -> str:
        if len(_encoded(target)) > self._limits.path_bytes or not target or target.startswith("/") or "\0" in target:
            raise _link_outside(name, target)
        if len(self._links) >= self._limits.links:
            raise _too_many(f"{self._limits.links} symbolic links")
        return target

    def _enter_parents(self, name: str) -> None:
        parents = name.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = "/".join(parents[:depth])
            if parent in self._links:
                raise _outside(name, "goes through a symbolic link")
            if parent in self._sizes:
                raise _twice(parent)
            self._folders.add(parent)

    def _require_room(self) -> None:
        if len(self._sizes) + len(self._links) + len(self._folders) > self._limits.files:
            raise _too_many(f"{self._limits.files} files and folders")

    def _stays_inside(self, name: str) -> bool:
        """Follows a link as the kernel would, through other links, and says whether it ever goes above the top."""
        here = name.split("/")[:-1]
        pending = deque(self._links[name].split("/"))
        hops = 0
        while pending:
            part = pending.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                if not here:
                    return False
                here.pop()
                continue
            here.append(part)
            target = self._links.get("/".join(here))
            if target is not None:
                hops += 1
                if hops > _MOST_HOPS:
                    return False
                here.pop()
                pending.extendleft(reversed(target.split("/")))
        return True


def normalized(name: str) -> str:
    """Returns the path without "." and "..".

    Raises:
        Refusal: it leaves the bundle (INVALID_ARGUMENT, BUNDLE_PATH_OUTSIDE).
    """
    normal = posixpath.normpath(name)
    if name.startswith("/") or "\\" in name or "\0" in name or normal == ".." or normal.startswith("../"):
        raise _outside(name, "leaves the bundle")
    return normal


def too_large(what: str, size: int, limit: int) -> Refusal:
    """Returns the refusal of something of `size` bytes where `limit` bytes are the most."""
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "BUNDLE_TOO_LARGE",
        f"the {what} is larger than {limit / 2**20:.4g} MiB; leave out what the code does not need",
        size_bytes=str(size),
        limit_bytes=str(limit),
    )


def _encoded(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError:
        readable = name.encode(errors="replace").decode()
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "BUNDLE_NAME_ENCODING",
            f"{readable}: this name is not UTF-8; rename the file",
            path=readable,
        ) from None


def _too_many(what: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "BUNDLE_TOO_MANY_FILES",
        f"the bundle has more than {what}; leave out what the code does not need",
    )


def _shown(name: str) -> str:
    return name if len(name) <= 80 else name[:79] + "…"


def _twice(name: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "BUNDLE_PATH_TWICE",
        f"{_shown(name)}: the archive holds this path twice; pack the code into a new archive",
        path=_shown(name),
    )


def _link_outside(name: str, target: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "BUNDLE_LINK_OUTSIDE",
        f"{_shown(name)}: this symbolic link leads out of the bundle, or nowhere, by {_shown(target)!r}; "
        "put a copy of the file there instead",
        path=_shown(name),
    )


def _outside(name: str, what: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "BUNDLE_PATH_OUTSIDE",
        f"{_shown(name)}: this path {what}; every path in a bundle must be relative and stay inside it",
        path=_shown(name),
    )
