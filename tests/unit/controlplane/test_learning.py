"""What jobs really used flows back into what the same code is predicted to need."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.endings import Ending
from controlplane.observing import observe
from puhui.rpc.moment import timestamp
from puhui.v1 import job_pb2
from puhui.v1 import job_service_pb2 as wire
from puhui.v1.job_pb2 import JOB_STATE_FAILED, JOB_STATE_RUNNING, JOB_STATE_SUCCEEDED
from tests.unit.controlplane.centres import RunningCentre, running
from tests.unit.controlplane.fake_node import FakeNode

SUCCEEDED = Ending(JOB_STATE_SUCCEEDED, "SUCCEEDED", "")
FAILED = Ending(JOB_STATE_FAILED, "EXIT_CODE", "")


async def ran(
    centre: RunningCentre, node: FakeNode, peak_mib: int | None, code: int = 0, samples: int = 5, **spec: object
) -> job_pb2.Job:
    """A job runs to its end, and its node tells how much memory it used."""
    job_id = await centre.submit(**spec)
    await centre.until(job_id, JOB_STATE_RUNNING)
    idleness = node.containers[job_id, 1].idleness
    idleness.busy_seconds, idleness.memory_samples = 1.0, samples
    if peak_mib is not None:
        idleness.peak_memory_mib = peak_mib
    await node.exit(job_id, code)
    return await centre.ended(job_id)


async def predicted(centre: RunningCentre, **spec: object) -> wire.PredictJobResponse:
    fields = {"command": ["python3", "x.py"], **spec}
    return await centre.jobs.PredictJob(
        wire.PredictJobRequest(
            spec=job_pb2.JobSpec(**fields),  # type: ignore[arg-type]
            inline=wire.InlineCode(files={"x.py": "print(1)\n"}),
        )
    )


async def test_what_a_job_used_is_what_its_code_is_predicted_to_need(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        assert (await predicted(centre)).sizing.choices[0].profile == "1g.10gb"
        for peak_mib in (15_000, 15_010, 15_020):
            job = await ran(centre, node, peak_mib)
            assert job.attempts[0].peak_memory_mib == peak_mib
        answer = await predicted(centre)
        assert answer.prediction.reason.startswith(
            "3 earlier runs of this code peaked at 14.6 GiB to 14.7 GiB (seen on emulated cards). "
        )
        assert 15_010 < answer.prediction.required_mib < 17_000
        assert answer.prediction.memory.p50_mib == pytest.approx(15_010, rel=0.001)
        assert {"earlier_runs": "3"}.items() <= {fact.name: fact.value for fact in answer.prediction.facts}.items()
        assert answer.sizing.choices[0].profile == "1g.20gb"
        job_id = await centre.submit()
        assert (await centre.until(job_id, JOB_STATE_RUNNING)).attempts[0].profile == "1g.20gb"


async def test_it_is_still_known_after_a_restart(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        await ran(centre, node, 15_000)
    async with running(tmp_path, node) as centre:
        assert "1 earlier run of this code" in (await predicted(centre)).prediction.reason


async def test_nobody_sees_the_history_of_another_tenant_or_of_other_code(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        await ran(centre, node, 15_000, tenant="astro")
        for spec in ({"tenant": "bio"}, {}, {"tenant": "astro", "command": ["python3", "x.py", "--big"]}):
            assert "earlier" not in (await predicted(centre, **spec)).prediction.reason
        assert "1 earlier run" in (await predicted(centre, tenant="astro")).prediction.reason


@pytest.mark.parametrize(("peak_mib", "samples"), [(None, 5), (None, 0), (15_000, 2)])
async def test_nothing_is_learnt_from_what_was_not_seen(tmp_path: Path, peak_mib: int | None, samples: int) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job = await ran(centre, node, peak_mib, samples=samples)
        assert not job.attempts[0].HasField("peak_memory_mib")
        assert "earlier" not in (await predicted(centre)).prediction.reason


async def test_what_did_not_come_to_its_end_tells_a_lower_bound(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        await ran(centre, node, 15_000, code=3)
        reason = (await predicted(centre)).prediction.reason
        assert reason.startswith("an earlier run of this code did not come to its end and needs more than 14.6 GiB (")
        assert (await predicted(centre)).prediction.memory.p50_mib == 15_000


async def test_what_the_user_says_wins_over_history(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        await ran(centre, node, 15_000)
        answer = await predicted(centre, resources=job_pb2.Resources(memory_mib=9000))
        assert answer.sizing.choices[0].profile == "1g.10gb"


def ended_job(**attempt: object) -> job_pb2.Job:
    job = job_pb2.Job(id="j-1", spec=job_pb2.JobSpec(tenant="astro"))
    made = job.attempts.add(number=1, profile="1g.10gb", gpu_model="H100", **attempt)
    made.start_time.CopyFrom(timestamp(100.0))
    made.end_time.CopyFrom(timestamp(160.0))
    share = made.shares.add(busy_seconds=30.0)
    share.hold_time.CopyFrom(timestamp(90.0))
    share.release_time.CopyFrom(timestamp(165.0))
    return job


def test_an_attempt_shows_memory_time_and_use() -> None:
    seen = observe(ended_job(peak_memory_mib=9000), "f", SUCCEEDED, 0, 170.0)
    assert seen is not None
    assert (seen.peak_mib, seen.at_least_mib, seen.duration_s, seen.utilization) == (9000, None, 60.0, 0.4)
    seen = observe(ended_job(peak_memory_mib=9000), "f", FAILED, 0, 170.0)
    assert seen is not None
    assert (seen.peak_mib, seen.at_least_mib) == (None, 9000)


def test_an_attempt_that_never_began_or_has_no_fingerprint_shows_nothing() -> None:
    assert observe(ended_job(peak_memory_mib=9000), "", SUCCEEDED, 0, 170.0) is None
    assert observe(job_pb2.Job(id="j-1"), "f", FAILED, 0, 170.0) is None
    never = ended_job(peak_memory_mib=9000)
    never.attempts[0].ClearField("start_time")
    assert observe(never, "f", FAILED, 0, 170.0) is None
    assert observe(ended_job(), "f", SUCCEEDED, 0, 170.0) is None
