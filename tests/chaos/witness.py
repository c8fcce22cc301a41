"""Reads the events of a daemon over all its lives, as a control plane does: from the last cursor on."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import grpc

from puhui.v1.card_pb2 import AttemptRef
from puhui.v1.node_pb2 import NodeEvent, NodeEventKind
from puhui.v1.node_service_pb2 import WatchEventsRequest
from tests.chaos.victim import Victim


class Witness:
    """Everything that a daemon told, in order.

    Attributes:
        events: what was told.
        resumed: how often the stream broke and was taken up again.
    """

    def __init__(self, victim: Victim) -> None:
        self.events: list[NodeEvent] = []
        self.resumed = 0
        self._victim = victim
        self._ends: defaultdict[str, asyncio.Future[NodeEvent]] = defaultdict(asyncio.Future)

    async def watch(self) -> None:
        """Reads until cancelled."""
        while True:
            node = await self._victim.node()
            after = self.events[-1].cursor if self.events else 0
            try:
                async for response in node.stub.WatchEvents(WatchEventsRequest(after_cursor=after)):
                    self._note(response.event)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
            self.resumed += 1
            await asyncio.sleep(0.02)

    def _note(self, event: NodeEvent) -> None:
        last = self.events[-1].cursor if self.events else 0
        assert event.cursor == last + 1, f"after {last} it told {event}"
        self.events.append(event)
        if event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_EXITED:
            end = self._ends[event.owner.job_id]
            assert not end.done(), f"an end was told twice: {end.result()}, then {event}"
            end.set_result(event)

    async def end(self, owner: AttemptRef) -> NodeEvent:
        """Waits until the end of an attempt's command is told."""
        return await asyncio.shield(self._ends[owner.job_id])

    def replay(self) -> tuple[set[str], set[str]]:
        """Returns the UUIDs of the slices, and the ids of the containers, that are there by what was told."""
        slices, containers = set(), set()
        for event in self.events:
            if event.kind == NodeEventKind.NODE_EVENT_KIND_SLICE_CREATED:
                assert event.slice.uuid not in slices, event
                slices.add(event.slice.uuid)
            elif event.kind == NodeEventKind.NODE_EVENT_KIND_SLICE_DESTROYED:
                slices.discard(event.slice.uuid)
            elif event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_REMOVED:
                assert event.container.id in containers, event
                containers.discard(event.container.id)
            elif event.kind == NodeEventKind.NODE_EVENT_KIND_CONTAINER_STARTED:
                assert event.container.id not in containers, event
                containers.add(event.container.id)
            elif event.HasField("container"):
                assert event.container.id in containers, event
        return slices, containers
