"""What rootless containers need: programs, subordinate ids, user namespaces, storage, network, an image."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.doctor.findings import Ability, Finding, advice, notice, ok, problem, unknown
from nodedaemon.doctor.person import Person
from nodedaemon.podman_account import (
    PROGRAM_PATH,
    PodmanAccount,
    PodmanUnusableError,
    cgroup_layout,
    choose_oci_runtime,
)

__all__ = ["ContainerFacts", "judge_containers", "look_at_containers", "subordinate_ids"]

_CONTAINERS = Ability.CONTAINERS
_IDS_NEEDED = 65536
_OLDEST = (4, 0)
# Debian's package of each program.
_PACKAGES = {
    "podman": "podman",
    "newuidmap": "uidmap",
    "newgidmap": "uidmap",
    "setpriv": "util-linux",
    "catatonit": "catatonit",
}


@dataclass(frozen=True)
class ContainerFacts:
    """What this host has of what rootless containers need."""

    user: str
    """Name of the user that was asked for."""
    person: bool
    """Whether there is such a user."""
    is_root: bool
    """Whether that user is root."""
    programs: Mapping[str, bool]
    oci_runtimes: tuple[str, ...]
    podman_version: str
    """What `podman --version` says; empty when it says nothing."""
    mappers: Mapping[str, bool | None]
    """Whether newuidmap and newgidmap have the privilege they need; None when it cannot be said."""
    subuids: int | None
    """How many subordinate user ids there are; None when it cannot be said."""
    subgids: int | None
    sysctls: Mapping[str, int | None]
    """Those that can forbid user namespaces; None where this kernel has none such."""
    namespaces: bool | None
    """Whether a user namespace with mounts of its own could be made just now."""
    layout: str
    network_trouble: str | None
    """Why containers cannot have a network; None when it cannot be said."""
    storage_driver: str | None
    """Driver of the store that is there; empty when there is none yet, None when it cannot be looked at."""
    images: tuple[str, ...] | None
    """Names of the images in the store; None when they cannot be looked at."""
    image: str
    """The image of containers that ask for none."""


def subordinate_ids(text: str, names: Sequence[str]) -> int:
    """Returns how many subordinate ids a user has.

    Args:
        text: content of /etc/subuid or /etc/subgid.
        names: the user's name and number, each of which a line may begin with.
    """
    fields = (line.strip().split(":") for line in text.splitlines())
    return sum(int(one[2]) for one in fields if len(one) == 3 and one[0] in names and one[2].isdecimal())


def look_at_containers(user: str, person: Person | None, image: str) -> ContainerFacts:
    """Looks at the host. Starts no container and no Podman that stays.

    Args:
        user: name of the user that was asked for.
        person: that user; None when there is none.
        image: the image of containers that ask for none.
    """
    account = _account(user)
    driver, images = _store(person)
    names = ("max_user_namespaces", "unprivileged_userns_clone", "apparmor_restrict_unprivileged_userns")
    return ContainerFacts(
        user=user,
        person=person is not None,
        is_root=person is not None and person.uid == 0,
        programs={name: _find(name) is not None for name in _PACKAGES},
        oci_runtimes=tuple(name for name in ("crun", "runc") if _find(name)),
        podman_version=_podman_version(),
        mappers={name: _privileged(_find(name)) for name in ("newuidmap", "newgidmap") if _find(name)},
        subuids=_count_ids(Path("/etc/subuid"), person),
        subgids=_count_ids(Path("/etc/subgid"), person),
        sysctls={name: _sysctl(name) for name in names},
        namespaces=_try_namespaces(person),
        layout=cgroup_layout(Path("/proc/self/mounts").read_text()),
        network_trouble=account.network_problem() if account else None,
        storage_driver=driver,
        images=images,
        image=image,
    )


def _account(user: str) -> PodmanAccount | None:
    try:
        return PodmanAccount.look(user)
    except PodmanUnusableError:
        return None


def _find(program: str) -> str | None:
    return shutil.which(program, path=PROGRAM_PATH + ":/usr/libexec/podman:/usr/lib/podman")


def _podman_version() -> str:
    program = _find("podman")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False, env={"PATH": PROGRAM_PATH}
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\d+\.\d+\S*", done.stdout)
    return found[0] if found else ""


def _privileged(program: str | None) -> bool | None:
    if program is None:
        return None
    try:
        status = Path(program).stat()
        if status.st_mode & stat.S_ISUID and status.st_uid == 0:
            return True
        return "security.capability" in os.listxattr(program)
    except OSError:
        return None


def _count_ids(file: Path, person: Person | None) -> int | None:
    if person is None:
        return None
    try:
        return subordinate_ids(file.read_text(), (person.name, str(person.uid)))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError):
        return None


def _sysctl(name: str) -> int | None:
    for folder in ("user", "kernel"):
        try:
            return int(Path("/proc/sys", folder, name).read_text())
        except (OSError, ValueError):
            continue
    return None


def _try_namespaces(person: Person | None) -> bool | None:
    if person is None or _find("unshare") is None:
        return None
    done = person.run("unshare", "--user", "--map-root-user", "--mount", "true")
    return None if done is None else done.returncode == 0


def _store(person: Person | None) -> tuple[str | None, tuple[str, ...] | None]:
    """Returns the driver of the user's store and the names of its images, without waking Podman."""
    if person is None:
        return None, None
    store = person.home / ".local/share/puhui/podman/storage"
    try:
        entries = {entry.name for entry in os.scandir(store)}
    except FileNotFoundError:
        return "", ()
    except OSError:
        return None, None
    driver = next((name for name in ("overlay", "vfs", "btrfs", "zfs") if f"{name}-images" in entries), "")
    if not driver:
        return "", ()
    try:
        listed = json.loads((store / f"{driver}-images/images.json").read_text())
    except FileNotFoundError:
        return driver, ()
    except (OSError, ValueError):
        return driver, None
    return driver, tuple(str(name) for entry in listed for name in entry.get("names") or ())


