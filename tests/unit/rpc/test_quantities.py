"""Sizes and durations mean what people mean by them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puhui.rpc.quantities import parse_duration, parse_size, to_mib


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("12Gi", 12 * 2**30),
        ("12GiB", 12 * 2**30),
        ("1.5 TB", 1_500_000_000_000),
        ("100B", 100),
        ("0.5Ki", 512),
        ("10mb", 10**7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "", "GB", "-1GB", "24XB", "24 G B", "1e3GB", "iB", "5i", "5iB", "∞GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="write 24GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "length"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("250ms", 0.25), ("1.5H", 5400), (" 1m ", 60)],
)
def test_durations(text: str, length: float) -> None:
    assert parse_duration(text) == length


@pytest.mark.parametrize("text", ["10", "", "m", "-1m", "10 m", "1y", "1h30", "1:30"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="write 90s"):
        parse_duration(text)


@given(st.integers(0, 2**50))
def test_mib_are_rounded_up(size: int) -> None:
    assert (to_mib(size) - 1) * 2**20 < size <= to_mib(size) * 2**20 or size == 0
