"""Ends what Podman no longer knows of, although it started it.

A Podman service that is killed between having a container's first process made and noting that it was leaves conmon and
that process behind: the container counts as never started, and removing it touches neither.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import structlog

from nodedaemon.podman_account import PodmanAccount

__all__ = ["end_leftovers"]

_log = structlog.get_logger(__name__)

_CONMON = "conmon"
_PODMAN = "podman"
_END_S = 5.0
_LOOK_S = 0.02
_OF_CONTAINER = ("-c", "-n")


def end_leftovers(account: PodmanAccount, oci_runtime: str, container: str, proc: Path = Path("/proc")) -> None:
    """Ends what is left of a container that Podman has removed.

    Args:
        account: the user that owned it.
        oci_runtime: path of the OCI runtime that it was made with.
        container: its id or its name.
        proc: where the kernel shows its processes.
    """
    for conmon, container_id in _conmons(account.uid, container, proc):
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(conmon)
            try:
                left = _end(conmon, ended, proc)
            finally:
                os.close(ended)
            if left:
                # What the runtime keeps of it goes, too; it knows nothing of one whose making was cut short.
                account.run(oci_runtime, "delete", "--force", container_id)
                _log.warning("ended what was left of a container", container=container_id[:12], processes=sorted(left))


def _end(conmon: int, ended: int, proc: Path) -> set[int]:
    """Ends the processes that a conmon looks after, so that it ends as well. Returns those that there were."""
    found: set[int] = set()
    deadline = time.monotonic() + _END_S
    while not select.select([ended], [], [], _LOOK_S)[0] and time.monotonic() < deadline:
        children = [pid for pid in _children(conmon, proc) if _program(pid, proc) not in ("", _CONMON, _PODMAN)]
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                found.add(pid)
    return found


def _conmons(uid: int, container: str, proc: Path) -> Iterator[tuple[int, str]]:
    """Yields the process id of each conmon of a container, and the container's id."""
    for folder in proc.glob("[0-9]*"):
        try:
            if folder.stat().st_uid != uid:
                continue
            words = _words(int(folder.name), proc)
        except OSError:
            continue  # it has ended meanwhile
        options = dict(pairwise(words))
        is_conmon = bool(words) and Path(words[0]).name == _CONMON and "--exec" not in words
        if is_conmon and container in (options.get(name) for name in _OF_CONTAINER):
            yield int(folder.name), options["-c"]


def _children(pid: int, proc: Path) -> list[int]:
    try:
        return [int(child) for child in (proc / str(pid) / "task" / str(pid) / "children").read_text().split()]
    except OSError:
        return []


def _program(pid: int, proc: Path) -> str:
    """Returns the name of the program that a process runs; empty when it has ended."""
    try:
        words = _words(pid, proc)
    except OSError:
        return ""
    return Path(words[0]).name if words else ""


def _words(pid: int, proc: Path) -> list[str]:
    line = (proc / str(pid) / "cmdline").read_bytes().rstrip(b"\0")
    return [word.decode(errors="replace") for word in line.split(b"\0")] if line else []
