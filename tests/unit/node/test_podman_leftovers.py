"""What a killed Podman service left behind is ended, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nodedaemon.podman_account import PodmanAccount
from nodedaemon.podman_leftovers import end_leftovers

_ID = "4e09c9d52068"
Conmon = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def account(tmp_path: Path) -> PodmanAccount:
    return PodmanAccount("", os.geteuid(), os.getegid(), tmp_path, tmp_path, "runc", "v2", ())


@pytest.fixture
def conmon(tmp_path: Path) -> Iterator[Conmon]:
    """Starts what looks like a conmon: it looks after one process, and ends when that does."""
    # A shell takes its script from where a conmon has the id of its container.
    waiting = f": {_ID}; sleep 600 & echo $!; wait"

    with ExitStack() as stack:

        def start(name: str, script: str = waiting) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                ["conmon", "-c", script, "-n", name], executable="/bin/sh", stdout=subprocess.PIPE
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def oci_runtime(tmp_path: Path) -> Path:
    """An OCI runtime that writes down what it is asked for."""
    path = tmp_path / "runc"
    path.write_text(f'#!/bin/sh\nprintf "%s " "$@" >> {tmp_path}/asked\n')
    path.chmod(0o755)
    return path


def child_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_conmon_that_podman_forgot_ends_with_its_process(
    account: PodmanAccount, conmon: Conmon, oci_runtime: Path, tmp_path: Path
) -> None:
    forgotten, other = conmon("puhui-j-1"), conmon("puhui-j-2")
    child, others = child_of(forgotten), child_of(other)
    end_leftovers(account, str(oci_runtime), "puhui-j-1")
    assert forgotten.wait(10) == 0
    assert not Path(f"/proc/{child}/exe").exists()
    assert (tmp_path / "asked").read_text().startswith("delete --force ")
    assert other.poll() is None
    os.kill(others, signal.SIGKILL)


def test_nothing_is_done_when_nothing_is_left(account: PodmanAccount, oci_runtime: Path, tmp_path: Path) -> None:
    end_leftovers(account, str(oci_runtime), "puhui-j-1")
    assert not (tmp_path / "asked").exists()
