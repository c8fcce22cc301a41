"""Calls about a job that is at a peer: answered as one that is here, and runs taken up when the connection breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from controlplane import happenings
from controlplane.forwards import ForwardStage
from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2
from puhui.v1 import job_service_pb2 as wire
from tests.unit.controlplane.carried import Ends, ends
from tests.unit.controlplane.centres import eventually

ECHO = ["echo", "hello"]


@contextlib.asynccontextmanager
async def at_peer(folder: Path) -> AsyncIterator[Ends]:
    async with ends(folder) as both:
        await both.send()
        await both.bind()
        yield both


@contextlib.contextmanager
def refused(code: grpc.StatusCode, reason: str) -> Iterator[list[Refusal]]:
    found: list[Refusal] = []
    with pytest.raises(Refusal) as caught:
        yield found
    assert (caught.value.code, caught.value.reason) == (code, reason), caught.value
    found.append(caught.value)


def output(answers: list[wire.RunJobResponse]) -> bytes:
    return b"".join(answer.output.data for answer in answers)


async def test_a_run_is_carried_with_its_input(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both, both.run("r-1", command=ECHO) as run:
        accepted = (await run.until("run")).run
        assert (accepted.job_id, list(accepted.command)) == (both.job_id, ECHO)
        begun = (await run.until("run")).run
        assert (begun.id, begun.job_id, begun.attempt) == (accepted.id, both.job_id, 1)
        command = await both.command()
        assert command.start.owner.job_id == both.job_there
        run.send(stdin=b"typed")
        await eventually(lambda: [one.stdin for one in command.input] == [b"typed"])
        await command.write(b"hello\n")
        assert (await run.until("output")).output.data == b"hello\n"
        await command.end(7)
        assert (await run.until("exit_code")).exit_code == 7
        listed = await both.jobs.ListRuns(wire.ListRunsRequest(job_id=both.job_id), None)
        assert [(one.id, one.job_id) for one in listed.runs] == [(accepted.id, both.job_id)]


async def test_a_run_is_taken_up_where_the_connection_was_cut(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both, both.run("r-1", command=ECHO) as run:
        await run.until("run")
        await run.until("run")
        command = await both.command()
        await command.write(b"before ")
        assert (await run.until("output")).output.data == b"before "
        await both.peer.cut()
        told = (await run.until("event")).event
        assert (told.reason, told.job_id) == ("PEER_OUT_OF_CONTACT", both.job_id)
        await command.write(b"and after")
        rest = asyncio.create_task(run.rest())
        await both.peer.mend()
        await command.end(3)
        answers = await rest
        assert output(answers) == b"and after"
        assert [answer.exit_code for answer in answers if answer.HasField("exit_code")] == [3]
        assert not any(answer.HasField("run") for answer in answers), "that it was accepted and begun was told before"
        assert len(both.node.commands) == 1, "it was run once"


async def test_what_was_typed_while_the_connection_was_cut_is_sent_after_it(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both, both.run("r-1", command=["sh"], tty=True) as run:
        await run.until("run")
        await run.until("run")
        command = await both.command()
        run.send(stdin=b"typed before, ")
        run.send(terminal_size=wire.TerminalSize(columns=99, rows=9))
        await eventually(lambda: len(command.input) == 2)
        await both.peer.cut()
        await run.until("event")
        run.send(stdin=b"typed meanwhile")
        run.send(stdin_closed=True)
        sent = len(both.peer.requests)
        rest = asyncio.create_task(run.rest())
        await both.peer.mend()
        await eventually(lambda: len(command.input) == 4)
        assert b"".join(one.stdin for one in command.input) == b"typed before, typed meanwhile"
        assert command.input[-1].stdin_closed
        again = wire.RunJobRequest.FromString(both.peer.requests[sent + 1].message).start
        assert (again.terminal_size.columns, again.output_offset) == (99, 0)
        await command.end(0)
        await rest


async def test_a_run_that_may_have_lost_input_is_given_back_to_its_caller(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both, both.run("r-1", command=["cat"]) as run:
        await run.until("run")
        await run.until("run")
        run.send(stdin=b"half of i")
        command = await both.command()
        await eventually(lambda: bool(command.input))
        await both.peer.cut()
        with refused(grpc.StatusCode.UNAVAILABLE, "PEER_UNREACHABLE") as found:
            await run.rest()
        assert found[0].retry_after_s


async def test_a_run_without_a_request_id_ends_with_its_connection(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both, both.run(command=ECHO) as run:
        await run.until("run")
        await run.until("run")
        await both.peer.cut()
        with refused(grpc.StatusCode.ABORTED, "RUN_HUNG_UP"):
            await run.rest()


async def test_a_run_ends_when_its_session_is_given_up_for_lost(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both, both.run("r-1", command=ECHO) as run:
        await run.until("run")
        await run.until("run")
        await both.peer.cut()
        await run.until("event")
        await both.change(stage=ForwardStage.LOST)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "RUN_LOST"):
            await run.rest()


async def test_a_run_waits_while_its_session_is_on_its_way(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.send()
        async with both.run("r-1", command=ECHO) as run:
            first = asyncio.create_task(run.until("run"))
            await both.bind()
            assert (await first).run.job_id == both.job_id
            await run.until("run")
            await (await both.command()).end(0)
            assert (await run.until("exit_code")).exit_code == 0


async def test_a_run_that_waits_goes_with_its_session(tmp_path: Path) -> None:
    async with ends(tmp_path) as both, both.run("r-1", command=ECHO) as run:
        accepted = (await run.until("run")).run
        waiting = asyncio.create_task(run.until("event"))
        await both.send()
        left = await both.here.centre._store.run(accepted.id)
        assert left is not None
        assert left[0].HasField("end_time"), "here it waits no longer"
        await waiting
        rest = asyncio.create_task(run.rest())
        await both.bind()
        await (await both.command()).end(0)
        answers = await rest
        assert [answer.run.HasField("start_time") for answer in answers if answer.HasField("run")] == [True]
        assert answers[-1].exit_code == 0


async def test_the_job_in_an_answer_is_the_one_of_here(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both:
        answer = await both.jobs.SuspendJob(wire.SuspendJobRequest(job_id=both.job_id, request_id="s-1"), None)
        assert (await both.there.job(both.job_there)).state == job_pb2.JOB_STATE_IDLE
        job = await both.job()
        assert (answer.job.id, answer.job.attempts[0].peer) == (both.job_id, "b")
        for shown in (job, answer.job):
            assert shown.attempts[0].HasField("lease_expire_time")
            shown.attempts[0].ClearField("lease_expire_time")
        assert answer.job == job
        answer = await both.jobs.ResumeJob(wire.ResumeJobRequest(job_id=both.job_id), None)
        assert answer.job.id == both.job_id


async def test_an_answer_waits_until_what_it_says_is_known_here(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.send()
        await both.bind(cursor=0)
        asked = asyncio.create_task(both.jobs.SuspendJob(wire.SuspendJobRequest(job_id=both.job_id), None))
        await both.there.until_told(both.job_there, "RECLAIMED")
        job = await both.there.job(both.job_there)
        event = job_pb2.JobEvent(reason="RECLAIMED", state=job.state, message="its share was taken back")
        assert not asked.done()
        await both.change(happenings.PeerTold(event, job), cursor=job.last_cursor)
        assert (await asked).job.state == job_pb2.JOB_STATE_IDLE


async def test_what_waits_in_the_queue_of_its_peer_is_shown_to_wait_there(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        await both.send()
        await both.bind()
        job = await both.there.job(both.job_there)
        event = job_pb2.JobEvent(
            reason="WAITING_FOR_SLICE", state=job_pb2.JOB_STATE_QUEUED, message="waits for 1g.10gb"
        )
        await both.change(happenings.PeerTold(event, job))
        shown = await both.here.job(both.job_id)
        assert (shown.state, shown.message) == (
            job_pb2.JOB_STATE_STARTING,
            "in the queue of peer b: waits for 1g.10gb",
        )
        event = job_pb2.JobEvent(reason="RESERVED", state=job_pb2.JOB_STATE_STARTING, message="1g.10gb reserved")
        await both.change(happenings.PeerTold(event, job))
        assert (await both.here.job(both.job_id)).message == "1g.10gb reserved"


async def test_why_it_waits_is_said_by_its_peer_or_from_memory(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both:
        request = wire.ExplainJobRequest(job_id=both.job_id)
        assert (await both.jobs.ExplainJob(request, None)).message.startswith("at peer b: ")
        both.peer.speaks.clear()
        assert (await both.jobs.ExplainJob(request, None)).message.startswith("peer b does not answer; what was last")
        await both.peer.cut()
        assert (await both.jobs.ExplainJob(request, None)).message.startswith("peer b is out of contact")


class Hurried:
    """A call whose caller waits for that long only."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time_remaining(self) -> float:
        """Returns how long it still waits."""
        return self._seconds


