"""Who holds a slice: a process, its command, and the container that it is in, whoever runs that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

__all__ = ["Holder", "container_in", "holder"]

# libpod-<id>.scope, docker-<id>.scope, cri-containerd-<id>.scope, /docker/<id>, .../<id> of Kubernetes
_IN_CGROUP = re.compile(r"(?:^|[/:-])([0-9a-f]{64})(?:\.scope)?(?:/|$)", re.MULTILINE)
# A container's process has a monitor above it that names the container on its command line.
_MONITORS = {"conmon": ("-c", "--cid"), "containerd-shim": ("-id",), "containerd-shim-runc-v2": ("-id",)}
_KEEPER = "nodedaemon.process_keeper"
_MOST_ANCESTORS = 64


@dataclass(frozen=True)
class Holder:
    """A process that holds a slice."""

    pid: int
    command: str
    """Its command line, shortened."""
    container: str = ""
    """Id of its container; empty when it is in none, or that cannot be told."""

    def __str__(self) -> str:
        where = f" in container {self.container[:12]}" if self.container else ""
        return f"{self.pid} ({self.command}){where}"


def holder(pid: int, proc: Path = Path("/proc")) -> Holder:
    """Returns what can be told of a process.

    Args:
        pid: its id on the host.
        proc: where the kernel shows its processes.
    """
    words = _words(pid, proc)
    if words is None:
        return Holder(pid, "ended meanwhile")
    return Holder(pid, " ".join(words).strip()[:200] or "no command line", _container_of(pid, proc))


def _container_of(pid: int, proc: Path) -> str:
    try:
        cgroup = (proc / str(pid) / "cgroup").read_text()
    except OSError:
        cgroup = ""
    return container_in(cgroup) or next((found for found in _monitored(pid, proc) if found), "")


def container_in(cgroup: str) -> str:
    """Returns the id of the container that a cgroup belongs to; empty when it is none's.

    Args:
        cgroup: content of /proc/PID/cgroup.
    """
    found = _IN_CGROUP.findall(cgroup)
    return str(found[-1]) if found else ""


def _monitored(pid: int, proc: Path) -> Iterator[str]:
    """Yields the container that each process above this one looks after, or nothing.

    Containers of a rootless user may share a cgroup, which then does not tell them apart.
    """
    for _ in range(_MOST_ANCESTORS):
        try:
            # The name in the second field may hold anything, a closing parenthesis, too.
            pid = int((proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
        words = _words(pid, proc) or []
        if not words:
            return
        if _KEEPER in words:
            yield Path(words[-1]).name
        options = _MONITORS.get(Path(words[0]).name, ())
        yield next((value for option, value in pairwise(words) if option in options), "")


def _words(pid: int, proc: Path) -> list[str] | None:
    try:
        line = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    return [word.decode(errors="replace") for word in line.rstrip(b"\0").split(b"\0")] if line else []
