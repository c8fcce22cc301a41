"""Artifacts: what an attempt left in its outputs, as one archive.

The tree was written by code that nobody trusts. It is read by descriptors that follow no link, so nothing outside it
can get into the archive, and its links leave it only as far as they lead inside it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from puhui.v1.stream_pb2 import ArtifactFile, ArtifactManifest

__all__ = ["pack_artifacts", "read_manifest"]

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def pack_artifacts(outputs: Path, archive: Path) -> ArtifactManifest:
    """Packs everything below `outputs` into `archive`, and its manifest beside it.

    The same tree packs to the same bytes. Regular files, directories and symbolic links that stay inside are packed;
    sockets, pipes, devices and links that lead outside are left out. A missing or replaced `outputs` packs as empty.

    Args:
        outputs: the directory; nothing writes to it any more.
        archive: where the gzip-compressed tar archive goes; put there in one step.

    Returns:
        The manifest, as `read_manifest` will return it.

    Raises:
        PermissionError: a file may not be read.
        OSError: the disk is full.
    """
    partial = archive.with_suffix(".partial")
    files: list[ArtifactFile] = []
    try:
        with partial.open("wb") as raw:
            digesting = _Digesting(raw)
            with (
                gzip.GzipFile(
                    filename="", mode="wb", fileobj=cast("IO[bytes]", digesting), compresslevel=1, mtime=0
                ) as zipped,
                tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                try:
                    root = os.open(outputs, _FOLDER_FLAGS)
                except (FileNotFoundError, NotADirectoryError, OSError) as error:
                    if isinstance(error, PermissionError):
                        raise
                else:
                    with _closing(root):
                        files.extend(_add_folder(tar, root, ""))
        manifest = ArtifactManifest(
            digest="sha256:" + digesting.sha256.hexdigest(), size_bytes=digesting.count, files=files
        )
        _manifest_path(archive).write_bytes(manifest.SerializeToString())
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def read_manifest(archive: Path) -> ArtifactManifest | None:
    """Returns the manifest of an archive that was packed before; None when it was not."""
    if not archive.exists():
        return None
    return ArtifactManifest.FromString(_manifest_path(archive).read_bytes())


def _manifest_path(archive: Path) -> Path:
    return archive.with_suffix(".manifest")


def _add_folder(tar: tarfile.TarFile, folder: int, prefix: str) -> Iterator[ArtifactFile]:
    for name in sorted(os.listdir(folder), key=os.fsencode):
        path = f"{prefix}{name}"
        status = os.lstat(name, dir_fd=folder)
        entry = tarfile.TarInfo(path)
        entry.mtime = int(status.st_mtime)
        entry.mode = stat.S_IMODE(status.st_mode) & 0o777
        if stat.S_ISDIR(status.st_mode):
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
            with _closing(os.open(name, _FOLDER_FLAGS, dir_fd=folder)) as inner:
                yield from _add_folder(tar, inner, path + "/")
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(name, dir_fd=folder)
            if _stays_inside(path, target):
                entry.type = tarfile.SYMTYPE
                entry.linkname = target
                tar.addfile(entry)
        elif stat.S_ISREG(status.st_mode):
            entry.size = status.st_size
            with os.fdopen(os.open(name, _FILE_FLAGS, dir_fd=folder), "rb") as file:
                tar.addfile(entry, file)
            yield ArtifactFile(path=_printable(path), size_bytes=entry.size)


def _printable(path: str) -> str:
    """Returns a path that protobuf can carry: bytes that are not UTF-8 are shown as escapes."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _stays_inside(path: str, target: str) -> bool:
    resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return not target.startswith("/") and resolved != ".." and not resolved.startswith("../")


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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
