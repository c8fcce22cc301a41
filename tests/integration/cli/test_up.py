"""`puhui up` and `puhui down`: a whole centre in real processes, with emulated cards."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puhui.cli.local_state import ProcessId
from puhui.rpc.notify import ReadySocket
from tests.integration.cli.program import Puhui

UP = ("up", "--port", "0", "--runtime", "process", "--emulate", "A100-80GB:1")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Puhui]:
    """Somebody whose centre, if one is left, is stopped."""
    puhui = Puhui.at(tmp_path / "home")
    puhui.environment["PUHUI_LOCAL_STATE"] = str(tmp_path / "state")
    yield puhui
    puhui("down")


def record(user: Puhui) -> Any:
    return json.loads(Path(user.environment["PUHUI_LOCAL_STATE"], "up.json").read_text())


def alive(pid: int) -> bool:
    try:
        return ProcessId.of(pid).pid == pid
    except OSError:
        return False


class Foreground:
    """A `puhui up` in the foreground, ready."""

    def __init__(self, user: Puhui) -> None:
        with ReadySocket() as ready:
            user.environment["NOTIFY_SOCKET"] = ready.path
            self.process: subprocess.Popen[bytes] = user.start(*UP)
            self.address = ready.wait(self.process.pid, 60)
        del user.environment["NOTIFY_SOCKET"]
        user.environment["PUHUI_SERVER"] = self.address
        self.heard = ""

    def said(self, words: str, times: int = 1) -> None:
        """Reads what it says until it has said this so many times."""
        assert self.process.stderr is not None
        while self.heard.count(words) < times:
            line = self.process.stderr.readline().decode()
            assert line, f"it ended and had not said {words!r}: {self.heard}"
            self.heard += line


def test_a_centre_comes_up_runs_code_and_goes_down(user: Puhui, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text(
        "import os, sys\n"
        "print('on', os.environ['CUDA_VISIBLE_DEVICES'][:4], sys.argv[1:])\n"
        "open(os.environ['PUHUI_OUTPUTS'] + '/result', 'w').write('42')\n"
        "sys.exit(5)\n"
    )
    started = user(*UP, "--detach", "--json")
    assert started.code == 0, started.err
    answer = started.json
    assert answer["emulated"] is True
    assert [gpu["emulated"] for gpu in answer["node"]["inventory"]["gpus"]] == [True]
    user.environment["PUHUI_SERVER"] = answer["address"]

    ran = user("run", "--memory", "8GB", code / "train.py", "--lr", "0.1")
    assert (ran.code, ran.out) == (5, "on MIG- ['--lr', '0.1']\n"), ran.err
    assert "A100-SXM4-80GB (emulated)" in ran.err
    assert "no isolation" in ran.err
    job = user("ps", "--all", "--json").json["jobs"][0]
    assert user("pull", job["id"], "-o", "out").code == 0
    assert (user.folder / "out/result").read_text() == "42"
    assert user("slices", "--json").json == {"slices": []}

    second = user(*UP)
    assert (second.code, "CENTRE_RUNNING" in second.err) == (1, True)
    again = user(*UP, "--detach", "--json")
    assert again.error["metadata"]["address"] == answer["address"]

    pids = [process["pid"] for process in [record(user)["supervisor"], *record(user)["daemons"].values()]]
    down = user("down", "--json")
    assert down.json == {"stopped": True, "address": answer["address"], "running_jobs": []}
    assert [pid for pid in pids if alive(pid)] == []
    assert user("down", "--json").json["stopped"] is False

    # What was, is still there after the next start.
    user.environment["PUHUI_SERVER"] = user(*UP, "--detach", "--json").json["address"]
    assert user("get", job["id"], "--json").json["exit_code"] == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_foreground_says_what_it_is_and_stops_at_a_signal(user: Puhui, number: signal.Signals) -> None:
    centre = Foreground(user)
    daemons = [process["pid"] for process in record(user)["daemons"].values()]
    assert len(daemons) == 2
    centre.process.send_signal(number)
    out, err = centre.process.communicate(timeout=60)
    said = out.decode()
    assert centre.process.returncode == 0
    assert "EMULATED CARDS" in said
    assert f"serves at   {centre.address}" in said
    assert "1 x A100-SXM4-80GB (emulated)" in said
    assert f"export PUHUI_SERVER={centre.address}" in said
    assert "Traceback" not in err.decode()
    assert [pid for pid in daemons if alive(pid)] == []
    assert user("down", "--json").json["stopped"] is False


@pytest.mark.parametrize("dying", [["controlplane"], ["nodedaemon"], ["controlplane", "nodedaemon"]])
def test_a_daemon_that_dies_is_started_again_and_the_job_runs_on(user: Puhui, tmp_path: Path, dying: list[str]) -> None:
    centre = Foreground(user)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/wait.py").write_text(
        "import os, sys\n"
        "print('on', flush=True)\n"
        "print(open(sys.argv[1]).read())\n"
        "open(os.environ['PUHUI_OUTPUTS'] + '/result', 'w').write('42')\n"
        "sys.exit(5)\n"
    )
    job_id = user("submit", "--memory", "8GB", tmp_path / "code/wait.py", str(gate)).out.strip()
    logs = user.start("logs", "-f", job_id)
    assert logs.stdout is not None
    assert logs.stdout.read(3) == b"on\n"
    before = {name: process["pid"] for name, process in record(user)["daemons"].items()}
    [here] = record(user)["centres"]
    before_at = {"controlplane": here["address"], "nodedaemon": here["node_address"]}
    for name in dying:
        os.kill(before[name], signal.SIGKILL)
    for name in dying:
        centre.said(f"the {name} serves again at {before_at[name]}\n")
    after = {name: process["pid"] for name, process in record(user)["daemons"].items()}
    assert {name for name in before if before[name] != after[name]} == set(dying)
    assert record(user)["centres"] == [here]
    assert all(alive(pid) for pid in after.values())
    assert all(f"the {name} was killed by signal 9; it is started again in 0.2 s" in centre.heard for name in dying)
    noted = Path(user.environment["PUHUI_LOCAL_STATE"], "logs/supervisor.log").read_text()
    assert [noted.count(f"the {name} was killed by signal 9") for name in dying] == [1] * len(dying)

    gate.write_text("through")
    assert logs.communicate(timeout=60)[0] == b"through\n"
    assert user("wait", job_id).code == 5
    assert user("pull", job_id, "-o", "out").code == 0
    assert (user.folder / "out/result").read_text() == "42"
    assert len(user("get", job_id, "--json").json["attempts"]) == 1
    centre.process.send_signal(signal.SIGINT)
    centre.process.communicate(timeout=60)
    assert centre.process.returncode == 0
    assert [pid for pid in after.values() if alive(pid)] == []


@pytest.mark.timeout(120)
def test_a_daemon_that_cannot_be_had_again_is_given_up_and_named(user: Puhui) -> None:
    centre = Foreground(user)
    daemons = {key: process["pid"] for key, process in record(user)["daemons"].items()}
    state = Path(user.environment["PUHUI_LOCAL_STATE"])
    (state / "nodedaemon").rename(state / "elsewhere")
    (state / "nodedaemon").touch()
    os.kill(daemons["nodedaemon"], signal.SIGKILL)
    _, err = centre.process.communicate(timeout=90)
    assert centre.process.returncode == 1
    last = err.decode().splitlines()[-1]
    assert last.startswith("error: the nodedaemon ended with code 1 before it was ready, 5 times in a row: ")
    assert "(DAEMON_FAILED)" in last
    assert [pid for pid in daemons.values() if alive(pid)] == []


def test_a_second_ctrl_c_kills_what_does_not_end(user: Puhui) -> None:
    centre = Foreground(user)
    daemons = {key: process["pid"] for key, process in record(user)["daemons"].items()}
    controlplane = os.pidfd_open(daemons["controlplane"])
    os.kill(daemons["nodedaemon"], signal.SIGSTOP)
    centre.process.send_signal(signal.SIGINT)
    assert select.select([controlplane], [], [], 30)[0]  # so it is the node daemon's turn
    os.close(controlplane)
    centre.process.send_signal(signal.SIGINT)
    centre.process.communicate(timeout=10)
    assert centre.process.returncode == 0
    assert [pid for pid in daemons.values() if alive(pid)] == []


def test_down_ends_a_centre_whose_daemon_is_being_started_again(user: Puhui) -> None:
    centre = Foreground(user)
    daemons = {key: process["pid"] for key, process in record(user)["daemons"].items()}
    for times in (1, 2, 3):  # the pause grows, so that `down` comes within one
        os.kill(record(user)["daemons"]["nodedaemon"]["pid"], signal.SIGKILL)
        centre.said("the nodedaemon was killed by signal 9", times)
        if times < 3:
            centre.said("the nodedaemon serves again at", times)
    assert user("down", "--json").json["stopped"] is True
    centre.process.communicate(timeout=60)
    assert [pid for pid in daemons.values() if alive(pid)] == []
    assert user("down", "--json").json["stopped"] is False


def test_daemons_of_a_killed_up_are_stopped_by_the_next(user: Puhui) -> None:
    centre = Foreground(user)
    daemons = [process["pid"] for process in record(user)["daemons"].values()]
    centre.process.kill()
    centre.process.communicate()
    assert all(alive(pid) for pid in daemons)
    started = user(*UP, "--detach")
    assert started.code == 0, started.err
    assert [pid for pid in daemons if alive(pid)] == []


def test_down_touches_nothing_that_only_has_the_same_number(user: Puhui) -> None:
    centre = Foreground(user)
    state = Path(user.environment["PUHUI_LOCAL_STATE"], "up.json")
    document = record(user)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        document["supervisor"]["pid"] = bystander.pid
        state.write_text(json.dumps({**document, "daemons": {}}))
        assert user("down", "--json").json["stopped"] is False
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        centre.process.terminate()
        centre.process.communicate(timeout=60)


def test_a_port_that_is_taken_is_explained(user: Puhui, tmp_path: Path) -> None:
    centre = Foreground(user)
    port = centre.address.rpartition(":")[2]
    for detach in ([], ["--detach"]):
        other = user(*UP, "--port", port, "--state", tmp_path / "other", *detach)
        assert other.code == 1
        assert "is another daemon running there?" in other.err
        assert "the controlplane ended with code" in other.err
    centre.process.terminate()
    centre.process.communicate(timeout=60)


def test_an_unknown_card_is_explained(user: Puhui) -> None:
    ended = user("up", "--port", "0", "--runtime", "process", "--emulate", "B9000:1")
    assert ended.code == 1
    assert "B9000" in ended.err
    assert ended.err.startswith("error: the nodedaemon ended with code 1 before it was ready: No card model")
    assert (ended.err.count("\n"), "nodedaemon.log" in ended.err) == (1, True)
    behind = user("up", "--port", "0", "--runtime", "process", "--emulate", "B9000:1", "--detach")
    assert (behind.code, behind.err) == (1, ended.err)
    assert user("down", "--json").json["stopped"] is False


@pytest.mark.parametrize("flag", ["--log-level=loud", "--emulate=H100-80GB-SXM5:two", "--emulate="])
def test_a_mistake_starts_nothing(user: Puhui, flag: str) -> None:
    ended = user("up", "--port", "0", flag)
    assert (ended.code, ended.err.count("\n"), "USAGE" in ended.err) == (2, 1, True)
    assert not Path(user.environment["PUHUI_LOCAL_STATE"]).exists()


def test_down_of_a_state_that_is_not_there(user: Puhui, tmp_path: Path) -> None:
    ended = user("down", "--state", tmp_path / "none")
    assert (ended.code, "there is no such folder" in ended.err) == (1, True)


def test_down_says_which_jobs_run_on(user: Puhui, tmp_path: Path) -> None:
    started = user(*UP, "--detach")
    assert started.code == 0, started.err
    state = user.environment["PUHUI_LOCAL_STATE"]
    assert f"stop        puhui down --state {state}\n" in started.out
    user.environment["PUHUI_SERVER"] = record(user)["centres"][0]["address"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code/stay.py").write_text("import sys\nprint('on')\nwhile True:\n    __import__('time').sleep(60)\n")
    job_id = user("submit", "--memory", "8GB", tmp_path / "code/stay.py").out.strip()
    logs = user.start("logs", "-f", job_id)
    assert logs.stdout is not None
    assert logs.stdout.read(3) == b"on\n"
    logs.terminate()
    logs.communicate(timeout=60)
    down = user("down")
    assert f"1 job runs on: {job_id}; `puhui up --state {state}` takes it up again" in down.err
    user.environment["PUHUI_SERVER"] = user(*UP, "--detach", "--json").json["address"]
    assert user("cancel", job_id).code == 0
    user("wait", job_id)


def test_a_damaged_record_is_not_guessed_about(user: Puhui, tmp_path: Path) -> None:
    state = Path(user.environment["PUHUI_LOCAL_STATE"])
    state.mkdir()
    (state / "up.json").write_text("{")
    ended = user("down")
    assert (ended.code, "STATE_UNREADABLE" in ended.err) == (1, True)
    (state / "up.json").unlink()
