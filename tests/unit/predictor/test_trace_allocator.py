"""The model of the caching allocator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_onnx.trace.allocator import CachingAllocator, OutOfDeviceMemoryError, rounded

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_a_first_request_takes_what_the_real_one_takes(size: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.take(size)
    assert allocator.reserved == reserved
    assert allocator.allocated == rounded(size) if reserved == 20 * MIB or size <= MIB else reserved


def test_a_rest_of_a_megabyte_is_not_split_off_a_large_block() -> None:
    allocator = CachingAllocator()
    allocator.take(19 * MIB)  # of a segment of 20 MiB
    assert (allocator.allocated, allocator.reserved) == (20 * MIB, 20 * MIB)
    other = CachingAllocator()
    other.take(5 * MIB)
    other.take(5 * MIB)
    assert (other.allocated, other.reserved) == (10 * MIB, 20 * MIB)


def test_the_smallest_block_that_holds_a_request_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.take(60 * MIB), allocator.take(40 * MIB)
    allocator.give(large)
    allocator.give(small)
    assert allocator.take(39 * MIB) == small
    assert allocator.reserved == 100 * MIB


def test_fragments_that_do_not_touch_do_not_serve_a_large_request() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.take(30 * MIB) for _ in range(4)]
    for block in blocks:
        allocator.give(block)
    allocator.take(100 * MIB)
    assert allocator.reserved == 220 * MIB


def test_an_expandable_segment_grows_instead() -> None:
    allocator = CachingAllocator(expandable=True)
    blocks = [allocator.take(30 * MIB) for _ in range(4)]
    for block in blocks:
        allocator.give(block)
    allocator.take(100 * MIB)
    assert allocator.reserved == 120 * MIB


def test_what_is_cached_is_given_back_before_a_request_fails() -> None:
    allocator = CachingAllocator(100 * MIB)
    allocator.give(allocator.take(60 * MIB))
    allocator.take(80 * MIB)
    assert allocator.reserved == 80 * MIB
    with pytest.raises(OutOfDeviceMemoryError, match="do not fit"):
        allocator.take(30 * MIB)
    assert allocator.allocated == 80 * MIB


def test_an_expandable_segment_may_give_back_the_end_that_it_wanted_to_grow() -> None:
    allocator = CachingAllocator(43_232_768, expandable=True)
    allocator.take(1_289_217)
    allocator.take(40_653_313)
    assert allocator.allocated <= allocator.reserved <= 43_232_768


_SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(1, 64 * MIB))


@given(
    st.lists(st.tuples(_SIZES, st.integers(0, 5)), max_size=60),
    st.booleans(),
    st.one_of(st.none(), st.integers(4 * MIB, 300 * MIB)),
)
def test_blocks_are_accounted_for_whatever_is_asked(
    requests: list[tuple[int, int]], expandable: bool, capacity: int | None
) -> None:
    allocator = CachingAllocator(capacity, expandable=expandable)
    live: list[tuple[int, int]] = []
    for size, gives in requests:
        try:
            live.append((allocator.take(size), rounded(size)))
        except OutOfDeviceMemoryError:
            assert capacity is not None
        for _ in range(min(gives - 3, len(live))):
            allocator.give(live.pop(0)[0])
        assert len({block for block, _ in live}) == len(live)
        asked = sum(size for _, size in live)
        assert asked <= allocator.allocated <= allocator.reserved <= allocator.peak_reserved
        # At most a megabyte is left on a block: what is less than that is not split off.
        assert allocator.allocated <= asked + MIB * len(live)
        assert allocator.allocated <= allocator.peak_allocated
        assert capacity is None or allocator.reserved <= capacity
    for block, _ in live:
        allocator.give(block)
    assert allocator.allocated == 0
    before = allocator.reserved
    if before >= 20 * MIB and expandable and capacity is None:
        allocator.take(2 * MIB)
        assert allocator.reserved == before
