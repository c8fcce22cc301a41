"""The commands `doctor` and `prepare` on this very host, as root and beside a daemon that runs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nodedaemon.host import has_real_gpu
from tests.daemons import Daemon

_PR_SET_CHILD_SUBREAPER = 36
_PODMAN_HOME = Path(pwd.getpwnam("puhui").pw_dir if os.geteuid() == 0 else Path.home(), ".local/share/puhui/podman")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Whoever runs the tests may have settings for a daemon of their own.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PUHUI_NODE_")}
    command = [sys.executable, "-m", "nodedaemon", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def _examine(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = _run("doctor", "--json", *arguments)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def _found(report: dict[str, Any], check: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in report["findings"] if one["check"] == check)
    return found


@contextlib.contextmanager
def _adopting() -> Iterator[Callable[[], set[str]]]:
    """Makes what outlives its parent a child of this process, and tells the children that were not there before."""
    libc = ctypes.CDLL(None)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield lambda: set(children.read_text().split()) - before
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def test_this_host_can_serve_emulated_cards_with_containers() -> None:
    began = time.monotonic()
    code, report = _examine("--emulate", "H100-80GB-SXM5:2", "--state", "/var/tmp/puhui-no-such-state")
    assert time.monotonic() - began < 5
    assert (code, report["can_serve"], report["emulated"]) == (0, True, True)
    assert report["verdict"] == "This host can serve emulated cards with containers."
    assert all(one["level"] == "ok" or one["command"] for one in report["findings"])


def test_real_cards_are_served_only_where_there_are_any() -> None:
    code, report = _examine("--state", "/var/tmp/puhui-no-such-state")
    assert code == (0 if report["can_serve"] else 1)
    if not has_real_gpu():
        assert report["verdict"] == "This host cannot serve real cards: see driver."


def test_nothing_is_made_and_nothing_stays() -> None:
    state = Path("/var/tmp/puhui-no-such-state")
    before = sorted(_PODMAN_HOME.iterdir()), _PODMAN_HOME.stat().st_mtime_ns
    with _adopting() as orphans:
        for arguments in ([], ["--emulate", "A100-80GB"]):
            _examine(*arguments, "--state", str(state))
        assert orphans() == set()
    assert (sorted(_PODMAN_HOME.iterdir()), _PODMAN_HOME.stat().st_mtime_ns) == before
    assert not state.exists()


def test_the_table_ends_with_whether_this_host_can_serve() -> None:
    done = _run("doctor", "--emulate", "A100-80GB", "--state", "/var/tmp/puhui-no-such-state")
    assert done.stdout.splitlines()[-1] == "This host can serve emulated cards with containers."
    assert "\x1b" not in done.stdout


def test_unknown_cards_are_a_usage_error() -> None:
    assert _run("doctor", "--emulate", "H1000").returncode == 2


def test_a_user_that_is_not_there_is_told() -> None:
    code, report = _examine("--emulate", "A100-80GB", "--podman-user", "no-such-user", "--state", "/var/tmp/puhui-none")
    assert _found(report, "user")["level"] == "problem"
    assert "useradd" in _found(report, "user")["command"]
    # Plain processes may do, if this interpreter is within reach of whom they would run as.
    assert code == (0 if report["can_serve"] else 1)


def test_the_daemon_that_holds_the_state_is_named(serving: Daemon, state: Path) -> None:
    code, report = _examine("--emulate", "H100-80GB-SXM5:1,A100-80GB:1", "--state", str(state))
    assert code == 0
    assert _found(report, "daemon")["text"].startswith(f"process {serving.process.pid} holds this state")
    assert _found(report, "emulated-cards")["level"] == "ok"


def test_other_cards_than_the_state_has_are_told(serving: Daemon, state: Path) -> None:
    code, report = _examine("--emulate", "A30-24GB", "--state", str(state))
    assert code == 1
    assert "other cards" in _found(report, "emulated-cards")["text"]


def test_prepare_says_what_it_would_do_on_this_host() -> None:
    done = _run("prepare", "--dry-run", "--emulated")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/run/puhui" in done.stdout
