"""Waits for a file to change, without asking again and again."""

from __future__ import annotations

import asyncio
import ctypes
import os
from pathlib import Path
from typing import Self

__all__ = ["FileWatch"]

_IN_MODIFY = 0x2
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Tells when a file is written to (inotify(7)).

    Usage::

        with FileWatch(path) as watch:
            while True:
                read_what_is_there()
                await watch.changed.wait()      # an asyncio.Event, also to be set by others
                watch.changed.clear()

    Raises:
        OSError: there is no such file, or the user's inotify watches are used up.
    """

    def __init__(self, path: Path) -> None:
        self.changed = asyncio.Event()
        self._descriptor = _checked(_libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC), path)
        try:
            _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_MODIFY), path)
        except OSError:
            os.close(self._descriptor)
            raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _drain(self) -> None:
        os.read(self._descriptor, 65536)
        self.changed.set()


def _checked(result: int, path: Path) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return result
