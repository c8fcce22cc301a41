"""The commands that ask: their tables, their JSON, their exit codes."""

import base64
import os
import signal
from pathlib import Path

import pytest

from tests.integration.cli.program import Puhui
from tests.unit.cli.small_centre import RunningCentre


def submitted(puhui: Puhui, script: Path, *options: str) -> str:
    ended = puhui("submit", *options, script)
    assert ended.code == 0, ended.err
    return ended.out.strip()


def test_ps_lists_what_has_not_ended(puhui: Puhui, script: Path) -> None:
    assert "--all" in puhui("ps").err
    waiting = submitted(puhui, script, "--label=course=wait", "--name=waits", "--label=team=a")
    done = submitted(puhui, script, "--label=exit=3", "--name", "n" * 63)
    assert puhui("wait", done).code == 3
    listed = puhui("ps")
    assert waiting in listed.out
    assert "  waiting for slice\n" in listed.out
    assert done not in listed.out
    everything = puhui("ps", "--all")
    assert "1g.10gb (emulated)" in everything.out
    assert "failed" in everything.out
    assert "n" * 63 in everything.out, "nothing is cut in a pipe"
    assert all(line == line.rstrip() for line in everything.out.splitlines())
    for options, expected in (
        (["--all"], [done, waiting]),
        (["--all", "--limit", "1"], [done]),
        (["--state", "queued"], [waiting]),
        (["--state", "FAILED", "--state", "queued"], [done, waiting]),
        (["--all", "--name", "wai"], [waiting]),
        (["--label", "team=a"], [waiting]),
        (["--state", "running"], []),
    ):
        ended = puhui("ps", "--json", *options)
        assert [job["id"] for job in ended.json["jobs"]] == expected, options
    assert "--limit 4" in puhui("ps", "--all", "--limit", "1").err


def test_get_shows_one_job(puhui: Puhui, script: Path) -> None:
    job_id = submitted(puhui, script)
    assert puhui("wait", job_id).code == 0
    shown = puhui("get", job_id)
    assert "H100 80GB HBM3 (emulated)" in " ".join(shown.out.split())
    assert max(map(len, shown.out.splitlines())) <= 80
    document = puhui("get", job_id, "--json").json
    assert document["state"] == "JOB_STATE_SUCCEEDED"
    assert document["exit_code"] == 0
    assert document["prediction"]["required_mib"] == 9100  # a number, though 64 bits wide
    assert document["executing_centre"] == ""
    assert document["spec"]["max_duration"] is None


def test_a_job_that_is_not_there(puhui: Puhui) -> None:
    for command in ("get", "logs", "wait", "cancel", "pull"):
        ended = puhui(command, "j-nothing")
        assert (ended.code, ended.out) == (1, ""), command
        assert ended.err == "error: no job j-nothing; see `puhui ps` (JOB_NOT_FOUND)\n"
        ended = puhui(command, "j-nothing", "--json")
        assert ended.error["reason"] == "JOB_NOT_FOUND"
        assert ended.error["metadata"] == {"job_id": "j-nothing"}
    assert not (puhui.folder / "j-nothing").exists()


def test_wait_ends_as_the_job_did(puhui: Puhui, script: Path) -> None:
    assert puhui("wait", submitted(puhui, script, "--label=exit=7")).code == 7
    assert puhui("wait", submitted(puhui, script, "--label=course=never-starts"), "--json").code == 125
    waiting = submitted(puhui, script, "--label=course=wait")
    ended = puhui("wait", waiting, "--timeout", "200ms")
    assert ended.code == 124
    assert "it goes on (WAIT_TIMED_OUT)" in ended.err


def test_cancel_ends_a_job_and_says_so(puhui: Puhui, script: Path) -> None:
    job_id = submitted(puhui, script, "--label=course=hang")
    assert puhui("cancel", job_id, "-m", "enough").code == 0
    assert puhui("wait", job_id).code == 143
    assert puhui("cancel", job_id, "--json").json["state"] == "JOB_STATE_CANCELLED"


def test_logs_come_on_their_own_streams(puhui: Puhui, script: Path) -> None:
    job_id = submitted(puhui, script)
    followed = puhui("logs", "-f", job_id)
    assert (followed.code, followed.out, followed.err) == (0, "to stdout 普 again\n", "to stderr\n")
    assert puhui("logs", "--tail", "1", job_id).out == " again\n"
    chunks = puhui("logs", job_id, "--json").lines
    assert b"".join(base64.b64decode(chunk["data"]) for chunk in chunks).decode() == "to stdout 普to stderr\n again\n"
    assert [chunk["stream"] for chunk in chunks][1] == "LOG_STREAM_STDERR"
    assert chunks[1]["offset"] == len("to stdout 普".encode())


