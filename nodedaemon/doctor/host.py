"""The host around the daemon: cgroups, limits, the clock, and what happens when a user logs out."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.cgroups import CONTROLLERS, CgroupTree, ContainerCgroup, divide
from nodedaemon.doctor.findings import Ability, Finding, notice, ok, unknown
from nodedaemon.doctor.findings import problem as found_problem
from nodedaemon.podman_account import PodmanAccount, PodmanUnusableError, cgroup_layout

__all__ = ["HostFacts", "ProcessFacts", "judge_host", "judge_processes", "look_at_host"]

# Debian and Ubuntu; from their next boot on.
_BOOT_WITH_V2 = (
    "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&systemd.unified_cgroup_hierarchy=1 /' /etc/default/grub && update-grub"
)
# The daemon's unit enters the cgroup of the other one at each start.
_USE_UNITS = "systemctl start puhui-containers && systemctl restart puhui-nodedaemon"
_SHOW_CONTROLLERS = "cat /sys/fs/cgroup/cgroup.controllers"
_FILES = 65536
_INOTIFY_INSTANCES = 128
_TIME_ERROR = 5  # <sys/timex.h>: the clock is not synchronised


@dataclass(frozen=True)
class HostFacts:
    """The host around a daemon: one that runs, or one that this process would start."""

    who: str
    """Which of the two, in words."""
    layout: str
    """As `cgroup_layout` returns it."""
    cgroup: ContainerCgroup | None
    """What containers get of the daemon's cgroup; None when that cannot be said."""
    files: int | None
    """Most files that the daemon may have open; None when that cannot be said."""
    inotify_instances: int | None
    synchronised: bool | None
    """Whether the kernel's clock is kept right; None when it does not tell."""
    runtime_dir: str
    """Where Podman's sockets would be; empty when there is no account."""
    linger: bool
    """Whether that directory outlives the user's login."""
    user: str


@dataclass(frozen=True)
class ProcessFacts:
    """Whether plain processes may stand in for containers."""

    refusal: str
    """Why not; empty when they may."""


def look_at_host(user: str, daemon: int | None) -> HostFacts:
    """Looks at the host.

    Args:
        user: the user that was asked for.
        daemon: process id of the daemon that runs; None when none does.
    """
    account = None
    with contextlib.suppress(PodmanUnusableError):  # told of where containers are looked at
        account = PodmanAccount.look(user)
    runtime_dir = str(account.runtime_dir) if account else ""
    name = account.name if account else user
    layout = cgroup_layout(Path("/proc/self/mounts").read_text())
    return HostFacts(
        who="the running daemon" if daemon else "a daemon started from here",
        layout=layout,
        cgroup=_container_cgroup(layout, daemon or os.getpid(), name),
        files=_most_files(daemon or os.getpid()),
        inotify_instances=_number(Path("/proc/sys/fs/inotify/max_user_instances")),
        synchronised=_synchronised(),
        runtime_dir=runtime_dir,
        linger=Path("/var/lib/systemd/linger", name).exists(),
        user=name,
    )


def _container_cgroup(layout: str, pid: int, user: str) -> ContainerCgroup | None:
    """Returns what containers of a daemon get, as far as it has been divided already."""
    tree = CgroupTree()
    try:
        lines = Path("/proc", str(pid), "status").read_text().splitlines()
        uid = next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))
        own, above = tree.survey(pid, uid)
        division = divide(layout, own, above, user)
        if own is not None and not division.top:
            return ContainerCgroup(no_limits=division.no_limits, no_freezer=division.no_freezer)
        return tree.look(division) if division.top else None
    except OSError:
        return None


def _most_files(pid: int) -> int | None:
    try:
        lines = Path("/proc", str(pid), "limits").read_text().splitlines()
    except OSError:
        return None
    hard = next((line.split()[4] for line in lines if line.startswith("Max open files")), "")
    return int(hard) if hard.isdecimal() else None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _synchronised() -> bool | None:
    # struct timex with modes = 0 only reads; it is 208 bytes on 64-bit Linux.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    return None if state < 0 else bool(state != _TIME_ERROR)


