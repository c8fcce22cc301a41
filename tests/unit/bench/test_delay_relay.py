from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

import pytest

from bench.delay_relay import Passing, Relay, relay_process, round_trips


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[str]:
    answering: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.create_task(_echo(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.gather(*answering)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def _round_trip_s(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytes) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    writer.write(said)
    assert await reader.readexactly(len(said)) == said
    return loop.time() - began


async def test_each_direction_is_delayed_by_half_and_nothing_is_lost_or_overtaken() -> None:
    log: deque[Passing] = deque()
    async with echoing() as upstream:
        relay = Relay(3, upstream, log)
        async with connected(await relay.start()) as (reader, writer):
            assert await _round_trip_s(reader, writer, b"at once") < 0.1
            relay.one_way_s = 0.1
            assert 0.2 <= await _round_trip_s(reader, writer, b"late") < 0.4
            # Much that is under way at a time is delayed once, and comes in order.
            large = bytes(range(256)) * 8192
            assert 0.2 <= await _round_trip_s(reader, writer, large) < 1.5
            relay.one_way_s = 0.0
            writer.write(b"the last")
            writer.write_eof()
            assert await reader.read() == b"the last"
        await relay.stop()
    assert {piece.link for piece in log} == {3}
    for up in (True, False):
        assert sum(piece.size_bytes for piece in log if piece.up == up) == 7 + 4 + len(large) + 8
    assert [piece.at_s for piece in log] == sorted(piece.at_s for piece in log)


async def test_what_the_other_side_breaks_off_is_broken_off() -> None:
    async with echoing() as upstream:
        relay = Relay(0, upstream)
        address = await relay.start()
        async with connected(address) as (reader, writer):
            await _round_trip_s(reader, writer, b"hello")
            await relay.stop()
            assert await reader.read() == b""
        with pytest.raises(OSError, match=r".*"):
            async with connected(address):
                pass


async def test_a_relay_to_nowhere_ends_its_connections() -> None:
    async with echoing() as upstream:
        pass
    relay = Relay(0, upstream)
    async with connected(await relay.start()) as (reader, _):
        assert await reader.read() == b""
    await relay.stop()


async def test_a_relay_in_another_process_is_told_what_to_do() -> None:
    async with echoing() as upstream:
        with relay_process([upstream, upstream]) as relays:
            async with connected(relays.addresses[1]) as (reader, writer):
                await _round_trip_s(reader, writer, b"hello")
                assert [(one.link, one.up, one.size_bytes) for one in relays.passed()] == [(1, True, 5), (1, False, 5)]
                assert relays.passed() == []
                relays.delay(0.05)
                assert await _round_trip_s(reader, writer, b"hello") >= 0.1


def _passed(*pieces: tuple[bool, int]) -> list[Passing]:
    return [Passing(float(number), 1, up, size) for number, (up, size) in enumerate(pieces)]


def test_round_trips_are_the_waits_for_answers() -> None:
    up, down, frame, ack = (True, 500), (False, 300), (False, 39), (True, 39)
    assert round_trips([]) == 0
    assert round_trips(_passed(up)) == 1
    assert round_trips(_passed(up, up, down)) == 1
    assert round_trips(_passed(up, down, up, up, down, down)) == 2
    assert round_trips(_passed(up, frame, up, ack, down)) == 1
    assert round_trips(_passed(down, up, down, ack)) == 1
    assert round_trips(_passed(frame, ack), least_bytes=1) == 1
