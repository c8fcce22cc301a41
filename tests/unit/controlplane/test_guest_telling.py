"""What a guest's origin is told: all about it, nothing about others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import happenings
from controlplane.guest_telling import told_event, told_job
from controlplane.jobs import transition
from puhui.rpc.identity import new_id
from puhui.v1 import job_pb2
from tests.unit.controlplane.samples import first_events, queued

OWN, OTHER = "j-0123456789ab", "j-zyxwvtsrqpnm"


def told(message: str) -> str:
    event = job_pb2.JobEvent(job_id=OWN, message=message, details={"why": message})
    after = told_event(event)
    assert after.details["why"] == after.message
    assert told_job(job_pb2.Job(id=OWN, message=message)).message == after.message
    return after.message


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("3rd in the queue", "3rd in the queue"),
        (f"job {OTHER} needs the room", "another job needs the room"),
        (f"it waits for {OTHER}", "it waits for another job"),
        (f"job {OWN} is here", f"job {OWN} is here"),
        (
            "its results cannot be collected yet: failed to connect; last error: UNKNOWN: ipv4:10.1.2.3:7071: refused",
            "its results cannot be collected yet: failed to connect; last error: UNKNOWN: (an address) refused",
        ),
        ("ipv6:%5B::1%5D:7071: no", "(an address) no"),
        ("node 192.168.0.9:7071 is away", "node (an address) is away"),
        ("node [fe80::1]:7071 is away", "node (an address) is away"),
        ("image python:3.11 of registry.example:5000/x", "image python:3.11 of registry.example:5000/x"),
        ("at 12:30:05 memory slices 0–1", "at 12:30:05 memory slices 0–1"),
        ("version 1.2.3", "version 1.2.3"),
    ],
)
def test_what_is_about_others_is_left_out(said: str, heard: str) -> None:
    assert told(said) == heard


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_id_of_another_job_ever_comes_through(before: str, after: str) -> None:
    other = new_id("j")
    assert other not in told(f"{before} {other} {after}")


def test_who_needed_the_room_is_not_told() -> None:
    record, _ = first_events(queued(OWN))
    record.job.attempts.add(number=1)
    _, event = transition(record, happenings.WarmSliceDropped(1, "MIG-1", OTHER), 5.0)
    assert OTHER in str(event)
    after = told_event(event)
    assert OTHER not in str(after)
    assert after.details["slice_uuid"] == "MIG-1"
    assert after.reason == "WARM_SLICE_DROPPED"
    assert OTHER in str(event), "what is stored stays as it is"
