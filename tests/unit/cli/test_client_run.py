"""What the Python client promises of runs, over a real connection."""

import threading
from collections.abc import Iterator

import grpc
import pytest

from puhui.client import Centre, Patience, Refusal, RunCall, Trouble
from puhui.v1 import job_pb2
from puhui.v1.stream_pb2 import LOG_STREAM_STDERR
from tests.unit.cli.small_centre import RunningCentre
from tests.unit.cli.small_runs import COUNTED, SmallRun

ALL_LINES = b"".join(b"%d\n" % number for number in range(COUNTED))


@pytest.fixture
def centre(running: RunningCentre) -> Iterator[Centre]:
    with Centre(running.address, patience=Patience(first_s=5)) as centre:
        yield centre


@pytest.fixture
def session(centre: Centre) -> str:
    job = centre.submit(job_pb2.JobSpec(kind=job_pb2.JOB_KIND_SESSION, name="den"), None)
    for update in centre.updates(job.id):
        if update.event.state == job_pb2.JOB_STATE_RUNNING:
            break
    return job.id


def output_of(call: RunCall) -> bytes:
    return b"".join(response.output.data for response in call if response.HasField("output"))


def only_run(running: RunningCentre) -> SmallRun:
    run: SmallRun
    (run,) = running.centre.runs.values()
    return run


def test_a_command_is_run_and_its_streams_are_kept_apart(centre: Centre, session: str) -> None:
    call = centre.run(session, ["echo", "a", "b"])
    chunks = [response.output for response in call if response.HasField("output")]
    assert [chunk.data for chunk in chunks if chunk.stream != LOG_STREAM_STDERR] == [b"a b\n"]
    assert [chunk.data for chunk in chunks if chunk.stream == LOG_STREAM_STDERR] == [b"and an error\n"]
    assert (call.exit_code, call.started) == (0, True)
    call = centre.run(session, ["exit", "7"])
    assert output_of(call) == b""
    assert call.exit_code == 7


def test_what_is_asked_for_arrives(centre: Centre, running: RunningCentre, session: str) -> None:
    call = centre.run(session, ["env"], env={"B": "2", "A": "1"}, working_directory="/tmp", terminal_size=(100, 40))
    assert output_of(call) == b"A=1\nB=2\n/tmp\n"
    start = only_run(running).start
    assert (start.tty, start.terminal_size.columns, start.terminal_size.rows) == (True, 100, 40)
    assert start.request_id


@pytest.mark.parametrize("broken", [[0], [1, 5, 700], [1999], [2000]])
def test_no_byte_of_output_is_lost_or_doubled_when_the_connection_breaks(
    centre: Centre, running: RunningCentre, session: str, broken: list[int]
) -> None:
    running.centre.break_after["RunJob"] = list(broken)
    call = centre.run(session, ["count"])
    assert output_of(call) == ALL_LINES
    assert call.exit_code == 0
    assert running.centre.connections == len(broken) + 1
    assert len(running.centre.runs) == 1


def test_a_restart_of_the_control_plane_does_not_end_a_run(running: RunningCentre, session: str) -> None:
    told: list[Trouble] = []
    with Centre(running.address, on_trouble=told.append) as centre:
        call = centre.run(session, ["cat"], terminal_size=(80, 24))
        seen = b""
        for response in call:
            seen += response.output.data
            if seen == b"listening\n":
                call.write(b"one ")
            elif seen.endswith(b"one "):
                seen += b"| "
                running.hang_up()
                running.listen()
                call.resize(120, 50)
            elif seen.endswith(b"50\r\n"):
                call.write(b"two")
                call.end_input()
    assert seen == b"listening\none | size 120 50\r\ntwo"
    assert call.exit_code == 0
    assert told


def test_half_an_input_is_not_worked_on(centre: Centre, running: RunningCentre, session: str) -> None:
    call = centre.run(session, ["cat"])

    def converse() -> None:
        broken = False
        for response in call:
            if response.output.data == b"listening\n":
                call.write(b"one")
            elif response.output.data == b"one" and not broken:
                broken = True
                running.hang_up()
                running.listen()

    with pytest.raises(Refusal) as caught:
        converse()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ABORTED, "INPUT_IN_DOUBT")
    assert only_run(running).signals == [1]
    assert not call.write(b"more")


def test_input_waits_for_the_command_and_outlives_a_break_before_it(running: RunningCentre, session: str) -> None:
    running.centre.gate.clear()
    with Centre(running.address) as centre:
        call = centre.run(session, ["cat"])
        assert call.write(b"typed before it began")
        call.end_input()
        seen, accepted = b"", 0
        for response in call:
            seen += response.output.data
            accepted += response.HasField("run") and not call.started
            if accepted == 1 and not call.started:
                accepted += 1
                running.hang_up()
                running.open_gate()
                running.listen()
    assert seen == b"listening\ntyped before it began"


def test_much_input_waits_for_a_slow_command(centre: Centre, running: RunningCentre, session: str) -> None:
    data = bytes(range(256)) * 2**13  # 2 MiB
    call = centre.run(session, ["cat"])
    held = threading.Event()

    def write() -> None:
        assert call.write(data.replace(b"\x04", b"\x05"))
        held.set()
        call.end_input()

    running.centre.gate.clear()
    writer = threading.Thread(target=write)
    writer.start()
    begun, seen = False, b""
    for response in call:
        if not begun:
            begun = True
            assert not held.wait(0.2)  # nothing is sent, and no more than a little is taken, before the command runs
            running.open_gate()
        seen += response.output.data
    writer.join()
    assert seen == b"listening\n" + data.replace(b"\x04", b"\x05")


def test_signals_and_hanging_up(centre: Centre, running: RunningCentre, session: str) -> None:
    call = centre.run(session, ["cat"])
    for response in call:
        if response.output.data == b"listening\n":
            call.send_signal(2)
        elif response.output.data == b"signal 2\n":
            call.hang_up()
    assert only_run(running).signals == [2, 1]
    assert call.exit_code == 129


def test_hanging_up_while_it_waits_ends_it_at_once(centre: Centre, running: RunningCentre, session: str) -> None:
    running.centre.gate.clear()
    call = centre.run(session, ["cat"])
    for _ in call:
        call.hang_up()
    assert (call.exit_code, call.started) == (None, False)
    assert not call.write(b"x")


def test_a_refusal_is_a_refusal(centre: Centre, session: str) -> None:
    for job_id, reason in (("j-nothing", "JOB_NOT_FOUND"), (session, "JOB_ENDED")):
        if job_id == session:
            centre.cancel(session)
        call = centre.run(job_id, ["cat"])
        call.write(b"typed already")
        with pytest.raises(Refusal) as caught:
            list(call)
        assert caught.value.reason == reason


def test_shares_and_runs(centre: Centre, running: RunningCentre, session: str) -> None:
    assert centre.suspend(session, job_pb2.RECLAIM_MODE_STOP).state == job_pb2.JOB_STATE_IDLE
    assert running.centre.suspended[0].hardest == job_pb2.RECLAIM_MODE_STOP
    assert centre.resume(session).state == job_pb2.JOB_STATE_RESUMING
    assert centre.explain(session).queue_position == 3
    for word in ("a", "b", "c"):
        output_of(centre.run(session, ["echo", word]))
    assert [run.command[1] for run in centre.runs(session, page_size=2)] == ["c", "b", "a"]
