"""Facts about the host."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["boot_id", "has_real_gpu", "memory_bytes"]


def boot_id() -> str:
    """Returns what changes whenever the host boots."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def memory_bytes() -> int:
    """Returns the size of the host's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def has_real_gpu() -> bool:
    """Says whether a real NVIDIA driver is loaded on this host."""
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists()