def judge_containers(facts: ContainerFacts) -> list[Finding]:
    """Says what rootless containers lack."""
    findings = [_user(facts)]
    findings += [_program(name, facts) for name in _PACKAGES if name not in facts.mappers]
    findings += [_version(facts)] if facts.podman_version or facts.programs["podman"] else []
    findings.append(_oci_runtime(facts))
    findings += [_mapper(name, privileged) for name, privileged in facts.mappers.items()]
    if facts.person:
        findings += [
            _ids("subuid", facts.subuids, "--add-subuids", facts.user),
            _ids("subgid", facts.subgids, "--add-subgids", facts.user),
        ]
    findings.append(_namespaces(facts))
    findings.append(_storage(facts))
    findings.append(_network(facts))
    findings.append(_image(facts))
    return findings


def _user(facts: ContainerFacts) -> Finding:
    if not facts.person:
        return problem(
            "user",
            f"there is no user {facts.user} to own the containers",
            f"useradd --system --create-home --home-dir /var/lib/{facts.user} --shell /usr/sbin/nologin {facts.user}",
            _CONTAINERS,
        )
    if facts.is_root:
        return problem(
            "user", "containers are never run as root", "puhui-nodedaemon doctor --podman-user puhui", _CONTAINERS
        )
    return ok("user", f"containers belong to user {facts.user}")


def _program(name: str, facts: ContainerFacts) -> Finding:
    if facts.programs[name]:
        return ok(name, f"{name} is installed")
    return problem(name, f"{name} is not installed", f"apt-get install {_PACKAGES[name]}", _CONTAINERS)


def _version(facts: ContainerFacts) -> Finding:
    said = facts.podman_version
    numbers = tuple(int(part) for part in re.findall(r"\d+", said)[:2])
    if len(numbers) < 2:
        return unknown("podman-version", "podman does not say its version", "podman --version", _CONTAINERS)
    if numbers < _OLDEST:
        return problem("podman-version", f"podman {said} is older than 4.0", "apt-get install podman", _CONTAINERS)
    return ok("podman-version", f"podman {said} is recent enough")


