from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import happenings
from controlplane.endings import Ending, ending_of
from controlplane.growing import Outgrown
from controlplane.jobs import FINAL_STATES, TRANSITIONS, IllegalTransition, transition
from controlplane.records import JobRecord
from puhui.v1 import card_pb2, job_pb2, prediction_pb2
from tests.unit.controlplane.samples import attempt, container, queued

SIZING = prediction_pb2.Sizing(reason="because")
LARGER = prediction_pb2.Sizing(required_mib=10_484)

anything: st.SearchStrategy[happenings.Happening] = st.one_of(
    st.just(happenings.Submitted()),
    st.just(happenings.Predicted(None, SIZING)),
    st.just(happenings.Waits("full")),
    st.integers(1, 9).map(lambda token: happenings.Reserved(attempt(token=token), SIZING, "node-1")),
    st.integers(0, 30).map(happenings.Adopted),
    st.just(happenings.SliceCreated(card_pb2.Slice(uuid="MIG-1"))),
    st.just(happenings.ContainerStarted(container())),
    st.just(happenings.Requeued("PLACEMENT_TAKEN", "taken")),
    st.just(happenings.CancelRequested("enough")),
    st.sampled_from([0, 1, 137]).map(lambda code: happenings.CommandEnded(container(code))),
    st.just(happenings.NotStarted(Ending(job_pb2.JOB_STATE_FAILED, "IMAGE_NOT_FOUND", "no image"))),
    st.sampled_from([None, 143]).map(lambda code: happenings.Stopped(None if code is None else container(code))),
    st.just(happenings.ResultsCollected(5, job_pb2.JobArtifacts())),
    st.just(happenings.ResultsDelayed("away")),
    st.just(happenings.ResultsLost("broken", 5, job_pb2.JobArtifacts())),
    st.just(happenings.ContainerRemoved(1)),
    st.just(happenings.SliceDestroyed(1, "MIG-1")),
    st.sampled_from(["", "still held"]).map(happenings.Ended),
    st.sampled_from([None, LARGER]).map(lambda sizing: ran_out(sizing)),
    st.just(happenings.Grows()),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(anything, max_size=40))
def test_whatever_happens_only_legal_transitions_come_of_it(sequence: list[happenings.Happening]) -> None:
    record = queued()
    token = 0
    for number, happening in enumerate(sequence):
        before = record
        frozen = before.job.SerializeToString(deterministic=True)
        try:
            record, event = transition(record, happening, 1000.0 + number)
        except IllegalTransition:
            assert record is before
        else:
            assert record.state in TRANSITIONS[before.state]
            assert event.state == record.state
            assert event.reason.isupper()
            assert event.message
            if before.state in FINAL_STATES:
                assert (record.state, record.job.reason) == (before.state, before.job.reason)
                assert record.job.end_time == before.job.end_time
            if record.state in FINAL_STATES:
                assert record.job.HasField("end_time")
            if record.job.attempts:
                if len(record.job.attempts) == len(before.job.attempts):
                    assert record.attempt.fencing_token >= token
                token = record.attempt.fencing_token
        assert before.job.SerializeToString(deterministic=True) == frozen, "a stored job was changed in place"


def through(record: JobRecord, *sequence: happenings.Happening) -> JobRecord:
    for happening in sequence:
        record, _ = transition(record, happening, 1000.0)
    return record


def running() -> JobRecord:
    return through(
        queued(),
        happenings.Reserved(attempt(), SIZING, "node-1"),
        happenings.SliceCreated(card_pb2.Slice(uuid="MIG-1", gpu_index=3, emulated=True)),
        happenings.ContainerStarted(container()),
    )


def test_a_command_that_ends_with_0_succeeds_after_its_results_are_here() -> None:
    record = through(
        running(),
        happenings.CommandEnded(container(0)),
        happenings.ResultsCollected(7, job_pb2.JobArtifacts(file_count=2)),
        happenings.ContainerRemoved(1),
        happenings.SliceDestroyed(1, "MIG-1"),
        happenings.Ended(),
    )
    assert record.state == job_pb2.JOB_STATE_SUCCEEDED
    assert record.job.exit_code == 0
    assert (record.job.log_size_bytes, record.job.artifacts.file_count) == (7, 2)
    assert record.attempt.gpu_index == 3
    assert record.attempt.HasField("release_time")


def ran_out(sizing: prediction_pb2.Sizing | None = LARGER) -> happenings.RanOut:
    ending = Ending(job_pb2.JOB_STATE_FAILED, "DEVICE_OUT_OF_MEMORY", "full")
    return happenings.RanOut(Outgrown("1g.10gb", 9984, ending, sizing))


