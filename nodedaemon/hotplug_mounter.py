"""Shows device nodes in running containers, with the rights of the user that owns the containers and no others.

    python -m nodedaemon.hotplug_mounter UID GID

Reads one request per line and answers each with one line, in JSON, until its input ends::

    {"do": "show", "pid": 4711, "folder": "/…/caps", "target": "/dev/nvidia-caps", "nodes": {"nvidia-cap21": "/dev/…"}}
    {"changed": true}
    {"do": "holders", "pid": 4711, "files": ["/dev/nvidia-caps/nvidia-cap21"]}
    {"holders": [4720], "unknown": []}
    {"do": "signal", "pid": 4711, "signal": 15, "processes": [[4720, "81234"]]}
    {"signalled": [4720]}

Processes are named with when they began, as /proc/PID/stat has it; null is all but the init process that have a
handler for the signal.

`pid` is the container's init process, and `folder` the directory of the host that it has at `target`. What fails is
answered with {"step": "…", "error": "…", "errno": n}.

Each request has a child of its own, because joining a user namespace cannot be undone. It joins the container's user
namespace, which its user owns, copies the host's mounts into a namespace of its own, clones each node there as a
mount that hangs nowhere (open_tree(2)), joins the container's mount namespace and hangs the clones up
(move_mount(2)). Nothing is shared between host and container, so nothing of it outlives the container. A node is taken
away by removing the file that it hangs on: the kernel then unmounts it in every other namespace (since Linux 3.18).

Standard library only: it must start fast, and gives up root before it does anything.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pwd
import signal
import stat
import sys
from pathlib import Path
from typing import Any

__all__ = ["catches", "file_kind", "main", "open_files", "send"]

# Numbers of system calls that Python and older C libraries do not name; the same on every architecture.
_OPEN_TREE = 428
_MOVE_MOUNT = 429
_MOUNT_SETATTR = 442
# linux/mount.h, linux/fcntl.h, linux/sched.h, linux/prctl.h
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NOEXEC = 0x8
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_PR_SET_NO_NEW_PRIVS = 38

_MOST_STALE = 16
"""How many wrong mounts on top of each other are taken away before it is called hopeless."""

_libc = ctypes.CDLL(None, use_errno=True)


class StepError(Exception):
    """A step failed, and with which errno."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(step)
        self.step = step
        self.error = error


