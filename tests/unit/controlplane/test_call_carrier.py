"""Calls about a guest that its origin carries here: each reaches that guest's job and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from controlplane.call_carrier import CallCarrier
from controlplane.carried_methods import CARRIED, Method
from controlplane.guests import GuestRecord, GuestStage
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, job_service_pb2
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_service_pb2 as job_wire
from tests.unit.controlplane.centres import eventually

OTHER = "j-0000000000zz"
OWN = "j-0123456789ab"
GUEST = GuestRecord("a", "j-ba9876543210", 3, 5, job_id=OWN)
NAMES = [method.name for method in job_service_pb2.DESCRIPTOR.services_by_name["JobService"].methods]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Guests:
    """The part of the store that is asked."""

    def __init__(self, *guests: GuestRecord) -> None:
        self.guests = {guest.key: guest for guest in guests}

    async def guest(self, key: tuple[str, str, int]) -> GuestRecord | None:
        return self.guests.get(key)


class Jobs:
    """Answers any call of JobService with what it is given, and keeps what it was asked."""

    def __init__(self, *answers: Message | Refusal, hold: bool = False) -> None:
        self.answers = answers
        self.asked: list[Message] = []
        self.called: list[str] = []
        self.closed = False
        self.input_ended = False
        self.hold = asyncio.Event()
        if not hold:
            self.hold.set()

    def __getattr__(self, name: str) -> Any:
        method = CARRIED[name]
        return self._stream(method) if method.streams_responses else self._single(method)

    def _single(self, method: Method) -> Any:
        async def call(request: Any, context: object) -> Message:
            self.called.append(method.name)
            self.asked.append(request)
            return self._answer(self.answers[0])

        return call

    def _stream(self, method: Method) -> Any:
        async def call(request: Any, context: object) -> AsyncIterator[Message]:
            self.called.append(method.name)
            try:
                await self.hold.wait()
                if method.streams_requests:
                    async for one in request:
                        self.asked.append(one)
                    self.input_ended = True
                else:
                    self.asked.append(request)
                for answer in self.answers:
                    yield self._answer(answer)
            finally:
                self.closed = True

        return call

    @staticmethod
    def _answer(answer: Message | Refusal) -> Message:
        if isinstance(answer, Refusal):
            raise answer
        return answer


def origin(token: int = 5, attempt: int = 3, job_id: str = GUEST.origin_job) -> card_pb2.AttemptRef:
    return card_pb2.AttemptRef(centre="a", job_id=job_id, attempt=attempt, fencing_token=token)


def header(method: str = "SuspendJob", **fields: Any) -> wire.CallForwardedJobRequest:
    return wire.CallForwardedJobRequest(header=wire.CallHeader(origin=origin(**fields), method=method))


def told(*messages: Message) -> list[wire.CallForwardedJobRequest]:
    return [wire.CallForwardedJobRequest(message=message.SerializeToString()) for message in messages]


END = wire.CallForwardedJobRequest(end=True)
SUSPEND = job_wire.SuspendJobRequest(job_id=OTHER)


async def each(messages: Iterable[wire.CallForwardedJobRequest]) -> AsyncIterator[wire.CallForwardedJobRequest]:
    for message in messages:
        yield message


async def carried(jobs: Jobs, *messages: wire.CallForwardedJobRequest, peer: str = "a") -> list[bytes]:
    carrier: Any = CallCarrier(Guests(GUEST), jobs)  # type: ignore[arg-type]
    return [answer.message async for answer in carrier.serve(peer, each(messages))]


@contextlib.contextmanager
def refused(code: grpc.StatusCode, reason: str) -> Iterator[None]:
    with pytest.raises(Refusal) as error:
        yield
    assert (error.value.code, error.value.reason) == (code, reason), error.value
    assert error.value.message


def asking(method: Method) -> Message:
    """Returns a request of a method that names a job of somebody else in every way it can."""
    request: Any = method.request()
    for one in [request, *(getattr(request, name) for name in ["start"] if name in request.DESCRIPTOR.fields_by_name)]:
        for field, value in (("job_id", OTHER), ("request_id", "again"), ("attempt", 3)):
            if field in one.DESCRIPTOR.fields_by_name:
                setattr(one, field, value)
    return method.request.FromString(request.SerializeToString())


@pytest.mark.parametrize("method", CARRIED.values(), ids=CARRIED)
async def test_every_call_reaches_the_guests_own_job_alone(method: Method) -> None:
    response: Any = method.response()
    if "job" in response.DESCRIPTOR.fields_by_name:
        response.job.id = OWN
        response.job.attempts.add(number=1)
    if "runs" in response.DESCRIPTOR.fields_by_name:
        response.runs.add(id="r-1", job_id=OWN, attempt=1, message=f"see {OWN}; {OTHER} was first")
    if "message" in response.DESCRIPTOR.fields_by_name:
        response.message = f"{OWN} waits for job {OTHER} on 10.1.2.3:7070"
    if "event" in response.DESCRIPTOR.fields_by_name:
        response.event.job_id, response.event.attempt = OWN, 1
        response.event.details["for_job"] = OTHER
    jobs = Jobs(response)
    (answer,) = await carried(jobs, header(method.name), *told(asking(method)), END)
    assert jobs.called == [method.name]
    (asked,) = jobs.asked
    assert OTHER not in str(asked)
    assert OWN in str(asked)
    assert 'request_id: "again"' not in str(asked)
    assert "attempt" not in str(asked), "the newest is meant"
    text = str(method.response.FromString(answer))
    assert OWN not in text
    assert OTHER not in text
    assert "10.1.2.3" not in text
    if hasattr(response, "runs"):
        (run,) = job_wire.ListRunsResponse.FromString(answer).runs
        assert (run.job_id, run.attempt) == (GUEST.origin_job, 3)


@pytest.mark.parametrize("name", [*(set(NAMES) - set(CARRIED)), "", "__init__", "_accept", "Nothing", "x" * 10_000])
async def test_nothing_else_is_carried(name: str) -> None:
    jobs = Jobs()
    with refused(grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_CARRIED"):
        await carried(jobs, header(name), *told(SUSPEND), END)
    assert jobs.called == []


async def test_one_peers_guest_is_nothing_to_another() -> None:
    not_found = grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND"
    jobs = Jobs()
    with refused(*not_found):
        await carried(jobs, header(), *told(SUSPEND), END, peer="eve")
    with refused(*not_found):
        await carried(jobs, header(attempt=4), *told(SUSPEND), END)
    with refused(*not_found):
        await carried(jobs, header(job_id=OWN), *told(SUSPEND), END)
    never: Any = CallCarrier(Guests(replace(GUEST, job_id="", stage=GuestStage.CANCELLED)), jobs)  # type: ignore[arg-type]
    with refused(*not_found):
        await anext(never.serve("a", each([header(), *told(SUSPEND), END])))
    assert jobs.called == []


async def test_who_no_longer_commands_it_calls_nothing() -> None:
    jobs = Jobs()
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_FENCING_TOKEN"):
        await carried(jobs, header(token=4), *told(SUSPEND), END)
    assert jobs.called == []


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "HEADER_MISSING"),
        ([wire.CallForwardedJobRequest()], "HEADER_MISSING"),
        ([*told(SUSPEND), END], "HEADER_MISSING"),
        ([END], "HEADER_MISSING"),
        ([header()], "MESSAGE_INVALID"),
        ([header(), END], "MESSAGE_INVALID"),
        ([header(), header(), *told(SUSPEND)], "MESSAGE_INVALID"),
        ([header(), wire.CallForwardedJobRequest()], "MESSAGE_INVALID"),
        ([header(), wire.CallForwardedJobRequest(message=b"\xff\xff\xff\xff")], "MESSAGE_INVALID"),
        ([header("RunJob"), header("RunJob")], "MESSAGE_INVALID"),
        ([header("RunJob"), *told(asking(CARRIED["RunJob"])), header("RunJob")], "MESSAGE_INVALID"),
    ],
)
async def test_messages_that_are_not_what_they_must_be(messages: list[Any], reason: str) -> None:
    jobs = Jobs(job_wire.SuspendJobResponse())
    with refused(INVALID, reason):
        await carried(jobs, *messages)
    assert jobs.called in ([], ["RunJob"])
    assert not jobs.input_ended


async def test_fields_of_later_versions_are_left_out() -> None:
    """What this version does not know, it cannot make the guest's own."""
    jobs = Jobs(job_wire.SuspendJobResponse())
    unknown = wire.CallForwardedJobRequest(message=SUSPEND.SerializeToString() + b"\xfa\x3f\x03abc")
    await carried(jobs, header(), unknown, END)
    assert jobs.asked[0].SerializeToString() == job_wire.SuspendJobRequest(job_id=OWN).SerializeToString()


