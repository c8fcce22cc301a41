"""Workspaces that outlive their container: taken over by the next attempt, or carried from and to other nodes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import structlog

from nodedaemon.answers import Mutations
from nodedaemon.artifacts import read_manifest
from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.results import known_container
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.workspace import Attempts, remove_tree
from nodedaemon.workspace_archive import WORKSPACE_LIMITS, as_workspace, pack_workspace, unpack_workspace
from puhui.rpc.errors import Refusal
from puhui.rpc.transfer import UploadPart, receive
from puhui.v1.node_service_pb2 import NodeServicePutBundleRequest, PutWorkspaceRequest, WorkspaceHeader
from puhui.v1.stream_pb2 import ArtifactManifest, BundleHeader

__all__ = ["Carrying", "choose_workspace"]

_log = structlog.get_logger(__name__)

_KEPT_S = 24 * 3600


class Carrying:
    """Takes the workspaces of attempts in and gives them out.

    Args:
        root: directory for what is being uploaded, on the file system of the attempts; emptied.
        journal: knows the attempts.
        attempts: where their things are.
        runtime: helps with files that the daemon's user may not read.
        uid: user that the containers' files belong to.
        gid: that user's group.
    """

    def __init__(
        self, root: Path, journal: Journal, attempts: Attempts, runtime: ContainerRuntime, uid: int, gid: int
    ) -> None:
        self._root = root
        self._journal = journal
        self._attempts = attempts
        self._runtime = runtime
        self._uid = uid
        self._gid = gid
        root.mkdir(mode=0o700, exist_ok=True)
        for path in root.iterdir():
            remove_tree(path)  # cut short by a crash

    async def give(self, owner: Owner) -> tuple[ArtifactManifest, Path]:
        """Returns what the workspace of an attempt holds whose container does not run, and where the archive is.

        The manifest does not name the files.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with NOT_FINISHED or WORKSPACE_NOT_FOUND.
            OSError: the disk is full.
        """
        record = known_container(self._journal, owner)
        if record.stage is ContainerStage.CREATING or record.stage.is_alive:
            raise _not_finished(owner)
        folder = self._attempts.folder(owner)
        async with self._attempts.lock(owner):
            if not folder.workspace.is_dir():
                raise _not_found(owner)
            manifest = read_manifest(folder.workspace_archive)
            if manifest is None:
                try:
                    manifest = await asyncio.to_thread(pack_workspace, folder.workspace, folder.workspace_archive)
                except PermissionError:
                    await self._runtime.make_removable(folder.workspace)
                    manifest = await asyncio.to_thread(pack_workspace, folder.workspace, folder.workspace_archive)
        return ArtifactManifest(digest=manifest.digest, size_bytes=manifest.size_bytes), folder.workspace_archive

    async def take_in(self, parts: AsyncIterator[PutWorkspaceRequest], mutations: Mutations) -> None:
        """Takes the upload of a workspace that an attempt is to begin with; an earlier upload for it is replaced.

        Args:
            parts: the upload.
            mutations: fence it.

        Raises:
            Refusal: INVALID_ARGUMENT with UPLOAD_MALFORMED, UPLOAD_INCOMPLETE, UPLOAD_DIGEST, OWNER_INVALID,
                WORKSPACE_UNREADABLE, WORKSPACE_PATH_OUTSIDE, WORKSPACE_PATH_TWICE, WORKSPACE_NAME_ENCODING,
                WORKSPACE_LINK_OUTSIDE or WORKSPACE_ENTRY_KIND; RESOURCE_EXHAUSTED with WORKSPACE_TOO_LARGE or
                WORKSPACE_TOO_MANY_FILES; ALREADY_EXISTS with CONTAINER_EXISTS; FAILED_PRECONDITION with
                STALE_FENCING_TOKEN. Nothing is kept of it then.
            OSError: the disk is full.
        """
        first = await anext(aiter(parts), None)
        header = first.header if first is not None else WorkspaceHeader()
        owner = Owner.of(header.owner, "header.owner")
        mutations.require_command(owner, header.owner.fencing_token)
        self._require_new(owner)
        most_bytes = min(WORKSPACE_LIMITS.archive_bytes, self._free_bytes())
        try:
            async with receive(_as_bundle(header, parts), self._root, most_bytes) as upload:
                await upload.finish()
                # From here on it is no matter whether the caller stays.
                archive = upload.path.rename(upload.path.with_name(upload.path.name + ".whole"))
        except Refusal as error:
            raise as_workspace(error) from error

        async def act(owner: Owner, token: int) -> None:
            try:
                self._require_new(owner)
                await self._put_in_place(owner, archive)
            finally:
                archive.unlink(missing_ok=True)

        await mutations.carry_out_once(header.owner, "PutWorkspace", act)

    async def _put_in_place(self, owner: Owner, archive: Path) -> None:
        partial = Path(tempfile.mkdtemp(prefix="unpack-", dir=self._root))
        room = self._free_bytes()
        try:
            await asyncio.to_thread(unpack_workspace, archive, partial, self._uid, self._gid, room)
            carried = self._attempts.make_folder(owner).carried
            if carried.exists():
                carried.rename(partial.with_name(partial.name + ".old"))
            partial.rename(carried)
        finally:
            for left in (partial, partial.with_name(partial.name + ".old")):
                await asyncio.to_thread(remove_tree, left)

    def _require_new(self, owner: Owner) -> None:
        if self._journal.container(owner) is not None:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                "CONTAINER_EXISTS",
                f"{owner} has a container, which has a workspace already; upload it for a new attempt",
            )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free

    async def prune(self, moment: float) -> None:
        """Drops workspaces that were uploaded 24 h before a time (seconds since the epoch) and never used."""
        for carried in self._attempts.uploaded():
            owner = self._attempts.owner_of(carried.parent)
            with contextlib.suppress(FileNotFoundError):  # it is used at this moment
                if carried.stat().st_ctime < moment - _KEPT_S and self._journal.container(owner) is None:
                    await asyncio.to_thread(self._attempts.remove, owner)
                    _log.info("dropped a workspace that nobody used", owner=str(owner))


def choose_workspace(
    journal: Journal, attempts: Attempts, owner: Owner, earlier: int, known: ContainerRecord | None
) -> int:
    """Returns the attempt whose workspace a new container begins with: its own for an uploaded one, 0 for an empty one.

    Args:
        journal: knows the attempts.
        attempts: where their things are.
        owner: who begins.
        earlier: the attempt of the same job that it asks for; 0 is not to.
        known: what an unfinished try to make the container left.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID; FAILED_PRECONDITION with NOT_FINISHED, WORKSPACE_NOT_FOUND or
            WORKSPACE_UPLOADED.
    """
    uploaded = attempts.folder(owner).carried.is_dir()
    taken = known.workspace_of if known is not None else 0
    if not earlier:
        return owner.attempt if uploaded or taken == owner.attempt else 0
    if earlier >= owner.attempt:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
            f"workspace_of_attempt must be an earlier attempt than {owner.attempt}",
            field="workspace_of_attempt",
        )
    if uploaded:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "WORKSPACE_UPLOADED",
            f"a workspace was uploaded for {owner}, so it cannot take that of attempt {earlier} over; leave "
            "workspace_of_attempt out",
        )
    other = owner.of_attempt(earlier)
    record = journal.container(other)
    if record is not None and (record.stage is ContainerStage.CREATING or record.stage.is_alive):
        raise _not_finished(other)
    there = record is not None and attempts.workspace_of(owner, earlier).is_dir()
    if not there and taken != earlier:
        raise _not_found(other)
    return earlier


async def _as_bundle(header: WorkspaceHeader, parts: AsyncIterator[PutWorkspaceRequest]) -> AsyncIterator[UploadPart]:
    bundle = BundleHeader(bundle_id=header.digest, size_bytes=header.size_bytes)
    yield NodeServicePutBundleRequest(header=bundle)
    async for part in parts:
        yield NodeServicePutBundleRequest(chunk=part.chunk)


def _not_finished(owner: Owner) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NOT_FINISHED",
        f"the command of {owner} still runs; its workspace can be had when it has ended: stop it with StopContainer",
    )


def _not_found(owner: Owner) -> Refusal:
    return Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "WORKSPACE_NOT_FOUND",
        f"this node has no workspace of {owner}: it was discarded, or another attempt took it over; begin with an "
        "empty one, or upload one with PutWorkspace",
    )
