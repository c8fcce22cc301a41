"""Artifacts: what an attempt left in its outputs, as one archive.

The tree was written by code that nobody trusts. It is read by descriptors that follow no link, so nothing outside it
can get into the archive, and its links leave it only as far as they lead inside it.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import posixpath
import stat
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any, cast

import structlog

from puhui.rpc.bundle_rules import BundleEntries, BundleLimits
from puhui.rpc.errors import Refusal
from puhui.v1.stream_pb2 import ArtifactFile, ArtifactManifest

__all__ = ["LEFT_OUT", "LIMITS", "MOST_DEPTH", "pack_artifacts", "pack_tree", "read_manifest"]

_log = structlog.get_logger(__name__)

MOST_DEPTH = 64
"""Folders that may lie one in the other."""
LEFT_OUT = "LEFT_OUT.txt"
"""The file of an archive that says what was left out of it."""

_MOST_LINES = 1000
_MOST_SHOWN = 300
LIMITS = BundleLimits(archive_bytes=2**50, unpacked_bytes=2**50, files=2**31, links=2000, ratio=2**30)
"""Results are as large as they are; paths and links are bounded, for whoever unpacks them."""
_REASONS = {
    "BUNDLE_LINK_OUTSIDE": "this symbolic link leads out of them, in circles, or through too many others",
    "BUNDLE_NAME_ENCODING": "this name is not UTF-8",
    "BUNDLE_PATH_OUTSIDE": "this path is too long, or has a backslash in it",
    "BUNDLE_TOO_MANY_FILES": "there are too many files or links",
}

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def pack_artifacts(outputs: Path, archive: Path) -> ArtifactManifest:
    """Packs everything below an attempt's `outputs`, as `pack_tree` does."""
    return pack_tree(outputs, archive, LIMITS)


