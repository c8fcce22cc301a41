"""Carries calls of peers to the jobs that they have here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from controlplane.job_service import JobService
from controlplane.store import Store
from puhui.rpc.errors import unimplemented
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["CallCarrier"]


class CallCarrier:
    """Carries calls. Not yet: see the next commit."""

    def __init__(self, store: Store, jobs: JobService) -> None:
        self._store = store
        self._jobs = jobs

    async def serve(
        self, peer: str, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncGenerator[wire.CallForwardedJobResponse, None]:
        """Carries one call."""
        raise unimplemented("CallForwardedJob")
        yield wire.CallForwardedJobResponse()
