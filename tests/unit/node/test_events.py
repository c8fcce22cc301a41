"""Events are resumed by cursor, or it is said that they cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodedaemon.events import EventLog
from nodedaemon.journal import Journal
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now
from puhui.v1.node_pb2 import NodeEventKind

_A_WEEK_AND_A_DAY_S = 8 * 24 * 3600


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "node.db")
    yield journal
    journal.close()


def add(events: EventLog, count: int) -> None:
    for _ in range(count):
        events.add(NodeEventKind.NODE_EVENT_KIND_RECONCILED, "SOMETHING", "something happened")


async def cursors(events: EventLog, after: int) -> list[int]:
    return [event.cursor async for event in events.watch(after)]


async def test_every_event_after_a_cursor_comes_once_and_in_order(journal: Journal) -> None:
    events = EventLog(journal)
    add(events, 450)
    events.close()
    assert await cursors(events, 0) == list(range(1, 451))
    assert await cursors(events, 200) == list(range(201, 451))
    assert await cursors(events, 450) == []


async def test_a_watcher_sees_what_happens_while_it_waits(journal: Journal) -> None:
    events = EventLog(journal)
    watching = asyncio.create_task(cursors(events, 0))
    add(events, 1)
    await asyncio.sleep(0)
    add(events, 2)
    events.close()
    assert await watching == [1, 2, 3]


async def test_a_cursor_that_was_never_given_is_refused(journal: Journal) -> None:
    events = EventLog(journal)
    add(events, 3)
    with pytest.raises(Refusal) as caught:
        await cursors(events, 4)
    assert (caught.value.code.name, caught.value.reason) == ("OUT_OF_RANGE", "CURSOR_UNKNOWN")


async def test_a_cursor_whose_successors_were_dropped_is_refused(journal: Journal) -> None:
    events = EventLog(journal)
    for _ in range(3):
        journal.add_event(now() - _A_WEEK_AND_A_DAY_S, b"")
    add(events, 2)
    journal.prune(now())
    events.close()
    with pytest.raises(Refusal) as caught:
        await cursors(events, 2)
    assert (caught.value.code.name, caught.value.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
    assert caught.value.metadata == {"first_cursor": "4"}
    # Nothing was missed after the last one that is gone, and 0 is all that are kept.
    assert await cursors(events, 3) == [4, 5]
    assert await cursors(events, 0) == [4, 5]


async def test_cursors_go_on_when_all_events_were_dropped(journal: Journal) -> None:
    events = EventLog(journal)
    for _ in range(3):
        journal.add_event(now() - _A_WEEK_AND_A_DAY_S, b"")
    journal.prune(now())
    with pytest.raises(Refusal) as caught:
        await cursors(events, 1)
    assert caught.value.reason == "CURSOR_EXPIRED"
    add(events, 1)
    events.close()
    assert await cursors(events, 3) == [4]


async def test_a_reader_that_is_overtaken_by_the_dropping_is_told(journal: Journal) -> None:
    events = EventLog(journal)
    for _ in range(250):
        journal.add_event(now() - _A_WEEK_AND_A_DAY_S, b"")
    add(events, 1)
    watch = events.watch(0)
    assert (await anext(watch)).cursor == 1
    journal.prune(now())
    with pytest.raises(Refusal) as caught:
        [event async for event in watch]
    assert caught.value.reason == "CURSOR_EXPIRED"
