"""Moves the emulated cards of living processes: what they have open is taken from them, and given back.

    python card_mover.py UID GID RECORDS

Reads one request from its input, in JSON, and answers it in one line. `init` is a process of the container whose user
namespace is joined, `records` a directory in which one file per checkpointed process says what it had open::

    {"do": "take", "init": 4711, "pids": [4720], "nodes": {"nvidia-cap21": [2049, 77]}, "timeout_s": 5}
    {"do": "give", "init": 4711, "pids": [4720], "moves": {"nvidia-cap21": "/dev/nvidia-caps/nvidia-cap30"}}
    {"do": "want", "init": 4711, "pids": [4720]}

The last waits until a process wants its card, or until this one's input ends.

Each thread of a process is stopped with ptrace(2), and one of them is made to call dup3(2): onto an empty pipe that has
the process itself for its only writer, so that whatever is read of the card from then on blocks; or onto the newly
opened node, and what was blocked reads that. Memory, threads, process id and descriptor numbers stay. What a process
was doing when it was stopped goes on, an interrupted system call from its beginning, as after any stop.

Standard library only: it must start fast, and gives up root before it does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import pwd
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

__all__ = ["main"]

_CLONE_NEWUSER = 0x10000000
_PR_SET_NO_NEW_PRIVS = 38
_WALL = 0x40000000
# linux/ptrace.h
_CONT, _GETREGS, _SETREGS, _DETACH, _SYSCALL = 7, 12, 13, 17, 24
_SEIZE, _INTERRUPT, _GETSIGMASK, _SETSIGMASK = 0x4206, 0x4207, 0x420A, 0x420B
_O_TRACESYSGOOD = 1
_AT_SYSCALL = signal.SIGTRAP | 0x80
_SIGSET_BYTES = 8
# asm/unistd_64.h
_NR_CLOSE, _NR_PIPE2, _NR_OPENAT, _NR_DUP3, _NR_READ = 3, 293, 257, 292, 0
_SYSCALL_INSTRUCTION = b"\x0f\x05"
_SCRATCH = 512
_REGISTERS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
    "fs_base gs_base ds es fs gs"
)
_LOOK_S = 0.1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class MoveError(Exception):
    """A card cannot be moved; the text says which and why."""


class _Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in _REGISTERS.split())


def _ptrace(request: int, thread: int, address: Any = None, data: Any = None) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Stopped:
    """A process of which every thread is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._threads: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._stop()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _stop(self) -> None:
        while True:
            new = [t for t in _threads(self._pid) if t not in self._threads]
            if not new:
                break
            for thread in new:
                try:
                    _ptrace(_SEIZE, thread, None, _O_TRACESYSGOOD)
                    self._threads.append(thread)
                    _ptrace(_INTERRUPT, thread)
                except ProcessLookupError:
                    continue
                except PermissionError:
                    if _state(self._pid, thread) in "ZX":
                        continue
                    raise
                self._settle(thread)
        self._threads = [t for t in self._threads if _state(self._pid, t) == "t"]
        if not self._threads:
            raise ProcessLookupError(errno.ESRCH, "it has ended")

    def _settle(self, thread: int) -> None:
        """Waits until a thread stops because it was asked to; signals that came before are delivered."""
        with contextlib.suppress(ProcessLookupError):
            while (stopped := self.wait(thread)) is not None:
                _ptrace(_CONT, thread, None, stopped)

    def wait(self, thread: int) -> int | None:
        """Waits for a stop of a thread.

        Returns:
            The signal that stopped it, which is delivered only if it is continued with it; None for any other stop.

        Raises:
            ProcessLookupError: it has ended.
        """
        _, status = os.waitpid(thread, _WALL)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, "it has ended")
        return os.WSTOPSIG(status) if status >> 16 == 0 else None

    def _let_go(self) -> None:
        for thread in self._threads:
            with contextlib.suppress(OSError):
                _ptrace(_DETACH, thread)
        self._threads = []

    @contextlib.contextmanager
    def calls(self) -> Iterator[_Calls]:
        """Lets one thread make system calls of ours; what it did before goes on afterwards."""
        thread = self._threads[0]
        before = _Registers()
        _ptrace(_GETREGS, thread, None, ctypes.byref(before))
        if before.cs != 0x33:
            raise MoveError(f"process {self._pid} is not a 64-bit one")
        mask, closed = ctypes.c_uint64(), ctypes.c_uint64(2**64 - 1)
        with _scratch(self._pid, before.rsp) as memory:
            gate = _gate(self._pid)
            _ptrace(_GETSIGMASK, thread, _SIGSET_BYTES, ctypes.byref(mask))
            _ptrace(_SETSIGMASK, thread, _SIGSET_BYTES, ctypes.byref(closed))
            try:
                yield _Calls(self, thread, before, gate, memory)
            finally:
                _ptrace(_SETREGS, thread, None, ctypes.byref(before))
                _ptrace(_SETSIGMASK, thread, _SIGSET_BYTES, ctypes.byref(mask))
                # It must be let go from where the kernel looks for signals: there it takes up again what it was
                # interrupted in, or ends that with EINTR if a signal has come for it meanwhile.
                _ptrace(_INTERRUPT, thread)
                _ptrace(_CONT, thread)
                self._settle(thread)


