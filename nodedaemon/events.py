"""Events of this node: kept in the journal, and told to whoever watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import structlog

from nodedaemon.journal import Journal
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, timestamp
from puhui.v1.card_pb2 import AttemptRef, Slice
from puhui.v1.node_pb2 import Container, NodeEvent, NodeEventKind

__all__ = ["EventLog"]

_log = structlog.get_logger(__name__)

_PAGE = 200


class EventLog:
    """The events of one daemon. Cursors only grow, over restarts too."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._news = asyncio.Event()
        self._closed = False

    def add(
        self,
        kind: NodeEventKind.ValueType,
        reason: str,
        message: str,
        *,
        owner: AttemptRef | None = None,
        slice: Slice | None = None,  # noqa: A002 - the word of the contract
        container: Container | None = None,
    ) -> None:
        """Keeps an event and wakes the watchers."""
        event = NodeEvent(
            time=timestamp(now()),
            kind=kind,
            owner=owner,
            slice=slice,
            container=container,
            reason=reason,
            message=message,
        )
        cursor = self._journal.add_event(now(), event.SerializeToString())
        _log.info(
            message,
            kind=NodeEventKind.Name(kind).removeprefix("NODE_EVENT_KIND_"),
            reason=reason,
            cursor=cursor,
            **({"job": owner.job_id, "attempt": owner.attempt} if owner else {}),
        )
        self._wake()

    def close(self) -> None:
        """Ends every watch: the daemon is stopping."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def watch(self, after: int) -> AsyncIterator[NodeEvent]:
        """Yields every event after a cursor, then live ones.

        Raises:
            Refusal: OUT_OF_RANGE with CURSOR_UNKNOWN, this node never gave that cursor, or CURSOR_EXPIRED, events after
                it are no longer kept; the latter also to a reader that is slower than events are dropped.
        """
        if after > self._journal.last_cursor():
            raise Refusal(
                grpc.StatusCode.OUT_OF_RANGE,
                "CURSOR_UNKNOWN",
                f"this node has never given cursor {after}: its journal is another one now; watch from 0 again",
                last_cursor=str(self._journal.last_cursor()),
            )
        resumed = after > 0
        if resumed and after + 1 < self._journal.first_cursor():
            raise self._expired(after)
        while True:
            news = self._news
            # A page at a time: what a slow reader has not taken stays on the disk.
            page = self._journal.events(after, _PAGE)
            if resumed and page and page[0][0] > after + 1:
                raise self._expired(after)
            resumed = resumed or bool(page)
            for cursor, message in page:
                event = NodeEvent.FromString(message)
                event.cursor = after = cursor
                yield event
            if not page:
                if self._closed:
                    return
                await news.wait()

    def _expired(self, after: int) -> Refusal:
        first = self._journal.first_cursor()
        return Refusal(
            grpc.StatusCode.OUT_OF_RANGE,
            "CURSOR_EXPIRED",
            f"events between cursor {after} and {first} are no longer kept: read the state with GetNode and "
            "ListContainers, and watch from 0 again",
            first_cursor=str(first),
        )
