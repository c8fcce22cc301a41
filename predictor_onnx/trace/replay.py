"""From the record of a run to the memory that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from predictor_onnx.trace.allocator import CachingAllocator, rounded
from predictor_onnx.trace.events import Category, Events, Kind, Phase
from predictor_onnx.trace.workspace import workspace_bytes


@dataclass(frozen=True)
class MemoryUse:
    """What a run needs of the device, without the CUDA context. Bytes.

    Attributes:
        allocated: most that lives at once, workspaces included.
        reserved: most that the caching allocator takes from the driver.
        live: most that lives at once without workspaces, by category, at that moment; in the order of ``Category``.
        phase: in which phase that moment is.
        by_phase: most that lives at once in each phase, in the order of ``Phase``.
    """

    allocated: int
    reserved: int
    live: tuple[int, ...]
    phase: Phase
    by_phase: tuple[int, ...]


def replay(
    events: Events, *, capacity: int | None = None, expandable: bool = False, workspaces: bool = True
) -> MemoryUse:
    """Run the allocator over a record.

    Args:
        events: the record.
        capacity: what the device has for tensors, in bytes; None when it has no end.
        expandable: whether segments grow in place (``expandable_segments:True``).
        workspaces: whether convolutions take a workspace.

    Raises:
        OutOfDeviceMemoryError: the run does not fit the capacity.
    """
    allocator = CachingAllocator(capacity, expandable=expandable)
    blocks: dict[int, tuple[int, int]] = {}
    live = [0] * len(Category)
    by_phase = [0] * len(Phase)
    phase, total, most, at_most, phase_of_most = Phase.BUILD, 0, 0, tuple(live), Phase.BUILD
    for kind, subject, size in zip(events.kinds, events.subjects, events.sizes, strict=True):
        if kind == Kind.TAKE:
            taken = rounded(size)
            blocks[subject] = (allocator.take(size), taken)
            live[events.categories[subject]] += taken
            total += taken
            if total > by_phase[phase]:
                by_phase[phase] = total
                if total > most:
                    most, at_most, phase_of_most = total, tuple(live), phase
        elif kind == Kind.GIVE:
            block, taken = blocks.pop(subject)
            allocator.give(block)
            live[events.categories[subject]] -= taken
            total -= taken
        elif kind == Kind.PHASE:
            phase = Phase(subject)
        elif workspaces:
            needed = workspace_bytes(events.convolutions[subject])
            if needed:
                allocator.give(allocator.take(needed))
    return MemoryUse(allocator.peak_allocated, allocator.peak_reserved, at_most, phase_of_most, tuple(by_phase))
