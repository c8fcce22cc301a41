"""Wake-ups for those who watch: no polling, and no wake-up is lost.

Usage::

    with feed.watching(job_id) as news:
        while True:
            news.clear()
            ...look at the store...
            await news.wait()
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

__all__ = ["Feed"]


class Feed:
    """Tells watchers of a job that something about it was stored."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[asyncio.Event]] = {}

    @contextlib.contextmanager
    def watching(self, job_id: str, news: asyncio.Event | None = None) -> Iterator[asyncio.Event]:
        """Yields an event that is set whenever something about the job was stored.

        Args:
            job_id: the job.
            news: the event; a new one if not given.
        """
        news = news or asyncio.Event()
        self._watchers.setdefault(job_id, set()).add(news)
        try:
            yield news
        finally:
            watchers = self._watchers[job_id]
            watchers.discard(news)
            if not watchers:
                del self._watchers[job_id]

    @property
    def watchers(self) -> int:
        """Number of watchers now."""
        return sum(len(watchers) for watchers in self._watchers.values())

    def publish(self, job_ids: Iterable[str]) -> None:
        """Wakes the watchers of some jobs."""
        for job_id in job_ids:
            for news in self._watchers.get(job_id, ()):
                news.set()
