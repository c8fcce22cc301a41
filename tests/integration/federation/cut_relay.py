"""A TCP relay between two centres that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

__all__ = ["CutRelay", "free_port", "relayed"]


def free_port() -> int:
    """Returns a port on loopback that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class CutRelay:
    """Passes on what comes, until it is cut.

    Attributes:
        address: where it listens.
    """

    def __init__(self, port: int) -> None:
        self.address = ""
        self._to = port
        self._through = True
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self.cut()
        if self._server is not None:
            self._server.close()

    def cut(self) -> None:
        """Resets every connection; new ones are reset at once."""
        self._through = False
        for writer in self._open:
            writer.transport.abort()

    def mend(self) -> None:
        """Lets new connections through."""
        self._through = True

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._through:
            writer.transport.abort()
            return
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()  # nobody listens there
            return
        both = {writer, there_writer}
        self._open |= both
        try:
            await asyncio.gather(_pass(reader, there_writer), _pass(there_reader, writer))
        finally:
            self._open -= both
            for one in both:
                one.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def relayed(port: int) -> AsyncIterator[CutRelay]:
    """Relays to a port until the block ends."""
    relay = CutRelay(port)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()
