"""What `puhui explain` says of a job, to people and to scripts."""

import json
import subprocess
import sys

import pytest

from puhui.v1 import job_pb2
from tests.unit.cli.small_centre import Kept, RunningCentre


def asked(running: RunningCentre, *arguments: str) -> str:
    command = [sys.executable, "-m", "puhui.cli", "explain", *arguments, "--server", running.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def put(running: RunningCentre, job: job_pb2.Job) -> job_pb2.Job:
    job.id, job.spec.kind = "j-000000000001", job_pb2.JOB_KIND_SESSION
    running.centre.kept[job.id] = Kept(job)
    return job


@pytest.mark.parametrize("peer", ["", "local-2"])
def test_scripts_are_told_which_job_how_it_is_and_where(running: RunningCentre, peer: str) -> None:
    job = put(running, job_pb2.Job(state=job_pb2.JOB_STATE_RUNNING))
    job.attempts.add(number=1, peer=peer)
    said = json.loads(asked(running, job.id, "--json"))
    assert (said["job_id"], said["state"], said["peer"]) == (job.id, "JOB_STATE_RUNNING", peer or None)
    assert (said["message"], said["queue_position"], said["expected_wait"]) == ("two jobs are before it", 3, "90s")


def test_people_are_told_in_whose_queue_it_has_its_place(running: RunningCentre) -> None:
    job = put(running, job_pb2.Job(state=job_pb2.JOB_STATE_QUEUED))
    assert "place      3 in the queue\n" in asked(running, job.id)
    job.state, job.reason = job_pb2.JOB_STATE_STARTING, "WAITING_FOR_SLICE"
    job.attempts.add(number=1, peer="local-2")
    assert "place      3 in the queue of peer local-2\n" in asked(running, job.id)