async def test_whoever_waits_is_told_in_time_that_a_peer_is_silent(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both:
        both.peer.speaks.clear()
        with pytest.raises(Refusal) as caught:
            await both.jobs.ListRuns(wire.ListRunsRequest(job_id=both.job_id), Hurried(2.6))
        assert caught.value.reason == "PEER_UNREACHABLE"
        assert "peer b has not answered in time" in caught.value.message


async def test_what_is_here_is_answered_here(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        assert (await both.jobs.GetJob(wire.GetJobRequest(job_id=both.job_id), None)).job.id == both.job_id
        assert not (await both.jobs.ListRuns(wire.ListRunsRequest(job_id=both.job_id), None)).runs
        with refused(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"):
            await both.jobs.SuspendJob(wire.SuspendJobRequest(job_id="j-none"), None)
        await both.send()
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_STARTED"):
            await both.jobs.SuspendJob(wire.SuspendJobRequest(job_id=both.job_id), None)
        assert not both.peer.requests


async def test_a_peer_out_of_contact_is_said_to_be(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both:
        await both.peer.cut()
        with refused(grpc.StatusCode.UNAVAILABLE, "PEER_UNREACHABLE") as found:
            await both.jobs.SuspendJob(wire.SuspendJobRequest(job_id=both.job_id), None)
        assert found[0].retry_after_s
        assert "taken to be running there still" in found[0].message
        with refused(grpc.StatusCode.UNAVAILABLE, "PEER_UNREACHABLE"):
            await both.run("r-1", command=ECHO).rest()
        both.book.clear()
        with refused(grpc.StatusCode.UNAVAILABLE, "PEER_UNREACHABLE"):
            await both.jobs.ListRuns(wire.ListRunsRequest(job_id=both.job_id), None)


async def test_a_refusal_speaks_of_the_job_of_here(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both:
        await both.there.cancel(both.job_there)
        await both.there.ended(both.job_there)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED") as found:
            await both.jobs.SuspendJob(wire.SuspendJobRequest(job_id=both.job_id), None)
        assert found[0].metadata["job_id"] == both.job_id
        assert found[0].message.startswith(f"at peer b: job {both.job_id} ")
        assert both.job_there not in found[0].message


@pytest.mark.parametrize(
    "answer", [b"\xff\xff\xff", wire.ListRunsResponse(runs=[job_pb2.Run(job_id="j-another")]).SerializeToString()]
)
async def test_what_no_honest_peer_answers_is_refused(tmp_path: Path, answer: bytes) -> None:
    async with at_peer(tmp_path) as both:
        both.peer.spoil = lambda _: answer
        with refused(grpc.StatusCode.DATA_LOSS, "PEER_ANSWER_INVALID"):
            await both.jobs.ListRuns(wire.ListRunsRequest(job_id=both.job_id), None)


async def test_a_peer_that_has_it_no_longer_asks_for_patience(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both:
        await both.there.centre._store.forget_guest(("a", both.job_id, 1))
        with refused(grpc.StatusCode.UNAVAILABLE, "GUEST_NOT_FOUND"):
            await both.jobs.ListRuns(wire.ListRunsRequest(job_id=both.job_id), None)


async def test_request_ids_of_a_peer_are_its_own(tmp_path: Path) -> None:
    async with at_peer(tmp_path) as both:
        for request_id in ("s-1", "x" * 64):
            # Somebody there has used the same one for something else.
            own = wire.SuspendJobRequest(
                job_id=both.job_there, request_id=request_id, hardest=job_pb2.RECLAIM_MODE_DETACH
            )
            await both.there.jobs.SuspendJob(own)
            await both.jobs.SuspendJob(wire.SuspendJobRequest(job_id=both.job_id, request_id=request_id), None)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_INVALID"):
            await both.jobs.SuspendJob(wire.SuspendJobRequest(job_id=both.job_id, request_id="x" * 65), None)
