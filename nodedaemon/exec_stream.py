"""What goes between a caller and a command: its output from the log, and the caller's input to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import grpc

from nodedaemon.exec_process import ExecProcess
from nodedaemon.exec_request import require_sound_input
from nodedaemon.logs import follow_log
from nodedaemon.records import ExecRecord
from puhui.rpc.errors import Refusal
from puhui.v1.node_service_pb2 import ExecRequest
from puhui.v1.stream_pb2 import LogChunk

__all__ = ["feed", "output"]

_HELD_MESSAGES = 4  # of standard input, each up to 1 MiB


async def output(
    log: Path,
    offset: int,
    ended: asyncio.Event | None,
    feeding: Coroutine[Any, Any, None],
    stopping: asyncio.Event,
) -> AsyncGenerator[LogChunk, None]:
    """Yields a command's output until it has ended, and lets input be fed meanwhile.

    Args:
        log: where the output is.
        offset: first byte wanted.
        ended: set when the command has ended; None when it has already.
        feeding: feeds the input; cancelled when the output is over.
        stopping: set when the daemon stops.

    Raises:
        Refusal: UNAVAILABLE with DAEMON_STOPPING; as `feeding` does.
    """
    chunks = follow_log(log, offset=offset, tail_lines=0, end=ended)
    feeder = asyncio.create_task(feeding)
    stop = asyncio.create_task(stopping.wait())
    step: asyncio.Future[LogChunk | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(anext(chunks, None))
            while not step.done():
                aside = {task for task in (feeder, stop) if not task.done()}
                await asyncio.wait({step, *aside}, return_when=asyncio.FIRST_COMPLETED)
                if feeder.done():
                    feeder.result()
                if stop.done():
                    raise Refusal(
                        grpc.StatusCode.UNAVAILABLE,
                        "DAEMON_STOPPING",
                        "the daemon is stopping; the command runs on: repeat the start with the same request_id",
                        retry_after_s=1,
                    )
            chunk = step.result()
            if chunk is None:
                return
            yield chunk
    finally:
        tasks = [task for task in (step, feeder, stop) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await chunks.aclose()


async def feed(requests: AsyncIterator[ExecRequest], process: ExecProcess | None, record: ExecRecord) -> None:
    """Passes input on. Signals and sizes do not wait for input that the command does not take yet.

    Args:
        requests: what follows the start.
        process: the command; None when it has ended, and then input is checked and dropped.
        record: the same, as the journal has it.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID.
    """
    held: asyncio.Queue[bytes | None] = asyncio.Queue(_HELD_MESSAGES)
    writing = asyncio.create_task(_write(held, process)) if process is not None else None
    try:
        async for request in requests:
            part = require_sound_input(request, tty=record.tty)
            if process is None:
                continue
            if part == "stdin":
                await held.put(request.stdin)
            elif part == "stdin_closed" and request.stdin_closed:
                await held.put(None)
            elif part == "signal":
                process.signal(request.signal)
            elif part == "terminal_size":
                process.resize(request.terminal_size.columns, request.terminal_size.rows)
        if process is not None:
            if not record.request_id:
                await held.put(None)
            await held.join()
    finally:
        if writing is not None:
            writing.cancel()


async def _write(held: asyncio.Queue[bytes | None], process: ExecProcess) -> None:
    while True:
        data = await held.get()
        if data is None:
            await process.close_input()
        else:
            await process.write(data)
        held.task_done()