def judge_host(facts: HostFacts) -> list[Finding]:
    """Says what the host lacks. Nothing of it keeps a daemon from serving."""
    return [_limits(facts), _pause(facts), _files(facts), _inotify(facts), _clock(facts), _logout(facts)]


def _limits(facts: HostFacts) -> Finding:
    check = "limits"
    if facts.layout != "v2":
        return notice(
            check,
            f"cgroups are {facts.layout}: containers have no limits on CPU, memory and processes",
            _BOOT_WITH_V2,
        )
    if facts.cgroup is None:
        return unknown(check, f"the cgroup of {facts.who} cannot be looked at", "systemd-cgls")
    missing = [name for name in CONTROLLERS if name not in facts.cgroup.controllers]
    if missing:
        command = _SHOW_CONTROLLERS if facts.cgroup.parent else _USE_UNITS
        return notice(check, f"{facts.who} cannot limit {', '.join(missing)}: {facts.cgroup.no_limits}", command)
    return ok(check, "containers have limits on CPU, memory and processes")


def _pause(facts: HostFacts) -> Finding:
    check = "pause"
    if facts.layout != "v2":
        return notice(check, f"cgroups are {facts.layout}: rootless containers cannot be frozen", _BOOT_WITH_V2)
    if facts.cgroup is None:
        return unknown(check, f"the cgroup of {facts.who} cannot be looked at", "systemd-cgls")
    if not facts.cgroup.freezer:
        return notice(check, f"{facts.who} stops containers by signals, as {facts.cgroup.no_freezer}", _USE_UNITS)
    return ok(check, "containers can be frozen")


def _files(facts: HostFacts) -> Finding:
    if facts.files is None:
        return unknown("open-files", f"how many files {facts.who} may open cannot be said", "ulimit -Hn")
    if facts.files < _FILES:
        return notice(
            "open-files",
            f"{facts.who} may open {facts.files} files, and many jobs need more",
            "sudo prlimit --pid $$ --nofile=65536",
        )
    return ok("open-files", f"{facts.who} may open {facts.files} files")


def _inotify(facts: HostFacts) -> Finding:
    if facts.inotify_instances is None:
        return unknown(
            "inotify", "the limit on inotify instances cannot be read", "sysctl fs.inotify.max_user_instances"
        )
    if facts.inotify_instances < _INOTIFY_INSTANCES:
        return notice(
            "inotify",
            f"a user may have {facts.inotify_instances} inotify instances, and each followed log takes one",
            "sysctl -w fs.inotify.max_user_instances=1024",
        )
    return ok("inotify", f"a user may have {facts.inotify_instances} inotify instances")


def _clock(facts: HostFacts) -> Finding:
    if facts.synchronised is None:
        return unknown("clock", "the kernel does not tell whether the clock is kept right", "timedatectl")
    if not facts.synchronised:
        return notice(
            "clock", "the clock is not kept right by NTP, and times of jobs may be off", "timedatectl set-ntp true"
        )
    return ok("clock", "the clock is synchronised")


def _logout(facts: HostFacts) -> Finding:
    if facts.runtime_dir.startswith("/run/user/") and not facts.linger:
        return notice(
            "linger",
            f"containers end when user {facts.user} logs out, because {facts.runtime_dir} goes away then",
            f"loginctl enable-linger {facts.user}",
        )
    return ok("linger", "containers outlive logins")


def judge_processes(facts: ProcessFacts) -> list[Finding]:
    """Says whether plain processes may stand in for containers beside emulated cards."""
    if facts.refusal:
        return [
            found_problem(
                "processes",
                f"plain processes cannot stand in for containers: {facts.refusal}",
                "puhui-nodedaemon serve --help",
                Ability.PROCESSES,
            )
        ]
    return [ok("processes", "plain processes could stand in for containers beside emulated cards, without isolation")]
