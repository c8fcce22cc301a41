"""Carries a workspace from a job's former attempt to its newest one: over to another node, or aside on the same.

Nothing of the former attempt is thrown away before the newest runs, so a crash or a refusal on the way loses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc
import structlog

from controlplane import happenings
from controlplane.collect import collect
from controlplane.happenings import Happening
from controlplane.node_asker import GivenUp, NodeAsker
from controlplane.node_link import NodeLink
from controlplane.records import JobRecord
from controlplane.surroundings import Surroundings
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_pb2, node_service_pb2, stream_pb2

__all__ = ["Carried", "WorkspaceCarrier"]

_log = structlog.get_logger(__name__)

_LEAVING: set[asyncio.Task[None]] = set()
"""The event loop itself keeps no task alive."""


class Carried(Protocol):
    """The newest attempt."""

    @property
    def record(self) -> JobRecord:
        """The job."""

    @property
    def attempt(self) -> job_pb2.Attempt:
        """The attempt."""

    @property
    def owner(self) -> card_pb2.AttemptRef:
        """Under which its node is commanded."""

    @property
    def asker(self) -> NodeAsker:
        """Asks its node."""

    def owner_of(self, number: int) -> card_pb2.AttemptRef:
        """Under which another attempt of the job is commanded."""

    def link_to(self, attempt: job_pb2.Attempt) -> NodeLink:
        """The connection to the node of any attempt of the job."""

    async def change(self, *told: Happening) -> bool:
        """Stores what happened."""


class WorkspaceCarrier:
    """Carries the workspace of `record.carry_from` to the newest attempt.

    Args:
        carried: the newest attempt.
        around: what it works with.
        cancel: set once the job's end was asked for.
    """

    def __init__(self, carried: Carried, around: Surroundings, cancel: asyncio.Event) -> None:
        self._carried = carried
        self._around = around
        self._cancel = cancel

    @property
    def _former(self) -> job_pb2.Attempt:
        return self._carried.record.job.attempts[self._carried.record.carry_from - 1]

    @property
    def _asker(self) -> NodeAsker:
        """Asks the node of the former attempt."""
        return NodeAsker(lambda: self._carried.link_to(self._former), self._cancel)

    async def bring(self) -> int:
        """Ends what runs of the former attempt, and has its workspace where the newest attempt finds it.

        Returns:
            The attempt whose workspace the node is to take over; 0 when it has been given the workspace.

        Raises:
            Refusal: a node's.
            GivenUp: the job's end was asked for, and a node cannot be asked.
        """
        former, owner = self._former, self._carried.owner_of(self._former.number)
        stop = node_service_pb2.StopContainerRequest(owner=owner, request_id=self._request_id("carry-stop"))
        if self._carried.record.job.spec.HasField("stop_grace"):
            stop.grace.CopyFrom(self._carried.record.job.spec.stop_grace)
        await self._unless_gone(lambda: self._asker.ask(lambda client: client.stop_container(stop), give_up=True))
        job_id = self._carried.record.id
        if not self._around.results.has_log(job_id, former.number):
            got = await collect(self._carried.link_to(former).client, owner, self._around.results)
            if got.error is not None:
                raise GivenUp if self._cancel.is_set() else _not_now(got.error)
        if former.node_id == self._carried.attempt.node_id:
            return former.number
        if self._around.results.workspace(job_id, former.number) is None:
            await self._asker.ask(lambda _: self._fetch(owner), give_up=True)
        kept = self._around.results.workspace(job_id, former.number)
        if kept is not None:
            archive, manifest = kept
            header = node_service_pb2.WorkspaceHeader(
                owner=self._carried.owner, digest=manifest.digest, size_bytes=manifest.size_bytes
            )
            await self._carried.asker.ask(lambda client: client.put_workspace(header, archive), give_up=True)
        return 0

    def size_bytes(self) -> int:
        """Returns the size of the archive that went to another node; 0 when there was none."""
        kept = self._around.results.workspace(self._carried.record.id, self._former.number)
        return kept[1].size_bytes if kept is not None else 0

    def leave(self, number: int) -> None:
        """The newest attempt runs: begins to remove what a former one left. Nothing waits for that.

        What a node out of contact keeps of it is an orphan, and removed when it is back.
        """
        task = asyncio.create_task(self._remove(number), name=f"leave {self._carried.record.id}/{number}")
        _LEAVING.add(task)
        task.add_done_callback(_LEAVING.discard)

    async def _remove(self, number: int) -> None:
        job_id = self._carried.record.id
        remove = node_service_pb2.RemoveContainerRequest(
            owner=self._carried.owner_of(number), discard_results=True, request_id=f"{job_id}/{number}/carry-remove"
        )
        self._around.results.drop_workspace(job_id, number)
        try:
            await self._carried.link_to(self._carried.record.job.attempts[number - 1]).client.remove_container(remove)
        except Refusal as refusal:
            _log.info("what a former attempt left is removed later", job=job_id, attempt=number, why=str(refusal))
            return
        try:
            await self._carried.change(happenings.ContainerRemoved(number))
        except OSError as error:
            _log.error("that a former container is gone cannot be told", job=job_id, why=str(error))

    async def _fetch(self, owner: card_pb2.AttemptRef) -> None:
        client = self._carried.link_to(self._former).client
        manifest = stream_pb2.ArtifactManifest()
        with self._around.results.write_workspace(owner.job_id, owner.attempt) as archive:
            async for part in client.read_workspace(owner, 0):
                if part.HasField("manifest"):
                    manifest = part.manifest
                else:
                    await asyncio.to_thread(archive.write, part.chunk)
            if not archive.matches(manifest):
                raise Refusal(
                    grpc.StatusCode.DATA_LOSS,
                    "WORKSPACE_DIGEST",
                    "the workspace that arrived from the node does not have the digest that it announced",
                )
            if manifest.size_bytes:
                await asyncio.to_thread(archive.keep, manifest)

    async def _unless_gone(self, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            await ask()
        except Refusal as refusal:
            if refusal.reason not in ("CONTAINER_NOT_FOUND", "CONTAINER_NOT_RUNNING"):
                raise

    def _request_id(self, step: str) -> str:
        return f"{self._carried.record.id}/{self._former.number}/{step}"


def _not_now(error: Refusal | OSError) -> Refusal:
    if isinstance(error, Refusal):
        return error
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL", f"the former attempt's log cannot be kept: {error}")
