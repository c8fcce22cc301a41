"""Does what NVIDIA's cuda-checkpoint does, with its options, through cuda-bindings.

    python -m nodedaemon.checkpoint_bindings --get-state --pid 4711
    python -m nodedaemon.checkpoint_bindings --action lock --pid 4711 --timeout 10000

A process of its own, so that a call that the driver never answers holds up nothing else.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from importlib import import_module
from typing import Any

__all__ = ["main"]

_STATES = ("running", "locked", "checkpointed", "failed")


class _RefusedError(Exception):
    """The driver refused something; the text has its reason."""


def main(arguments: list[str]) -> int:
    """Does one thing. Returns the exit code: 0, or 1 when the driver refuses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--get-state", action="store_true")
    parser.add_argument("--action", choices=("lock", "checkpoint", "restore", "unlock"))
    parser.add_argument("--timeout", type=int, default=0)
    parser.add_argument("--device-map", default="")
    asked = parser.parse_args(arguments)
    driver: Any = import_module("cuda.bindings.driver")
    try:
        _require(driver, driver.cuInit(0))
        if asked.get_state:
            state = _require(driver, driver.cuCheckpointProcessGetState(asked.pid))
            sys.stdout.write(_STATES[int(state)] + "\n")
        else:
            _act(driver, asked)
    except _RefusedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _act(driver: Any, asked: argparse.Namespace) -> None:
    if asked.action == "lock":
        lock = driver.CUcheckpointLockArgs()
        lock.timeoutMs = asked.timeout
        _require(driver, driver.cuCheckpointProcessLock(asked.pid, lock))
    elif asked.action == "checkpoint":
        _require(driver, driver.cuCheckpointProcessCheckpoint(asked.pid, driver.CUcheckpointCheckpointArgs()))
    elif asked.action == "restore":
        restore = driver.CUcheckpointRestoreArgs()
        pairs = [_pair(driver, one) for one in asked.device_map.split(",") if one]
        if pairs:
            restore.gpuPairs = pairs
            restore.gpuPairsCount = len(pairs)
        _require(driver, driver.cuCheckpointProcessRestore(asked.pid, restore))
    else:
        _require(driver, driver.cuCheckpointProcessUnlock(asked.pid, driver.CUcheckpointUnlockArgs()))


def _pair(driver: Any, text: str) -> Any:
    old, _, new = text.partition("=")
    pair = driver.CUcheckpointGpuPair()
    pair.oldUuid, pair.newUuid = _uuid(driver, old), _uuid(driver, new)
    return pair


def _uuid(driver: Any, text: str) -> Any:
    one = driver.CUuuid()
    one.bytes = uuid.UUID(text.removeprefix("GPU-").removeprefix("MIG-")).bytes
    return one


def _require(driver: Any, answer: Any) -> Any:
    code, *values = answer
    if int(code) != 0:
        _, name = driver.cuGetErrorName(code)
        raise _RefusedError(name.decode() if isinstance(name, bytes) else str(code))
    return values[0] if values else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
