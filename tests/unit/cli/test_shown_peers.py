"""What is shown of jobs that are at a peer, and of those that a peer has sent."""

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from puhui.cli.jobs import job_facts, job_row, where_it_is, why_it_waits
from puhui.cli.story import tell
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import WatchJobResponse


def at_peer() -> job_pb2.Job:
    job = job_pb2.Job(id="j-1", state=job_pb2.JOB_STATE_RUNNING, centre="a", executing_centre="b")
    job.attempts.add(number=1, peer="b", peer_job_id="j-9", profile="1g.10gb")
    return job


def sent_here(hops_left: int = 0) -> job_pb2.Job:
    job = job_pb2.Job(id="j-9", state=job_pb2.JOB_STATE_RUNNING, centre="b")
    job.guest.peer, job.guest.job_id, job.guest.attempt, job.guest.hops_left = "a", "j-1", 2, hops_left
    return job


def facts_of(job: job_pb2.Job, at: float = 1000.0) -> dict[str, str]:
    return dict(job_facts(job, at))


def test_the_list_says_where_a_job_is_when_that_is_at_a_peer() -> None:
    on = sent_here()
    on.attempts.add(number=1, peer="c")
    assert [where_it_is(job) for job in (job_pb2.Job(), at_peer(), sent_here(), on)] == ["", "b", "of a", "of a, c"]


def test_a_job_at_a_peer_is_shown_with_its_id_there_and_its_lease() -> None:
    job = at_peer()
    assert facts_of(job)["attempt 1"] == "1g.10gb, peer b (job j-9 there)"
    job.attempts[0].lease_expire_time.CopyFrom(Timestamp(seconds=1720))
    assert facts_of(job)["attempt 1"] == "1g.10gb, peer b (job j-9 there), under a lease for 12m more"
    assert facts_of(job, 2000.0)["attempt 1"].endswith("under a lease for 0.0s more")


def test_what_waits_in_a_peers_queue_is_shown_to_wait_there() -> None:
    job = at_peer()
    job.state, job.reason, job.message = job_pb2.JOB_STATE_STARTING, "WAITING_FOR_SLICE", "in the queue of peer b: full"
    assert why_it_waits(job) == "in the queue of peer b: full"
    assert job_row(job, 1000.0)[2:4] == ("starting", "1g.10gb?")
    job.reason = "RESERVED"
    assert why_it_waits(job) == ""
    assert job_row(job, 1000.0)[2:4] == ("starting", "1g.10gb")


def test_what_was_brought_back_shows_nothing_of_the_attempt_that_is_over() -> None:
    job = at_peer()
    job.start_time.CopyFrom(Timestamp(seconds=900))
    job.create_time.CopyFrom(Timestamp(seconds=800))
    job.attempts[0].emulated = True
    job.attempts[0].start_time.CopyFrom(Timestamp(seconds=900))
    job.attempts[0].release_time.CopyFrom(Timestamp(seconds=950))
    job.state = job_pb2.JOB_STATE_QUEUED
    job.sizing.choices.add(profile="2g.20gb")
    assert (job_row(job, 1000.0)[3], job_row(job, 1000.0)[5], where_it_is(job)) == ("2g.20gb?", "-", "")
    del job.sizing.choices[:]
    job.spec.resources.profile = "7g.80gb"
    assert job_row(job, 1000.0)[3] == "7g.80gb?"
    assert facts_of(job)["attempt 1"].endswith("released"), "what was is still told of, as over"

    job.attempts.add(number=2, profile="2g.20gb")
    job.state = job_pb2.JOB_STATE_STARTING
    assert job_row(job, 1000.0)[3:6:2] == ("2g.20gb", "-")
    job.state = job_pb2.JOB_STATE_RUNNING
    job.attempts[1].start_time.CopyFrom(Timestamp(seconds=990))
    assert job_row(job, 1000.0)[5] == "10s", "of this attempt, and not of all"


def test_a_guest_is_shown_with_its_sender_its_lease_and_its_hops() -> None:
    job = sent_here()
    assert facts_of(job)["sent by"] == "peer a, where it is attempt 2 of job j-1, may not be sent on"
    job = sent_here(hops_left=1)
    job.guest.lease_expire_time.CopyFrom(Timestamp(seconds=1060))
    said = "peer a, where it is attempt 2 of job j-1, under a lease for 1m more, may be sent on 1 time"
    assert facts_of(job)["sent by"] == said


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (job_pb2.PeerPolicy(here_only=True), "none: here only"),
        (job_pb2.PeerPolicy(), "any"),
        (
            job_pb2.PeerPolicy(preferred_peers=["b", "c"], max_wait=Duration(seconds=120)),
            "b, c first, when the wait here is longer than 2m",
        ),
        (
            job_pb2.PeerPolicy(required_labels={"region": "eu"}, forbidden_labels={"tier": "2"}),
            "only with region=eu, not with tier=2",
        ),
    ],
)
def test_where_a_job_may_run_is_shown_as_its_user_said_it(policy: job_pb2.PeerPolicy, said: str) -> None:
    job = job_pb2.Job(spec=job_pb2.JobSpec(peers=policy))
    assert facts_of(job)["peers"] == said
    assert "peers" not in facts_of(job_pb2.Job())


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("FORWARDING", "forwarding"),
        ("FORWARDED", "forwarded"),
        ("PEER_OUT_OF_CONTACT", "no contact"),
        ("PEER_IN_CONTACT", "in contact"),
        ("BROUGHT_BACK", "back"),
        ("PEER_ENDED", "coming"),
        ("LATE_RESULT", "late"),
        ("LATE_RESULT_KEPT", "late"),
    ],
)
def test_the_story_tells_of_the_way_there_and_back(reason: str, label: str) -> None:
    event = job_pb2.JobEvent(reason=reason, attempt=1, message="what happened", state=job_pb2.JOB_STATE_RUNNING)
    assert tell(WatchJobResponse(job=at_peer(), event=event)) == [(label, "what happened")]


def test_the_story_says_what_happened_at_a_peer() -> None:
    event = job_pb2.JobEvent(reason="SLICE_CREATED", attempt=1, peer="b", details={"slice_uuid": "MIG-12345678-9"})
    assert tell(WatchJobResponse(job=at_peer(), event=event)) == [("cut", "[b] MIG-12345678")]
    event = job_pb2.JobEvent(reason="WAITING_FOR_SLICE", attempt=1, peer="b", message="nothing is free")
    assert tell(WatchJobResponse(job=at_peer(), event=event)) == [("waiting", "[b] nothing is free")]
