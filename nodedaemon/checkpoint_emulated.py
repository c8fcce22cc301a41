"""Checkpoints real processes on emulated cards. docs/decisions/0010 says how, and what that is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nodedaemon.checkpoint import Ability, CheckpointError, Move, Process, living
from nodedaemon.emulation import card_mover

__all__ = ["EmulatedCheckpoints", "emulated_ability"]

_LIMIT_S = 20.0
_NOBODY_TRACES = 3
"""Value of kernel.yama.ptrace_scope, see ptrace(2)."""


class EmulatedCheckpoints:
    """Moves processes off emulated cards, and onto others.

    Args:
        uid: user that owns the processes, or the user namespace that they are in.
        gid: that user's group.
        records: directory that says what each checkpointed process had open; made if missing.
    """

    def __init__(self, uid: int, gid: int, records: Path) -> None:
        self._uid = uid
        self._gid = gid
        self._records = records
        records.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(records, uid, gid)
        records.chmod(0o700)

    def probe(self) -> Ability:  # noqa: D102 - see Checkpoints
        return emulated_ability()

    async def checkpoint(self, init: int, processes: Collection[Process], nodes: Mapping[str, Path]) -> None:  # noqa: D102
        identities = {}
        for name, path in nodes.items():
            status = path.stat()
            identities[name] = [status.st_dev, status.st_ino]
        await self._ask({"do": "take", "init": init, "pids": _pids(processes), "nodes": identities})

    async def restore(self, init: int, processes: Collection[Process], moves: Sequence[Move]) -> None:  # noqa: D102
        paths = {old: path for move in moves for old, path in move.paths.items()}
        await self._ask({"do": "give", "init": init, "pids": _pids(processes), "moves": paths})

    async def wanted(self, init: int, processes: Collection[Process]) -> Process | None:  # noqa: D102
        pids = _pids(processes)
        if not pids:
            return None
        mover = await self._launch()
        try:
            answer = await _exchange(mover, {"do": "want", "init": init, "pids": pids})
        finally:
            await _end(mover)
        return next((one for one in processes if one.pid == answer.get("wanted")), None)

    async def _ask(self, request: dict[str, Any]) -> None:
        if not request["pids"]:
            return
        mover = await self._launch()
        try:
            async with asyncio.timeout(_LIMIT_S):
                answer = await _exchange(mover, request)
                await mover.wait()
        except TimeoutError as error:
            # It is not ended: a process that it has stopped would go on from where it must not.
            raise CheckpointError(
                f"a process did not stop within {_LIMIT_S:g} s; see `ps -eo pid,stat,wchan`"
            ) from error
        if "error" in answer:
            raise CheckpointError(str(answer["error"]))

    async def _launch(self) -> asyncio.subprocess.Process:
        identity = (str(self._uid), str(self._gid))
        try:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", card_mover.__file__, *identity, str(self._records)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                cwd="/",
                # What ends the daemon must not end it in the middle.
                start_new_session=True,
            )
        except OSError as error:
            raise CheckpointError(f"what moves cards cannot be started: {error.strerror}") from error


def emulated_ability() -> Ability:
    """Returns whether processes on emulated cards can be checkpointed on this host."""
    if platform.machine() != "x86_64":
        return Ability("", f"emulated cards checkpoint processes on x86-64 only, and this is {platform.machine()}")
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except OSError:
        scope = 0
    if scope >= _NOBODY_TRACES:
        return Ability("", "kernel.yama.ptrace_scope is 3: no process may be traced until this host is started anew")
    return Ability("emulated", "checkpoints are emulated: real processes lose and get emulated cards")


def _pids(processes: Collection[Process]) -> list[int]:
    return [one.pid for one in living(processes)]


async def _exchange(mover: asyncio.subprocess.Process, request: dict[str, Any]) -> dict[str, Any]:
    assert mover.stdin is not None  # noqa: S101 - both are pipes
    assert mover.stdout is not None  # noqa: S101
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        mover.stdin.write(json.dumps(request).encode() + b"\n")
        await mover.stdin.drain()
    said = await mover.stdout.readline()
    answer: dict[str, Any] = json.loads(said) if said else {"error": "what moves cards ended without an answer"}
    return answer


async def _end(mover: asyncio.subprocess.Process) -> None:
    """Ends a mover that only looks."""
    assert mover.stdin is not None  # noqa: S101
    mover.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        mover.kill()
    await asyncio.shield(mover.wait())
