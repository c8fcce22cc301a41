"""A model of PyTorch's CUDA caching allocator: what a run of allocations reserves of the device.

Source of the rules: ``c10/cuda/CUDACachingAllocator.cpp`` of PyTorch 2.x with its default settings (no garbage
collection, no power-of-two rounding, unlimited split size) on one stream. Bytes everywhere.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

MIB: Final = 1 << 20
#: Every request is rounded up to a multiple of it (kMinBlockSize).
_GRAIN: Final = 512
#: Requests up to this size come from the small pool (kSmallSize).
_SMALL: Final = MIB
#: What the small pool asks the driver for at a time (kSmallBuffer).
_SMALL_SEGMENT: Final = 2 * MIB
#: Requests of the large pool below this size share segments (kMinLargeAlloc) of this size (kLargeBuffer).
_SHARED_BELOW: Final = 10 * MIB
_SHARED_SEGMENT: Final = 20 * MIB
#: Larger segments are a multiple of it (kRoundLarge).
_LARGE_GRAIN: Final = 2 * MIB


class OutOfDeviceMemoryError(Exception):
    """The device has no room for a segment, though everything cached was given back."""


class _Block:
    """A stretch of a segment. ``before`` and ``after`` are its neighbours in the segment."""

    __slots__ = ("after", "before", "free", "number", "size", "small")

    def __init__(self, number: int, size: int, small: bool) -> None:
        self.number = number
        self.size = size
        self.small = small
        self.free = False
        self.before: _Block | None = None
        self.after: _Block | None = None


def rounded(size: int) -> int:
    """What a request of ``size`` bytes takes."""
    return max(_GRAIN, -(-size // _GRAIN) * _GRAIN)


def segment_of(size: int) -> int:
    """What the driver is asked for when nothing cached fits a rounded request."""
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _SHARED_BELOW:
        return _SHARED_SEGMENT
    return -(-size // _LARGE_GRAIN) * _LARGE_GRAIN


class CachingAllocator:
    """Best fit with splitting and merging, in two pools.

    Attributes:
        allocated: bytes in live blocks, rounded. ``peak_allocated`` is its most so far.
        reserved: bytes of segments taken from the driver. ``peak_reserved`` is its most so far.
    """

    def __init__(self, capacity: int | None = None, *, expandable: bool = False) -> None:
        """An empty allocator.

        Args:
            capacity: bytes that the driver can give; None when it has no end.
            expandable: whether segments grow in place (``expandable_segments:True``).
        """
        self.allocated = self.peak_allocated = 0
        self.reserved = self.peak_reserved = 0
        self._capacity = capacity
        self._expandable = expandable
        #: Free blocks of the large and the small pool, by size, then age (addresses grow with age).
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._blocks: dict[int, _Block] = {}
        self._count = 0
        #: The last block of each pool's growing segment, where segments expand.
        self._tail: dict[bool, _Block] = {}

    def take(self, size: int) -> int:
        """Allocate; the answer names the block.

        Raises:
            OutOfDeviceMemoryError: the capacity does not suffice.
        """
        size = rounded(size)
        small = size <= _SMALL
        free = self._free[small]
        at = bisect_left(free, (size, -1))
        if at < len(free):
            block = self._blocks[free.pop(at)[1]]
            block.free = False
        else:
            block = self._grown(size, small) if self._expandable else self._segment(segment_of(size), small)
        left = block.size - size
        if left >= _GRAIN if small or self._expandable else left > _SMALL:
            self._split(block, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block.number

    def give(self, number: int) -> None:
        """Free a block; it is merged with free neighbours and kept for later requests."""
        block = self._blocks[number]
        self.allocated -= block.size
        block.free = True
        before, after = block.before, block.after
        if before is not None and before.free:
            self._forget(before)
            block.size += before.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
            del self._blocks[before.number]
        if after is not None and after.free:
            self._forget(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
            elif self._tail.get(block.small) is after:
                self._tail[block.small] = block
            del self._blocks[after.number]
        insort(self._free[block.small], (block.size, block.number))

    def _forget(self, block: _Block) -> None:
        free = self._free[block.small]
        free.pop(bisect_left(free, (block.size, block.number)))

    def _new(self, size: int, small: bool) -> _Block:
        block = _Block(self._count, size, small)
        self._blocks[self._count] = block
        self._count += 1
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = self._new(block.size - size, block.small)
        block.size = size
        rest.free = True
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        elif self._tail.get(block.small) is block:
            self._tail[block.small] = rest
        block.after = rest
        insort(self._free[block.small], (rest.size, rest.number))

    def _segment(self, size: int, small: bool) -> _Block:
        self._reserve(size)
        return self._new(size, small)

    def _grown(self, size: int, small: bool) -> _Block:
        """The pool's one segment, grown until its last block holds ``size`` bytes."""
        tail, more = self._lacking(size, small)
        if self._capacity is not None and self.reserved + more > self._capacity:
            # The end of the segment itself may be given back.
            self._give_back()
            tail, more = self._lacking(size, small)
        self._reserve(more)
        if tail is not None and tail.free:
            self._forget(tail)
            tail.size += more
            tail.free = False
            return tail
        block = self._new(more, small)
        if tail is not None:
            tail.after, block.before = block, tail
        self._tail[small] = block
        return block

    def _lacking(self, size: int, small: bool) -> tuple[_Block | None, int]:
        """The last block of the pool's segment, and by how many bytes it must grow to hold ``size``."""
        grain = _SMALL_SEGMENT if small else _SHARED_SEGMENT
        tail = self._tail.get(small)
        has = tail.size if tail is not None and tail.free else 0
        return tail, -(-(size - has) // grain) * grain

    def _reserve(self, size: int) -> None:
        if self._capacity is not None and self.reserved + size > self._capacity:
            self._give_back()
            if self.reserved + size > self._capacity:
                raise OutOfDeviceMemoryError(
                    f"{size} bytes more than the {self.reserved} in use do not fit {self._capacity}"
                )
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _give_back(self) -> None:
        """Return to the driver what is wholly free; an expandable segment shrinks at its end."""
        for free in self._free:
            for entry in list(free):
                block = self._blocks[entry[1]]
                if block.after is not None or (block.before is not None and not self._expandable):
                    continue
                free.remove(entry)
                self.reserved -= block.size
                if block.before is not None:
                    block.before.after = None
                    self._tail[block.small] = block.before
                else:
                    self._tail.pop(block.small, None)
                del self._blocks[block.number]
