"""The state directory: can the daemon keep what it must keep, and can its containers reach their files there?"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.doctor.findings import Ability, Finding, notice, ok, problem, unknown

__all__ = ["StateFacts", "journal_holder", "judge_state", "look_at_state"]

_SERVE = Ability.SERVE
_LOW_BYTES = 5 * 2**30
_LEAST_BYTES = 256 * 2**20
_LOW_INODES = 10_000
_SLOW_FSYNC_S = 0.02
_FSYNCS = 5
# SQLite's write-ahead log needs memory that all processes of one host share, which these do not give.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs", "lustre", "afs")
# SQLite locks these bytes of a database: pending, reserved, and 510 shared ones.
_SQLITE_LOCKS = (0x40000000, 512)


@dataclass(frozen=True)
class StateFacts:
    """A state directory."""

    path: Path
    kind: str
    """"directory", "missing" (its parent is `near`), "hidden" (cannot be looked at) or "other"."""
    near: Path
    """The directory itself, or the nearest above it that is there."""
    writable: bool
    """By this process."""
    reachable: bool | None
    """By the user that owns the containers; None when it cannot be said."""
    user: str
    file_system: str
    free_bytes: int
    free_inodes: int | None
    """None when the file system does not count them."""
    leases: bool | None
    """Whether files there can be leased, which emulated cards need; None when it cannot be said."""
    fsync_s: float | None
    """Median time of one fsync, in seconds; None when it cannot be measured."""
    holder: int | None
    """Process id of the daemon that has the journal open, if one has; 0 when it cannot be said."""


def look_at_state(path: Path, user: str, may: Callable[[str, Path], bool | None] | None) -> StateFacts:
    """Looks at a state directory, and leaves nothing there.

    Args:
        path: the directory; it need not exist.
        user: name of the user that owns the containers.
        may: says whether test(1) with a flag holds for that user; None when there is no such user.
    """
    kind, near = _nearest(path)
    try:
        room = os.statvfs(near)
    except OSError:
        return StateFacts(path, "hidden", near, False, None, user, "", 0, None, None, None, 0)
    writable = os.access(near, os.W_OK | os.X_OK)
    leases, fsync_s = _probe(near) if writable else (None, None)
    return StateFacts(
        path=path,
        kind=kind,
        near=near,
        writable=writable,
        # A daemon run by root opens its own directory to that user; those above it are not its to open.
        reachable=may("-x", near if kind != "directory" or os.geteuid() else near.resolve().parent) if may else None,
        user=user,
        file_system=_file_system(near),
        free_bytes=room.f_bavail * room.f_frsize,
        free_inodes=room.f_favail if room.f_files else None,
        leases=leases,
        fsync_s=fsync_s,
        holder=journal_holder(path / "node.db"),
    )


def _nearest(path: Path) -> tuple[str, Path]:
    kind = "directory"
    for place in (path, *path.parents):
        try:
            if place.is_dir():
                return kind, place
            if place.exists():
                return "other", place.parent
        except OSError:
            return "hidden", place.parent
        kind = "missing"
    return kind, Path("/")


def _file_system(path: Path) -> str:
    best, kind = "", ""
    with contextlib.suppress(OSError):
        where = str(path.resolve())
        for line in Path("/proc/self/mounts").read_text().splitlines():
            fields = line.split()
            place = fields[1].replace("\\040", " ")
            inside = where == place or where.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(best):
                best, kind = place, fields[2]
    return kind


def _probe(folder: Path) -> tuple[bool | None, float | None]:
    """Tries a lease and a few fsyncs on a file that has no name, or loses it at once."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            leases: bool | None = True
            try:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            except OSError as error:
                leases = False if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) else None
            times = []
            for _ in range(_FSYNCS):
                os.write(file.fileno(), bytes(4096))
                began = time.perf_counter()
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
            return leases, statistics.median(times)
    except OSError:
        return None, None


def journal_holder(path: Path) -> int | None:
    """Returns the process id of whoever has a journal locked; None for nobody, 0 when it cannot be said."""
    # struct flock of 64-bit Linux: type, whence, start, length, pid.
    layout = "hhqqi4x"
    start, length = _SQLITE_LOCKS
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return 0
    try:
        asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return None if kind == fcntl.F_UNLCK else int(pid)