def _oci_runtime(facts: ContainerFacts) -> Finding:
    try:
        name, why = choose_oci_runtime(facts.layout, facts.oci_runtimes)
    except PodmanUnusableError as error:
        text, command = advice(str(error), "apt-get install crun runc")
        return problem("oci-runtime", text, command, _CONTAINERS)
    return ok("oci-runtime", why or f"{name} is used, as usual with cgroup v2")


def _mapper(name: str, privileged: bool | None) -> Finding:
    if privileged is None:
        return unknown(
            name, f"the privileges of {name} cannot be looked at", f"getcap $(command -v {name})", _CONTAINERS
        )
    if not privileged:
        return problem(
            name,
            f"{name} is neither setuid nor has file capabilities, so it can map no ids",
            f"chmod u+s $(command -v {name})",
            _CONTAINERS,
        )
    return ok(name, f"{name} is installed and may map ids")


def _ids(name: str, count: int | None, option: str, user: str) -> Finding:
    command = f"usermod {option} 200000-265535 {user}"
    if count is None:
        return unknown(name, f"/etc/{name} cannot be read", f"cat /etc/{name}", _CONTAINERS)
    if count == 0:
        return problem(name, f"user {user} has no range in /etc/{name}", command, _CONTAINERS)
    if count < _IDS_NEEDED:
        return problem(
            name, f"user {user} has {count} ids in /etc/{name}, and images need {_IDS_NEEDED}", command, _CONTAINERS
        )
    return ok(name, f"user {user} has {count} ids in /etc/{name}")


def _namespaces(facts: ContainerFacts) -> Finding:
    check = "user-namespaces"
    if facts.sysctls["max_user_namespaces"] == 0:
        return problem(
            check, "this kernel allows no user namespaces", "sysctl -w user.max_user_namespaces=15000", _CONTAINERS
        )
    if facts.sysctls["unprivileged_userns_clone"] == 0:
        return problem(
            check,
            "this kernel allows user namespaces for root only",
            "sysctl -w kernel.unprivileged_userns_clone=1",
            _CONTAINERS,
        )
    if facts.namespaces:
        return ok(check, "unprivileged user namespaces work")
    if facts.sysctls["apparmor_restrict_unprivileged_userns"]:
        return unknown(
            check,
            "AppArmor restricts user namespaces to programs with a profile, and podman may or may not have one",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
            _CONTAINERS,
        )
    if facts.namespaces is None:
        return unknown(check, "user namespaces could not be tried", "unshare -Urm true", _CONTAINERS)
    return problem(check, "a user namespace could not be made", "unshare -Urm true", _CONTAINERS)


def _storage(facts: ContainerFacts) -> Finding:
    check = "storage"
    if facts.storage_driver is None:
        return unknown(check, "the container storage cannot be looked at", "sudo puhui-nodedaemon doctor", _CONTAINERS)
    if facts.storage_driver == "vfs":
        return problem(
            check,
            "the container storage has the driver vfs, which copies every image for every container, and cannot be "
            "changed: move it away and import the images again",
            f"mv ~{facts.user}/.local/share/puhui/podman/storage ~{facts.user}/.local/share/puhui/podman/storage.vfs",
            _CONTAINERS,
        )
    if not facts.storage_driver:
        return ok(check, "there is no container storage yet; the daemon makes one with overlay")
    return ok(check, f"the container storage has the driver {facts.storage_driver}")


def _network(facts: ContainerFacts) -> Finding:
    if facts.network_trouble is None:
        return unknown("network", "whether containers can have a network is not known yet", "ls -l /dev/net/tun")
    if facts.network_trouble:
        text, command = advice(facts.network_trouble, "ls -l /dev/net/tun")
        return notice("network", f"containers cannot have a network, which few ask for: {text}", command)
    return ok("network", "containers can have a network")


def _image(facts: ContainerFacts) -> Finding:
    build = f"scripts/base-image | puhui-nodedaemon podman -- import - {facts.image}"
    if facts.images is None:
        return unknown(
            "base-image", "the images cannot be looked at", f"puhui-nodedaemon podman -- image exists {facts.image}"
        )
    if facts.image not in facts.images:
        return notice("base-image", f"image {facts.image} is missing, and jobs that name no other need it", build)
    return ok("base-image", f"image {facts.image} is there")