def test_leaving_a_log_leaves_the_job(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    job_id = submitted(puhui, script, "--label=course=hang")
    process = puhui.start("logs", "-f", job_id)
    assert process.stdout is not None
    seen = b""
    while not seen.endswith(b"again\n"):
        seen += os.read(process.stdout.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert not running.centre.kept[job_id].job.HasField("end_time")


def test_pull_puts_artifacts_into_a_new_folder(puhui: Puhui, script: Path) -> None:
    job_id = submitted(puhui, script)
    puhui("wait", job_id)
    ended = puhui("pull", job_id)
    assert (puhui.folder / job_id / "deep/metrics.json").read_text() == "{}"
    assert ended.out.splitlines() == [f"{puhui.folder}/{job_id}/{name}" for name in ("model.pt", "deep/metrics.json")]
    again = puhui("pull", job_id, "--json")
    assert (again.code, again.error["reason"]) == (1, "TARGET_NOT_EMPTY")
    document = puhui("pull", job_id, "-o", "elsewhere/out", "--json").json
    assert document["folder"] == str(puhui.folder / "elsewhere/out")
    assert [file["size_bytes"] for file in document["manifest"]["files"]] == [7, 2]


def test_pull_to_where_nothing_can_be_written_names_it(puhui: Puhui, script: Path) -> None:
    job_id = submitted(puhui, script)
    puhui("wait", job_id)
    ended = puhui("pull", job_id, "-o", "/proc/x")
    assert ended.code == 1
    assert ended.err.startswith("error: /proc/x cannot be written (")
    assert ended.err.endswith("; name another folder with -o (TARGET_NOT_WRITABLE)\n")


def test_pull_of_a_job_that_goes_on(puhui: Puhui, script: Path) -> None:
    job_id = submitted(puhui, script, "--label=course=hang")
    ended = puhui("pull", job_id)
    assert (ended.code, "NOT_FINISHED" in ended.err) == (1, True)
    assert list(puhui.folder.glob(f"*{job_id}*")) == []


def test_predict_draws_needs_against_slices(puhui: Puhui, running: RunningCentre, script: Path) -> None:
    ended = puhui("predict", script)
    assert ended.code == 0
    assert "← chosen" in next(line for line in ended.out.splitlines() if line.startswith("1g.10gb"))
    assert "p99" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    assert puhui("predict", "--json", script).json["sizing"]["choices"][0]["profile"] == "1g.10gb"
    assert running.centre.kept == {}


@pytest.mark.parametrize("command", ["nodes", "slices", "capacity"])
def test_emulated_cards_are_always_called_so(puhui: Puhui, command: str) -> None:
    ended = puhui(command)
    assert ended.code == 0
    assert "H100 80GB HBM3 (emulated)" in " ".join(ended.out.split())
    assert max(map(len, ended.out.splitlines())) <= 80
    assert '"emulated": true' in puhui(command, "--json").out


def test_the_address_comes_from_the_nearest_source(puhui: Puhui, running: RunningCentre) -> None:
    settings = puhui.home / ".config/puhui/config.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("server: 127.0.0.1:2\n")
    assert puhui("capacity").code == 0
    assert "127.0.0.1:1" in puhui("capacity", "--server", "127.0.0.1:1").err
    del puhui.environment["PUHUI_SERVER"]
    assert "127.0.0.1:2" in puhui("capacity").err
    settings.write_text(f"server: {running.address}\n")
    assert puhui("capacity").code == 0
    settings.write_text("sever: x\n")
    ended = puhui("capacity", "--json")
    assert (ended.code, ended.error["reason"]) == (2, "CONFIG_INVALID")


def test_version_schema_and_help_need_no_centre(puhui: Puhui) -> None:
    puhui.environment["PUHUI_SERVER"] = "127.0.0.1:1"
    assert puhui("version").out.startswith("puhui ")
    assert set(puhui("version", "--json").json) == {"puhui", "python", "grpc"}
    assert puhui("schema", "--json").json["additionalProperties"] is False
    for arguments in ([], ["--help"], ["run", "--help"], ["up", "-h"]):
        ended = puhui(*arguments)
        assert (ended.code, ended.err) == (0, "")
        assert "Usage: puhui" in ended.out
