"""A cgroup of its own for every container, which limits and freezing need.

A v2 cgroup that is the daemon's to divide has two parts: `daemon`, for the daemon and all that it starts, and
`containers`, below which Podman makes one for each container.

The daemon does not make itself a part: whoever starts it must put it into `daemon`, each time. The kernel lets no
process into a cgroup that hands controllers down to others with processes in them (EBUSY), so if the daemon divided
the cgroup of its own systemd unit, systemd could not start it again beside living containers (systemd issue 24064;
from version 258 on, DelegateSubgroup= does not help either, says the discussion of systemd change 41304). And it
cannot leave the controllers alone there, since the OCI runtimes hand down all that they can. So the cgroup that is
divided is that of a unit that is never started again, deploy/systemd/puhui-containers.service.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CONTROLLERS",
    "CgroupTree",
    "ContainerCgroup",
    "Division",
    "Seen",
    "claim",
    "divide",
    "is_border",
    "own_path",
]

CONTROLLERS = ("cpu", "memory", "pids")
"""Controllers by which containers are limited."""

_DAEMON = "daemon"
_CONTAINERS = "containers"
_CONTROL = "cgroup.subtree_control"
_PROCESSES = "cgroup.procs"


@dataclass(frozen=True)
class Seen:
    """One v2 cgroup."""

    path: str
    """Below the root of the hierarchy; begins with "/"."""
    delegated: bool
    """Whether it is the daemon's to divide."""
    controllers: frozenset[str]
    """Controllers that it has, and may hand down."""


@dataclass(frozen=True)
class Division:
    """How a daemon's cgroup is to be divided."""

    top: str = ""
    """The cgroup that is divided; empty when none is."""
    controllers: tuple[str, ...] = ()
    """Controllers that are handed down to containers."""
    no_limits: str = ""
    """Why some of `CONTROLLERS` are not, as the rest of a sentence; empty when all are."""
    no_freezer: str = ""
    """Why containers have no cgroups of their own, as the rest of a sentence; empty when they have."""

    @property
    def containers(self) -> str:
        """Cgroup below which each container has one."""
        return f"{self.top}/{_CONTAINERS}"


@dataclass(frozen=True)
class ContainerCgroup:
    """What containers really get."""

    parent: str = ""
    """Cgroup below which each has one of its own; empty when they have none."""
    controllers: tuple[str, ...] = ()
    """Controllers that each container's own cgroup has."""
    freezer: bool = False
    """Whether a container's own cgroup can be frozen."""
    no_limits: str = ""
    """As in `Division`."""
    no_freezer: str = ""
    """As in `Division`."""


def own_path(text: str) -> str | None:
    """Returns the v2 cgroup of a process; None when it has none.

    Args:
        text: content of /proc/PID/cgroup.
    """
    for line in text.splitlines():
        if line.startswith("0::/"):
            return line.removeprefix("0::")
    return None


def divide(layout: str, own: str | None, above: Seen | None, user: str) -> Division:
    """Says whether and how a cgroup is to be divided between a daemon and its containers.

    Args:
        layout: as `podman_account.cgroup_layout` returns it.
        own: path of the daemon's cgroup; None when it is not known.
        above: the cgroup above it; None when there is none, or it cannot be looked at.
        user: name of the containers' user.
    """
    if layout != "v2":
        return Division(
            no_limits=f"that needs cgroup v2 with its controllers delegated to user {user}, and this host's layout is "
            f"{layout}",
            no_freezer=f"freezing needs cgroup v2, and this host's layout is {layout}",
        )
    if own is None:
        return _undivided("the daemon's cgroup cannot be looked at")
    if above is None or not above.delegated or own.rpartition("/")[2] != _DAEMON:
        return _undivided(
            f"the daemon is in cgroup {own}, and not in its part of a delegated one: enable puhui-containers.service "
            "and start the daemon by its unit"
        )
    missing = [name for name in CONTROLLERS if name not in above.controllers]
    return Division(
        top=above.path,
        controllers=tuple(name for name in CONTROLLERS if name in above.controllers),
        no_limits=f"cgroup {above.path} does not have the controllers {', '.join(missing)}" if missing else "",
    )


def _undivided(why: str) -> Division:
    return Division(no_limits=why, no_freezer=f"they have no cgroups of their own: {why}")


