"""Podman's stream of events about containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import structlog
from podman.api.client import APIClient

from nodedaemon.podman_service import API_VERSION

__all__ = ["container_events"]

_log = structlog.get_logger(__name__)


async def container_events(url: str, node_id: str) -> AsyncIterator[dict[str, Any]]:
    """Yields what Podman tells of containers whose command has ended or that were removed, until the stream breaks.

    Args:
        url: where its service listens.
        node_id: label of this daemon's containers.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    client = APIClient(url, version=API_VERSION)
    filters = {"label": [f"puhui.node={node_id}"], "event": ["died", "remove"], "type": ["container"]}
    stream: list[Any] = []

    def read() -> None:
        try:
            answer = client.get("/events", params={"stream": "true", "filters": json.dumps(filters)}, stream=True)
            stream.append(answer)
            for line in answer.iter_lines(chunk_size=1):
                if line:
                    loop.call_soon_threadsafe(queue.put_nowait, json.loads(line))
        except (OSError, ValueError) as error:
            _log.debug("event stream of podman ended", error=str(error))
        finally:
            client.close()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(queue.put_nowait, None)

    # A thread of its own: the pool's are for what ends.
    threading.Thread(target=read, name="podman-events", daemon=True).start()
    try:
        while (event := await queue.get()) is not None:
            yield event
    finally:
        for answer in stream:
            _hang_up(answer)


def _hang_up(answer: Any) -> None:
    """Ends a stream under its reader. Closing it would wait for the reader, which waits for the next event."""
    connection = answer.raw.connection
    if connection is not None and connection.sock is not None:
        with contextlib.suppress(OSError):  # it has ended by itself
            connection.sock.shutdown(socket.SHUT_RDWR)
