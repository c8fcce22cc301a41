"""Fetches what an attempt left where it ran, at a node or at a peer, into this centre's results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import grpc

from controlplane.results import Results
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_pb2, node_service_pb2, stream_pb2

__all__ = ["Collected", "Left", "collect"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Collected:
    """What of an attempt's results is here, on disk."""

    log_bytes: int
    """Size of the log, in bytes."""
    artifacts: job_pb2.JobArtifacts
    errors: Mapping[str, Refusal | OSError] = field(default_factory=dict)
    """Why what is not here is not, by what it is: log, artifacts."""

    @property
    def missing(self) -> str:
        """What is not here, in words; "" when all of it is."""
        return " and ".join(self.errors)

    @property
    def error(self) -> Refusal | OSError | None:
        """Why it is not."""
        return next(iter(self.errors.values()), None)


class Left(Protocol):
    """Where an attempt left its results."""

    def read_logs(
        self, owner: card_pb2.AttemptRef, offset: int, tail_lines: int, follow: bool
    ) -> AsyncGenerator[stream_pb2.LogChunk, None]:
        """Yields its output."""

    def read_artifacts(
        self, owner: card_pb2.AttemptRef, offset: int
    ) -> AsyncGenerator[node_service_pb2.NodeServiceGetArtifactsResponse, None]:
        """Yields the manifest of its artifacts, then the archive in chunks."""


async def collect(
    client: Left, owner: card_pb2.AttemptRef, results: Results, before: Collected | None = None
) -> Collected:
    """Fetches log and artifacts of an attempt whose command has ended, as much of them as can be had now.

    It may be called again at any time, and begins anew.

    Args:
        client: where they are.
        owner: the attempt.
        results: where to.
        before: what came before; what of it came whole is not fetched again.
    """
    whole = {"log", "artifacts"} - before.errors.keys() if before is not None else set()
    log, artifacts = await asyncio.gather(
        _known(before.log_bytes) if before and "log" in whole else _log(client, owner, results),
        _known(before.artifacts) if before and "artifacts" in whole else _artifacts(client, owner, results),
        return_exceptions=True,
    )
    errors = {}
    for name, outcome in (("log", log), ("artifacts", artifacts)):
        if isinstance(outcome, Refusal | OSError):
            errors[name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
    try:
        await asyncio.to_thread(results.settle, owner.job_id, owner.attempt)
    except OSError as error:
        errors = {"log": error, "artifacts": error}
    return Collected(
        0 if isinstance(log, BaseException) else log,
        job_pb2.JobArtifacts() if isinstance(artifacts, BaseException) else artifacts,
        errors,
    )


async def _known(one: _T) -> _T:
    return one


async def _log(client: Left, owner: card_pb2.AttemptRef, results: Results) -> int:
    with results.write_log(owner.job_id, owner.attempt) as log:
        try:
            async for chunk in client.read_logs(owner, 0, 0, True):
                log.write(chunk)
        except Refusal as refusal:
            if refusal.code != grpc.StatusCode.NOT_FOUND:
                raise
        await asyncio.to_thread(log.keep)
        return log.size_bytes


async def _artifacts(client: Left, owner: card_pb2.AttemptRef, results: Results) -> job_pb2.JobArtifacts:
    manifest = stream_pb2.ArtifactManifest()
    with results.write_artifacts(owner.job_id, owner.attempt) as archive:
        try:
            async for part in client.read_artifacts(owner, 0):
                if part.HasField("manifest"):
                    manifest = part.manifest
                else:
                    await asyncio.to_thread(archive.write, part.chunk)
        except Refusal as refusal:
            if refusal.code != grpc.StatusCode.NOT_FOUND:
                raise
            manifest = stream_pb2.ArtifactManifest()
        if not archive.matches(manifest):
            raise Refusal(
                grpc.StatusCode.DATA_LOSS,
                "ARTIFACTS_DIGEST",
                "the artifacts that arrived do not have the digest that was announced",
            )
        if not manifest.files:
            return job_pb2.JobArtifacts()
        await asyncio.to_thread(archive.keep, manifest)
    return job_pb2.JobArtifacts(digest=manifest.digest, file_count=len(manifest.files), size_bytes=manifest.size_bytes)
