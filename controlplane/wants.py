"""Run instructions that have not begun yet: a share that somebody is about to use is not taken back."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from controlplane.watch import Feed

__all__ = ["Wants"]


class Wants:
    """Counts, for every job, the runs that wait for its share.

    Args:
        feed: told whenever that changes.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._waiting: Counter[str] = Counter()

    @contextlib.contextmanager
    def waiting(self, job_id: str) -> Iterator[None]:
        """A run of the job waits until the block ends."""
        self._waiting[job_id] += 1
        self._feed.publish([job_id])
        try:
            yield
        finally:
            self._waiting[job_id] -= 1
            if not self._waiting[job_id]:
                del self._waiting[job_id]
            self._feed.publish([job_id])

    def __contains__(self, job_id: str) -> bool:
        """Returns whether a run of the job waits."""
        return job_id in self._waiting
