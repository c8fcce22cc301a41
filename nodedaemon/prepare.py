"""Prepares a host, as root, so that the daemon can run as an unprivileged user.

Three things need root. The cap nodes below /dev must be made: the driver does not make them. The daemon's user must be
let read the config node, which is the right to create and destroy instances. And /run/puhui must exist. Everything may
be repeated, and what is as it should be is left alone.

**Who may read the config node.** It becomes root:GROUP with mode 0440, where GROUP is the daemon user's own group: that
user can open it for reading, nobody else can, and `ls -l` shows it. An ACL would do the same, but is lost on the next
chmod, and needs a tool to be seen. Either is undone by nvidia-modprobe, which is setuid, which NVML starts by itself,
and which puts owner and mode back to the driver's own (root, 0400) for as long as the capability file says
`DeviceFileModify: 1`. So that is set to 0 first, as NVIDIA's MIG user guide describes; it lasts until the driver is
loaded anew, and then `prepare` must run again. A udev rule cannot do this: cap nodes have no kernel device that udev
would hear of. Nothing else is loosened: the monitor node and the nodes of instances get the mode that the driver wants
(0444), and toggling MIG mode stays root's.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.device_files import (
    CAPS_MAJOR,
    CONFIG,
    MONITOR,
    Capability,
    capabilities,
    char_majors,
    gpu_minors,
    minors_of_gpus,
    parse_capability,
)
from nodedaemon.devices import read_minors
from nodedaemon.doctor.cards import CardFacts, how_to_enable
from nodedaemon.doctor.containers import subordinate_ids
from nodedaemon.driver_facts import Mig
from nodedaemon.podman_account import PROGRAM_PATH

__all__ = ["Done", "Host", "NvidiaModprobe", "PrepareError", "prepare"]

_SUBORDINATE_IDS = 65536
_NVIDIA_MAJOR = 195
_CONTROL_MINOR = 255
_OTHER_MODES = {CONFIG: 0o400, MONITOR: 0o444}
_INSTANCE_MODE = 0o444
_DEVICE_MODE = 0o666


class PrepareError(Exception):
    """The host cannot be prepared; the text says what to do."""


@dataclass(frozen=True)
class Done:
    """One step and what came of it."""

    text: str
    """What was done, or would be, or is already so, or is wrong."""
    changed: bool = False
    trouble: bool = False
    """Something is missing that a daemon on real cards needs."""


NvidiaModprobe = Callable[[Sequence[str]], None]
"""Runs nvidia-modprobe with arguments; what it could not make is noticed afterwards.

Raises:
    OSError: it cannot be started.
