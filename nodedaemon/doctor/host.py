"""The host around the daemon: cgroups, limits, the clock, and what happens when a user logs out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.doctor.findings import Ability, Finding, notice, ok, unknown
from nodedaemon.doctor.findings import problem as found_problem
from nodedaemon.podman_account import PodmanAccount, PodmanUnusableError, cgroup_layout

__all__ = ["HostFacts", "ProcessFacts", "judge_host", "judge_processes", "look_at_host"]

_CONTROLLERS = ("cpu", "memory", "pids")
# Debian and Ubuntu; from their next boot on.
_BOOT_WITH_V2 = (
    "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&systemd.unified_cgroup_hierarchy=1 /' /etc/default/grub && update-grub"
)
_FILES = 65536
_INOTIFY_INSTANCES = 128
_TIME_ERROR = 5  # <sys/timex.h>: the clock is not synchronised


@dataclass(frozen=True)
class HostFacts:
    """The host around a daemon that this process would start."""

    layout: str
    """As `cgroup_layout` returns it."""
    by_root: bool
    controllers: frozenset[str] | None
    """Controllers of this process's own cgroup; None when they cannot be read. Meaningful on v2 only."""
    cgroup_writable: bool
    """Whether this process may make cgroups below its own."""
    files: int
    """Most files that one process may have open."""
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


def look_at_host(user: str) -> HostFacts:
    """Looks at the host.

    Args:
        user: the user that was asked for.
    """
    own = _own_cgroup()
    account = None
    with contextlib.suppress(PodmanUnusableError):  # told of where containers are looked at
        account = PodmanAccount.look(user)
    runtime_dir = str(account.runtime_dir) if account else ""
    name = account.name if account else user
    return HostFacts(
        layout=cgroup_layout(Path("/proc/self/mounts").read_text()),
        by_root=os.geteuid() == 0,
        controllers=_controllers(own),
        cgroup_writable=own is not None and os.access(own, os.W_OK),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        inotify_instances=_number(Path("/proc/sys/fs/inotify/max_user_instances")),
        synchronised=_synchronised(),
        runtime_dir=runtime_dir,
        linger=Path("/var/lib/systemd/linger", name).exists(),
        user=name,
    )


def _own_cgroup() -> Path | None:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("0::/"):
            return Path("/sys/fs/cgroup", line.removeprefix("0::/"))
    return None


def _controllers(cgroup: Path | None) -> frozenset[str] | None:
    if cgroup is None:
        return None
    try:
        return frozenset((cgroup / "cgroup.controllers").read_text().split())
    except OSError:
        return None


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
    if facts.controllers is None:
        return unknown(check, "the controllers of this cgroup cannot be read", "cat /proc/self/cgroup")
    missing = [name for name in _CONTROLLERS if name not in facts.controllers]
    if missing:
        return notice(
            check,
            f"a daemon started from here cannot limit {', '.join(missing)}: its unit, with Delegate=yes, can",
            "systemctl start puhui-nodedaemon",
        )
    if facts.by_root or not facts.cgroup_writable:
        return notice(
            check,
            f"a daemon started from here cannot limit containers: this cgroup is not delegated to user {facts.user}; "
            "its unit delegates one",
            "systemctl start puhui-nodedaemon",
        )
    return ok(check, "CPU, memory and processes of containers can be limited")


def _pause(facts: HostFacts) -> Finding:
    if facts.layout == "v2":
        return ok("pause", "containers can be suspended")
    return notice(
        "pause",
        f"cgroups are {facts.layout}: rootless containers cannot be suspended",
        _BOOT_WITH_V2,
    )


def _files(facts: HostFacts) -> Finding:
    if facts.files < _FILES:
        return notice(
            "open-files",
            f"a daemon started from here may open {facts.files} files, and many jobs need more",
            "sudo prlimit --pid $$ --nofile=65536",
        )
    return ok("open-files", f"a daemon started from here may open {facts.files} files")


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
