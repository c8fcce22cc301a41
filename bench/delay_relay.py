"""A TCP relay that delays what it passes on, in a process of its own: the kernel here may have no netem.

    python -m bench.delay_relay HOST:PORT ...

It listens once for each address, prints where in one line of JSON, and then reads commands from standard input, a line
of JSON each, and answers each in a line of JSON: {"one_way_s": 0.04} sets the delay of each direction, {"log": true}
returns what has passed since the last time that was asked.

What it emulates is delay alone: what is sent together arrives together and in order, bandwidth is that of the machine,
nothing is lost, and the connection itself is made without delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Passing", "Relay", "RelayProcess", "relay_process", "round_trips"]

_READ_BYTES = 65536
_MOST_LOGGED = 200_000
_HOST = "127.0.0.1"
_STOP_S = 10.0


@dataclass(frozen=True)
class Passing:
    """A piece that reached the relay."""

    at_s: float
    """When, in seconds since the epoch."""
    link: int
    """Which of the addresses that are relayed, from 0."""
    up: bool
    """Towards that address, or back from it."""
    size_bytes: int


def round_trips(passed: Sequence[Passing], least_bytes: int = 100) -> int:
    """Counts how often a message went up after one had come down: the waits for an answer, plus one for the first.

    Frames of HTTP/2 itself (acknowledged settings, windows, pings) also pass, so small pieces are left out.

    Args:
        passed: what passed one link, in order.
        least_bytes: smaller pieces carry no message.
    """
    count, answered = 0, True
    for piece in passed:
        if piece.size_bytes < least_bytes:
            continue
        if piece.up and answered:
            count += 1
        answered = not piece.up
    return count


class Relay:
    """Relays connections to one address.

    Args:
        link: its number in the log.
        upstream: "host:port" that connections are passed on to.
        log: where what passes is noted; None notes nothing.
    """

    def __init__(self, link: int, upstream: str, log: deque[Passing] | None = None) -> None:
        self.one_way_s = 0.0
        """Delay of each direction."""
        self._link = link
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self._log = log
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Begins to listen on loopback, and returns where.

        Raises:
            OSError: it cannot.
        """
        self._server = await asyncio.start_server(self._accept, _HOST, 0)
        return f"{_HOST}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Listens no more, and ends every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
                try:
                    async with asyncio.TaskGroup() as both:
                        both.create_task(self._pass(reader, there_writer, up=True))
                        both.create_task(self._pass(there_reader, writer, up=False))
                except* OSError:
                    pass  # one side broke the connection off; so is the other's
                finally:
                    await _closed(there_writer)
            finally:
                await _closed(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        """Passes one direction on until it ends."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def arrive() -> None:
            while True:
                due, data = await on_the_way.get()
                # Another delay meanwhile does not let what follows overtake: the queue is in order.
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        arriving = asyncio.create_task(arrive())
        try:
            data = b"-"
            while data:
                data = await reader.read(_READ_BYTES)
                if data and self._log is not None:
                    self._log.append(Passing(time.time(), self._link, up, len(data)))
                on_the_way.put_nowait((loop.time() + self.one_way_s, data))
            await arriving
        finally:
            arriving.cancel()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class RelayProcess:
    """Relays in another process. Made by `relay_process`."""

    def __init__(self, process: subprocess.Popen[str], addresses: list[str]) -> None:
        self._process = process
        self.addresses = addresses
        """Where it listens, for each address that is relayed."""

    def _ask(self, command: dict[str, object]) -> list[list[float]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer: list[list[float]] = json.loads(self._process.stdout.readline())
        return answer

    def delay(self, one_way_s: float) -> None:
        """Sets the delay of each direction."""
        self._ask({"one_way_s": one_way_s})

    def passed(self) -> list[Passing]:
        """Returns what has passed since this was last asked."""
        return [Passing(at, int(link), bool(up), int(size)) for at, link, up, size in self._ask({"log": True})]


@contextlib.contextmanager
def relay_process(upstreams: Sequence[str], within: Sequence[str] = ()) -> Iterator[RelayProcess]:
    """Relays connections to addresses until the block ends.

    Args:
        upstreams: "host:port" of each.
        within: command that becomes it, such as one that enters a network namespace.
    """
    command = [*within, sys.executable, "-m", "bench.delay_relay", *upstreams]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield RelayProcess(process, json.loads(process.stdout.readline()))
        process.stdin.close()  # it ends with its standard input
        process.wait(_STOP_S)


async def _serve(upstreams: Sequence[str]) -> None:
    log: deque[Passing] = deque(maxlen=_MOST_LOGGED)
    relays = [Relay(number, upstream, log) for number, upstream in enumerate(upstreams)]
    _say([await relay.start() for relay in relays])
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        command = json.loads(line)
        if "one_way_s" in command:
            for relay in relays:
                relay.one_way_s = float(command["one_way_s"])
            _say([])
        else:
            _say([[one.at_s, one.link, one.up, one.size_bytes] for one in log])
            log.clear()
    for relay in relays:
        await relay.stop()


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1:]))
