"""Whether a command that failed ran out of device memory, as the end of its output tells. Pure.

Device memory has no killer: the driver refuses an allocation, the framework raises, and the command ends like any other
that failed. What the host's memory limit kills is something else, and known from the node (`Container.oom_killed`).

Taken for a proof is only what a library prints when an allocation on the device has failed for good, and only when the
command did not go on to die of something else. A warning about a failed allocation, of which XLA itself says that it is
no failure, is none.
"""

from __future__ import annotations

import re

__all__ = ["TAIL_BYTES", "ran_out"]

TAIL_BYTES = 16 * 2**10
"""So much of the end of the output is looked at. A report of PyTorch or XLA is a few KiB long."""

_REFUSED = re.compile(
    "|".join(
        (
            # PyTorch; HIP is its name for CUDA on AMD
            r"torch\.(?:cuda\.)?OutOfMemoryError: \S",
            r"(?:CUDA|HIP) out of memory\. Tried to allocate",
            r"Error: (?:CUDA|HIP) out of memory",
            r"(?:CUDA|HIP) error: out of memory",
            r"cuda runtime error \(2\)",
            # the driver, the runtime and NCCL
            r"CUDA_ERROR_OUT_OF_MEMORY",
            r"cudaErrorMemoryAllocation",
            r"cudaMalloc failed: out of memory",
            r"(?i:cuda failure (?:2\b|'?out of memory))",
            # their libraries
            r"CU(?:BLAS|SOLVER|SPARSE)_STATUS_ALLOC_FAILED",
            r"CUDNN_STATUS_ALLOC_FAILED",
            r"CUFFT_ALLOC_FAILED",
            # XLA (JAX and TensorFlow), TensorFlow, CuPy, vLLM
            r"(?i:resource[_ ]exhausted): (?:Out of memory (?:while trying to allocate|allocating)|"
            r"Failed to allocate request for \S+ \(\d+B\) on device)",
            r"OOM when allocating tensor .*device:GPU",
            r"cupy\.cuda\.memory\.OutOfMemoryError: ",
            r"No available memory for the cache blocks",
        )
    )
)
_RANK = r"(?:\[(?P<rank>\w+)\]:\s?)?"
# A worker of torchrun may write its rank before each line.
_TRACEBACK = re.compile(_RANK + r"\s*(?:\+ Exception Group )?Traceback \(most recent call last\)")
_RAISED = re.compile(_RANK + r"(?P<name>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Exhausted))(?::|$)")
_LAST_OF_TRACEBACK = re.compile(_RANK + r"(?P<name>[A-Za-z_][\w.]*)(?::|$)")
_IGNORED = re.compile(_RANK + r"Exception ignored in")
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
# What ends a program without an exception of Python.
_NATIVE_END = re.compile(
    r"Segmentation fault|terminate called after|Fatal Python error|Bus error|Killed\b|Aborted\b|[\w./-]+: error: "
)
# PyTorch's own words, which programs print when they have caught it.
_SAID = re.compile(r"(?:CUDA|HIP) out of memory\. Tried to allocate")
# What starts a process raises these when that process has failed.
_OF_LAUNCHERS = frozenset(
    {"ChildFailedError", "CalledProcessError", "ProcessRaisedException", "ProcessExitedException", "SystemExit"}
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def ran_out(tail: bytes) -> bool:
    """Returns whether a command that has failed ran out of device memory.

    Args:
        tail: the end of its output, both streams; `TAIL_BYTES` of it are enough.
    """
    lines = _COLOUR.sub("", tail[-TAIL_BYTES:].decode(errors="replace")).splitlines()
    refused = max((number for number, line in enumerate(lines) if _REFUSED.search(line)), default=None)
    if refused is None:
        return False
    after = [line for line in lines[refused + 1 :] if line.strip()]
    raised = _RAISED.match(lines[refused])
    if raised is None and _SAID.search(lines[refused]) and after and not _TRACEBACK.match(after[0]):
        return False  # it was caught and told of, and the program went on
    return not _died_of_something_else(after, raised["rank"] if raised is not None else None)


def _died_of_something_else(lines: list[str], rank: str | None) -> bool:
    """Returns whether what follows a refusal tells of another cause of death.

    Args:
        lines: that are not empty, after the refusal.
        rank: of the worker that was refused; the others fail because of it.
    """
    chained = ignored = in_traceback = False
    for line in lines:
        if line.startswith(_CHAINED):
            chained = True
        elif _IGNORED.match(line):
            ignored = True
        elif _TRACEBACK.match(line):
            in_traceback = True
        elif in_traceback and _rest(line)[:1].isspace():
            continue  # a frame
        else:
            raised = (_LAST_OF_TRACEBACK if in_traceback else _RAISED).match(line)
            if raised is not None:
                of_another = rank is not None and raised["rank"] not in (None, rank)
                of_a_launcher = raised["name"].rpartition(".")[2] in _OF_LAUNCHERS
                if not (chained or ignored or of_another or of_a_launcher):
                    return True
                ignored = False
            elif _NATIVE_END.search(line) and not chained:
                return True
            in_traceback = False
    return False


def _rest(line: str) -> str:
    """Returns a line without the rank before it."""
    found = re.match(_RANK, line)
    return line[found.end() :] if found is not None else line
