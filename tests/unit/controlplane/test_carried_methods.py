"""Which calls are carried to a peer, and how ids are exchanged on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.carried_methods import CARRIED, LOCAL, exchange, job_id_of, ours
from puhui.v1 import job_pb2, job_service_pb2
from puhui.v1 import job_service_pb2 as wire

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
