"""A real database of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from controlplane.sqlite_store import SqliteStore
from controlplane.store import Store
from controlplane.watch import Feed

Open = Callable[[], Awaitable[Store]]


@pytest.fixture(params=["sqlite"])
async def opener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens the same store again and again; closes what is open at the end."""
    opened: list[Store] = []

    async def open_store() -> Store:
        while opened:
            await opened.pop().close()
        opened.append(await SqliteStore.open(tmp_path / "store.db", Feed()))
        return opened[-1]

    yield open_store
    while opened:
        await opened.pop().close()


@pytest.fixture
async def store(opener: Open) -> Store:
    return await opener()
