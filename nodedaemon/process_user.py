"""Whom plain processes run as, and whether they may run at all. Decisions from facts; asking the host is apart."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ProcessUser",
    "ProcessesRefusedError",
    "choose_process_user",
    "find_process_user",
    "out_of_reach",
    "require_no_real_gpu",
]

_STATE_OUT_OF_REACH = 3
_PROBE = f"import os, sys; sys.exit(0 if os.access(sys.argv[1], os.X_OK) else {_STATE_OUT_OF_REACH})"


class ProcessesRefusedError(Exception):
    """Plain processes cannot run on this host; the text says why and what to do."""


@dataclass(frozen=True)
class ProcessUser:
    """Whom the processes run as."""

    name: str
    uid: int
    gid: int


def require_no_real_gpu(*, emulated: bool, real_gpu: bool) -> None:
    """Refuses plain processes where they could reach a real GPU.

    Args:
        emulated: the node serves emulated cards.
        real_gpu: this host has a real GPU, whatever the node serves.

    Raises:
        ProcessesRefusedError: it has, or may have.
    """
    if not emulated:
        raise ProcessesRefusedError(
            "--runtime process isolates nothing and is refused on real GPUs: use --runtime podman"
        )
    if real_gpu:
        raise ProcessesRefusedError(
            "this host has a real GPU, which a plain process could use beside the emulated cards: use --runtime podman"
        )


def choose_process_user(name: str, user: ProcessUser | None, out_of_reach: str, *, allow_root: bool) -> ProcessUser:
    """Returns whom a daemon run by root runs plain processes as.

    Args:
        name: the unprivileged user to run them as.
        user: that user; None when the host has none.
        out_of_reach: what that user cannot reach; empty when everything can be reached.
        allow_root: run them as root rather than not at all. For tests only.

    Raises:
        ProcessesRefusedError: the user is missing, or something is out of its reach.
    """
    if user is not None and user.uid != 0 and not out_of_reach:
        return user
    if allow_root:
        return ProcessUser("root", 0, 0)
    if user is None:
        problem = f"this host has no user {name}: make it with `useradd --system {name}`"
    elif user.uid == 0:
        problem = f"--podman-user {name} is root: name an unprivileged user"
    else:
        problem = (
            f"user {name} cannot reach {out_of_reach}: move it, or clone Puhui anew, to a place that {name} can reach"
        )
    raise ProcessesRefusedError(
        f"submitted code never runs as root, and {problem}; or run the daemon as an unprivileged user"
    )


def find_process_user(name: str, state: Path, *, allow_root: bool) -> ProcessUser:
    """Returns whom plain processes of this daemon run as, and lets that user through to its files in `state`.

    Args:
        name: the unprivileged user, when root runs the daemon. Any other user's daemon runs them as itself.
        state: the daemon's state directory.
        allow_root: as `choose_process_user` takes it.

    Raises:
        ProcessesRefusedError: as `choose_process_user` does.
    """
    if os.geteuid() != 0:
        return ProcessUser(str(os.geteuid()), os.geteuid(), os.getegid())
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return choose_process_user(name, None, "", allow_root=allow_root)
    user = ProcessUser(entry.pw_name, entry.pw_uid, entry.pw_gid)
    os.chown(state, 0, user.gid)
    state.chmod(0o710)
    return choose_process_user(name, user, out_of_reach(user, state.resolve()), allow_root=allow_root)


def out_of_reach(user: ProcessUser, state: Path) -> str:
    """Says what that user cannot reach: Python, or the state directory; empty when it reaches both."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE, str(state)],
            user=user.uid,
            group=user.gid,
            extra_groups=[],
            cwd="/",
            check=False,
            capture_output=True,
        )
    except OSError:
        return f"the interpreter {sys.executable}"
    if done.returncode == _STATE_OUT_OF_REACH:
        return f"the state directory {state}"
    return f"the interpreter {sys.executable}" if done.returncode else ""