def test_one_that_ran_out_of_memory_waits_for_a_larger_slice_and_keeps_the_old_attempt() -> None:
    ended = through(running(), happenings.CommandEnded(container(1)), ran_out())
    assert (ended.grows, ended.at_least_mib, ended.ran_out_of_mib) == (True, 10_484, 9984)
    record = through(ended, happenings.SliceDestroyed(1, "MIG-1"), happenings.Grows())
    assert (record.state, record.ending, record.grows) == (job_pb2.JOB_STATE_QUEUED, None, False)
    assert (record.job.attempts[0].message, record.job.attempts[0].exit_code) == ("full", 1)
    assert record.job.sizing == LARGER
    again = through(record, happenings.Reserved(attempt(token=2), LARGER, "node-1"))
    assert (again.ran_out_of_mib, again.at_least_mib) == (0, 10_484)


def test_a_suspend_of_the_share_that_was_outgrown_is_not_one_of_the_next() -> None:
    record = through(
        running(),
        happenings.SuspendRequested(job_pb2.RECLAIM_MODE_DETACH),
        happenings.CommandEnded(container(1)),
        ran_out(),
        happenings.Grows(),
    )
    assert (record.suspend, record.parked) == (job_pb2.RECLAIM_MODE_UNSPECIFIED, False)


def test_one_that_succeeded_or_was_cancelled_does_not_grow() -> None:
    succeeded = through(running(), happenings.CommandEnded(container(0)))
    cancelled = through(running(), happenings.CommandEnded(container(1)), happenings.CancelRequested("no"))
    keeps = through(running(), happenings.CommandEnded(container(1)), ran_out(None))
    for record, happening in ((succeeded, ran_out()), (cancelled, ran_out()), (keeps, happenings.Grows())):
        with pytest.raises(IllegalTransition):
            transition(record, happening, 1000.0)


def test_a_cancel_before_it_goes_on_is_how_it_ends() -> None:
    record = through(running(), happenings.CommandEnded(container(1)), ran_out(), happenings.CancelRequested("no"))
    with pytest.raises(IllegalTransition):
        transition(record, happenings.Grows(), 1000.0)
    record = through(record, happenings.Ended())
    assert (record.state, record.job.message) == (job_pb2.JOB_STATE_CANCELLED, "cancelled by request: no")


def test_a_cancelled_waiting_job_never_starts() -> None:
    record = through(queued(), happenings.CancelRequested("no"))
    assert record.state == job_pb2.JOB_STATE_CANCELLED
    with pytest.raises(IllegalTransition):
        transition(record, happenings.Reserved(attempt(), SIZING, "node-1"), 1000.0)


def test_a_job_requeued_after_a_cancel_request_cannot_be_placed_again() -> None:
    record = through(
        queued(),
        happenings.Reserved(attempt(), SIZING, "node-1"),
        happenings.CancelRequested("no"),
        happenings.Requeued("PLACEMENT_TAKEN", "taken"),
    )
    with pytest.raises(IllegalTransition):
        transition(record, happenings.Reserved(attempt(token=2), SIZING, "node-1"), 1000.0)


def test_a_fencing_token_only_grows() -> None:
    with pytest.raises(IllegalTransition):
        transition(running(), happenings.Adopted(1), 1000.0)


def test_a_release_after_the_end_leaves_the_end_as_it_was() -> None:
    record = through(running(), happenings.CommandEnded(container(3)), happenings.Ended("node away"))
    assert record.job.message.endswith("node away")
    late, event = transition(record, happenings.SliceDestroyed(1, "MIG-1"), 2000.0)
    assert event.reason == "SLICE_DESTROYED"
    assert (late.job.reason, late.job.exit_code) == ("EXIT_CODE", 3)
    assert late.attempt.HasField("release_time")


@pytest.mark.parametrize(
    ("ended", "state", "reason", "words"),
    [
        (container(0), job_pb2.JOB_STATE_SUCCEEDED, "SUCCEEDED", "exit code 0"),
        (container(3), job_pb2.JOB_STATE_FAILED, "EXIT_CODE", "exit code 3;"),
        (container(137), job_pb2.JOB_STATE_FAILED, "EXIT_CODE", "signal 9"),
        (container(137, oom_killed=True), job_pb2.JOB_STATE_FAILED, "HOST_OUT_OF_MEMORY", "host_memory_mib"),
        (container(143, timed_out=True), job_pb2.JOB_STATE_FAILED, "TIMED_OUT", "max_duration"),
        (container(), job_pb2.JOB_STATE_FAILED, "EXIT_CODE_UNKNOWN", "does not know"),
    ],
)
def test_how_a_command_ended_says_how_the_job_ends(ended, state, reason, words) -> None:  # type: ignore[no-untyped-def]
    ending = ending_of(ended)
    assert (ending.state, ending.reason) == (state, reason)
    assert words in ending.message
