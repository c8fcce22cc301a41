"""The connection to one node, kept alive: what happens there is known here without asking.

After every (re)connection the node's containers and slices are listed, so that nothing that happened in between is
missed; then its events are followed. Not to be in contact means nothing but that.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import structlog

from controlplane.node_client import NodeClient
from puhui.rpc.errors import Refusal
from puhui.v1 import card_pb2, node_pb2

__all__ = ["AttemptKey", "LinkOwner", "NodeLink"]

_log = structlog.get_logger(__name__)

AttemptKey = tuple[str, int]
"""(job id, attempt number)."""

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 5.0
# Events tell of everything; listing again now and then only guards against what nobody thought of.
_LIST_AGAIN_S = 60.0


class LinkOwner(Protocol):
    """Who wants to know what a link learns."""

    async def synced(
        self, link: NodeLink, inventory: node_pb2.NodeInventory, containers: list[node_pb2.Container]
    ) -> None:
        """The link is (again) in contact, and this is what the node has."""

    def happened(self, link: NodeLink, event: node_pb2.NodeEvent) -> None:
        """Something happened on the node."""

    def lost(self, link: NodeLink, why: str) -> None:
        """The link is out of contact."""


class NodeLink:
    """The connection to one node."""

    def __init__(
        self,
        node_id: str,
        centre: str,
        address: str,
        connect: Callable[[str], NodeClient],
        owner: LinkOwner,
        event_cursor: int,
    ) -> None:
        self.node_id = node_id
        self.address = address
        self.client = connect(address)
        self.event_cursor = event_cursor
        self.containers: dict[AttemptKey, node_pb2.Container] = {}
        self.wanted: set[AttemptKey] = set()
        """Attempts whose checkpointed processes ask for their card."""
        self._centre = centre
        self._connect = connect
        self._owner = owner
        self._contact = asyncio.Event()
        self._nudge = asyncio.Event()
        self._moving = asyncio.Lock()
        self._news: dict[AttemptKey, set[asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def in_contact(self) -> bool:
        """Whether the node is heard right now."""
        return self._contact.is_set()

    async def contact(self) -> None:
        """Waits until the node is in contact."""
        await self._contact.wait()

    def start(self) -> None:
        """Begins to connect."""
        self._task = asyncio.create_task(self._run(), name=f"link {self.node_id}")

    async def stop(self) -> None:
        """Ends the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.client.close()

    async def move(self, address: str) -> None:
        """Connects anew: the daemon is at `address` now, or was started again there."""
        async with self._moving:
            old, self.address = self.client, address
            self.client = self._connect(address)
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
            self._contact.clear()
            await old.close()
            self.start()

    def nudge(self) -> None:
        """The node was heard of by other means: try again now."""
        self._nudge.set()

    @contextlib.contextmanager
    def watching(self, key: AttemptKey, news: asyncio.Event) -> Iterator[None]:
        """Sets `news` whenever something may have happened to an attempt's container."""
        self._news.setdefault(key, set()).add(news)
        try:
            yield
        finally:
            watchers = self._news[key]
            watchers.discard(news)
            if not watchers:
                del self._news[key]

    def note(self, key: AttemptKey, container: node_pb2.Container) -> None:
        """Notes what was told of a container; an older word does not undo that it has exited."""
        known = self.containers.get(key)
        if known is None or known.state != node_pb2.CONTAINER_STATE_EXITED or known.id != container.id:
            self.containers[key] = container

    async def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                await self._follow()
                why = "it ended the connection"
            except Refusal as refusal:
                why = refusal.message
                if refusal.reason in ("CURSOR_UNKNOWN", "CURSOR_EXPIRED"):
                    # The node's journal is a new one, or was not read for too long. The lists have what came of it.
                    self.event_cursor = 0
            except Exception as error:  # noqa: BLE001 - the link must live on, whatever a node sends
                why = f"its answer was not understood ({type(error).__name__})"
                _log.error("link failed unforeseen", node=self.node_id, exc_info=error)
            if self._contact.is_set():
                retry_s = _FIRST_RETRY_S
                self._contact.clear()
            self._owner.lost(self, why)
            self._nudge.clear()
            # Jitter keeps a fleet from coming back all at once.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(retry_s * random.uniform(0.5, 1.0)):  # noqa: S311
                    await self._nudge.wait()
            retry_s = min(retry_s * 2, _LAST_RETRY_S)

    async def _follow(self) -> None:
        events = self.client.events(self.event_cursor)
        async with contextlib.aclosing(events):
            await self._list()
            pending: asyncio.Future[node_pb2.NodeEvent] | None = None
            try:
                while True:
                    pending = pending or asyncio.ensure_future(_next(events.__anext__()))
                    done, _ = await asyncio.wait({pending}, timeout=_LIST_AGAIN_S)
                    if not done:
                        await self._list()
                        continue
                    event, pending = pending.result(), None
                    self._note(event)
            except StopAsyncIteration:
                return
            finally:
                if pending is not None:
                    pending.cancel()
                    await asyncio.gather(pending, return_exceptions=True)

    async def _list(self) -> None:
        inventory = await self.client.inventory()
        containers = await self.client.list_containers()
        self.containers = {
            _key(container.owner): container for container in containers if container.owner.centre == self._centre
        }
        await self._owner.synced(self, inventory, containers)
        self._contact.set()
        for watchers in self._news.values():
            for news in watchers:
                news.set()

    def _note(self, event: node_pb2.NodeEvent) -> None:
        self.event_cursor = max(self.event_cursor, event.cursor)
        if event.HasField("container") and event.owner.centre == self._centre:
            key = _key(event.owner)
            if event.kind == node_pb2.NODE_EVENT_KIND_CARD_WANTED:
                self.wanted.add(key)
            if event.kind == node_pb2.NODE_EVENT_KIND_CONTAINER_REMOVED:
                self.containers.pop(key, None)
            else:
                self.note(key, event.container)
            for news in self._news.get(key, ()):
                news.set()
        self._owner.happened(self, event)


def _key(owner: card_pb2.AttemptRef) -> AttemptKey:
    return owner.job_id, owner.attempt


async def _next(awaitable: Awaitable[node_pb2.NodeEvent]) -> node_pb2.NodeEvent:
    return await awaitable