class CgroupTree:
    """The v2 hierarchy of this host.

    Args:
        root: where it is mounted.
        proc: where the processes are.
    """

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        self._root = root
        self._proc = proc

    def survey(self, pid: int, uid: int) -> tuple[str | None, Seen | None]:
        """Returns which cgroup a process is in, and the one above it. None stands for what cannot be looked at.

        Args:
            pid: the process.
            uid: the user that it runs as.
        """
        try:
            path = own_path((self._proc / str(pid) / "cgroup").read_text())
        except OSError:
            return None, None
        above = path.rpartition("/")[0] if path else ""
        return path, self._see(above, uid) if above else None

    def _see(self, path: str, uid: int) -> Seen | None:
        folder = self._folder(path)
        try:
            controllers = frozenset((folder / "cgroup.controllers").read_text().split())
            return Seen(path, _is_delegated(folder, uid), controllers)
        except OSError:
            return None

    def _folder(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def carry_out(self, division: Division, uid: int, gid: int) -> None:
        """Divides a cgroup. What is divided already stays so.

        Args:
            division: what `divide` returned, with a `top`.
            uid: the containers' user, who makes their cgroups.
            gid: that user's group.

        Raises:
            OSError: it cannot be done.
        """
        top, containers = self._folder(division.top), self._folder(division.containers)
        containers.mkdir(exist_ok=True)
        for controller in division.controllers:
            for folder in (top, containers):
                # What could not be handed down is missing when it is looked for, and is told of then.
                with contextlib.suppress(OSError):
                    _write(folder / _CONTROL, f"+{controller}")
        if os.geteuid() == 0:
            # Moving a process takes the right to write to the cgroup above both.
            os.chown(top / _PROCESSES, uid, gid)
            for name in ("", _PROCESSES, _CONTROL, "cgroup.threads"):
                os.chown(containers / name, uid, gid)

    def look(self, division: Division) -> ContainerCgroup:
        """Returns what containers really get from a cgroup that has been divided.

        Raises:
            OSError: it cannot be looked at.
        """
        containers = self._folder(division.containers)
        handed_down = (containers / _CONTROL).read_text().split()
        missing = [name for name in CONTROLLERS if name not in handed_down]
        refused = f"cgroup {division.top} did not hand down the controllers {', '.join(missing)}" if missing else ""
        freezer = (containers / "cgroup.freeze").exists()
        return ContainerCgroup(
            parent=division.containers,
            controllers=tuple(name for name in CONTROLLERS if name in handed_down),
            freezer=freezer,
            no_limits=division.no_limits or refused,
            no_freezer="" if freezer else "this kernel's cgroups have no freezer",
        )


def claim(layout: str, uid: int, gid: int, user: str, tree: CgroupTree) -> ContainerCgroup:
    """Divides the cgroup above this process's, if it is its to divide, and returns what containers get from it.

    Args:
        layout: as `podman_account.cgroup_layout` returns it.
        uid: the containers' user.
        gid: that user's group.
        user: that user's name.
        tree: the hierarchy.
    """
    own, above = tree.survey(os.getpid(), os.geteuid()) if layout == "v2" else (None, None)
    division = divide(layout, own, above, user)
    if not division.top:
        return ContainerCgroup(no_limits=division.no_limits, no_freezer=division.no_freezer)
    try:
        tree.carry_out(division, uid, gid)
        return tree.look(division)
    except OSError as error:
        why = _undivided(f"cgroup {division.top} cannot be divided ({error.strerror}, {error.filename})")
        return ContainerCgroup(no_limits=why.no_limits, no_freezer=why.no_freezer)


def _is_delegated(folder: Path, uid: int) -> bool:
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return False
    files = [folder, folder / _PROCESSES, folder / _CONTROL]
    if not all(_may_write(file.stat(), uid) for file in files):
        return False
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            return os.getxattr(folder, name) == b"1"
    return is_border(uid, folder.stat().st_uid, folder.parent.stat().st_uid)


def is_border(uid: int, owner: int, above: int) -> bool:
    """Says whether what a user may divide begins at a cgroup, where older systemd has not marked it for that user.

    Args:
        uid: the user.
        owner: whose the cgroup is.
        above: whose the one above it is. The cgroup of a desktop's terminal belongs to its user, but so does that one.
    """
    return uid != 0 and owner == uid != above


def _may_write(status: os.stat_result, uid: int) -> bool:
    return uid == 0 or (status.st_uid == uid and bool(status.st_mode & stat.S_IWUSR))


def _write(file: Path, text: str) -> None:
    # One write, and no O_TRUNC: these are commands, not content.
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