def judge_state(facts: StateFacts, *, emulated: bool) -> list[Finding]:
    """Says what a state directory is good for.

    Args:
        facts: what was seen.
        emulated: emulated cards were asked for, which need more of the file system.
    """
    path = facts.path
    if facts.kind == "hidden":
        return [
            unknown(
                "state",
                f"{path} cannot be looked at by this user",
                f"sudo puhui-nodedaemon doctor --state {path}",
                _SERVE,
            )
        ]
    if facts.kind == "other":
        return [
            problem(
                "state", f"{facts.near} has a file where {path} should be a directory", f"ls -l {facts.near}", _SERVE
            )
        ]
    findings = [_directory(facts), _reach(facts), _file_system_finding(facts), _space(facts), _inodes(facts)]
    if emulated:
        findings.append(_leases(facts))
    findings += [_fsync(facts), _holder(facts)]
    return findings


def _directory(facts: StateFacts) -> Finding:
    if not facts.writable:
        return problem(
            "state",
            f"this user may not write to {facts.near}",
            "puhui-nodedaemon doctor --state ~/.local/state/puhui-node",
            _SERVE,
        )
    if facts.kind == "missing":
        return ok("state", f"{facts.path} is not there yet, and can be made")
    return ok("state", f"{facts.path} is there and can be written")


def _reach(facts: StateFacts) -> Finding:
    if facts.reachable is None:
        return unknown(
            "state-reach",
            f"whether user {facts.user} can reach {facts.path} cannot be said",
            f"namei -l {facts.path}",
            Ability.CONTAINERS,
        )
    if not facts.reachable:
        return problem(
            "state-reach",
            f"user {facts.user}, which owns the containers, cannot reach {facts.path}: choose a place below /var/lib, "
            "or open the directories above it",
            f"namei -l {facts.path}",
            Ability.CONTAINERS,
            Ability.PROCESSES,
        )
    return ok("state-reach", f"user {facts.user}, which owns the containers, can reach the place")


def _file_system_finding(facts: StateFacts) -> Finding:
    kind = facts.file_system
    if not kind:
        return unknown(
            "file-system", f"the file system of {facts.near} is not known", f"findmnt -T {facts.near}", _SERVE
        )
    if kind in _NETWORK:
        return problem(
            "file-system",
            f"{facts.near} is on {kind}, where the journal's write-ahead log does not work: use a local disk",
            f"findmnt -T {facts.near}",
            _SERVE,
        )
    if kind in ("tmpfs", "ramfs"):
        return notice(
            "file-system", f"{facts.near} is on {kind}: the state is lost at a reboot", f"findmnt -T {facts.near}"
        )
    return ok("file-system", f"{facts.near} is on {kind}")


def _space(facts: StateFacts) -> Finding:
    free = f"{facts.free_bytes / 2**30:.1f} GiB"
    command = f"df -h {facts.near}"
    if facts.free_bytes < _LEAST_BYTES:
        return problem("space", f"only {free} are free at {facts.near}", command, _SERVE)
    if facts.free_bytes < _LOW_BYTES:
        return notice("space", f"{free} are free at {facts.near}, which logs and artifacts may soon fill", command)
    return ok("space", f"{free} are free at {facts.near}")


def _inodes(facts: StateFacts) -> Finding:
    if facts.free_inodes is None:
        return ok("inodes", "the file system has no limit on the number of files")
    if facts.free_inodes < _LOW_INODES:
        return notice("inodes", f"only {facts.free_inodes} files more fit at {facts.near}", f"df -i {facts.near}")
    return ok("inodes", f"{facts.free_inodes} files more fit at {facts.near}")


def _leases(facts: StateFacts) -> Finding:
    if facts.leases is None:
        return unknown(
            "leases", f"whether files at {facts.near} can be leased cannot be said", f"findmnt -T {facts.near}"
        )
    if not facts.leases:
        return problem(
            "leases",
            f"{facts.file_system} has no file leases, by which emulated cards notice who uses them",
            f"findmnt -T {facts.near}",
            Ability.EMULATION,
        )
    return ok("leases", "files can be leased, as emulated cards need")


def _fsync(facts: StateFacts) -> Finding:
    if facts.fsync_s is None:
        return unknown(
            "fsync",
            f"how long an fsync takes was not measured: {facts.near} may not be written",
            f"ls -ld {facts.near}",
        )
    took = f"{facts.fsync_s * 1000:.1f} ms"
    if facts.fsync_s > _SLOW_FSYNC_S:
        return notice(
            "fsync", f"an fsync takes {took}, which slows bundles and artifacts down", f"findmnt -T {facts.near}"
        )
    return ok("fsync", f"an fsync takes {took}")


def _holder(facts: StateFacts) -> Finding:
    if facts.holder is None:
        return ok("daemon", "no daemon holds this state")
    if facts.holder == 0:
        return unknown("daemon", "whether a daemon holds this state cannot be said", "sudo puhui-nodedaemon doctor")
    return notice(
        "daemon",
        f"process {facts.holder} holds this state: a second daemon on it is refused",
        f"ps -o pid,user,args {facts.holder}",
    )
