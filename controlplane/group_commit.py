"""One thread that writes to SQLite, and commits for many at once.

Whatever waits when a transaction begins goes into it, each write in a savepoint of its own, so that one that
fails takes nobody with it. Answers are given after the commit: what was answered survives a crash.
"""

from __future__ import annotations

import asyncio
import errno
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlite_utils import Database

__all__ = ["GroupCommit"]

_T = TypeVar("_T")
_MOST_WRITES = 256


@dataclass
class _Write:
    act: Callable[[Database], Any]
    answer: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class GroupCommit:
    """The writer of one database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.commits = 0
        """Transactions that were committed."""
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    async def write(self, act: Callable[[Database], _T]) -> _T:
        """Runs `act` in a transaction on the writer's thread, and returns its result once it is durable.

        Raises:
            OSError: the disk is full (ENOSPC); nothing was stored.
            Exception: whatever `act` raises; nothing of it was stored.
        """
        if self._closed:
            raise RuntimeError("the store is closed")
        answer: asyncio.Future[_T] = self._loop.create_future()
        self._writes.put(_Write(act, answer))
        # A caller that gives up does not undo the write, so its answer must have somewhere to go.
        return await asyncio.shield(answer)

    async def close(self) -> None:
        """Commits what waits, and ends the thread."""
        self._closed = True
        self._writes.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._commit(batch)
            except Exception as error:  # noqa: BLE001 - whoever asked for the writes gets it; the thread lives on
                for write in batch:
                    write.error = write.error or _foreseen(error)
            self._loop.call_soon_threadsafe(_answer, batch)

    def _next_batch(self) -> list[_Write] | None:
        first = self._writes.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < _MOST_WRITES:
            try:
                write = self._writes.get_nowait()
            except queue.Empty:
                break
            if write is None:
                self._writes.put(None)
                break
            batch.append(write)
        return batch

    def _commit(self, batch: list[_Write]) -> None:
        self._db.conn.execute("begin immediate")
        try:
            for write in batch:
                try:
                    with self._db.atomic():
                        write.result = write.act(self._db)
                except Exception as error:
                    write.error = _foreseen(error)
                    if not self._db.conn.in_transaction:
                        raise
            self._db.conn.execute("commit")
            self.commits += 1
        except BaseException:
            if self._db.conn.in_transaction:
                self._db.conn.execute("rollback")
            raise


def _foreseen(error: Exception) -> Exception:
    if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, "the disk of the control plane's state is full")
    return error


def _answer(batch: list[_Write]) -> None:
    for write in batch:
        if write.answer.done():
            continue
        if write.error is not None:
            write.answer.set_exception(write.error)
            # Nobody may be waiting for it any more.
            write.answer.exception()
        else:
            write.answer.set_result(write.result)