"""


@dataclass(frozen=True)
class Host:
    """What is prepared."""

    root: Path
    """Where /dev, /proc, /run and /etc are to be found: "/" but in tests."""
    nvidia_modprobe: NvidiaModprobe | None
    """None when it is not installed."""
    uid: int
    """Who prepares it."""
    cards: Callable[[], CardFacts]
    """Asks the driver for its GPUs, once the nodes are there."""

    @classmethod
    def real(cls, cards: Callable[[], CardFacts]) -> Host:
        """Returns this host."""
        program = shutil.which("nvidia-modprobe", path=PROGRAM_PATH)

        def run(arguments: Sequence[str]) -> None:
            subprocess.run([program or "", *arguments], capture_output=True, timeout=60, check=False)

        return cls(Path("/"), run if program else None, os.geteuid(), cards)


@dataclass(frozen=True)
class _Node:
    """A character device that must be there."""

    path: Path
    device: int
    """Major and minor, as os.makedev packs them."""
    mode: int
    gid: int
    exact: bool
    """Whether owner and mode are ours to set when it is there already."""


def prepare(host: Host, user: str, *, emulated: bool, dry_run: bool) -> Iterator[Done]:
    """Prepares a host, step by step.

    Args:
        host: what to prepare.
        user: the daemon's user.
        emulated: the node serves emulated cards, so a missing driver is no trouble.
        dry_run: only tell what would be done.

    Yields:
        Each step, after it was done.

    Raises:
        PrepareError: this process is not root, there is no such user, or something cannot be made.
    """
    if host.uid != 0:
        raise PrepareError("prepare makes device nodes, which only root can: run it with sudo")
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise PrepareError(
            f"there is no user {user}: make it with `systemd-sysusers`, or with `useradd --system --create-home "
            f"--home-dir /var/lib/{user} --shell /usr/sbin/nologin {user}`"
        ) from None
    if entry.pw_uid == 0:
        raise PrepareError("the daemon is not to run as root: name an unprivileged user with --user")
    try:
        yield from _folders(host, entry, dry_run)
        yield from _group_members(entry, emulated)
        yield from _subordinate_ids(host, entry, emulated)
        if not (host.root / "proc/driver/nvidia").exists() and host.nvidia_modprobe and not dry_run and not emulated:
            host.nvidia_modprobe([])  # loads the driver
        if (host.root / "proc/driver/nvidia").exists():
            yield from _device_nodes(host, entry, dry_run)
            yield from _mig_modes(host.cards())
        else:
            yield Done(
                "no NVIDIA driver is loaded, and emulated cards need none"
                if emulated
                else "no NVIDIA driver is loaded: install it, or load it with `modprobe nvidia`, and prepare again",
                trouble=not emulated,
            )
    except OSError as error:
        raise PrepareError(f"{error.filename or 'the host'} cannot be prepared: {error.strerror or error}") from error


def _folders(host: Host, entry: pwd.struct_passwd, dry_run: bool) -> Iterator[Done]:
    # The upper one is root's: a user who owned it could put a link where root makes a directory for another user.
    top = host.root / "run/puhui"
    for folder, uid, gid, mode in (
        (top, 0, 0, 0o755),
        (top / f"podman-{entry.pw_uid}", entry.pw_uid, entry.pw_gid, 0o700),
    ):
        try:
            status = folder.lstat()
        except FileNotFoundError:
            if not dry_run:
                folder.mkdir(mode=0o700)
                os.chown(folder, uid, gid)
                folder.chmod(mode)
            yield Done(f"{folder}: {_would('made', dry_run)} for {_name(uid)}", changed=True)
            continue
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid:
            raise PrepareError(f"{folder} is not a directory of {_name(uid)}: remove it, and prepare again")
        if stat.S_IMODE(status.st_mode) != mode:
            if not dry_run:
                folder.chmod(mode)
            yield Done(f"{folder}: mode {_would('set', dry_run)} to {mode:04o}", changed=True)
        else:
            yield Done(f"{folder}: as it should be")


def _group_members(entry: pwd.struct_passwd, emulated: bool) -> Iterator[Done]:
    sharing = [one.pw_name for one in pwd.getpwall() if one.pw_gid == entry.pw_gid]
    others = sorted({*grp.getgrgid(entry.pw_gid).gr_mem, *sharing} - {entry.pw_name})
    if others:
        yield Done(
            f"group {_group(entry.pw_gid)} has members beside {entry.pw_name} ({', '.join(others)}), who may then "
            "create slices as well: give the daemon's user a group of its own",
            trouble=not emulated,
        )


def _subordinate_ids(host: Host, entry: pwd.struct_passwd, emulated: bool) -> Iterator[Done]:
    for name, option in (("subuid", "--add-subuids"), ("subgid", "--add-subgids")):
        file = host.root / "etc" / name
        text = file.read_text() if file.exists() else ""
        count = subordinate_ids(text, (entry.pw_name, str(entry.pw_uid)))
        if count >= _SUBORDINATE_IDS:
            yield Done(f"{file}: {entry.pw_name} has {count} ids")
        else:
            yield Done(
                f"{file}: {entry.pw_name} has {count} ids and containers need {_SUBORDINATE_IDS}: give it a range that "
                f"no other user has, such as `usermod {option} 200000-265535 {entry.pw_name}`",
                trouble=not emulated,
            )


def _device_nodes(host: Host, entry: pwd.struct_passwd, dry_run: bool) -> Iterator[Done]:
    gpus = gpu_minors(host.root)
    known = {one.name: one for one in capabilities(host.root)}
    if CONFIG in known:
        yield _keep_permission(known[CONFIG], dry_run)
    if host.nvidia_modprobe and not dry_run:
        host.nvidia_modprobe([option for gpu in gpus for option in ("-c", str(gpu))])
        host.nvidia_modprobe(["-u", "-c", "0"])
        if known:
            host.nvidia_modprobe([option for one in known.values() for option in ("-f", str(one.file))])
    majors = char_majors((host.root / "proc/devices").read_text())
    wanted = list(_device_list(host.root, majors, gpus))
    if CAPS_MAJOR in majors:
        minors = read_minors((host.root / "proc/driver/nvidia-caps/mig-minors").read_text())
        config, others = _cap_nodes(host.root, majors[CAPS_MAJOR], minors, known, gpus, entry.pw_gid)
        yield from (_make(node, dry_run) for node in wanted)
        yield _make(config, dry_run)
        yield _summary([_make(node, dry_run) for node in others], host.root / "dev/nvidia-caps", dry_run)
    else:
        yield from (_make(node, dry_run) for node in wanted)
        yield Done(
            "the driver has no MIG capabilities, so nobody but root can create slices: install driver 450.80 or later",
            trouble=True,
        )
    if "nvidia-uvm" not in majors:
        yield Done("nvidia-uvm is not loaded, and CUDA needs it: `modprobe nvidia-uvm` and prepare again", trouble=True)


def _keep_permission(config: Capability, dry_run: bool) -> Done:
    if not config.modify:
        return Done(f"{config.file}: nvidia-modprobe leaves the node alone already")
    if not dry_run:
        # A file of the kernel: it takes the whole setting in one write, and there is nothing to truncate.
        if not config.file.stat().st_mode & stat.S_IWUSR:
            config.file.chmod(stat.S_IMODE(config.file.stat().st_mode) | stat.S_IWUSR)
        with config.file.open("r+b", buffering=0) as file:
            file.write(b"DeviceFileModify: 0\n")
        if parse_capability(config.file.read_text()).get("DeviceFileModify") != 0:
            raise PrepareError(
                f"{config.file} does not take `DeviceFileModify: 0`, so nvidia-modprobe would take the permission away"
            )
    return Done(f"{config.file}: nvidia-modprobe {_would('told', dry_run)} to leave the node alone", changed=True)


def _device_list(root: Path, majors: dict[str, int], gpus: Sequence[int]) -> Iterator[_Node]:
    # The major was called nvidia-frontend up to driver 545; its number never changed.
    major = majors.get("nvidia", majors.get("nvidia-frontend", _NVIDIA_MAJOR))
    files = [("nvidiactl", os.makedev(major, _CONTROL_MINOR))]
    files += [(f"nvidia{gpu}", os.makedev(major, gpu)) for gpu in gpus]
    if "nvidia-uvm" in majors:
        files.append(("nvidia-uvm", os.makedev(majors["nvidia-uvm"], 0)))
    mode, gid = _device_mode(root)
    yield from (_Node(root / "dev" / name, device, mode, gid, exact=False) for name, device in files)


def _device_mode(root: Path) -> tuple[int, int]:
    """Returns mode and group that the driver's own parameters give to device nodes."""
    try:
        fields = parse_capability((root / "proc/driver/nvidia/params").read_text())
    except FileNotFoundError:
        fields = {}
    return fields.get("DeviceFileMode", _DEVICE_MODE), fields.get("DeviceFileGID", 0)