def pack_tree(
    root: Path, archive: Path, limits: BundleLimits, *, without: Collection[str] = (), place: str = ""
) -> ArtifactManifest:
    """Packs everything below `root` into `archive`, and its manifest beside it.

    The same tree packs to the same bytes. Everything that `puhui.rpc.bundle.unpack` accepts is packed, to a depth of
    `MOST_DEPTH` folders. The rest (sockets, links that lead outside or in circles, names that are not UTF-8, ...) is
    left out, and the file `LEFT_OUT` in the archive says what and why. A missing or replaced `root` packs as empty.

    Args:
        root: the directory; nothing writes to it any more.
        archive: where the gzip-compressed tar archive goes; put there in one step.
        limits: of paths and links.
        without: names right below `root` that are not packed, and not told of.
        place: where those who wrote the links saw `root`; links into it by its whole path become relative ones.

    Returns:
        The manifest, as `read_manifest` will return it.

    Raises:
        PermissionError: a file may not be read.
        OSError: the disk is full.
    """
    partial = archive.with_suffix(".partial")
    try:
        with partial.open("wb") as raw:
            digesting = _Digesting(raw)
            with (
                gzip.GzipFile(
                    filename="", mode="wb", fileobj=cast("IO[bytes]", digesting), compresslevel=1, mtime=0
                ) as zipped,
                tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                packer = _Packer(tar, limits, place)
                folder = _opened(root)
                if folder is not None:
                    packer.add_tree(folder, without)
        if packer.left_out:
            _log.warning(
                "left some files out", archive=str(archive), count=len(packer.left_out), first=packer.left_out[0]
            )
        manifest = ArtifactManifest(
            digest="sha256:" + digesting.sha256.hexdigest(), size_bytes=digesting.count, files=packer.files
        )
        _manifest_path(archive).write_bytes(manifest.SerializeToString())
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def _opened(root: Path) -> int | None:
    try:
        return os.open(root, _FOLDER_FLAGS)
    except PermissionError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def read_manifest(archive: Path) -> ArtifactManifest | None:
    """Returns the manifest of an archive that was packed before; None when it was not."""
    if not archive.exists():
        return None
    return ArtifactManifest.FromString(_manifest_path(archive).read_bytes())


def _manifest_path(archive: Path) -> Path:
    return archive.with_suffix(".manifest")


class _Packer:
    """Adds a tree to an archive: everything that `puhui.rpc.bundle.unpack` accepts, and a list of the rest."""

    def __init__(self, tar: tarfile.TarFile, limits: BundleLimits, place: str) -> None:
        self._tar = tar
        self._limits = limits
        self._place = place
        self._entries = BundleEntries(limits)
        self._links: list[tarfile.TarInfo] = []
        self.files: list[ArtifactFile] = []
        self.left_out: list[str] = []

    def add_tree(self, root: int, without: Collection[str]) -> None:
        """Adds everything below an open directory, which is closed then, but for some names right below it."""
        # One descriptor per level, and no recursion: code that nobody trusts chose how deep the tree is.
        taken = _listed(root)
        above = [("", root, iter([name for name in taken if name not in without]))]
        try:
            while above:
                prefix, folder, names = above[-1]
                name = next(names, None)
                if name is None:
                    os.close(above.pop()[1])
                    continue
                inner = self._add(folder, name, prefix + name, len(above))
                if inner is not None:
                    above.append((f"{prefix}{name}/", inner, iter(())))  # closed even if it cannot be listed
                    above[-1] = (f"{prefix}{name}/", inner, iter(_listed(inner)))
        finally:
            for _, folder, _ in above:
                os.close(folder)
        self._add_links()
        self._list_left_out(taken)

    def _add(self, folder: int, name: str, path: str, depth: int) -> int | None:
        """Adds one entry of a folder. Returns a descriptor when it is a folder that is to be gone through."""
        status = os.lstat(name, dir_fd=folder)
        entry = tarfile.TarInfo(path)
        entry.mtime = int(status.st_mtime)
        entry.mode = stat.S_IMODE(status.st_mode) & 0o777
        if stat.S_ISLNK(status.st_mode):
            entry.type = tarfile.SYMTYPE
            entry.linkname = _relative(path, os.readlink(name, dir_fd=folder), self._place)
            self._links.append(entry)  # whether it stays inside depends on the others
        elif stat.S_ISDIR(status.st_mode):
            entry.type = tarfile.DIRTYPE
            if depth > MOST_DEPTH:
                self._leave_out(
                    path, f"this folder lies more than {MOST_DEPTH} folders deep; so does all that is in it"
                )
            elif self._accepts(entry):
                self._tar.addfile(entry)
                return os.open(name, _FOLDER_FLAGS, dir_fd=folder)
        elif stat.S_ISREG(status.st_mode):
            entry.size = status.st_size
            if self._accepts(entry):
                with os.fdopen(os.open(name, _FILE_FLAGS, dir_fd=folder), "rb") as file:
                    self._tar.addfile(entry, file)
                self.files.append(ArtifactFile(path=path, size_bytes=entry.size))
        else:
            self._leave_out(path, "this is no file, folder or symbolic link")
        return None

    def _accepts(self, entry: tarfile.TarInfo) -> bool:
        try:
            self._entries.add(entry)
        except Refusal as error:
            self._leave_out(entry.name, _REASONS.get(error.reason, error.message))
            return False
        return True

    def _add_links(self) -> None:
        plain = []
        for entry in self._links:
            if _stays_inside(entry.name, entry.linkname):
                plain.append(entry)
            else:
                self._leave_out(entry.name, _REASONS["BUNDLE_LINK_OUTSIDE"])
        kept: list[tarfile.TarInfo] = []
        pending = [plain] if plain else []
        while pending:
            group = pending.pop()
            if _links_fit([*kept, *group], self._limits):
                kept.extend(group)
            elif len(group) == 1:
                self._leave_out(group[0].name, _REASONS["BUNDLE_LINK_OUTSIDE"])
            else:
                # Halves, so that few bad links among many cost few trials.
                middle = len(group) // 2
                pending += [group[middle:], group[:middle]]
        for entry in kept:
            if self._accepts(entry):
                self._tar.addfile(entry)

    def _leave_out(self, path: str, why: str) -> None:
        self.left_out.append(f"{_printable(path)}: {why}")

    def _list_left_out(self, taken: Collection[str]) -> None:
        """Adds a file that says what was left out, if anything was."""
        if not self.left_out:
            return
        name, number = LEFT_OUT, 1
        while name in taken:
            number += 1
            name = f"{number}-{LEFT_OUT}"
        lines = self.left_out[:_MOST_LINES]
        if len(self.left_out) > len(lines):
            lines.append(f"... and {len(self.left_out) - len(lines)} more")
        content = ("These were left out, because they could not be unpacked elsewhere:\n" + "\n".join(lines)).encode()
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        entry.mode = 0o644
        self._tar.addfile(entry, io.BytesIO(content))
        self.files.append(ArtifactFile(path=name, size_bytes=entry.size))


def _listed(folder: int) -> list[str]:
    return sorted(os.listdir(folder), key=os.fsencode)


def _relative(path: str, target: str, place: str) -> str:
    """Returns a link's target as seen from the link, when it names something below `place` by its whole path."""
    inside = place and (target == place or target.startswith(place + "/")) and ".." not in target.split("/")
    return posixpath.relpath(target, posixpath.join(place, posixpath.dirname(path))) if inside else target


def _links_fit(links: Sequence[tarfile.TarInfo], limits: BundleLimits) -> bool:
    entries = BundleEntries(limits)
    try:
        for entry in links:
            entries.add(entry)
        entries.contents()
    except Refusal as error:
        return error.reason == "BUNDLE_EMPTY"  # asked of links alone
    return True


def _printable(path: str) -> str:
    """Returns a path as one line of text: what is not UTF-8, or ends a line, is shown as escapes."""
    text = os.fsencode(path).decode("utf-8", errors="backslashreplace")
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return shown if len(shown) <= _MOST_SHOWN else shown[:_MOST_SHOWN] + "..."


def _stays_inside(path: str, target: str) -> bool:
    """Says whether a link leads inside whatever other links are there when it is unpacked.

    ".." may lead upwards from where the link is, which is no link itself; further on it might follow one.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    upwards = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and ".." not in parts[upwards:] and upwards <= path.count("/")


class _Digesting:
    """A file that counts and digests what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256: Any = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes) -> int:
        """Writes all of it."""
        self.sha256.update(data)
        self.count += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Does what a file does."""
        self._file.flush()
