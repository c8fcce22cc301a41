"""Stops and continues many processes by signals, where the host has no freezer for them.

A process cannot refuse SIGSTOP, but one that still runs can start another. So they are stopped again and again, until
twice in a row nobody is found that is not stopped.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc

from puhui.rpc.errors import Refusal

__all__ = ["Process", "continue_all", "processes_in_namespace", "processes_in_sessions", "stop_all"]

Process = tuple[int, str]
"""Process id and start time, which together are never used again."""

_LIMIT_S = 10.0
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.05
_PAST = "TtZXx"
"""States in which a process runs no more: stopped, traced, ended."""


def processes_in_namespace(init: int) -> list[Process]:
    """Returns the processes of the process-id namespace that a process is in; none when that process is gone."""
    try:
        namespace = Path(f"/proc/{init}/ns/pid").stat()
    except OSError:
        return []
    return [found for found in _all() if _is_in(found[0], namespace)]


def _is_in(process: int, namespace: os.stat_result) -> bool:
    try:
        return os.path.samestat(Path(f"/proc/{process}/ns/pid").stat(), namespace)
    except OSError:
        return False  # it has ended, or is another user's


def processes_in_sessions(leaders: frozenset[int]) -> list[Process]:
    """Returns the processes of sessions."""
    return [(int(fields[0]), fields[21]) for fields in _stats() if int(fields[5]) in leaders]


async def stop_all(find: Callable[[], Iterable[Process]]) -> None:
    """Stops every process that is found, and those that they start meanwhile.

    Args:
        find: finds the processes, each time it is called.

    Raises:
        Refusal: DEADLINE_EXCEEDED with SUSPEND_STUCK, one of them waits for the kernel; the others are stopped.
    """
    deadline = asyncio.get_running_loop().time() + _LIMIT_S
    pause, quiet = _FIRST_PAUSE_S, 0
    while quiet < 2:
        running = await asyncio.to_thread(lambda: _running(find()))
        for process in running:
            _send(process, signal.SIGSTOP)
        quiet = 0 if running else quiet + 1
        if not running:
            continue
        if asyncio.get_running_loop().time() > deadline:
            raise Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "SUSPEND_STUCK",
                f"process {running[0][0]} did not stop within {_LIMIT_S:g} s; it waits for the kernel, see "
                "`ps -eo pid,stat,wchan,args`",
            )
        # Nothing tells of the stop of a process that is not one's child.
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)


def _running(processes: Iterable[Process]) -> list[Process]:
    """Returns those that are not stopped."""
    states = {process: _state(process) for process in processes}
    parents = {parent for state, parent in states.values() if state == "T"}
    # Who has started a process with vfork cannot run before that one does, and so waits (D) for one that is stopped.
    return [
        process
        for process, (state, _) in states.items()
        if state not in _PAST and not (state == "D" and str(process[0]) in parents)
    ]


def continue_all(processes: Iterable[Process]) -> None:
    """Continues processes."""
    for process in processes:
        _send(process, signal.SIGCONT)


def _send(process: Process, number: int) -> None:
    try:
        descriptor = os.pidfd_open(process[0])
    except ProcessLookupError:
        return
    try:
        # The descriptor stays with whom it is, so this says whether it is whom we mean.
        if _start_time(process[0]) == process[1]:
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _all() -> Iterator[Process]:
    for fields in _stats():
        yield int(fields[0]), fields[21]


def _start_time(process: int) -> str | None:
    fields = _stat(str(process))
    return fields[21] if fields else None


def _state(process: Process) -> tuple[str, str]:
    """Returns the state of a process, and its parent's id."""
    fields = _stat(str(process[0]))
    return (fields[2], fields[3]) if fields and fields[21] == process[1] else ("X", "")


def _stats() -> Iterator[list[str]]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - hundreds of them, again and again
        fields = _stat(name) if name.isdigit() else None
        if fields:
            yield fields


def _stat(process: str) -> list[str] | None:
    """Returns the fields of /proc/PID/stat, counted from 0; the second, a name, is left empty."""
    try:
        text = Path("/proc", process, "stat").read_text()
    except OSError:
        return None
    return [process, "", *text.rpartition(")")[2].split()]