def _cap_nodes(
    root: Path, major: int, minors: dict[str, int], known: dict[str, Capability], gpus: list[int], gid: int
) -> tuple[_Node, list[_Node]]:
    """Returns the config node and all others.

    Those of every instance that these GPUs can ever have are made at once: their minors never change, and an
    unprivileged daemon could not make them later.
    """

    def node(name: str, minor: int, mode: int, group: int, *, exact: bool) -> _Node:
        return _Node(root / f"dev/nvidia-caps/nvidia-cap{minor}", os.makedev(major, minor), mode, group, exact)

    modes = {**_OTHER_MODES, **{name: one.mode for name, one in known.items()}}
    config = node(CONFIG, minors[CONFIG], 0o440, gid, exact=True)
    wanted = {MONITOR: minors[MONITOR], **minors_of_gpus(minors, gpus)}
    return config, [
        node(name, minor, modes.get(name, _INSTANCE_MODE), 0, exact=False) for name, minor in wanted.items()
    ]


def _make(node: _Node, dry_run: bool) -> Done:
    """Makes a device node, or sets right what is there.

    Raises:
        OSError: it cannot be made, because CAP_MKNOD is missing, say. Nothing else is put in its place.
    """
    path = node.path
    wanted = f"root:{_group(node.gid)} {node.mode:04o}"
    try:
        status = path.lstat()
    except FileNotFoundError:
        status = None
    if status and stat.S_ISCHR(status.st_mode) and status.st_rdev == node.device:
        fits = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, node.gid, node.mode)
        if fits or not node.exact:
            return Done(f"{path}: as it should be")
        if not dry_run:
            # Never wider than either the old or the new permission in between.
            path.chmod(0o400)
            os.chown(path, 0, node.gid)
            path.chmod(node.mode)
        return Done(f"{path}: {_would('set', dry_run)} to {wanted}", changed=True)
    if not dry_run:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        if status:
            path.unlink()  # not that device, whatever it is
        os.mknod(path, stat.S_IFCHR | 0o400, node.device)
        os.chown(path, 0, node.gid)
        path.chmod(node.mode)
    return Done(f"{path}: {_would('made', dry_run)} as {wanted}", changed=True)


def _summary(done: Sequence[Done], folder: Path, dry_run: bool) -> Done:
    changed = sum(one.changed for one in done)
    if not changed:
        return Done(f"{folder}: {len(done)} other nodes, all as they should be")
    return Done(f"{folder}: {changed} of {len(done)} other nodes {_would('made', dry_run)}", changed=True)


def _mig_modes(facts: CardFacts) -> Iterator[Done]:
    if facts.trouble:
        yield Done(f"the driver does not answer ({facts.trouble}): see `nvidia-smi`", trouble=True)
    for card in facts.cards:
        name = f"GPU {card.index} ({card.model})"
        if card.mig is Mig.ENABLED:
            yield Done(f"{name}: MIG mode is on")
        elif card.mig is Mig.DISABLED:
            yield Done(f"{name}: MIG mode is off, and is yours to turn on, with `{how_to_enable(card)}`")
        elif card.mig is Mig.NOT_SUPPORTED:
            yield Done(f"{name}: cannot be cut")
        else:
            yield Done(f"{name}: does not say its MIG mode; see `nvidia-smi -i {card.index} -q`")


def _would(word: str, dry_run: bool) -> str:
    return f"would be {word}" if dry_run else word


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
