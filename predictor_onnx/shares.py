"""Which share of a card a profile is, read from the profiles' names; no table of boards is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

#: ``3g.20gb``, ``1g.10gb+me``: compute slices and gigabytes.
_PROFILE: Final = re.compile(r"(\d+)g\.(\d+)gb(?:[+-].*)?")
#: Memory of a card is cut in eighths where there are seven compute slices, else like its compute.
_SEVEN: Final = 7
_EIGHTHS: Final = 8


@dataclass(frozen=True)
class Share:
    """Shares of the whole-card profile, above 0 and at most 1; bandwidth follows the memory slices."""

    compute: float
    memory: float


def shares(profiles: Iterable[str]) -> dict[str, Share]:
    """Share of each profile of one board, relative to its largest.

    ``shares(["1g.5gb", "3g.20gb", "7g.40gb"])["3g.20gb"]`` is 3/7 of the compute and 4/8 of the bandwidth.

    Raises:
        ValueError: a name is not that of a MIG profile.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for name in profiles:
        found = _PROFILE.fullmatch(name)
        if found is None or not int(found[1]) or not int(found[2]):
            raise ValueError(f"{name!r} is no MIG profile; names look like 1g.10gb")
        sizes[name] = (int(found[1]), int(found[2]))
    if not sizes:
        return {}
    slices, gigabytes = max(sizes.values())
    parts = _EIGHTHS if slices == _SEVEN else slices
    return {
        name: Share(count / slices, min(parts, max(1, round(parts * size / gigabytes))) / parts)
        for name, (count, size) in sizes.items()
    }