async def test_a_connection_that_ends_is_not_the_end_of_the_input() -> None:
    """A command must not take half of its input for all of it."""
    jobs = Jobs(job_wire.RunJobResponse(exit_code=0))
    start, half = asking(CARRIED["RunJob"]), job_wire.RunJobRequest(stdin=b"half of")
    call = asyncio.create_task(carried(jobs, header("RunJob"), *told(start, half)))
    await eventually(lambda: len(jobs.asked) == 2)
    done, _ = await asyncio.wait([call], timeout=0)
    assert not done
    assert not jobs.input_ended
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert jobs.closed
    jobs = Jobs(job_wire.RunJobResponse(exit_code=0))
    assert len(await carried(jobs, header("RunJob"), *told(start, half), END)) == 1
    assert jobs.input_ended


async def test_whoever_stops_reading_ends_the_call_here() -> None:
    jobs = Jobs(*[job_wire.RunJobResponse(exit_code=number) for number in range(9)])
    carrier: Any = CallCarrier(Guests(GUEST), jobs)  # type: ignore[arg-type]
    answers = carrier.serve("a", each([header("RunJob"), *told(asking(CARRIED["RunJob"])), END]))
    await anext(answers)
    assert not jobs.closed
    await answers.aclose()
    assert jobs.closed


