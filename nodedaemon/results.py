"""What an attempt leaves: its output and its artifacts. Both outlive its container, until they are discarded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc

from nodedaemon.artifacts import pack_artifacts, read_manifest
from nodedaemon.journal import Journal
from nodedaemon.logs import follow_log
from nodedaemon.owner import Owner
from nodedaemon.records import ContainerRecord, ContainerStage
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.workspace import Attempts
from puhui.rpc.errors import Refusal
from puhui.v1.stream_pb2 import ArtifactManifest, LogChunk

__all__ = ["Results", "known_container"]


def known_container(journal: Journal, owner: Owner) -> ContainerRecord:
    """Returns the container of an attempt, removed or not, as long as its results are kept.

    Raises:
        Refusal: NOT_FOUND with CONTAINER_NOT_FOUND.
    """
    record = journal.container(owner)
    if record is None:
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "CONTAINER_NOT_FOUND",
            f"{owner} has no container here, and no results are kept of one",
        )
    return record


class Results:
    """The results of the attempts of this node.

    Args:
        journal: knows the attempts.
        attempts: where their things are.
        runtime: helps with files that the daemon's user may not read.
        ended: returns what is set when an attempt's command has ended; None when it has no living container.
    """

    def __init__(
        self,
        journal: Journal,
        attempts: Attempts,
        runtime: ContainerRuntime,
        ended: Callable[[Owner], asyncio.Event | None],
    ) -> None:
        self._journal = journal
        self._attempts = attempts
        self._runtime = runtime
        self._ended = ended

    async def read_log(self, owner: Owner, *, offset: int, tail_lines: int, follow: bool) -> AsyncIterator[LogChunk]:
        """Yields output of an attempt's container, until it ends if asked to follow it.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND.
        """
        known_container(self._journal, owner)
        end = self._ended(owner) if follow else None
        log = self._attempts.folder(owner).log
        async for chunk in follow_log(log, offset=offset, tail_lines=tail_lines, end=end):
            yield chunk

    async def artifacts(self, owner: Owner) -> tuple[ArtifactManifest, Path]:
        """Returns what an attempt that has ended left in its outputs, and where the archive is.

        Raises:
            Refusal: NOT_FOUND with CONTAINER_NOT_FOUND; FAILED_PRECONDITION with NOT_FINISHED.
        """
        record = known_container(self._journal, owner)
        if record.stage is ContainerStage.CREATING or record.stage.is_alive:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "NOT_FINISHED",
                f"the command of {owner} still runs; its artifacts are collected when it has ended",
            )
        folder = self._attempts.folder(owner)
        async with self._attempts.lock(owner):
            manifest = read_manifest(folder.artifacts)
            if manifest is None:
                try:
                    manifest = await asyncio.to_thread(pack_artifacts, folder.outputs, folder.artifacts)
                except PermissionError:
                    await self._runtime.make_removable(folder.workspace)
                    manifest = await asyncio.to_thread(pack_artifacts, folder.outputs, folder.artifacts)
        return manifest, folder.artifacts
