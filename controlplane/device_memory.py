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
# The last line of a traceback; a worker of torchrun may write its rank before it.
_RAISED = re.compile(r"(?:\[\w+\]:\s*)?(?P<name>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Exhausted))(?::|$)")
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
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
    chained = False
    for line in lines[refused + 1 :]:
        chained = chained or line.startswith(_CHAINED)
        raised = _RAISED.match(line)
        if raised is not None and not chained and raised["name"].rpartition(".")[2] not in _OF_LAUNCHERS:
            return False
    return True
