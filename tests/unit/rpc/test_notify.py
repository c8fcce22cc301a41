"""Whoever starts a daemon learns that it is ready, or that it never will be."""

import subprocess
import sys

import pytest

from puhui.rpc.notify import ReadySocket, notify_ready, notify_stopping


def started(code: str, ready: ReadySocket) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], env={"NOTIFY_SOCKET": ready.path, "PATH": ""})


def test_readiness_travels_with_the_address() -> None:
    with ReadySocket() as ready:
        code = "from puhui.rpc.notify import notify_ready as n; n('127.0.0.1:7'); input()"
        process = subprocess.Popen(
            [sys.executable, "-c", code], env={"NOTIFY_SOCKET": ready.path}, stdin=subprocess.PIPE
        )
        assert ready.wait(process.pid, 30) == "127.0.0.1:7"
        process.communicate(b"\n")


def test_a_daemon_that_ends_before_it_is_ready_is_noticed() -> None:
    with ReadySocket() as ready:
        process = started("raise SystemExit(3)", ready)
        with pytest.raises(ChildProcessError):
            ready.wait(process.pid, 30)
        assert process.wait() == 3


def test_a_daemon_that_says_nothing_is_given_up() -> None:
    with ReadySocket() as ready:
        process = subprocess.Popen(["sleep", "60"])
        with pytest.raises(TimeoutError):
            ready.wait(process.pid, 0.05)
        process.kill()
        process.wait()


def test_a_starter_that_has_gone_need_not_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with ReadySocket() as ready:
        monkeypatch.setenv("NOTIFY_SOCKET", ready.path)
        notify_ready("127.0.0.1:7")
    notify_stopping()
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify_ready("127.0.0.1:7")
