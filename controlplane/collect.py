"""Fetches what an attempt left on its node into this centre's results."""

from __future__ import annotations

import asyncio

import grpc

from controlplane.node_client import NodeClient
from controlplane.results import Results
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_pb2, stream_pb2

__all__ = ["collect"]


async def collect(client: NodeClient, owner: card_pb2.AttemptRef, results: Results) -> tuple[int, job_pb2.JobArtifacts]:
    """Fetches log and artifacts of an attempt whose command has ended.

    It may be called again at any time, and begins anew.

    Returns:
        The size of the log in bytes, and what the artifacts are.

    Raises:
        Refusal: the node cannot be reached, or cannot give them now.
        OSError: the disk is full.
    """
    log_bytes, artifacts = await asyncio.gather(_log(client, owner, results), _artifacts(client, owner, results))
    results.settle(owner.job_id, owner.attempt)
    return log_bytes, artifacts


async def _log(client: NodeClient, owner: card_pb2.AttemptRef, results: Results) -> int:
    with results.write_log(owner.job_id, owner.attempt) as log:
        try:
            async for chunk in client.read_logs(owner, 0, 0, True):
                log.write(chunk)
        except Refusal as refusal:
            if refusal.code != grpc.StatusCode.NOT_FOUND:
                raise
        log.keep()
        return log.size_bytes


async def _artifacts(client: NodeClient, owner: card_pb2.AttemptRef, results: Results) -> job_pb2.JobArtifacts:
    manifest = stream_pb2.ArtifactManifest()
    with results.write_artifacts(owner.job_id, owner.attempt) as archive:
        try:
            async for part in client.read_artifacts(owner, 0):
                if part.HasField("manifest"):
                    manifest = part.manifest
                else:
                    archive.write(part.chunk)
        except Refusal as refusal:
            if refusal.code != grpc.StatusCode.NOT_FOUND:
                raise
            manifest = stream_pb2.ArtifactManifest()
        if not archive.matches(manifest):
            raise Refusal(
                grpc.StatusCode.DATA_LOSS,
                "ARTIFACTS_DIGEST",
                "the artifacts that arrived from the node do not have the digest that it announced",
            )
        if not manifest.files:
            return job_pb2.JobArtifacts()
        archive.keep(manifest)
    return job_pb2.JobArtifacts(digest=manifest.digest, file_count=len(manifest.files), size_bytes=manifest.size_bytes)
