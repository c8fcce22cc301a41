"""`puhui run`, against a centre that does what the test says."""

import json
import os
import pty
import re
import select
import signal
from pathlib import Path

import grpc
import pytest

from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2
from tests.integration.cli.program import Puhui
from tests.unit.cli.small_centre import RunningCentre

STDOUT = "to stdout 普 again\n"


def only_job(running: RunningCentre) -> job_pb2.Job:
    job: job_pb2.Job
    (job,) = (kept.job for kept in running.centre.kept.values())
    return job


def test_the_output_is_the_jobs_own_and_remarks_stay_out_of_it(
    puhui: Puhui, running: RunningCentre, script: Path
) -> None:
    ended = puhui("run", script, "--epochs", "3", "--name=x", "-v")
    assert ended.code == 0
    assert ended.out == STDOUT
    assert "to stderr\n" in ended.err
    job = only_job(running)
    assert list(job.spec.command) == ["python3", "train.py", "--epochs", "3", "--name=x", "-v"]
    assert job.spec.name == "some-code-train"
    for said in (
        f"code       {script.parent}: 1 file, 15 B",
        f"job        {job.id} at centre small",
        "8.9 GiB (p50 5.1 GiB, p90 6.0 GiB, p99 8.6 GiB; tier static)",
        "slice      1g.10gb is the smallest profile",
        "placed     1g.10gb on GPU 0, H100 80GB HBM3 (emulated), memory slice 0",
        "started    process (no isolation) c1",
        "ended      succeeded, exit code 0",
        "--name=x stands behind the script",
    ):
        assert said.replace("--name=x", "--name") in ended.err.replace("--name=x", "--name"), said
    assert "\x1b" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("labels", "code", "said"),
    [
        (["exit=3"], 3, "failed, exit code 3; its log says more"),
        (["exit=255"], 255, "exit code 255"),
        (["exit=-1"], 129, "exit code -1"),
        (["course=never-starts"], 125, "failed, no exit code (IMAGE_NOT_FOUND)"),
    ],
)
def test_it_ends_with_the_jobs_code(puhui: Puhui, script: Path, labels: list[str], code: int, said: str) -> None:
    ended = puhui("run", *(f"--label={label}" for label in labels), script)
    assert (ended.code, said in ended.err) == (code, True), ended.err