async def test_no_more_is_taken_of_a_fast_peer_than_is_used() -> None:
    taken = 0

    async def endless() -> AsyncIterator[wire.CallForwardedJobRequest]:
        nonlocal taken
        yield header("RunJob")
        while True:
            taken += 1
            yield told(job_wire.RunJobRequest(stdin=b"x"))[0]
            await asyncio.sleep(0)

    jobs = Jobs(hold=True)
    carrier: Any = CallCarrier(Guests(GUEST), jobs)  # type: ignore[arg-type]
    call = asyncio.create_task(anext(carrier.serve("a", endless())))
    await eventually(lambda: jobs.called == ["RunJob"])
    for _ in range(50):
        await asyncio.sleep(0)
    assert taken == 0
    jobs.hold.set()
    await eventually(lambda: len(jobs.asked) > 20)
    assert taken <= len(jobs.asked) + 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_refusal_says_of_the_guest_what_its_origin_calls_it_and_of_others_nothing() -> None:
    said = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "JOB_ENDED",
        f"job {OWN} has ended; job {OTHER} on 10.1.2.3:7070 has not",
        retry_after_s=2.0,
        job_id=OWN,
        other=OTHER,
    )
    with pytest.raises(Refusal) as error:
        await carried(Jobs(said), header(), *told(SUSPEND), END)
    refusal = error.value
    assert (refusal.code, refusal.reason, refusal.retry_after_s) == (said.code, said.reason, 2.0)
    assert refusal.metadata["job_id"] == GUEST.origin_job
    for text in (refusal.message, *refusal.metadata.values()):
        assert OWN not in text
        assert OTHER not in text
        assert "10.1.2.3" not in text


async def test_who_says_nothing_is_not_waited_for() -> None:
    async def silent() -> AsyncIterator[wire.CallForwardedJobRequest]:
        await asyncio.Event().wait()
        yield header()

    carrier: Any = CallCarrier(Guests(GUEST), Jobs(), silent_s=0.0)  # type: ignore[arg-type]
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, "HEADER_MISSING"):
        await anext(carrier.serve("a", silent()))
