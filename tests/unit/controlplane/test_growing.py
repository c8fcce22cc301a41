"""A job that runs out of device memory goes on with the next size up, once per size, without anybody doing anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.growing import credible_mib, outgrown
from puhui.v1 import job_pb2
from puhui.v1.job_pb2 import (
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_STOPPING,
    JOB_STATE_SUCCEEDED,
)
from tests.unit.controlplane.centres import RunningCentre, eventually, running
from tests.unit.controlplane.fake_node import FakeNode
from tests.unit.controlplane.samples import GEOMETRY, H100_PROFILES

FULL = (
    b"epoch 1\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of\n"
)


async def fills(node: FakeNode, job_id: str, attempt: int, code: int = 1, output: bytes = FULL) -> None:
    """The command of a job runs out of memory."""
    await node.write(job_id, output, attempt)
    await node.exit(job_id, code, attempt)


async def test_it_goes_up_size_by_size_until_it_fits(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        for number, profile in enumerate(("1g.10gb", "1g.20gb", "3g.40gb"), 1):
            job = await centre.until_runs(job_id, number)
            assert job.attempts[-1].profile == profile
            await fills(node, job_id, number)
        job = await centre.until_runs(job_id, 4)
        assert job.attempts[-1].profile == "7g.80gb"
        assert not job.HasField("exit_code")
        await node.exit(job_id, 0, 4)
        job = await centre.ended(job_id)
        assert (job.state, job.exit_code, len(job.attempts)) == (JOB_STATE_SUCCEEDED, 0, 4)
        assert [one.exit_code for one in job.attempts] == [1, 1, 1, 0]
        assert node.empty
        assert await centre.log(job_id, attempt=1) == FULL
        reasons = await centre.reasons(job_id)
        assert reasons[4:12] == [
            "CONTAINER_STARTED",
            "COMMAND_ENDED",
            "RESULTS_COLLECTED",
            "DEVICE_OUT_OF_MEMORY",
            "CONTAINER_REMOVED",
            "SLICE_DESTROYED",
            "GROWN",
            "RESERVED",
        ]
        event = await centre.until_told(job_id, "DEVICE_OUT_OF_MEMORY")
        assert event.message == (
            "it ran out of device memory on 1g.10gb (9984 MiB); it is tried again from its beginning on the next size "
            "up, 1g.20gb (20096 MiB)"
        )
        grown = await centre.until_told(job_id, "GROWN")
        assert dict(grown.details) == {
            "profile": "1g.10gb",
            "memory_mib": "9984",
            "next_profile": "1g.20gb",
            "next_memory_mib": "20096",
        }
        assert job.attempts[0].message == event.message
        assert job.sizing.reason.endswith(
            "are more than it ran out of; the smallest slice with that much is 7g.80gb (81152 MiB)"
        )


async def test_the_largest_slice_is_the_last(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, required_mib=60_000) as centre:
        job_id = await centre.submit()
        await centre.until_runs(job_id, 1)
        await fills(node, job_id, 1)
        job = await centre.ended(job_id)
        assert (job.state, job.reason, len(job.attempts)) == (JOB_STATE_FAILED, "DEVICE_OUT_OF_MEMORY", 1)
        assert "the largest slice here has 81152 MiB; have it need less" in job.message
        assert node.empty


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        (
            job_pb2.Resources(profile="1g.10gb"),
            ", the profile that was asked for, which is kept; ask for 1g.20gb, or leave --profile out",
        ),
        (
            job_pb2.Resources(memory_mib=9000),
            ", cut for the 9000 MiB that were asked for, which is kept; ask for 1g.20gb, or leave --memory out",
        ),
    ],
)
async def test_what_the_user_fixed_is_kept_and_said(tmp_path: Path, resources: job_pb2.Resources, said: str) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit(resources=resources)
        await centre.until_runs(job_id, 1)
        await fills(node, job_id, 1)
        job = await centre.ended(job_id)
        assert (job.state, job.reason, len(job.attempts)) == (JOB_STATE_FAILED, "DEVICE_OUT_OF_MEMORY", 1)
        assert job.message.startswith("it ran out of device memory on 1g.10gb (9984 MiB)" + said)


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        (b"epoch 1\nKeyError: 'label'\n", 1, "EXIT_CODE"),
        (FULL, 0, "SUCCEEDED"),
        (b"", 137, "EXIT_CODE"),
        (b"Killed\n", 137, "EXIT_CODE"),
    ],
)
async def test_what_ended_otherwise_is_not_tried_again(tmp_path: Path, output: bytes, code: int, reason: str) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until_runs(job_id, 1)
        await fills(node, job_id, 1, code, output)
        job = await centre.ended(job_id)
        assert (job.reason, len(job.attempts)) == (reason, 1)


async def test_host_memory_is_something_else(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until_runs(job_id, 1)
        node.containers[job_id, 1].oom_killed = True
        await fills(node, job_id, 1, 137)
        job = await centre.ended(job_id)
        assert (job.reason, len(job.attempts)) == ("HOST_OUT_OF_MEMORY", 1)


async def test_the_same_code_gets_the_larger_slice_at_once_the_next_time(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until_runs(job_id, 1)
        await fills(node, job_id, 1)
        await centre.until_runs(job_id, 2)
        again = await centre.submit()
        job = await centre.until_runs(again, 1)
        assert job.attempts[0].profile == "1g.20gb"
        assert (
            "an earlier run of this code did not come to its end and needs more than 9.8 GiB" in job.prediction.reason
        )
        # What it is known to need keeps its weight although it was never seen to use so much.
        (seen,) = await centre.centre._store.observations("default", (await record_of(centre, again)))
        assert (seen.peak_mib, seen.at_least_mib, seen.attempt) == (None, 9984, 1)


async def record_of(centre: RunningCentre, job_id: str) -> str:
    record = await centre.centre._store.job(job_id)
    assert record is not None
    return record.fingerprint


async def test_a_kill_of_the_control_plane_at_any_step_leads_to_the_larger_slice_once(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    released = node.hold("destroy_slice")
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit()
        await centre.until_runs(job_id, 1)
        await fills(node, job_id, 1)
        await centre.until_told(job_id, "DEVICE_OUT_OF_MEMORY")
    released.set()
    async with running(tmp_path, node) as centre:
        job = await centre.until_runs(job_id, 2)
        assert job.attempts[-1].profile == "1g.20gb"
        assert (await centre.reasons(job_id)).count("DEVICE_OUT_OF_MEMORY") == 1
        await node.exit(job_id, 0, 2)
        assert (await centre.ended(job_id)).state == JOB_STATE_SUCCEEDED
        assert node.empty


async def test_a_node_that_cannot_be_reached_is_waited_for(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, release_patience_s=0.01) as centre:
        job_id = await centre.submit()
        await centre.until_runs(job_id, 1)
        held = node.hold("remove_container")
        await fills(node, job_id, 1)
        await centre.until_told(job_id, "DEVICE_OUT_OF_MEMORY")
        await eventually(lambda: "remove_container" in node.calls)
        assert (await centre.job(job_id)).state == JOB_STATE_STOPPING
        held.set()
        assert (await centre.until_runs(job_id, 2)).attempts[-1].profile == "1g.20gb"


async def test_who_cancels_it_meanwhile_gets_what_was_asked_for(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node, release_patience_s=0.01) as centre:
        job_id = await centre.submit()
        await centre.until_runs(job_id, 1)
        held = node.hold("remove_container")
        await fills(node, job_id, 1)
        await centre.until_told(job_id, "DEVICE_OUT_OF_MEMORY")
        await centre.cancel(job_id)
        job = await centre.ended(job_id)
        assert (job.state, len(job.attempts)) == (JOB_STATE_CANCELLED, 1)
        assert "enough" in job.message
        held.set()
        await eventually(lambda: node.empty)


async def test_a_session_is_left_to_who_works_in_it(tmp_path: Path) -> None:
    node = FakeNode()
    node.exits_at_once = None
    async with running(tmp_path, node) as centre:
        job_id = await centre.submit(kind=job_pb2.JOB_KIND_SESSION)
        await centre.until_runs(job_id, 1)
        await fills(node, job_id, 1)
        assert (await centre.ended(job_id)).reason == "EXIT_CODE"


def ran_on(profile: str = "1g.10gb", **spec: object) -> job_pb2.Job:
    job = job_pb2.Job(id="j-1", spec=job_pb2.JobSpec(**spec))  # type: ignore[arg-type]
    job.attempts.add(number=1, profile=profile)
    return job


def test_a_guest_is_left_to_the_centre_that_sent_it() -> None:
    job = ran_on()
    job.guest.peer = "b"
    found = outgrown(job, 9984, [GEOMETRY])
    assert found.sizing is None
    assert found.ending.message.endswith(", and the centre that sent it decides how it goes on")


def test_what_no_card_here_can_give_a_peer_may() -> None:
    names = ["1g.10gb", "7g.141gb", "4g.71gb", "odd"]
    found = outgrown(ran_on("7g.80gb"), 81152, [GEOMETRY], names)
    assert found.sizing is not None
    assert (list(found.sizing.choices), found.sizing.required_mib) == ([], 85210)
    assert "the next size up, 7g.141gb at a peer" in found.ending.message
    here_only = ran_on("7g.80gb", peers=job_pb2.PeerPolicy(here_only=True))
    assert outgrown(here_only, 81152, [GEOMETRY], names).sizing is None
    assert outgrown(ran_on("7g.80gb"), 81152, [GEOMETRY], ["4g.71gb"]).sizing is None
    assert "no larger slice is known here" in outgrown(ran_on(), 9984, []).ending.message


@given(st.sampled_from([memory for _, _, memory, *_ in H100_PROFILES]))
def test_every_step_is_larger_so_each_size_is_tried_once(memory: int) -> None:
    sizing = outgrown(ran_on(), memory, [GEOMETRY]).sizing
    assert (sizing is None) == (memory == 81152)
    assert sizing is None or min(choice.memory_mib for choice in sizing.choices) > memory


@pytest.mark.parametrize(
    ("profile", "told_mib", "credible"),
    [
        ("1g.10gb", 9728, True),
        ("1g.10gb", 2**24, False),
        ("1g.10gb", 11_000, False),
        ("", 80_000, True),
        ("", 2**24, False),
        ("7g.99999gb", 2**24, False),
        ("1g.10gb", 0, False),
    ],
)
def test_a_peer_is_believed_what_a_slice_can_have(profile: str, told_mib: int, credible: bool) -> None:
    assert credible_mib(profile, told_mib) is credible
