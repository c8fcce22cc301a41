"""Reads torch's errors: whether the card was full, and what was asked of it in vain."""

from __future__ import annotations

import re
from typing import Final

#: torch's allocator, CUDA itself, and the libraries whose handles and workspaces found no room.
_FULL: Final = re.compile(r"out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE)
_TRIED: Final = re.compile(r"Tried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)")
_UNITS: Final = {"bytes": 2.0**-20, "KiB": 2.0**-10, "MiB": 1.0, "GiB": 1024.0}


def card_was_full(message: str) -> bool:
    """Whether an error says that device memory ran out."""
    return _FULL.search(message) is not None


def tried_mib(message: str) -> float | None:
    """MiB that torch's allocator was asked for in vain; None when the error does not say."""
    found = _TRIED.search(message)
    return None if found is None else float(found[1]) * _UNITS[found[2]]
