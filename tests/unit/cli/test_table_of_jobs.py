"""How wide `puhui ps` is: whole in a pipe, fitted to a terminal, and never so narrow that two peers look alike."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from puhui.v1 import job_pb2, job_service_pb2
from tests.unit.cli.small_centre import Kept, RunningCentre
from tests.unit.cli.small_runs import SmallRun

LONG_NAME = "sweep-of-learning-rates-with-the-large-model"
WHY = (
    "waits for 7g.80gb: 0 of 1 placements free on 1 NVIDIA H100 80GB HBM3; peers: local-2 has no room for it now (FULL)"
)


def put(running: RunningCentre, number: int, *, peer: str = "", ended: bool = False) -> None:
    job = job_pb2.Job(
        id=f"j-{number:012}",
        spec=job_pb2.JobSpec(name=f"{number}-{LONG_NAME}"),
        state=job_pb2.JOB_STATE_RUNNING if peer else job_pb2.JOB_STATE_QUEUED,
        message="" if peer else WHY,
        create_time=Timestamp(seconds=1),
    )
    if peer:
        job.attempts.add(number=1, peer=peer, profile="7g.80gb", emulated=True)
    if ended:
        job.state, job.exit_code = job_pb2.JOB_STATE_SUCCEEDED, 0
    running.centre.kept[job.id] = Kept(job)


def piped(running: RunningCentre, *arguments: str, columns: str = "") -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    asked = subprocess.run(
        [sys.executable, "-m", "puhui.cli", *arguments, "--server", running.address],
        env=environment | ({"COLUMNS": columns} if columns else {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return asked.stdout.splitlines()


def on_terminal(running: RunningCentre, width: int, *arguments: str) -> list[str]:
    """Returns what a terminal of that width gets, line by line, as it was written."""
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-m", "puhui.cli", *arguments, "--server", running.address],
        env=environment | {"TERM": "dumb"},
        stdout=other_end,
    ) as process:
        os.close(other_end)
        said = b""
        while chunk := _read(terminal):
            said += chunk
        assert process.wait(60) == 0
    os.close(terminal)
    return [line.rstrip() for line in said.decode().splitlines()]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody holds its other end any more
        return b""


def test_nothing_is_cut_in_a_pipe(running: RunningCentre) -> None:
    put(running, 1, peer="local-2")
    put(running, 2, peer="local-3")
    put(running, 3)
    said = piped(running, "ps")
    heading, *lines = said
    assert [line.split()[-1] for line in (heading, lines[2], lines[3])] == ["PEER", "local-3", "local-2"]
    assert [line.split()[1] for line in (lines[0], lines[2])] == [f"3-{LONG_NAME}", f"2-{LONG_NAME}"]
    assert lines[1].strip() == WHY


@pytest.mark.parametrize("columns", [90, 110])
def test_the_width_that_is_named_is_kept_to(running: RunningCentre, columns: int) -> None:
    put(running, 1, peer="local-2", ended=True)
    put(running, 2, peer="local-3")
    put(running, 3)
    said = piped(running, "ps", "--all", columns=str(columns))
    assert max(map(len, said)) == columns
    assert [line.split()[-1] for line in said[-2:]] == ["local-3", "local-2"]


def test_a_terminal_of_80_columns_tells_two_peers_apart(running: RunningCentre) -> None:
    put(running, 1, peer="local-2")
    put(running, 2, peer="local-3")
    heading, *lines = on_terminal(running, 80, "ps")
    assert [line.split()[-1] for line in lines] == ["local-3", "local-2"]
    assert max(map(len, lines)) <= 80
    assert "EXIT" not in heading, "nothing has ended: it is left out sooner than a name is cut"


def test_a_line_that_cannot_fit_is_longer_sooner_than_cut(running: RunningCentre) -> None:
    put(running, 1, peer="university-of-somewhere", ended=True)
    put(running, 2, peer="university-of-elsewhere")
    lines = on_terminal(running, 60, "ps", "--all")
    assert [line.split()[-1] for line in lines] == ["PEER", "university-of-elsewhere", "university-of-somewhere"]
    assert all("(emulated)" in line for line in lines[1:])


def test_a_job_took_no_longer_than_it_ran_however_late_that_is_heard(running: RunningCentre) -> None:
    put(running, 1, peer="local-2", ended=True)
    job = running.centre.kept["j-000000000001"].job
    job.start_time.seconds, job.end_time.seconds = 1000, 1101
    job.attempts[0].start_time.seconds, job.attempts[0].end_time.seconds = 1000, 1020
    assert " 20s " in piped(running, "ps", "--all")[1]


def test_no_figure_of_a_run_is_cut(running: RunningCentre) -> None:
    session = job_pb2.Job(id="j-box", state=job_pb2.JOB_STATE_RUNNING, create_time=Timestamp(seconds=1))
    session.spec.kind = job_pb2.JOB_KIND_SESSION
    running.centre.kept[session.id] = Kept(session)
    told = job_pb2.Run(id="r-slgcguz3mtpx", job_id="j-box", command=["sleep", "30"], exit_code=130)
    run = SmallRun(job_service_pb2.RunStart(job_id="j-box"), told)
    run.run.slice_uuid = "MIG-2dffb46a-1111-2222-3333-444444444444"
    running.centre.runs[run.run.id] = run
    for said in (piped(running, "runs", "j-box", columns="40"), on_terminal(running, 40, "runs", "j-box")):
        assert "r-slgcguz3mtpx" in said[1]
        assert "exit code 130" in said[1]
