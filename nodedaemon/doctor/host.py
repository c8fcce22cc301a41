"""The host around the daemon: cgroups, limits, the clock, and what happens when a user logs out."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
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
# Rootless Podman with the cgroupfs manager leaves a container in its starter's cgroup unless a parent was named:
# libpod's getOCICgroupPath. Seen with 4.3.1 under systemd 252: "cannot pause the container without a cgroup".
_SHOW_CGROUP = "puhui-nodedaemon podman -- inspect --latest --format '{{.State.CgroupPath}}'"
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
    controllers: frozenset[str] | None
    """Controllers of the daemon's cgroup; None when they cannot be read. Meaningful on v2 only."""
    delegated: bool | None
    """Whether the containers' user may make cgroups below it; None when that cannot be said."""
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


def look_at_host(user: str, daemon: int | None, may: Callable[[str, Path], bool | None] | None) -> HostFacts:
    """Looks at the host.

    Args:
        user: the user that was asked for.
        daemon: process id of the daemon that runs; None when none does.
        may: says whether test(1) with a flag holds for the containers' user; None when there is no such user.
    """
    cgroup = _cgroup(daemon or os.getpid())
    account = None
    with contextlib.suppress(PodmanUnusableError):  # told of where containers are looked at
        account = PodmanAccount.look(user)
    runtime_dir = str(account.runtime_dir) if account else ""
    name = account.name if account else user
    return HostFacts(
        who="the running daemon" if daemon else "a daemon started from here",
        layout=cgroup_layout(Path("/proc/self/mounts").read_text()),
        controllers=_controllers(cgroup),
        delegated=may("-w", cgroup) if may and cgroup else None,
        files=_most_files(daemon or os.getpid()),
        inotify_instances=_number(Path("/proc/sys/fs/inotify/max_user_instances")),
        synchronised=_synchronised(),
        runtime_dir=runtime_dir,
        linger=Path("/var/lib/systemd/linger", name).exists(),
        user=name,
    )


def _cgroup(pid: int) -> Path | None:
    """Returns where the v2 cgroup of a process is; None when it has none, or has ended."""
    try:
        lines = Path("/proc", str(pid), "cgroup").read_text().splitlines()
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
    if facts.controllers is None or facts.delegated is None:
        return unknown(check, f"the cgroup of {facts.who} cannot be looked at", "systemd-cgls")
    missing = [name for name in _CONTROLLERS if name not in facts.controllers]
    if missing:
        return notice(
            check,
            f"{facts.who} cannot limit {', '.join(missing)}: its unit, with Delegate=yes, lets it where the kernel can",
            "systemctl restart puhui-nodedaemon",
        )
    if not facts.delegated:
        return notice(
            check,
            f"{facts.who} cannot limit containers: its cgroup is not delegated to user {facts.user}",
            "systemctl restart puhui-nodedaemon",
        )
    return unknown(
        check,
        "CPU, memory and processes can be limited if Podman gives containers their own cgroups, as a running one shows",
        _SHOW_CGROUP,
    )


def _pause(facts: HostFacts) -> Finding:
    if facts.layout == "v2":
        return unknown(
            "pause",
            "containers can be frozen if Podman gives them cgroups of their own, as a running one shows",
            _SHOW_CGROUP,
        )
    return notice(
        "pause",
        f"cgroups are {facts.layout}: rootless containers cannot be frozen",
        _BOOT_WITH_V2,
    )


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
