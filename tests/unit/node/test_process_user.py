"""Plain processes: never as root unless a test asks for it loudly, and never beside a real GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nodedaemon.cli import app
from nodedaemon.process_runtime import ProcessRuntime
from nodedaemon.process_user import (
    ProcessesRefusedError,
    ProcessUser,
    choose_process_user,
    find_process_user,
    require_no_real_gpu,
)

_USER = ProcessUser("puhui", 990, 990)
_ROOT = ProcessUser("root", 0, 0)


def test_a_user_that_reaches_everything_is_taken() -> None:
    for allow_root in (False, True):
        assert choose_process_user("puhui", _USER, "", allow_root=allow_root) == _USER


@pytest.mark.parametrize(
    ("user", "out_of_reach", "words"),
    [
        (None, "", "no user puhui"),
        (_USER, "the interpreter /root/python", "cannot reach the interpreter /root/python"),
        (_USER, "the state directory /root/state", "cannot reach the state directory /root/state"),
        (_ROOT, "", "is root"),
    ],
)
def test_otherwise_processes_are_refused_unless_root_is_asked_for(
    user: ProcessUser | None, out_of_reach: str, words: str
) -> None:
    with pytest.raises(ProcessesRefusedError, match=words) as caught:
        choose_process_user("puhui", user, out_of_reach, allow_root=False)
    assert "run the daemon as an unprivileged user" in str(caught.value)
    assert choose_process_user("puhui", user, out_of_reach, allow_root=True) == _ROOT


def test_a_daemon_of_an_unknown_user_never_falls_back_to_root(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        assert find_process_user("nobody-here", tmp_path, allow_root=False).uid == os.geteuid()
        return
    arguments = ["serve", "--state", str(tmp_path), "--emulate", "A30-24GB:1", "--podman-user", "nobody-here"]
    with pytest.raises(ProcessesRefusedError):
        find_process_user("nobody-here", tmp_path, allow_root=False)
    environment = {"PUHUI_NODE_ALLOW_ROOT_PROCESSES": None}
    outcome = CliRunner(env=environment).invoke(app, [*arguments, "--runtime", "process"])
    assert outcome.exit_code == 1
    assert "submitted code never runs as root" in outcome.output


def test_processes_are_refused_beside_a_real_gpu() -> None:
    require_no_real_gpu(emulated=True, real_gpu=False)
    with pytest.raises(ProcessesRefusedError, match="refused on real GPUs"):
        require_no_real_gpu(emulated=False, real_gpu=False)
    with pytest.raises(ProcessesRefusedError, match="has a real GPU"):
        require_no_real_gpu(emulated=True, real_gpu=True)


async def test_running_as_root_is_told_loudly(tmp_path: Path) -> None:
    (_, notice) = ProcessRuntime(tmp_path / "processes", _ROOT, "").describe().notices
    assert "AS ROOT" in notice
    assert "--allow-root-processes" in notice
