"""Which calls are carried to a peer, and how ids are exchanged on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controlplane.carried_methods import (
    CARRIED,
    LOCAL,
    Method,
    exchange,
    job_id_of,
    ours,
    request_id_of,
    speaks_only_of,
)
from puhui.v1 import job_pb2, job_service_pb2
from puhui.v1 import job_service_pb2 as wire
from tests.unit.controlplane.messages import message_of

NOT_ABOUT_ONE_JOB = {"PutBundle", "SubmitJob", "ListJobs", "PredictJob"}
IDS = st.text("0123456789abcdefghjkmnpqrstvwxyz", min_size=12, max_size=12).map(lambda text: f"j-{text}")


def test_every_method_is_carried_or_named_as_an_exception() -> None:
    methods = {one.name for one in job_service_pb2.DESCRIPTOR.services_by_name["JobService"].methods}
    assert methods == set(CARRIED) | LOCAL | NOT_ABOUT_ONE_JOB
    assert not set(CARRIED) & (LOCAL | NOT_ABOUT_ONE_JOB)


def test_the_job_that_a_call_is_about_is_found() -> None:
    assert job_id_of(wire.SuspendJobRequest(job_id="j-1")) == "j-1"
    assert job_id_of(wire.RunJobRequest(start=wire.RunStart(job_id="j-2"))) == "j-2"
    assert job_id_of(wire.RunJobRequest(stdin=b"j-3")) == ""


def test_a_peer_reaches_its_own_job_whatever_it_names() -> None:
    request = wire.RunJobRequest(start=wire.RunStart(job_id="j-of-another", request_id="r", command=["j-of-another"]))
    ours("b", "j-mine", request)
    assert (request.start.job_id, request.start.request_id) == ("j-mine", "b/r")
    assert list(request.start.command) == ["j-of-another"], "what people typed stays"
    long = wire.SuspendJobRequest(job_id="j-1", request_id="x" * 64)
    ours("b", "j-mine", long)
    assert long.request_id != "x" * 64
    assert len(long.request_id) <= 64


@given(IDS, IDS, st.integers(1, 9))
def test_ids_are_exchanged_wherever_a_message_has_them(there: str, here: str, attempt: int) -> None:
    job = job_pb2.Job(id=there, message=f"see `puhui logs {there}`")
    job.runs.add(id="r-1", job_id=there, attempt=7, command=["echo", there])
    job.spec.labels["of"] = there
    answer = wire.SuspendJobResponse(job=job)
    exchange(answer, there, here, attempt)
    assert there == here or there not in str(answer)
    assert (answer.job.id, answer.job.runs[0].job_id, answer.job.runs[0].attempt) == (here, here, attempt)
    assert (answer.job.message, answer.job.spec.labels["of"]) == (f"see `puhui logs {here}`", here)


def test_output_is_never_changed() -> None:
    answer = wire.RunJobResponse()
    answer.output.data = b"j-there"
    exchange(answer, "j-there", "j-here", 1)
    assert answer.output.data == b"j-there"


THERE, HERE, OTHER = "j-there0000000", "j-here00000000", "j-other0000000"
TEXTS = st.sampled_from(["", THERE, f"see `puhui logs {THERE}`", OTHER, "again", "j-", "x" * 64, "x" * 65, "ü"])
DATA = st.sampled_from([b"", THERE.encode(), b"\xff" * 9])
ANY = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)


def inside(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            values = value.values() if field.message_type.fields_by_name["value"].message_type is not None else []
        else:
            values = value if field.is_repeated else [value]
        for one in values:
            yield from inside(one)


def differing(before: Any, after: Any) -> set[str]:
    """Returns the names of all scalar fields of two messages of one shape that are not the same in both."""
    names = set()
    for one, other in zip(inside(before), inside(after), strict=True):
        assert one.DESCRIPTOR is other.DESCRIPTOR
        for field in one.DESCRIPTOR.fields:
            if field.message_type is None and getattr(one, field.name) != getattr(other, field.name):
                names.add(f"{one.DESCRIPTOR.name}.{field.name}")
    return names


@pytest.mark.parametrize("method", CARRIED.values(), ids=CARRIED)
@ANY
@given(st.data())
def test_whatever_a_peer_asks_for_it_asks_of_its_own_job(method: Method, data: st.DataObject) -> None:
    request = data.draw(message_of(method.request, TEXTS, DATA))
    before = method.request.FromString(request.SerializeToString())
    ours("b", HERE, request)
    for one in inside(request):
        names = one.DESCRIPTOR.fields_by_name
        assert "job_id" not in names or one.job_id == HERE
        assert "attempt" not in names or not one.attempt
        assert (
            "request_id" not in names
            or not one.request_id
            or one.request_id.startswith("b/")
            or len(one.request_id) == 64
        )
    changed = {name.partition(".")[2] for name in differing(before, request)}
    assert changed <= {"job_id", "attempt", "request_id"}
    method.request.FromString(request.SerializeToString())


@pytest.mark.parametrize("method", CARRIED.values(), ids=CARRIED)
@ANY
@given(st.data(), st.integers(1, 9))
def test_whatever_a_peer_answers_names_no_job_of_its_own(method: Method, data: st.DataObject, attempt: int) -> None:
    response = data.draw(message_of(method.response, TEXTS, DATA))
    before = method.response.FromString(response.SerializeToString())
    exchange(response, THERE, HERE, attempt)
    for one in inside(response):
        for field, value in one.ListFields():
            if field.type == field.TYPE_STRING:
                assert all(THERE not in text for text in (value if field.is_repeated else [value]))
            if field.name == "attempt":
                assert value == attempt
    for name in differing(before, response):
        owner = next(one for one in inside(before) if one.DESCRIPTOR.name == name.partition(".")[0])
        field = owner.DESCRIPTOR.fields_by_name[name.partition(".")[2]]
        assert field.type == field.TYPE_STRING or field.name == "attempt", name
    exchange(response, HERE, THERE, attempt)
    assert differing(before, response) <= {f"{one.DESCRIPTOR.name}.attempt" for one in inside(before)}
    method.response.FromString(response.SerializeToString())


@ANY
@given(message_of(wire.SuspendJobResponse, TEXTS, DATA))
def test_an_answer_about_another_job_is_noticed(response: wire.SuspendJobResponse) -> None:
    named = [one.job_id for one in inside(response) if "job_id" in one.DESCRIPTOR.fields_by_name]
    named += [one.id for one in inside(response) if isinstance(one, job_pb2.Job)]
    assert speaks_only_of(OTHER, response) == all(name in {"", OTHER} for name in named)


@given(st.text(min_size=1, max_size=70), st.text(min_size=1, max_size=70), st.sampled_from(["b", "peer-" + "x" * 58]))
def test_no_two_requests_of_peers_become_one(one: str, other: str, peer: str) -> None:
    mine = request_id_of(peer, one)
    assert (mine == request_id_of(peer, other)) == (one == other)
    assert mine != request_id_of("c", one)
    assert len(mine) <= 64 or len(one) > 64, "what is valid stays so, and what is too long, too"
