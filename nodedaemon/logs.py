"""Reads the output of a container from its k8s-file log.

conmon writes one line per piece of output::

    2026-11-22T16:57:39.033616047+00:00 stdout F a whole line
    2026-11-22T16:57:39.033703100+00:00 stderr P a piece of a line that goes on, or never ends

What was written comes back byte for byte: F stands for a line break that the format took away. Offsets count those
bytes, both streams together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from datetime import datetime
from pathlib import Path

from nodedaemon.inotify import FileWatch
from puhui.rpc.moment import timestamp
from puhui.v1.stream_pb2 import LogChunk, LogStream

__all__ = ["LogDecoder", "follow_log"]

_READ_BYTES = 2**18
_MOST_CHUNK_BYTES = 2**18
_STREAMS = {b"stdout": LogStream.LOG_STREAM_STDOUT, b"stderr": LogStream.LOG_STREAM_STDERR}


class LogDecoder:
    """Turns the bytes of a k8s-file log into chunks of output.

    Feed it the file's bytes in order, cut anywhere. Lines of one stream that follow each other come back in one chunk.
    """

    def __init__(self) -> None:
        self.offset = 0
        """Bytes of output decoded so far."""
        self._rest = b""

    def feed(self, data: bytes) -> list[LogChunk]:
        """Decodes some more of the file; an unfinished line waits for its end."""
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest
        if not newline:
            return []
        chunks: list[LogChunk] = []
        pieces: list[bytes] = []
        size = 0
        for line in whole.split(b"\n"):
            time, stream, flag, text = (*line.split(b" ", 3), b"", b"", b"")[:4]
            if stream not in _STREAMS:
                continue  # not conmon's
            piece = text if flag == b"P" else text + b"\n"
            if not chunks or chunks[-1].stream != _STREAMS[stream] or size + len(piece) > _MOST_CHUNK_BYTES:
                if chunks:
                    chunks[-1].data = b"".join(pieces)
                pieces, size = [], 0
                chunks.append(
                    LogChunk(offset=self.offset, stream=_STREAMS[stream], time=timestamp(_moment(time.decode())))
                )
            pieces.append(piece)
            size += len(piece)
            self.offset += len(piece)
        if chunks:
            chunks[-1].data = b"".join(pieces)
        return chunks


def _moment(text: str) -> float:
    # Nanoseconds are more than a datetime takes: "2026-11-22T16:57:39.033616047+00:00".
    return datetime.fromisoformat(text[:26] + text[29:]).timestamp()


async def follow_log(
    log: Path, *, offset: int, tail_lines: int, end: asyncio.Event | None
) -> AsyncGenerator[LogChunk, None]:
    """Yields output from `offset` on.

    Args:
        log: the k8s-file log; when it is not there, nothing was written.
        offset: first byte wanted.
        tail_lines: start at most this many lines before the end instead; 0 is not to.
        end: set when the command has ended, so that nothing more will be written. None is not to follow: what is there
            now is all.

    Yields:
        Chunks in order, without a gap.
    """
    if not log.exists():
        return
    if tail_lines:
        offset = await asyncio.to_thread(_tail_offset, log, tail_lines)
    decoder = LogDecoder()
    with log.open("rb") as file, FileWatch(log) as watch:
        waiting = asyncio.ensure_future(_pass_on(end, watch.changed)) if end is not None else None
        try:
            while True:
                # Asked before reading: what ends between the two is then read in the next round.
                last = end is None or end.is_set()
                watch.changed.clear()
                while data := await asyncio.to_thread(file.read, _READ_BYTES):
                    for chunk in decoder.feed(data):
                        if chunk.offset + len(chunk.data) > offset:
                            yield _from(chunk, offset)
                if last:
                    return
                await watch.changed.wait()
        finally:
            if waiting is not None:
                waiting.cancel()


async def _pass_on(end: asyncio.Event, changed: asyncio.Event) -> None:
    await end.wait()
    changed.set()


def _from(chunk: LogChunk, offset: int) -> LogChunk:
    """Cuts what lies before an offset off a chunk."""
    skip = offset - chunk.offset
    if skip <= 0:
        return chunk
    return LogChunk(offset=offset, data=chunk.data[skip:], stream=chunk.stream, time=chunk.time)


def _tail_offset(log: Path, lines: int) -> int:
    """Returns the offset at which the last `lines` lines begin; an unfinished last line counts."""
    decoder = LogDecoder()
    # Offsets just behind a line break. One more than asked for: the last may be the very end.
    starts: deque[int] = deque([0], maxlen=lines + 1)
    with log.open("rb") as file:
        while data := file.read(_READ_BYTES):
            for chunk in decoder.feed(data):
                at = -1
                while (at := chunk.data.find(b"\n", at + 1)) >= 0:
                    starts.append(chunk.offset + at + 1)
    if starts[-1] == decoder.offset and len(starts) > 1:
        starts.pop()
    return starts[max(0, len(starts) - lines)]
