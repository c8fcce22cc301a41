"""Work that is carried through although whoever asked for it goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["Lasting"]

_T = TypeVar("_T")


class Lasting:
    """What must not be left half done when a client vanishes: a commit, and what follows from it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def do(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Carries `work` through and returns its result.

        Who is cancelled meanwhile stays until it is done, and is cancelled then: so nothing that `work` needs is
        cleared away under it.

        Raises:
            Exception: whatever `work` raises.
        """
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        finally:
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({task})

    async def finish(self) -> None:
        """Waits until nothing is under way."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
