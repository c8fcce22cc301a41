"""Sizes, durations and shares as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_duration", "parse_percent", "parse_size", "to_mib"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%?")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """Returns a size in bytes: "24GB", "24G" (powers of 1000), "12Gi", "12GiB" (powers of 1024), "100B".

    Raises:
        ValueError: it is none of these.
    """
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or not (match[2] or match[4]) or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is no size; write 24GB, 24G, 12Gi or 12GiB")
    base = 1024 if match[3] else 1000
    return round(float(match[1]) * float(base ** _POWERS[match[2].lower()]))


def to_mib(size_bytes: int) -> int:
    """Returns a size in MiB, rounded up."""
    return -(-size_bytes // 2**20)


def parse_duration(text: str) -> float:
    """Returns a duration in seconds: "90s", "10m", "1h30m", "2d", "250ms".

    Raises:
        ValueError: it is none of these.
    """
    compact = text.strip().lower() if isinstance(text, str) else ""
    if _DURATION.fullmatch(compact) is None:
        raise ValueError(f"{text!r} is no duration; write 90s, 10m, 1h30m or 2d")
    return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(compact))


def parse_percent(text: str) -> float:
    """Returns a share in percent: "1%", "0.5 %", "2".

    Raises:
        ValueError: it is none of these, or more than 100.
    """
    match = _PERCENT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or float(match[1]) > 100:
        raise ValueError(f"{text!r} is no share; write 1% or 0.5%")
    return float(match[1])
