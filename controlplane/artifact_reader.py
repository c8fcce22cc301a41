"""Reads artifacts of attempts out of this centre's results."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from controlplane.jobs import FINAL_STATES
from controlplane.log_reader import attempt_number, require_not_lost
from controlplane.records import JobRecord
from controlplane.results import Results
from puhui.rpc.errors import Refusal
from puhui.rpc.transfer import read_chunks
from puhui.v1 import job_service_pb2, stream_pb2

__all__ = ["read_artifacts"]


def read_artifacts(
    record: JobRecord, results: Results, attempt: int, offset: int
) -> Iterator[job_service_pb2.GetArtifactsResponse]:
    """Yields the manifest of an attempt's artifacts, then the archive in chunks.

    Args:
        record: the job.
        results: where they are.
        attempt: which attempt; 0 is the newest.
        offset: first byte of the archive wanted.

    Raises:
        Refusal: NOT_FOUND with ATTEMPT_NOT_FOUND; FAILED_PRECONDITION with NOT_FINISHED; DATA_LOSS with RESULTS_LOST;
            OUT_OF_RANGE with OFFSET_OUT_OF_RANGE.
    """
    number = attempt_number(record, attempt)
    if number == len(record.job.attempts) and record.state not in FINAL_STATES:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "NOT_FINISHED",
            f"job {record.id} has not ended; its artifacts can be had once it has (`puhui wait {record.id}`)",
            job_id=record.id,
        )
    manifest = results.manifest(record.id, number)
    if manifest is None:
        require_not_lost(record, number)
        manifest = stream_pb2.ArtifactManifest()
    if offset > manifest.size_bytes:
        raise Refusal(
            grpc.StatusCode.OUT_OF_RANGE,
            "OFFSET_OUT_OF_RANGE",
            f"the archive has {manifest.size_bytes} bytes; begin again at 0",
            size_bytes=str(manifest.size_bytes),
        )
    yield job_service_pb2.GetArtifactsResponse(manifest=manifest)
    if manifest.size_bytes:
        for chunk in read_chunks(results.archive(record.id, number), offset):
            yield job_service_pb2.GetArtifactsResponse(chunk=chunk)
