"""The most device memory that a container was seen to use: samples in, peak out. Pure.

Only samples in which every card tells its memory, and a process holds one, count: what cannot be read is not 0, and a
card that nobody holds yet says nothing of what is to run on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puhui.v1.node_service_pb2 import UtilizationSample

__all__ = ["MemoryPeak", "seen"]


@dataclass(frozen=True)
class MemoryPeak:
    """The most device memory that was seen in use, on all cards of a container together."""

    mib: int = 0
    """0 while none was seen."""
    samples: int = 0
    """In how many looks memory was seen in use."""


def seen(before: MemoryPeak, samples: Sequence[UtilizationSample]) -> MemoryPeak:
    """Returns the peak after a look at all cards of a container.

    Args:
        before: the peak until then.
        samples: what was seen now, at least one sample of each card.
    """
    used: dict[str, int] = {}
    for one in samples:
        if not one.HasField("memory_used_mib"):
            return before
        used[one.uuid] = max(one.memory_used_mib, used.get(one.uuid, 0))
    mib = sum(used.values())
    if not mib or not any(one.processes for one in samples):
        return before
    return MemoryPeak(max(mib, before.mib), before.samples + 1)
