"""A workspace as one archive, for a container that begins anew on another node.

Unlike code, files keep their modes: they are the container's own. Everything that leads outside is refused.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nodedaemon.artifacts import LIMITS, pack_tree
from nodedaemon.runtime import WORKSPACE_PATH
from puhui.rpc.bundle import check
from puhui.rpc.errors import Refusal
from puhui.v1.stream_pb2 import ArtifactManifest

__all__ = ["WORKSPACE_LIMITS", "as_workspace", "pack_workspace", "unpack_workspace"]

WORKSPACE_LIMITS = replace(LIMITS, files=2**22, links=100_000, least_files=0)
"""As for artifacts, but an environment of Python has many links, and a workspace may be empty."""


def pack_workspace(workspace: Path, archive: Path) -> ArtifactManifest:
    """Packs a workspace but for its code, as `nodedaemon.artifacts.pack_tree` does.

    Raises:
        PermissionError: a file may not be read.
        OSError: the disk is full.
    """
    return pack_tree(workspace, archive, WORKSPACE_LIMITS, without={"code"}, place=WORKSPACE_PATH)


def unpack_workspace(archive: Path, target: Path, uid: int, gid: int, most_bytes: int) -> None:
    """Checks an archive, then unpacks it into the empty directory `target`.

    Args:
        archive: the archive.
        target: the directory.
        uid: user that everything is to belong to, where this user may say so.
        gid: that user's group.
        most_bytes: size of all files together that there is room for.

    Raises:
        Refusal: as `puhui.rpc.bundle.check` does, for workspaces; nothing has been unpacked then.
        OSError: the disk is full.
    """
    try:
        check(archive, replace(WORKSPACE_LIMITS, unpacked_bytes=most_bytes))
    except Refusal as error:
        raise as_workspace(error) from error
    with tarfile.open(archive, "r:gz", errorlevel=2) as tar:
        # Python before 3.11.4 has no filters. What `check` let through needs none; two locks are better than one.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = _filtered
        tar.extractall(target, members=_owned(tar, uid, gid))  # noqa: S202 - every entry has been checked
    if os.geteuid() == 0:
        # An archive need not name every folder that it has files in.
        for folder, _, _ in os.walk(target):
            os.chown(folder, uid, gid)


def _owned(tar: tarfile.TarFile, uid: int, gid: int) -> Iterator[tarfile.TarInfo]:
    for entry in tar:
        entry.uid, entry.gid = uid, gid
        entry.uname = entry.gname = ""
        entry.mode &= 0o777
        yield entry


def _filtered(entry: tarfile.TarInfo, target: str) -> tarfile.TarInfo:
    safe = tarfile.data_filter(entry, target)
    # It would take rights away that the files of a container may well have.
    return safe.replace(uid=entry.uid, gid=entry.gid, mode=entry.mode, deep=False)


def as_workspace(refusal: Refusal) -> Refusal:
    """Returns a refusal of a bundle as one of a workspace."""
    message = refusal.message.replace("bundle_id", "digest").replace("bundle", "workspace")
    message = message.replace("leave out what the code does not need", "leave out what need not be carried along")
    reason = refusal.reason.replace("BUNDLE_", "WORKSPACE_")
    translated = Refusal(refusal.code, reason, message)
    translated.metadata = refusal.metadata
    return translated