class _Calls:
    """System calls that a stopped thread makes."""

    def __init__(self, process: _Stopped, thread: int, before: _Registers, gate: int, memory: _Memory) -> None:
        self._process = process
        self._thread = thread
        self._before = before
        self._gate = gate
        self._memory = memory

    def _call(self, number: int, *arguments: int) -> int:
        registers = _Registers.from_buffer_copy(self._before)
        registers.rax, registers.orig_rax, registers.rip = number, 2**64 - 1, self._gate
        for name, value in zip(("rdi", "rsi", "rdx", "r10"), arguments, strict=False):
            setattr(registers, name, value % 2**64)
        _ptrace(_SETREGS, self._thread, None, ctypes.byref(registers))
        for _ in range(2):  # before it, after it
            stopped = None
            while stopped != _AT_SYSCALL:
                _ptrace(_SYSCALL, self._thread, None, stopped)
                stopped = self._process.wait(self._thread)
        _ptrace(_GETREGS, self._thread, None, ctypes.byref(registers))
        result = ctypes.c_longlong(registers.rax).value
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def pipe(self) -> int:
        """Makes a pipe that can be read and written at one descriptor, which is returned."""
        self._call(_NR_PIPE2, self._memory.address, os.O_CLOEXEC)
        first, second = struct.unpack("=ii", self._memory.read(8))
        try:
            return self.open(f"/proc/self/fd/{first}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            self.close(first)
            self.close(second)

    def open(self, path: str, flags: int) -> int:
        """Opens a file as the process sees it."""
        self._memory.write(os.fsencode(path) + b"\0")
        return self._call(_NR_OPENAT, -100, self._memory.address, flags)

    def replace(self, new: int, descriptor: int, *, inherited: bool) -> None:
        """Puts what is open at one descriptor on another in its place."""
        self._call(_NR_DUP3, new, descriptor, 0 if inherited else os.O_CLOEXEC)
        self.close(new)

    def close(self, descriptor: int) -> None:
        """Closes a descriptor."""
        self._call(_NR_CLOSE, descriptor)


class _Memory:
    """A piece of a process's memory."""

    def __init__(self, descriptor: int, address: int) -> None:
        self._descriptor = descriptor
        self.address = address

    def read(self, size: int) -> bytes:
        """Returns what is there."""
        return os.pread(self._descriptor, size, self.address)

    def write(self, data: bytes) -> None:
        """Writes at its beginning."""
        if len(data) > _SCRATCH or os.pwrite(self._descriptor, data, self.address) != len(data):
            raise MoveError("the process's memory cannot be written")


@contextlib.contextmanager
def _scratch(pid: int, stack: int) -> Iterator[_Memory]:
    """Lends a piece of a stopped process's stack; what was there is put back."""
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        # What a function may use below its stack pointer without a word, and more: nothing that lives is touched.
        memory = _Memory(descriptor, (stack - 128 - _SCRATCH) & ~15)
        try:
            before = memory.read(_SCRATCH)
            memory.write(before)
        except OSError:
            memory = _Memory(descriptor, stack)
            before = memory.read(_SCRATCH)
        try:
            yield memory
        finally:
            memory.write(before)
    finally:
        os.close(descriptor)


def _gate(pid: int) -> int:
    """Returns where a process has an instruction that calls the kernel: in what the kernel itself maps into it."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(low)
                at = memory.read(high - low).find(_SYSCALL_INSTRUCTION)
            if at >= 0:
                return low + at
    raise MoveError(f"process {pid} has no vdso")


def _threads(pid: int) -> list[int]:
    return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())


def _state(pid: int, thread: int) -> str:
    try:
        return Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def start_time(pid: int) -> str:
    """Returns when a process began; with its id that is never used again.

    Raises:
        OSError: it has ended.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


# Requests ---------------------------------------------------------------------------------------------------


def _open_on(pid: int, wanted: dict[tuple[int, int], str]) -> list[dict[str, Any]]:
    """Returns which of these files a process has open, and how."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat()
            name = wanted.get((status.st_dev, status.st_ino))
            if name is not None:
                facts = dict(
                    line.split(":\t", 1) for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()
                )
                flags = int(facts["flags"], 8)
                found.append({"descriptor": int(entry.name), "name": name, "flags": flags})
    return found


def _take(records: Path, pids: list[int], nodes: dict[str, list[int]]) -> None:
    wanted = {(dev, ino): name for name, (dev, ino) in nodes.items()}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError), _Stopped(pid) as process:
            had = _open_on(pid, wanted)
            file = records / f"{pid}-{start_time(pid)}.json"
            known = json.loads(file.read_text()) if file.exists() else []
            again = {one["descriptor"] for one in had}
            # Before it is done: whoever dies in the middle leaves something that can be made good.
            _keep(file, [one for one in known if one["descriptor"] not in again] + had)
            if not had:
                continue
            with process.calls() as calls:
                for one in had:
                    calls.replace(calls.pipe(), one["descriptor"], inherited=not one["flags"] & os.O_CLOEXEC)
            _keep(file, _with_pipes(pid, json.loads(file.read_text())))


def _with_pipes(pid: int, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for one in known:
        one["pipe"] = Path(f"/proc/{pid}/fd/{one['descriptor']}").stat().st_ino
    return known


def _keep(file: Path, known: list[dict[str, Any]]) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(known))
    new.replace(file)


def _give(records: Path, init: int, pids: list[int], moves: dict[str, str]) -> None:
    pipes: dict[int, dict[str, Any]] = {}
    for pid in pids:
        file = _record(records, pid)
        for one in json.loads(file.read_text()) if file else []:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/fd/{one['descriptor']}").stat()
                if stat.S_ISFIFO(status.st_mode) and one.get("pipe", status.st_ino) == status.st_ino:
                    pipes[status.st_ino] = one
    # Those that were started meanwhile have them from whoever started them.
    for pid in sorted({*pids, *_members(init)}):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError), _Stopped(pid) as process:
            blocked = [one for one in _fifos(pid) if one[1] in pipes]
            if not blocked:
                continue
            with process.calls() as calls:
                for descriptor, inode, inherited in blocked:
                    one = pipes[inode]
                    path = moves.get(one["name"])
                    if path is None:
                        raise MoveError(f"process {pid} had {one['name']} open, and nothing is in its place")
                    try:
                        new = calls.open(path, one["flags"] & ~os.O_CLOEXEC)
                    except OSError as error:
                        raise MoveError(f"process {pid} cannot open {path}: {error.strerror}") from error
                    calls.replace(new, descriptor, inherited=inherited)
    for pid in pids:
        file = _record(records, pid)
        if file is not None:
            file.unlink()


def _fifos(pid: int) -> list[tuple[int, int, bool]]:
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat()
            if stat.S_ISFIFO(status.st_mode):
                text = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
                flags = int(text.split("flags:\t", 1)[1].split("\n", 1)[0], 8)
                found.append((int(entry.name), status.st_ino, not flags & os.O_CLOEXEC))
    return found


def _record(records: Path, pid: int) -> Path | None:
    try:
        file = records / f"{pid}-{start_time(pid)}.json"
    except OSError:
        return None
    return file if file.exists() else None


def _prune(records: Path) -> None:
    """Forgets the processes that have ended."""
    for file in records.glob("*-*.json"):
        if _record(records, int(file.name.partition("-")[0])) != file:
            file.unlink(missing_ok=True)


def _members(init: int) -> list[int]:
    """Returns the processes of a container that has a process-id namespace of its own."""
    mine = Path("/proc/self/ns/pid").stat()
    try:
        namespace = Path(f"/proc/{init}/ns/pid").stat()
    except OSError:
        return []
    if os.path.samestat(mine, namespace):
        return []
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if os.path.samestat((entry / "ns/pid").stat(), namespace):
                    members.append(int(entry.name))
    return members


def _want(records: Path, pids: list[int]) -> int | None:
    """Waits until a process reads its card, and returns which; None when the input ends, or all of them have."""
    had = {}
    for pid in pids:
        file = _record(records, pid)
        if file is not None:
            had[pid] = {one["descriptor"] for one in json.loads(file.read_text())}
    while had:
        for pid, descriptors in list(had.items()):
            try:
                for thread in _threads(pid):
                    words = Path(f"/proc/{pid}/task/{thread}/syscall").read_text().split()
                    if words[0] == str(_NR_READ) and int(words[1], 16) in descriptors:
                        return pid
            except OSError:
                if _record(records, pid) is None:
                    del had[pid]
        if select.select([0], [], [], _LOOK_S)[0]:
            return None
    return None


def _answer(request: dict[str, Any], records: Path) -> dict[str, object]:
    try:
        if platform.machine() != "x86_64":
            raise MoveError(f"processes can be moved on x86-64 only, and this is {platform.machine()}")
        with contextlib.ExitStack() as stack:
            if request["do"] != "want":
                # An earlier one may still be at it: it outlives the daemon that asked for it.
                lock = stack.enter_context((records / "lock").open("w"))
                _lock(lock.fileno(), time.monotonic() + request.get("timeout_s", 5))
            _join(request["init"])
            _prune(records)
            if request["do"] == "take":
                _take(records, request["pids"], request["nodes"])
            elif request["do"] == "give":
                _give(records, request["init"], request["pids"], request["moves"])
            elif request["do"] == "want":
                return {"wanted": _want(records, request["pids"])}
    except (MoveError, OSError) as error:
        return {"error": str(error)}
    return {}


def _lock(descriptor: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise MoveError("cards of another process are being moved, and that does not end") from None
            time.sleep(0.01)
        else:
            return


def _join(init: int) -> None:
    """Joins the user namespace of a container: there this user may trace what its containers run."""
    if os.path.samestat(Path(f"/proc/{init}/ns/user").stat(), Path("/proc/self/ns/user").stat()):
        return
    process = os.pidfd_open(init)
    try:
        if _libc.setns(process, ctypes.c_int(_CLONE_NEWUSER)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot join the container's user namespace: {os.strerror(number)}")
    finally:
        os.close(process)


def _give_up_root(uid: int, gid: int) -> None:
    if os.geteuid() == 0 and uid != 0:
        os.initgroups(pwd.getpwuid(uid).pw_name, gid)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def main(uid: int, gid: int, records: Path) -> int:
    """Answers one request. Returns 0."""
    _give_up_root(uid, gid)
    request = json.loads(sys.stdin.buffer.readline())
    sys.stdout.write(json.dumps(_answer(request, records)) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
