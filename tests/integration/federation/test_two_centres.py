"""A job's way to a peer and home, over real mutual TLS and real stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from puhui.v1 import job_pb2
from puhui.v1 import job_service_pb2 as wire
from tests.integration.federation.neighbourhood import neighbour, pair
from tests.unit.controlplane.centres import eventually


async def _all(answers: AsyncIterable[wire.RunJobResponse]) -> list[wire.RunJobResponse]:
    return [answer async for answer in answers]


async def test_what_does_not_fit_here_runs_there_and_comes_home(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as here, neighbour("b", tmp_path) as there:
        await pair(here, there)
        await here.fill()
        job_id = await here.submit(name="guest", tenant="astro")
        guest = await there.guest("guest")
        assert (guest.guest.peer, guest.guest.job_id, guest.spec.tenant) == ("a", job_id, "a.astro")
        await there.until(guest.id, job_pb2.JOB_STATE_RUNNING)
        job = await here.until(job_id, job_pb2.JOB_STATE_RUNNING)
        assert (job.executing_centre, job.attempts[0].peer, job.attempts[0].peer_job_id) == ("b", "b", guest.id)
        await there.node.write(guest.id, b"hello from there\n")
        there.node.artifacts[guest.id, 1] = b"archive"
        await there.node.exit(guest.id, 0)
        job = await here.ended(job_id)
        assert (job.state, job.exit_code, job.log_size_bytes) == (job_pb2.JOB_STATE_SUCCEEDED, 0, 17)
        assert await here.log(job_id) == b"hello from there\n"
        parts = here.jobs.GetArtifacts(wire.GetArtifactsRequest(job_id=job_id))
        assert b"".join([part.chunk async for part in parts]) == b"archive"
        assert there.node.empty
        reasons = await here.reasons(job_id)
        for reason in ("FORWARDING", "FORWARDED", "SLICE_CREATED", "CONTAINER_STARTED", "PEER_ENDED", "SUCCEEDED"):
            assert reason in reasons


async def test_one_that_runs_out_of_memory_there_is_sent_again_for_a_larger_slice_and_is_learnt_from(
    tmp_path: Path,
) -> None:
    async with neighbour("a", tmp_path) as here, neighbour("b", tmp_path) as there:
        await pair(here, there)
        await here.fill()
        job_id = await here.submit(name="guest")
        first = await there.guest("guest")
        await there.until(first.id, job_pb2.JOB_STATE_RUNNING)
        await there.node.write(first.id, b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
        await there.node.exit(first.id, 1)
        guest = await there.ended(first.id)
        assert (guest.reason, len(guest.attempts)) == ("DEVICE_OUT_OF_MEMORY", 1)
        assert guest.message.endswith("and the centre that sent it decides how it goes on")
        grown = await here.until_told(job_id, "GROWN")
        assert (grown.details["profile"], grown.details["next_profile"]) == ("1g.10gb", "1g.20gb")
        assert (await here.until_runs(job_id, 2)).attempts[1].profile == "1g.20gb"
        second = await there.guest("guest")
        idleness = there.node.containers[second.id, 1].idleness
        idleness.peak_memory_mib, idleness.memory_samples = 15_000, 4
        await there.node.exit(second.id, 0)
        job = await here.ended(job_id)
        assert (job.state, job.exit_code) == (job_pb2.JOB_STATE_SUCCEEDED, 0)
        assert [attempt.profile for attempt in job.attempts] == ["1g.10gb", "1g.20gb"]
        assert job.attempts[1].peak_memory_mib == 15_000
        record = await here.centre._store.job(job_id)
        assert record is not None
        seen = await here.centre._store.observations("default", record.fingerprint)
        assert [(one.peer, one.peak_mib, one.at_least_mib) for one in seen] == [("b", 15_000, None), ("b", None, 9984)]
        # Nobody there has learnt anything from another centre's code.
        assert there.centre._store._read.execute("select count(*) from observations").fetchone() == (0,)


async def test_output_is_followed_through_the_origin_while_it_is_written(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as here, neighbour("b", tmp_path) as there:
        await pair(here, there)
        await here.fill()
        job_id = await here.submit(name="guest")
        follow = aiter(here.jobs.ReadLogs(wire.ReadLogsRequest(job_id=job_id, follow=True), timeout=30))
        guest = await there.guest("guest")
        await there.until(guest.id, job_pb2.JOB_STATE_RUNNING)
        await there.node.write(guest.id, b"one\ntwo\n")
        assert (await anext(follow)).chunk.data == b"one\ntwo\n"
        await here.until(job_id, job_pb2.JOB_STATE_RUNNING)
        await there.node.write(guest.id, b"three\n")
        assert (await anext(follow)).chunk.data == b"three\n"
        for lines, said in ((1, b"three\n"), (2, b"two\nthree\n"), (9, b"one\ntwo\nthree\n")):
            assert await here.log(job_id, tail_lines=lines) == said
        await there.node.exit(guest.id, 0)
        assert [part.chunk.data async for part in follow] == []
        await here.ended(job_id)


async def test_runs_are_carried_to_a_session_at_a_peer(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as here, neighbour("b", tmp_path) as there:
        await pair(here, there)
        await here.fill()
        job_id = await here.submit(name="guest", kind=job_pb2.JOB_KIND_SESSION)
        guest = await there.guest("guest")
        await here.until(job_id, job_pb2.JOB_STATE_RUNNING)
        start = wire.RunStart(job_id=job_id, command=["echo", job_id], request_id="run-1")

        async def asked() -> AsyncIterator[wire.RunJobRequest]:
            yield wire.RunJobRequest(start=start)

        call = asyncio.create_task(_all(here.jobs.RunJob(asked(), wait_for_ready=True, timeout=30)))
        await eventually(lambda: bool(there.node.commands))
        command = there.node.commands[0]
        assert list(command.start.command) == ["echo", job_id]
        await command.write(b"hello\n")
        await command.end(3)
        answers = await call
        runs = [answer.run for answer in answers if answer.HasField("run")]
        assert {(run.job_id, run.attempt) for run in runs} <= {(job_id, 0), (job_id, 1)}
        assert b"".join(answer.output.data for answer in answers) == b"hello\n"
        assert [answer.exit_code for answer in answers if answer.HasField("exit_code")] == [3]
        listed = (await here.jobs.ListRuns(wire.ListRunsRequest(job_id=job_id))).runs
        assert [(run.job_id, run.exit_code) for run in listed] == [(job_id, 3)]
        explained = await here.jobs.ExplainJob(wire.ExplainJobRequest(job_id=job_id))
        assert explained.message.startswith("at peer b: ")
        await here.cancel(job_id)
        await here.ended(job_id)
        await there.ended(guest.id)
        # What ran there is known here also when the peer is asked no longer.
        listed = (await here.jobs.ListRuns(wire.ListRunsRequest(job_id=job_id))).runs
        assert [(run.job_id, run.exit_code) for run in listed] == [(job_id, 3)]
