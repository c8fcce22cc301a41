"""Podman after every process of its user was killed while the runtime directory stayed, as a power cut can leave it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nodedaemon.podman_account import PodmanAccount
from tests.daemons import open_folder


@pytest.fixture
def account() -> Iterator[PodmanAccount]:
    """The user of the containers with a Podman home and a pause process of this test alone."""
    found = PodmanAccount.find("puhui")
    with open_folder() as folder:
        own = replace(found, runtime_dir=folder / "run", home=folder / "a/b/c/home")
        for place in (own.runtime_dir, own.home):
            place.mkdir(parents=True)
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, own.uid, own.gid)
        own._prepare(folder)
        try:
            yield own
        finally:
            for pid in _processes(own):
                os.kill(pid, signal.SIGKILL)
            # What is in the store belongs to ids of the user namespace.
            subprocess.run(["rm", "-rf", str(own.home), str(own.runtime_dir)], check=False)


def _processes(account: PodmanAccount) -> list[int]:
    """Returns the living processes that were started with an account's runtime directory, and what descends of them."""
    word = f"XDG_RUNTIME_DIR={account.runtime_dir}".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
                children = (folder / "task" / folder.name / "children").read_text().split()
                found.update(int(child) for child in children)
        except OSError:
            continue
    return sorted(found)


def _end(pids: list[int]) -> None:
    """Kills processes at once, as nobody's orderly end, and waits until they are gone."""
    watched = [(pid, os.pidfd_open(pid)) for pid in pids]
    for pid, _ in watched:
        os.kill(pid, signal.SIGKILL)
    for _, descriptor in watched:
        assert select.select([descriptor], [], [], 10)[0]
        os.close(descriptor)


def _run(account: PodmanAccount) -> str:
    """Starts a container of this host's programs, so that no image is needed, and returns its id."""
    root = account.runtime_dir.parent / "root"
    for folder in ("usr", "proc", "dev", "etc", "sys"):
        (root / folder).mkdir(parents=True)
    for link in ("bin", "lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    for path in (root, *root.rglob("*")):
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
    options = ["--detach", "--network=none", "--volume=/usr:/usr:ro"]
    started = account.run("podman", "run", *options, "--rootfs", str(root), "sleep", "1000")
    assert started.returncode == 0, started.stderr
    return started.stdout.strip()


def test_a_podman_that_lost_every_process_serves_again(account: PodmanAccount) -> None:
    account.revive()
    identity = _run(account)
    _end(_processes(account))
    refused = account.run("podman", "ps")
    assert refused.returncode != 0, "the accident that this test is about did not happen"
    account.revive()
    listed = account.run("podman", "ps", "--all", "--quiet", "--no-trunc")
    assert listed.stdout.split() == [identity], listed.stderr
    assert account.run("podman", "ps", "--quiet").stdout.split() == []
    assert account.run("podman", "rm", "--force", identity).returncode == 0


def test_it_leaves_a_living_container_alone(account: PodmanAccount) -> None:
    account.revive()
    identity = _run(account)
    account.revive()
    assert account.run("podman", "ps", "--quiet", "--no-trunc").stdout.split() == [identity]
    account.run("podman", "rm", "--force", "--time", "0", identity)
