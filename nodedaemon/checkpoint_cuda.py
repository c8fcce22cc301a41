"""Checkpoints CUDA processes with the driver's own means: NVIDIA's cuda-bindings, or the cuda-checkpoint binary.

Device memory goes to host memory and the GPU is let go; CPU threads live on, and CUDA calls block until the process is
restored (driver 550 and later; the calls of cuda-bindings from 570 on). On MIG it does not work: it fails with "out of
memory", and NVIDIA's maintainer says that MIG is not supported (NVIDIA/cuda-checkpoint#42). So it is refused there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from nodedaemon.checkpoint import Ability, CheckpointError, Move, Process, living

__all__ = ["CudaCheckpoints", "find_command"]

_LOCK_MS = 10_000
_LIMIT_S = 120.0
"""Longest that one step may take: device memory is copied at some GB/s."""
_NO_MIG = (
    "CUDA processes on MIG slices cannot be checkpointed: NVIDIA's driver does not support it "
    "(NVIDIA/cuda-checkpoint#42), so shares are reclaimed by detaching and, where a job allows it, by stopping"
)
_NOTHING = (
    "CUDA processes cannot be checkpointed: neither NVIDIA's Python package cuda-bindings nor the program "
    "cuda-checkpoint is installed"
)


def find_command() -> tuple[str, list[str]]:
    """Returns what can checkpoint CUDA processes here, and the command that does it; empty when nothing can."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec("cuda.bindings.driver") is not None:
            return "cuda-bindings", [sys.executable, "-m", "nodedaemon.checkpoint_bindings"]
    binary = shutil.which("cuda-checkpoint")
    return ("cuda-checkpoint", [binary]) if binary else ("", [])


class CudaCheckpoints:
    """Checkpoints CUDA processes.

    Args:
        mig: whether the cards of this node are cut with MIG.
        find: finds what does it.
    """

    def __init__(self, *, mig: Callable[[], bool], find: Callable[[], tuple[str, list[str]]] = find_command) -> None:
        self._mig = mig
        self._find = find

    def probe(self) -> Ability:  # noqa: D102 - see Checkpoints
        name, _ = self._find()
        if not name:
            return Ability("", _NOTHING)
        return Ability("", _NO_MIG) if self._mig() else Ability(name)

    async def checkpoint(self, init: int, processes: Collection[Process], nodes: Mapping[str, Path]) -> None:  # noqa: D102
        ability = self.probe()
        if not ability.name:
            raise CheckpointError(ability.notice)
        for one in living(processes):
            await self._take(one)

    async def _take(self, one: Process) -> None:
        state = await self._state(one)
        if state == "checkpointed":
            return
        try:
            if state != "locked":
                await self._act("lock", one, "--timeout", str(_LOCK_MS))
            await self._act("checkpoint", one)
        except BaseException:
            # It must not stay locked: its work would wait for ever.
            await self._let_run(one)
            raise

    async def restore(self, init: int, processes: Collection[Process], moves: Sequence[Move]) -> None:  # noqa: D102
        changed = [f"{move.old_uuid}={move.new_uuid}" for move in moves if move.old_uuid != move.new_uuid]
        for one in living(processes):
            await self._let_run(one, *(["--device-map", ",".join(changed)] if changed else []))

    async def _let_run(self, one: Process, *device_map: str) -> None:
        state = await self._state(one)
        if state == "checkpointed":
            await self._act("restore", one, *device_map)
            state = "locked"
        if state == "locked":
            await self._act("unlock", one)
        elif state != "running":
            raise CheckpointError(f"process {one.pid} is {state}: the driver cannot go on with it; end it")

    async def wanted(self, init: int, processes: Collection[Process]) -> Process | None:
        """Returns None: the driver does not tell which of its calls block."""
        return None

    async def _state(self, one: Process) -> str:
        return (await self._call("--get-state", "--pid", str(one.pid))).strip().lower()

    async def _act(self, action: str, one: Process, *more: str) -> None:
        await self._call("--action", action, "--pid", str(one.pid), *more)

    async def _call(self, *arguments: str) -> str:
        _, command = self._find()
        if not command:
            raise CheckpointError(_NOTHING)
        process = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "LANG": "C.UTF-8"},
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
        what = " ".join(arguments)
        try:
            async with asyncio.timeout(_LIMIT_S):
                said, _ = await process.communicate()
        except TimeoutError as error:
            raise CheckpointError(f"the driver did not answer `{what}` within {_LIMIT_S:g} s") from error
        text = said.decode(errors="replace")
        if process.returncode:
            raise CheckpointError(f"the driver refused `{what}`: {text.strip()[-300:] or process.returncode}")
        return text
