"""Stays with one process of the process runtime, as conmon stays with a container.

    python -m nodedaemon.process_keeper FOLDER

FOLDER/spec.json says what to run. The keeper writes the process's output in the k8s-file format, and how it ended to
FOLDER/exit.json. It outlives the daemon, so output and exit code are never lost. Standard library only: it must
start fast.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOM_S = 0.5
"""Time between two tries to write on a full disk, in seconds."""

_READ_BYTES = 8192


def main(folder: Path) -> int:
    """Runs the process and stays until it has ended. Returns 0."""
    # By itself and first of all: a daemon that ends at this moment finds it again.
    _write(folder / "keeper.json", {"pid": os.getpid()})
    spec = json.loads((folder / "spec.json").read_text())
    # What is meant for the process reaches it by its own id; the keeper itself outlives everything but SIGKILL.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with Path(spec["log"]).open("ab", buffering=0) as log:
        try:
            process = subprocess.Popen(
                spec["command"],
                cwd=spec["cwd"],
                env=spec["env"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                **dropped(spec),
                preexec_fn=restore_signals,
            )
        except OSError as error:
            tell({"error": f"{spec['command'][0]}: {error.strerror}"})
            return 0
        # Before the daemon is told: it may want to signal the process at once.
        _write(folder / "running.json", {"pid": process.pid, "start_time": time.time()})
        tell({"pid": process.pid})
        _copy(process, log)
    code = process.wait()
    # As when a container's init ends: nothing of it lives on.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if (folder / "execs").exists():
        _end_execs(folder / "execs")
    ended: dict[str, object] = {"exit_code": 128 - code if code < 0 else code, "end_time": time.time()}
    while not has_room(lambda: _write(folder / "exit.json", ended)):
        time.sleep(ROOM_S)
    return 0


def _end_execs(folder: Path) -> None:
    """Ends what was started beside the process: there may be no daemon that does."""
    from nodedaemon.exec_process import live_command  # not before: it would slow every start down

    for one in folder.iterdir():
        leader = live_command(one)
        if leader:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(leader, signal.SIGKILL)


def dropped(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns how the process gives up root, when this is root and it is to run as somebody else."""
    if os.geteuid() != 0 or spec["uid"] == 0:
        return {}
    return {"user": spec["uid"], "group": spec["gid"], "extra_groups": []}


def restore_signals() -> None:
    """Gives a new process the signals back that its keeper ignores."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def tell(facts: dict[str, object]) -> None:
    """Answers the daemon, which may have gone meanwhile."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _copy(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Copies output to the log until the process has ended and all that it wrote is there."""
    assert process.stdout is not None  # noqa: S101 - both are pipes
    assert process.stderr is not None  # noqa: S101
    ended = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, b"stdout")
        selector.register(process.stderr, selectors.EVENT_READ, b"stderr")
        selector.register(ended, selectors.EVENT_READ, b"")
        open_pipes = 2
        while open_pipes:
            # A child that lives on may keep the pipes open for ever: what is there when the process ends is all.
            ready = [key for key, _ in selector.select()]
            over = any(key.data == b"" for key in ready)
            for key in ready:
                if key.data == b"":
                    continue
                data = os.read(key.fd, _READ_BYTES)
                if data:
                    append(log, log_lines(data, key.data))
                else:
                    selector.unregister(key.fileobj)
                    open_pipes -= 1
            if over and not any(key.data != b"" for key in ready):
                break
    os.close(ended)


def append(log: IO[bytes], lines: bytes) -> None:
    """Writes output down. On a full disk it waits for room, and so in the end does the process: nothing is lost."""
    left = memoryview(lines)

    def write() -> None:
        nonlocal left
        while left:
            left = left[log.write(left) :]

    while not has_room(write):
        time.sleep(ROOM_S)


def has_room(write: Callable[[], None]) -> bool:
    """Writes something, and says whether the disk had room for it."""
    try:
        write()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return True


def log_lines(data: bytes, stream: bytes) -> bytes:
    """Returns a piece of output in the k8s-file format."""
    stamp = time.time_ns()
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stamp // 10**9)) + f".{stamp % 10**9:09d}+00:00"
    head = text.encode() + b" " + stream
    pieces = data.split(b"\n")
    lines = [head + b" F " + piece + b"\n" for piece in pieces[:-1]]
    if pieces[-1]:
        lines.append(head + b" P " + pieces[-1] + b"\n")
    return b"".join(lines)


def _write(path: Path, facts: dict[str, object]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(facts))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
