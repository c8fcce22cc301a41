"""Sessions of a real centre that are told to run, fall idle, and lose their share: what each step takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bench.idle_exec import BareExec
from bench.idle_witness import Witness
from puhui.rpc.moment import duration
from puhui.v1.job_pb2 import JOB_KIND_SESSION, IdlePolicy, JobSpec, Resources
from puhui.v1.job_service_pb2 import CancelJobRequest, RunJobRequest, RunStart, SubmitJobRequest

if TYPE_CHECKING:
    from puhui.v1.job_service_pb2_grpc import JobServiceAsyncStub

__all__ = ["COMMAND", "IDLE_AFTER_S", "Bench", "Measured", "Ran"]

COMMAND = ("echo", "ready")
IDLE_AFTER_S = 0.5


@dataclass(frozen=True)
class Ran:
    """One run of a session."""

    first_byte_ms: float
    """From the run instruction to the first byte of its command's output."""
    share: str
    """How it got its share: "held", "warm" or "cold"."""
    cursor: int
    """Of the last event before its output."""
    ended_s: float
    """In seconds since the epoch."""


@dataclass
class Measured:
    """What was measured of one kind of run, in milliseconds."""

    run: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    """The exec with Podman alone that came just before each run."""
    reclaim: list[float] = field(default_factory=list)
    """From the threshold to the share being free."""
    detach: list[float] = field(default_factory=list)
    """From the threshold to the share being nobody's: its slice is kept warm, or about to be destroyed."""
    told: list[float] = field(default_factory=list)
    """From the threshold to the node's event that the session is idle."""

    @property
    def added(self) -> list[float]:
        """What each run took longer than the bare exec before it."""
        return [run - bare for run, bare in zip(self.run, self.bare, strict=True)]


class Bench:
    """Measures on one centre.

    Args:
        jobs: of its control plane.
        witness: what it and its node tell.
        bare: runs commands with Podman alone.
        profile: what each session needs.
    """

    def __init__(self, jobs: JobServiceAsyncStub, witness: Witness, bare: BareExec, profile: str) -> None:
        self._jobs = jobs
        self._witness = witness
        self._bare = bare
        self._profile = profile

    @contextlib.asynccontextmanager
    async def session(self, tenant: str, *, warm: bool) -> AsyncIterator[str]:
        """Yields the id of a session whose share has been taken back already, until the block ends.

        Args:
            tenant: whose it is.
            warm: whether the centre keeps this tenant's slices warm.
        """
        spec = JobSpec(
            name=f"idle-{tenant}",
            kind=JOB_KIND_SESSION,
            tenant=tenant,
            resources=Resources(profile=self._profile),
            idle=IdlePolicy(idle_after=duration(IDLE_AFTER_S), start_grace=duration(0.0)),
            stop_grace=duration(1.0),
        )
        job_id = (await self._jobs.SubmitJob(SubmitJobRequest(spec=spec))).job.id
        async with self._witness.following(job_id):
            try:
                reclaimed = await self._witness.job_event(job_id, "RECLAIMED")
                if not warm:
                    await self._witness.job_event(job_id, "WARM_SLICE_DROPPED", reclaimed.event.cursor)
                yield job_id
            finally:
                await self._jobs.CancelJob(CancelJobRequest(job_id=job_id))
                await self._witness.job_event(job_id, "CANCELLED")

    async def round(self, job_id: str, share: str, kept: bool, into: Measured | None, again: Measured | None) -> None:
        """Runs a command in a session that has no share, and waits until its share is free again.

        Args:
            job_id: the session.
            share: how it must get its share.
            kept: its slice is kept warm when it is taken back; otherwise it is destroyed.
            into: where to note it; None is a warm-up.
            again: where to note a second run, while the share is still held; None is none.

        Raises:
            RuntimeError: the run got its share in another way, or failed.
            TimeoutError: an event did not come.
        """
        bare_ms = await self._bare.run(COMMAND)
        ran = await self._run(job_id)
        if ran.share != share:
            raise RuntimeError(f"a run that was to have a {share} share had one that was {ran.share}")
        if into is not None:
            into.bare.append(bare_ms)
            into.run.append(ran.first_byte_ms)
        if again is not None:
            bare_ms = await self._bare.run(COMMAND)
            second = await self._run(job_id)
            # On a machine that is slower than the threshold there is no second run on a held share.
            if second.share == "held":
                again.bare.append(bare_ms)
                again.run.append(second.first_byte_ms)
                ran = replace(second, cursor=ran.cursor)
        reclaimed = await self._witness.job_event(job_id, "RECLAIMED", ran.cursor)
        uuid = reclaimed.event.details["slice_uuid"]
        free_s = reclaimed.arrived_s
        if not kept:
            dropped = await self._witness.job_event(job_id, "WARM_SLICE_DROPPED", reclaimed.event.cursor, uuid)
            free_s = dropped.arrived_s
        if into is not None:
            crossed = await self._witness.crossing(job_id, ran.ended_s)
            into.told.append((crossed.told_s - crossed.threshold_s) * 1000)
            into.detach.append((reclaimed.arrived_s - crossed.threshold_s) * 1000)
            into.reclaim.append((free_s - crossed.threshold_s) * 1000)

    async def _run(self, job_id: str) -> Ran:
        share, cursor, came = "held", 0, 0.0
        begun = time.perf_counter()
        call = self._jobs.RunJob(_requests(job_id, COMMAND))
        async for response in call:
            part = response.WhichOneof("part")
            if part == "event":
                cursor = max(cursor, response.event.cursor)
                if response.event.reason == "SHARE_RESERVED":
                    share = "warm" if response.event.details["warm"] == "true" else "cold"
            elif part == "output" and not came:
                came = time.perf_counter()
            elif part == "exit_code" and response.exit_code:
                raise RuntimeError(f"a run of {job_id} ended with {response.exit_code}")
        if not came:
            raise RuntimeError(f"a run of {job_id} wrote nothing")
        return Ran((came - begun) * 1000, share, cursor, time.time())


async def _requests(job_id: str, command: Sequence[str]) -> AsyncIterator[RunJobRequest]:
    yield RunJobRequest(start=RunStart(job_id=job_id, command=command))
    yield RunJobRequest(stdin_closed=True)
