"""Which processes are ours, and which only look so."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from puhui.cli.daemon_log import exit_words, reason_in
from puhui.cli.local_state import CentreRecord, ProcessId, Record, StateFolder, default_state, local_command
from puhui.cli.settings import server_address
from puhui.cli.terminal import Mistake
from puhui.rpc.errors import Refusal


def record(*processes: ProcessId) -> Record:
    first, *rest = processes
    return Record(
        first,
        {f"d{n}": process for n, process in enumerate(rest)},
        (CentreRecord("local", "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "A30-24GB:1", "/x"),),
    )


def test_a_process_is_known_by_more_than_its_number() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        ours = ProcessId.of(process.pid)
        assert ours.runs()
        for other in (
            ProcessId(ours.pid, ours.start_ticks + 1, ours.boot_id),
            ProcessId(ours.pid, ours.start_ticks, "another boot"),
        ):
            assert not other.runs()
            assert other.stop(1) is False
        assert process.poll() is None
        assert ours.stop(10) is True
        assert process.wait() == -15
        assert ours.stop(10) is False
    finally:
        process.kill()
        process.wait()


def test_a_process_that_will_not_end_is_killed() -> None:
    process = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(1)
    assert ProcessId.of(process.pid).stop(0.1) is True
    process.communicate()
    assert process.returncode == -9


def test_a_record_is_kept_and_taken_away(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "deep/state")
    folder.prepare()
    assert folder.read() is None
    mine = record(ProcessId.of(os.getpid()))
    folder.write(mine)
    assert folder.read() == mine
    folder.clear()
    folder.clear()
    assert folder.read() is None
    assert folder.stop() is None


def test_daemons_whose_up_was_killed_run_still() -> None:
    mine = ProcessId.of(os.getpid())
    gone = replace(mine, start_ticks=mine.start_ticks + 1)
    assert replace(record(gone), daemons={"controlplane": mine}).runs()
    assert not replace(record(gone), daemons={"controlplane": gone}).runs()


def test_the_record_of_an_older_up_is_understood(tmp_path: Path) -> None:
    mine = ProcessId.of(os.getpid())
    document: dict[str, object] = {"supervisor": asdict(mine), "daemons": {"controlplane": asdict(mine)}}
    document |= {"address": "127.0.0.1:1", "node_address": "127.0.0.1:2", "emulate": "A30-24GB:1"}
    (tmp_path / "up.json").write_text(json.dumps(document))
    read = StateFolder(tmp_path).read()
    assert read is not None
    assert read.address == "127.0.0.1:1"
    assert read.centres == (CentreRecord("local", "127.0.0.1:1", "127.0.0.1:2", "", "A30-24GB:1", str(tmp_path)),)


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.prepare()
    folder.write(record(ProcessId.of(os.getpid())))
    with folder.locked(), pytest.raises(Refusal, match=r"127\.0\.0\.1:1") as caught, StateFolder(tmp_path).locked():
        pass
    assert caught.value.reason == "CENTRE_RUNNING"
    with StateFolder(tmp_path).locked():
        pass


def test_a_second_up_while_the_first_is_starting(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.prepare()
    with folder.locked(), pytest.raises(Refusal, match="is being started by another `puhui up`") as caught:
        StateFolder(tmp_path).locked().__enter__()
    assert f"`puhui down --state {tmp_path}`" in caught.value.message
    assert caught.value.metadata["address"] == ""


def test_a_command_names_the_state_unless_it_is_the_default() -> None:
    assert local_command("down", default_state()) == "puhui down"
    assert local_command("down", Path("/a b")) == "puhui down --state '/a b'"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ""),
        ('{"event": "serves", "level": "info"}\n', ""),
        ('{"event": "it broke", "level": "error", "error": "disk full"}\n', "it broke: disk full"),
        ("noise\npuhui-nodedaemon: No card model is called 'B9'.\n", "No card model is called 'B9'"),
        ("Traceback\n  File x\nsqlite3.OperationalError: disk I/O error\n", "disk I/O error"),
        (
            "Usage: x\n╭─ Error ─╮\n│ Invalid value for --log-level: 'x' is │\n│ no level │\n╰─╯\n",
            "--log-level: 'x' is no level",
        ),
    ],
)
def test_the_reason_is_found_in_a_log(tmp_path: Path, text: str, reason: str) -> None:
    log = tmp_path / "x.log"
    log.write_text(text)
    assert reason_in(log) == reason
    assert reason_in(tmp_path / "none.log") == ""


def test_the_end_of_a_process_in_words() -> None:
    assert exit_words(-9) == "was killed by signal 9"
    assert exit_words(1) == "ended with code 1"


def test_the_state_of_a_user_is_below_its_home(tmp_path: Path) -> None:
    expected = "/var/lib/puhui/local" if os.geteuid() == 0 else str(tmp_path / "puhui/local")
    assert str(default_state({"XDG_STATE_HOME": str(tmp_path)})) == expected


@pytest.mark.parametrize("address", ["host:1", "127.0.0.1:7070", "[::1]:7070", "unix:/run/x"])
def test_addresses(address: str) -> None:
    assert server_address(address, {}) == address


@pytest.mark.parametrize("address", ["host", "host:", ":1", "http://host:1", "host:port", "a b:1", "unix:", "::1:7070"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(Mistake, match="HOST:PORT"):
        server_address(address, {})


def centres(own: Path, *arguments: str) -> tuple[str, str]:
    """Returns what `puhui centres` writes for a user whose centres, if any, are in `own`, to stdout and stderr."""
    asked = subprocess.run(
        [sys.executable, "-m", "puhui.cli", "centres", *arguments],
        env={**os.environ, "PUHUI_LOCAL_STATE": str(own)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return asked.stdout, " ".join(asked.stderr.split())


def test_where_no_centre_runs_another_state_folder_is_thought_of(tmp_path: Path) -> None:
    _, said = centres(tmp_path / "none")
    assert f"no local centre runs with its state in {tmp_path}/none" in said
    assert "name the --state" in said
    with pytest.raises(Mistake, match="where PUHUI_LOCAL_STATE names the --state"):
        server_address("local-2", {"PUHUI_LOCAL_STATE": str(tmp_path / "none")})


def test_who_lists_centres_of_another_folder_is_told_how_their_names_are_known(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.write(record(ProcessId.of(os.getpid())))
    listed, said = centres(tmp_path / "none", "--state", str(tmp_path))
    assert "127.0.0.1:1" in listed
    assert f"with PUHUI_LOCAL_STATE={tmp_path}, `--server NAME`" in said
    assert "PUHUI_LOCAL_STATE" not in "".join(centres(tmp_path))
    assert server_address("local", {"PUHUI_LOCAL_STATE": str(tmp_path)}) == "127.0.0.1:1"