def test_options_become_the_spec(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    ended = puhui(
        *("run", "--profile", "2g.20gb", "--memory", "12G", "--name", "mine", "--image", "localhost/x:1"),
        *("--env", "A=b=c", "--env", "EMPTY=", "--input", "images=1.5GB", "--max-duration", "1h30m"),
        *("--priority", "-5", "--label", "team=vision", "--cpus", "1.5", "--host-memory", "8Gi", "--network"),
        *("--stop-grace", "20s", "--tenant", "lab", script),
    )
    assert ended.code == 0, ended.err
    spec = only_job(running).spec
    assert (spec.resources.profile, spec.resources.memory_mib) == ("2g.20gb", 11445)
    assert (spec.name, spec.image, spec.priority) == ("mine", "localhost/x:1", -5)
    assert dict(spec.env) == {"A": "b=c", "EMPTY": ""}
    assert [(item.name, item.size_bytes) for item in spec.inputs] == [("images", 1_500_000_000)]
    assert (spec.resources.cpus, spec.resources.host_memory_mib, spec.resources.network) == (1.5, 8192, True)
    assert (spec.stop_grace.seconds, spec.tenant) == (20, "lab")
    assert (spec.max_duration.seconds, dict(spec.labels)) == (5400, {"team": "vision"})


def test_detach_prints_the_id_alone(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    for arguments in (("run", "--detach", "--label=course=wait"), ("submit", "--label=course=wait")):
        ended = puhui(*arguments, script)
        assert (ended.code, ended.out.strip()) == (0, list(running.centre.kept)[-1])
    ended = puhui("submit", "--json", script)
    assert ended.json["id"] == list(running.centre.kept)[-1]


def test_json_is_one_object_per_line(puhui: Puhui, script: Path) -> None:
    ended = puhui("run", "--json", "--label=exit=4", script)
    assert ended.code == 4
    lines = ended.lines
    assert [next(iter(line)) for line in lines[:4]] == ["event"] * 4
    assert [line["event"]["reason"] for line in lines if "event" in line][-1] == "EXIT_CODE"
    assert "".join(line["log"]["text"] for line in lines if "log" in line) == "to stdout 普to stderr\n again\n"
    assert lines[-1]["job"]["exit_code"] == 4
    assert lines[-1]["job"]["attempts"][0]["emulated"] is True


def test_json_behind_the_script_is_the_scripts(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    ended = puhui("run", script, "--json")
    assert ended.out == STDOUT
    assert only_job(running).spec.command[-1] == "--json"


def test_ctrl_c_detaches_and_says_how_to_come_back(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    process = puhui.start("run", "--label=course=hang", script, start_new_session=True)
    assert process.stdout is not None
    seen = b""
    while not seen.endswith(b"again\n"):
        seen += os.read(process.stdout.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    job = only_job(running)
    assert process.returncode == 130
    assert f"puhui logs -f {job.id}" in err.decode()
    assert f"puhui cancel {job.id}" in err.decode()
    assert "Traceback" not in err.decode()
    assert job.state == job_pb2.JOB_STATE_RUNNING


def test_a_reader_that_goes_away_is_not_an_error(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = puhui.start("run", "--label=course=hang", script, stdout=theirs)
    os.close(theirs)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 141
    assert "Traceback" not in err.decode()
    assert "Broken" not in err.decode()


def test_a_centre_that_restarts_in_between_is_waited_for(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    process = puhui.start("run", "--label=course=hang", script)
    assert process.stdout is not None
    assert process.stderr is not None
    seen = b""
    while not seen.endswith(b"again\n"):
        seen += os.read(process.stdout.fileno(), 4096)
    running.hang_up()
    told = b""
    while b"trying again" not in told:
        told += os.read(process.stderr.fileno(), 4096)
    running.listen()
    job = only_job(running)
    running.do("write", job.id, b"more\n", 1)
    running.do("end", job.id, job_pb2.JOB_STATE_FAILED, "EXIT_CODE", 5)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (5, b"more\n")


def test_a_centre_that_is_not_there_is_125_and_says_what_to_do(puhui: Puhui, script: Path) -> None:
    ended = puhui("run", "--server", "127.0.0.1:1", script)
    assert ended.code == 125
    assert "no centre answers at 127.0.0.1:1" in ended.err
    assert "puhui up" in ended.err
    assert ended.err.splitlines()[-1].startswith("error: ")


def test_a_refused_job_is_125(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    running.centre.faults["SubmitJob"] = [
        Refusal(grpc.StatusCode.NOT_FOUND, "PROFILE_NOT_AVAILABLE", "no such profile here; see `puhui capacity`")
    ]
    ended = puhui("run", "--json", script)
    assert (ended.code, ended.out) == (125, "")
    assert ended.error["code"] == "NOT_FOUND"
    assert ended.error["reason"] == "PROFILE_NOT_AVAILABLE"


@pytest.mark.parametrize(
    ("arguments", "reason", "said"),
    [
        (["run"], "USAGE", "say what to run"),
        (["run", "nothing.py"], "SCRIPT_NOT_FOUND", "nothing.py is not there"),
        (["run", "."], "SCRIPT_NOT_FOUND", "--directory"),
        (["run", "-f", "job.yaml", "x.py"], "USAGE", "not both"),
        (["run", "--memory", "12", "x.py"], "USAGE", "write 24GB"),
        (["run", "--max-duration", "ten", "x.py"], "USAGE", "write 90s"),
        (["run", "--env", "A", "x.py"], "USAGE", "KEY=VALUE"),
        (["run", "--priority", "1000", "x.py"], "USAGE", "100"),
        (["run", "--prof", "x", "x.py"], "USAGE", "`puhui run --help`"),
        (["run", "home.py"], "DIRECTORY_TOO_WIDE", "folder of its own"),
        (["run", "--directory", "code", "home.py"], "SCRIPT_OUTSIDE", "would not be uploaded"),
        (["run", "--directory", "none", "x.py"], "DIRECTORY_NOT_FOUND", "no folder"),
        (["run", "--server", "nonsense", "code/x.py"], "ADDRESS_INVALID", "HOST:PORT"),
        (["ps", "--state", "runing"], "USAGE", "did you mean running?"),
        (["ps", "--since", "yesterday"], "USAGE", "--since"),
        (["ps", "--label", "a"], "USAGE", "KEY=VALUE"),
        (["wait", "j-1", "--timeout", "x"], "USAGE", "--timeout"),
        (["get"], "USAGE", "Missing argument 'JOB'; see `puhui get --help`"),
        (["logs", ""], "USAGE", "give a job id or a name"),
        (["nonsense"], "USAGE", "nonsense"),
        (["up", "--runtime", "docker"], "USAGE", "podman"),
    ],
)
def test_a_mistake_is_2_and_says_what_to_write(
    puhui: Puhui, running: RunningCentre, arguments: list[str], reason: str, said: str
) -> None:
    (puhui.home / "code").mkdir()
    for name in ("x.py", "home.py", "code/x.py"):
        (puhui.home / name).write_text("")
    if arguments[-1] == "x.py" and "--directory" not in arguments:
        arguments = [*arguments[:-1], "code/x.py"]
    ended = puhui(arguments[0], "--json", *arguments[1:])
    assert ended.code == 2
    assert (ended.error["code"], ended.error["reason"]) == ("INVALID_ARGUMENT", reason)
    assert said in ended.error["message"]
    assert (ended.out, running.centre.kept) == ("", {})


def test_a_mistake_is_one_line_for_people(puhui: Puhui) -> None:
    ended = puhui("run", "nothing.py")
    assert ended.code == 2
    assert ended.err == (
        "error: nothing.py is not there; name a script, or a folder with --directory and a command in it "
        "(SCRIPT_NOT_FOUND)\n"
    )


def test_code_that_is_too_large_is_not_sent(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    with (script.parent / "data.bin").open("wb") as file:
        file.truncate(2**40)
    ended = puhui("run", script)
    assert ended.code == 125
    assert "what the code does not need (BUNDLE_TOO_LARGE)" in ended.err
    assert running.centre.calls["PutBundle"] == 0


def test_a_job_file_is_run_from_its_folder(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    (script.parent / "job.yaml").write_text("name: from-file\ncommand: python3 train.py --lr 0.1\nenv: {N: 3}\n")
    ended = puhui("run", "-f", script.parent / "job.yaml", "--name", "flag-wins")
    assert ended.code == 0, ended.err
    spec = only_job(running).spec
    assert (spec.name, list(spec.command)) == ("flag-wins", ["python3", "train.py", "--lr", "0.1"])
    assert dict(spec.env) == {"N": "3"}


def test_a_job_file_with_an_unknown_field_is_refused(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    (script.parent / "job.yaml").write_text("command: python3 train.py\n\nresources:\n  memroy: 12GB\n")
    ended = puhui("run", "-f", script.parent / "job.yaml")
    assert ended.code == 2
    assert "line 4: resources.memroy: is no field of a job file; did you mean memory?" in ended.err
    assert running.centre.calls == {}


def test_a_folder_with_a_command_in_it(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    (script.parent / "tool").write_text("#!/bin/sh\n")
    for command, expected in (
        (["train.py", "-x"], ["python3", "train.py", "-x"]),
        ([str(script)], ["python3", "train.py"]),
        (["python3", "-m", "train"], ["python3", "-m", "train"]),
        (["tool"], ["./tool"]),
    ):
        assert puhui("run", "--directory", script.parent, *command).code == 0
        assert list(list(running.centre.kept.values())[-1].job.spec.command) == expected


def on_terminal(puhui: Puhui, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs the program on a terminal, and returns its exit code and all that the terminal got."""
    terminal, other_end = pty.openpty()
    puhui.environment |= {"TERM": "xterm-256color"} | environment
    process = puhui.start(*arguments, stdout=other_end, stderr=other_end, start_new_session=True)
    os.close(other_end)
    seen = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # Linux's way of saying that the other end has closed
            break
    os.close(terminal)
    return process.wait(60), seen.decode()


def test_a_terminal_gets_colour_and_a_bar(puhui: Puhui, script: Path) -> None:
    (script.parent / "noise.bin").write_bytes(os.urandom(3_000_000))
    code, seen = on_terminal(puhui, "run", "--label=exit=6", str(script))
    assert code == 6
    assert "\x1b[1;36m" in seen
    assert "uploading" in seen
    assert "MiB" in seen
    assert "to stderr" in seen


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_it_is_not_wanted(puhui: Puhui, script: Path, environment: dict[str, str]) -> None:
    _, seen = on_terminal(puhui, "run", str(script), **environment)
    assert not re.search(r"\x1b\[[0-9;]*m", seen)  # a bar may move the cursor
    assert "ended" in seen


def test_ci_variables_do_not_colour_a_pipe(puhui: Puhui, script: Path) -> None:
    puhui.environment |= {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "GITHUB_ACTIONS": "true"}
    for arguments in (
        ["--help"],
        ["run", str(script)],
        ["ps", "--all"],
        ["capacity"],
        ["predict", str(script)],
        ["get", "nothing"],
    ):
        ended = puhui(*arguments)
        assert "\x1b" not in ended.out + ended.err, arguments
    assert json.loads(puhui("ps", "--all", "--json").out)["jobs"]