class _MountAttr(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _call(step: str, function: Any, *arguments: Any) -> int:
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise StepError(step, OSError(number, os.strerror(number)))
    return result


def _setns(step: str, descriptor: int, kind: int) -> None:
    _call(step, _libc.setns, descriptor, ctypes.c_int(kind))


def _clone(source: str) -> int:
    """Returns a mount of one node that hangs nowhere yet."""
    path = os.fsencode(source)
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    tree = _call(f"clone {source}", _libc.syscall, ctypes.c_long(_OPEN_TREE), ctypes.c_int(_AT_FDCWD), path, flags)
    attributes = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NOEXEC)
    _call(
        f"make {source} read-only",
        _libc.syscall,
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(tree),
        b"",
        ctypes.c_uint(_AT_EMPTY_PATH),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    return tree


def _hang_up(tree: int, name: str) -> None:
    """Puts a clone on the file `name` of the directory that this process is in."""
    _call(
        f"mount {name} in the container",
        _libc.syscall,
        ctypes.c_long(_MOVE_MOUNT),
        ctypes.c_int(tree),
        b"",
        ctypes.c_int(_AT_FDCWD),
        os.fsencode(name),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
    )


def _take_off(name: str) -> None:
    flags = ctypes.c_int(_MNT_DETACH | _UMOUNT_NOFOLLOW)
    _call(f"unmount what is on {name}", _libc.umount2, os.fsencode(name), flags)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _show(pid: int, folder: str, target: str, nodes: dict[str, str]) -> bool:
    """Makes a container see exactly these nodes, and returns whether anything had to be changed.

    Args:
        pid: its init process.
        folder: directory of the host with one file per node, on which the node is hung.
        target: where the container has that directory.
        nodes: where each node is on the host, by name.

    Raises:
        StepError: it does not.
    """
    changed = False
    step = "find the container's process"
    try:
        process = os.pidfd_open(pid)
        step = "look at the nodes on the host"
        place = _identity(Path(folder).lstat())
        wanted = {name: _identity(Path(source).lstat()) for name, source in nodes.items()}
        bare = {name: _identity(Path(folder, name).lstat()) for name in nodes}
        _setns("join the container's user namespace", process, _CLONE_NEWUSER)
        _call("copy the host's mounts", _libc.unshare, ctypes.c_int(_CLONE_NEWNS))
        trees = {name: _clone(source) for name, source in nodes.items()}
        _setns("join the container's mount namespace", process, _CLONE_NEWNS)
        step = f"look at {target} in the container"
        # The process id may be somebody else's by now: only our container has our directory there.
        if not Path(target).is_dir() or _identity(Path(target).lstat()) != place:
            raise StepError(step, OSError(errno.ESTALE, f"process {pid} has not this container's directory there"))
        os.chdir(target)
        for name, tree in trees.items():
            for _ in range(_MOST_STALE):
                seen = _identity(Path(name).lstat())
                if seen == wanted[name]:
                    break
                changed = True
                if seen == bare[name]:
                    _hang_up(tree, name)
                else:
                    _take_off(name)
            else:
                raise StepError(f"mount {name} in the container", OSError(errno.EBUSY, "something else stays there"))
        shown = sorted(entry.name for entry in Path().iterdir())
        if shown != sorted(nodes):
            raise StepError(step, OSError(errno.EEXIST, f"it has {', '.join(shown) or 'nothing'}"))
    except OSError as error:
        raise StepError(step, error) from error
    return changed


def _holders(pid: int, files: list[str]) -> tuple[list[int], list[int]]:
    """Looks for the processes of a container that have files open.

    Args:
        pid: its init process.
        files: files of the host.

    Returns:
        The ids of those that have, and of those that cannot be looked into, ascending.

    Raises:
        StepError: the container is not there.
    """
    step = "find the container's process"
    try:
        process = os.pidfd_open(pid)
        step = "look at the nodes on the host"
        wanted = {file_kind(Path(file).stat()) for file in files}
        # There this user may look into processes that do not let themselves be looked into otherwise.
        _setns("join the container's user namespace", process, _CLONE_NEWUSER)
        step = "look at the container's processes"
        namespace = _identity(Path(f"/proc/{pid}/ns/pid").stat())
    except OSError as error:
        raise StepError(step, error) from error
    found, unknown = [], []
    for member in _members(namespace):
        try:
            if wanted & open_files(member):
                found.append(member)
        except PermissionError:
            unknown.append(member)
        except OSError:
            continue  # it has ended meanwhile
    return found, unknown


def _members(namespace: tuple[int, int]) -> list[int]:
    """Returns the ids of the processes in a process namespace, ascending."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if _identity((entry / "ns/pid").stat()) == namespace:
                    members.append(int(entry.name))
            except OSError:
                continue  # it has ended, or it is none of the container's: those may be looked at
    return sorted(members)


def open_files(pid: int) -> set[tuple[int, int, int]]:
    """Returns what a process has open.

    Raises:
        OSError: it has ended, or may not be looked into.
    """
    files = set()
    with os.scandir(f"/proc/{pid}/fd") as descriptors:
        for descriptor in descriptors:
            try:
                files.add(file_kind(descriptor.stat()))
            except FileNotFoundError:
                continue  # closed meanwhile
    return files


def _signal(pid: int, number: int, processes: list[list[Any]] | None) -> list[int]:
    """Signals processes of a container, and returns the ids of those who were.

    Raises:
        StepError: the container is not there.
    """
    step = "find the container's process"
    try:
        process = os.pidfd_open(pid)
        _setns("join the container's user namespace", process, _CLONE_NEWUSER)
        namespace = _identity(Path(f"/proc/{pid}/ns/pid").stat())
    except OSError as error:
        raise StepError(step, error) from error
    members = _members(namespace)
    if processes is None:
        return [one for one in members if one != pid and catches(one, number) and send(one, None, number)]
    return sorted(one for one, started in processes if one in members and send(one, started, number))


def catches(pid: int, number: int) -> bool:
    """Returns whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:\t")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def send(pid: int, started: str | None, number: int) -> bool:
    """Signals a process, if it is the one that began then, and returns whether it did."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if started is not None and fields[19] != started:
            return False
        signal.pidfd_send_signal(process, number)
    except OSError:
        return False
    finally:
        os.close(process)
    return True


def file_kind(status: os.stat_result) -> tuple[int, int, int]:
    """Returns what makes two files the same: a device is what its number says, wherever its node is."""
    return (0, 0, status.st_rdev) if stat.S_ISCHR(status.st_mode) else (status.st_dev, status.st_ino, 0)


def _answer(line: bytes) -> dict[str, object]:
    request = json.loads(line)
    try:
        if request["do"] == "show":
            return {"changed": _show(request["pid"], request["folder"], request["target"], request["nodes"])}
        if request["do"] == "signal":
            return {"signalled": _signal(request["pid"], request["signal"], request["processes"])}
        found, unknown = _holders(request["pid"], request["files"])
    except StepError as failed:
        return {"step": failed.step, "error": failed.error.strerror or str(failed.error), "errno": failed.error.errno}
    return {"holders": found, "unknown": unknown}


def _serve(line: bytes) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _write(_answer(line))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        _write({"step": "answer", "error": f"the process for this request ended with status {status}", "errno": 0})


def _write(answer: dict[str, object]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _give_up_root(uid: int, gid: int) -> None:
    if os.geteuid() == 0:
        os.initgroups(pwd.getpwuid(uid).pw_name, gid)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _call("give up new privileges", _libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def main(uid: int, gid: int) -> int:
    """Answers until the input ends. Returns 0."""
    os.chdir("/")
    _give_up_root(uid, gid)
    for line in iter(sys.stdin.buffer.readline, b""):
        _serve(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
