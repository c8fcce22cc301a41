"""Who has a journal open: the second daemon on one state names the first."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

__all__ = ["locked_by"]


def locked_by(path: Path) -> int | None:
    """Returns the id of another process that has a journal open; None when none has, or it cannot be seen."""
    # struct flock of fcntl(2): SQLite's locks are those of the file's bytes.
    asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with contextlib.suppress(OSError), path.open("r+b") as file:
        kind, _, _, _, pid = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
        if kind != fcntl.F_UNLCK and pid > 0:
            return int(pid)
    return None
