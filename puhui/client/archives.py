"""Files on their way: code packed for a centre, artifacts kept from one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import grpc

from puhui.rpc.bundle import BundleLimits, pack, pack_files, survey, unpack
from puhui.rpc.bundle_rules import too_large
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import digest_of
from puhui.rpc.transfer import read_chunks
from puhui.v1.job_service_pb2 import PutBundleRequest
from puhui.v1.stream_pb2 import ArtifactManifest, BundleHeader

__all__ = ["ArtifactArchive", "Code", "PackedCode", "Progress", "Pulled", "packed"]

Code = Path | Mapping[str, bytes]
"""Code that is to be run: a directory, one file, or files by path and content."""

Progress = Callable[[int, int], None]
"""Is told how many bytes have travelled, of how many."""

# What a job left is as large as it is; who pulls it has asked for it.
_ARTIFACT_LIMITS = BundleLimits(
    archive_bytes=2**50, unpacked_bytes=2**50, files=2**31, links=2**20, ratio=2**30, path_bytes=4096
)


@dataclass(frozen=True)
class PackedCode:
    """A bundle, ready to be sent."""

    path: Path
    """The archive; gone when the `packed` block ends."""
    header: BundleHeader
    """Its digest and size."""

    def requests(self, progress: Progress | None) -> Iterator[PutBundleRequest]:
        """Yields the messages of one upload.

        Raises:
            OSError: the archive cannot be read.
        """
        if progress is not None:
            progress(0, self.header.size_bytes)
        yield PutBundleRequest(header=self.header)
        sent = 0
        for chunk in read_chunks(self.path):
            yield PutBundleRequest(chunk=chunk)
            sent += len(chunk)
            if progress is not None:
                progress(sent, self.header.size_bytes)


@contextlib.contextmanager
def packed(code: Code) -> Iterator[PackedCode]:
    """Packs code into a temporary archive for as long as the block runs.

    Raises:
        Refusal: the code is not what a bundle may hold, as `puhui.rpc.bundle.pack` says, or is too large
            (RESOURCE_EXHAUSTED, BUNDLE_TOO_LARGE).
        OSError: it cannot be read, or there is no room for the archive.
    """
    limits = BundleLimits()
    with tempfile.TemporaryDirectory(prefix="puhui-bundle-") as folder:
        path = Path(folder, "bundle.tar.gz")
        if isinstance(code, Path):
            survey(code, limits)
            with path.open("wb") as archive:
                pack(code, archive)
        else:
            path.write_bytes(pack_files(code))
        size = path.stat().st_size
        if size > limits.archive_bytes:
            raise too_large("archive", size, limits.archive_bytes)
        yield PackedCode(path, BundleHeader(bundle_id=digest_of(path), size_bytes=size))


@dataclass(frozen=True)
class Pulled:
    """Artifacts that are here now."""

    folder: Path
    """Where they are."""
    manifest: ArtifactManifest
    """What they are."""


class ArtifactArchive:
    """An artifact archive that is being received beside the folder that it will become.

    Nothing is at the folder's place before all of it has arrived, and nothing is left over when it does not.
    """

    def __init__(self, target: Path) -> None:
        """Prepares to receive.

        Raises:
            Refusal: FAILED_PRECONDITION with TARGET_NOT_EMPTY or TARGET_NOT_WRITABLE.
        """
        self._target = target.absolute()
        if self._target.exists() and (not self._target.is_dir() or any(self._target.iterdir())):
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "TARGET_NOT_EMPTY",
                f"{target} is there already, and nothing in it is overwritten; name a new folder with -o",
                path=str(target),
            )
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._target.name}-", dir=self._target.parent))
        except OSError as error:
            # The name that was asked for says more than that of the folder beside it.
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "TARGET_NOT_WRITABLE",
                f"{target} cannot be written ({error.strerror}); name another folder with -o",
                path=str(target),
            ) from error
        self._path = self._folder / "artifacts.tar.gz"
        self._file: IO[bytes] = self._path.open("wb")
        self._manifest: ArtifactManifest | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def received_bytes(self) -> int:
        """Bytes that have arrived: the offset at which a broken transfer goes on."""
        return self._file.tell()

    @property
    def size_bytes(self) -> int:
        """Size of the whole archive; 0 before the manifest has arrived."""
        return self._manifest.size_bytes if self._manifest is not None else 0

    def begin(self, manifest: ArtifactManifest) -> None:
        """Takes the manifest, which comes again when a broken transfer goes on.

        Raises:
            Refusal: ABORTED with ARTIFACTS_CHANGED.
        """
        if self._manifest is not None and self._manifest.digest != manifest.digest:
            raise Refusal(
                grpc.StatusCode.ABORTED,
                "ARTIFACTS_CHANGED",
                "the artifacts changed while they were being fetched; pull them again",
            )
        self._manifest = manifest

    def write(self, chunk: bytes) -> None:
        """Takes the next piece.

        Raises:
            OSError: the disk is full.
        """
        self._file.write(chunk)

    def finish(self) -> Pulled:
        """Verifies the archive and puts its content where it was asked for.

        Raises:
            Refusal: DATA_LOSS with ARTIFACTS_DIGEST; INVALID_ARGUMENT as `puhui.rpc.bundle.check` says.
            OSError: the disk is full.
        """
        self._file.close()
        manifest = self._manifest
        # A job that left nothing has no archive.
        nothing = manifest is not None and not manifest.size_bytes and not manifest.files
        if manifest is None or not (nothing or digest_of(self._path) == manifest.digest):
            raise Refusal(
                grpc.StatusCode.DATA_LOSS,
                "ARTIFACTS_DIGEST",
                "what arrived does not have the digest that the centre announced; pull again",
            )
        content = self._folder / "content"
        content.mkdir()
        if manifest.files:
            unpack(self._path, content, _ARTIFACT_LIMITS)
        content.chmod(0o755)
        if self._target.exists():
            self._target.rmdir()
        content.replace(self._target)
        return Pulled(self._target, manifest)
