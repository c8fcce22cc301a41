"""Waits for files to change, without asking again and again.

All watches of an event loop share one inotify instance: a user has few of those (128 by default), but many watches.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

__all__ = ["FileWatch"]

_IN_MODIFY = 0x2
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_EVENT = struct.Struct("iIII")
_READ_BYTES = 65536

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
        self._instance = _Instance.of(asyncio.get_running_loop())
        self._number = self._instance.add(path, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._instance.remove(self._number, self)


class _Instance:
    """The inotify instance of one event loop; there is one for as long as something is watched."""

    _all: dict[asyncio.AbstractEventLoop, _Instance] = {}  # noqa: RUF012 - one for the process

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watches: dict[int, set[FileWatch]] = {}
        self._descriptor = _checked(_libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC), "inotify")
        loop.add_reader(self._descriptor, self._drain)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Instance:
        """Returns the one of a loop."""
        found = cls._all.get(loop)
        if found is None:
            found = cls._all[loop] = cls(loop)
        return found

    def add(self, path: Path, watch: FileWatch) -> int:
        """Watches a file. The number is that of the file: all who watch it share it."""
        try:
            number = _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_MODIFY), str(path))
        except OSError:
            self._close_if_idle()
            raise
        self._watches.setdefault(number, set()).add(watch)
        return number

    def remove(self, number: int, watch: FileWatch) -> None:
        """Watches a file no longer, once nobody else does."""
        watches = self._watches.get(number)
        if watches is not None:
            watches.discard(watch)
            if not watches:
                del self._watches[number]
                _libc.inotify_rm_watch(self._descriptor, number)  # the file may be gone, and the watch with it
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if not self._watches and self._all.get(self._loop) is self:
            del self._all[self._loop]
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)

    def _drain(self) -> None:
        for number, mask in _events(os.read(self._descriptor, _READ_BYTES)):
            if mask & _IN_Q_OVERFLOW:
                told = [watch for watches in self._watches.values() for watch in watches]
            else:
                told = list(self._watches.get(number, ()))
            for watch in told:
                watch.changed.set()
            if mask & _IN_IGNORED:
                self._watches.pop(number, None)  # the file is gone; nothing more will be told of it


def _events(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields the number and the mask of each struct inotify_event."""
    at = 0
    while at < len(data):
        number, mask, _, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size + length
        yield number, mask


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
