"""The driver's own checkpoint is asked as it wants to be asked, and nothing stays locked when it refuses."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nodedaemon.checkpoint import CheckpointError, Move, Process, start_time
from nodedaemon.checkpoint_cuda import CudaCheckpoints

# Behaves as cuda-checkpoint does: keeps the state in a file, and refuses to checkpoint when told to.
_PROGRAM = """#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> said
case "$*" in
    --get-state*) cat state ;;
    *"checkpoint --pid"*) if [ -e sick ]; then echo "OS call failed"; exit 1; fi; echo checkpointed > state ;;
    *"unlock --pid"*) echo running > state ;;
    *"lock --pid"*|*"restore --pid"*) echo locked > state ;;
esac
"""
_ME = Process(os.getpid(), start_time(os.getpid()))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "cuda-checkpoint"
    path.write_text(_PROGRAM)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "state").write_text("running\n")
    return path


def actions(program: Path) -> list[str]:
    said = (program.parent / "said").read_text().splitlines()
    return [line.removeprefix("--action ") for line in said if line.startswith("--action")]


async def test_a_process_is_locked_checkpointed_restored_and_unlocked(program: Path) -> None:
    cuda = CudaCheckpoints(mig=lambda: False, find=lambda: ("cuda-checkpoint", [str(program)]))
    assert cuda.probe().name == "cuda-checkpoint"
    for _ in range(2):
        await cuda.checkpoint(1, [_ME], {})
    for _ in range(2):
        await cuda.restore(1, [_ME], [Move("GPU-a", "GPU-b", {}), Move("GPU-c", "GPU-c", {})])
    pid = _ME.pid
    assert actions(program) == [
        f"lock --pid {pid} --timeout 10000",
        f"checkpoint --pid {pid}",
        f"restore --pid {pid} --device-map GPU-a=GPU-b",
        f"unlock --pid {pid}",
    ]


async def test_a_process_that_cannot_be_checkpointed_is_unlocked_again(program: Path) -> None:
    (program.parent / "sick").touch()
    cuda = CudaCheckpoints(mig=lambda: False, find=lambda: ("cuda-checkpoint", [str(program)]))
    with pytest.raises(CheckpointError, match="OS call failed"):
        await cuda.checkpoint(1, [_ME], {})
    assert actions(program)[-1] == f"unlock --pid {_ME.pid}"
    assert (program.parent / "state").read_text() == "running\n"


async def test_on_mig_and_without_a_program_it_is_refused_in_words(program: Path) -> None:
    mig = CudaCheckpoints(mig=lambda: True, find=lambda: ("cuda-checkpoint", [str(program)]))
    assert mig.probe().name == ""
    with pytest.raises(CheckpointError, match="MIG"):
        await mig.checkpoint(1, [_ME], {})
    assert not (program.parent / "said").exists()
    assert "cuda-bindings" in CudaCheckpoints(mig=lambda: False, find=lambda: ("", [])).probe().notice
