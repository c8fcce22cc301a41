"""Usage, from the store of a real control plane to what `puhui usage` says."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.metering import HoldBegun, HoldEnded, ReclaimedBegun, RunBegun, RunEnded, UsageChange
from controlplane.records import Change
from puhui.rpc.moment import now, timestamp
from puhui.v1 import fleet_service_pb2 as wire
from puhui.v1 import job_pb2
from tests.unit.controlplane.centres import RunningCentre, refused, running
from tests.unit.controlplane.samples import H100


async def use(centre: RunningCentre, job_id: str, *changes: UsageChange) -> None:
    await centre.centre._store.change_job(job_id, lambda record, _: Change(record, usage=changes))


async def used(centre: RunningCentre, start: float) -> str:
    """A job that held two slices for 100 s, used them for 25 s, and lived without them for 300 s."""
    job_id = await centre.submit(name="train", tenant="lab")
    await use(
        centre,
        job_id,
        HoldBegun(start, 1, "2g.20gb", H100, 2, 7, emulated=True),
        RunBegun("r-1", start, 0.0),
        RunEnded("r-1", start + 40, 25.0),
        HoldEnded(start + 100, 25.0, job_pb2.RECLAIM_MODE_DETACH),
        ReclaimedBegun(start + 100),
        HoldBegun(start + 400, 1, "1g.10gb", "Unknown GPU", 1, 7, emulated=True),
        HoldEnded(start + 500),
    )
    return job_id


async def puhui(centre: RunningCentre, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "puhui.cli",
        *arguments,
        "--server",
        centre.centre.address,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "120"},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


async def test_usage_is_told_by_tenant_job_and_run(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        start = now() - 1000
        job_id = await used(centre, start)
        by_tenant = await centre.fleet.GetUsage(
            wire.GetUsageRequest(start_time=timestamp(start - 10), end_time=timestamp(start + 390), point_count=4)
        )
        (row,) = by_tenant.rows
        assert (row.tenant, row.job_id, row.emulated, row.reclaims) == ("lab", "", True, 1)
        figures = (row.held_seconds, row.busy_seconds, row.held_slice_seconds, row.busy_slice_seconds)
        assert figures == pytest.approx((100, 25, 200, 50), abs=1e-3)
        assert row.reclaimed_slice_seconds == pytest.approx(2 * 290, abs=1e-3)
        assert row.tflops_hours == pytest.approx(989 * 2 / 7 * 100 / 3600, rel=1e-4)
        assert [point.held_slices for point in by_tenant.points] == pytest.approx([1.8, 0.2, 0, 0], abs=1e-4)
        assert by_tenant.tenants[0].reclaimed_slice_seconds == row.reclaimed_slice_seconds
        (job,) = (await centre.fleet.GetUsage(wire.GetUsageRequest(group_by=wire.USAGE_GROUP_JOB))).rows
        assert (job.job_id, job.job_name) == (job_id, "train")
        assert job.held_slice_seconds == pytest.approx(300)
        (run,) = (await centre.fleet.GetUsage(wire.GetUsageRequest(group_by=wire.USAGE_GROUP_RUN))).rows
        assert run.run_id == "r-1"
        assert (run.held_seconds, run.busy_seconds) == pytest.approx((40, 25))
        for other in (wire.GetUsageRequest(tenant="another"), wire.GetUsageRequest(job_id="j-absent")):
            assert not (await centre.fleet.GetUsage(other)).rows


async def test_usage_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        late, early = Timestamp(seconds=20), Timestamp(seconds=10)
        for request in (
            wire.GetUsageRequest(start_time=late, end_time=early),
            wire.GetUsageRequest(point_count=501),
            wire.GetUsageRequest(group_by=99),  # type: ignore[arg-type]
        ):
            async with refused(grpc.StatusCode.INVALID_ARGUMENT, "USAGE_INVALID"):
                await centre.fleet.GetUsage(request)


async def test_the_command_shows_a_table_a_chart_and_what_reclaim_saved(tmp_path: Path) -> None:
    async with running(tmp_path, join=False) as centre:
        code, out, err = await puhui(centre, "usage")
        assert (code, out) == (0, "")
        assert "nobody held a share in the last 1d" in err
        job_id = await used(centre, now() - 1000)
        code, out, err = await puhui(centre, "usage", "--by", "job", "--since", "30m")
        assert code == 0, err
        assert job_id in out
        assert "train (emulated)" in " ".join(out.split())
        assert "given back" in out
        assert "reclaim gave back 0.2 share-hours" in " ".join(err.split())
        assert max(len(line) for line in out.splitlines()) <= 80
        code, out, err = await puhui(centre, "usage", "--json", "--by", "run")
        (row,) = json.loads(out)["rows"]
        assert (code, row["run_id"], row["emulated"]) == (0, "r-1", True)
        code, out, err = await puhui(centre, "usage", "--since", "soon")
        assert code == 2
        assert "is no duration" in err
