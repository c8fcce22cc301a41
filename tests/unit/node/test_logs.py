"""k8s-file logs decode to what was written, however they are cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodedaemon.inotify import FileWatch
from nodedaemon.logs import LogDecoder, follow_log
from nodedaemon.process_keeper import log_lines as keeper_lines

_STAMP = b"2026-11-22T16:57:39.033616047+00:00"


def _as_conmon(writes: list[tuple[bool, bytes]]) -> bytes:
    """Renders writes as conmon does: a line per line break, P for a piece without one."""
    log = b""
    for is_err, data in writes:
        head = _STAMP + (b" stderr " if is_err else b" stdout ")
        pieces = data.split(b"\n")
        log += b"".join(head + b"F " + piece + b"\n" for piece in pieces[:-1])
        log += head + b"P " + pieces[-1] + b"\n" if pieces[-1] else b""
    return log


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=40))), st.integers(1, 50))
def test_any_output_comes_back_from_any_cuts(writes: list[tuple[bool, bytes]], step: int) -> None:
    log = _as_conmon(writes)
    decoder = LogDecoder()
    chunks = [chunk for at in range(0, len(log), step) for chunk in decoder.feed(log[at : at + step])]
    written = b"".join(data for _, data in writes)
    assert b"".join(chunk.data for chunk in chunks) == written
    assert decoder.offset == len(written)
    at = 0
    for chunk in chunks:
        assert chunk.offset == at
        at += len(chunk.data)
    for is_err in (False, True):
        assert b"".join(c.data for c in chunks if (c.stream == 2) == is_err) == b"".join(
            data for err, data in writes if err == is_err
        )


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_the_keeper_writes_what_the_decoder_reads(data: bytes) -> None:
    assert b"".join(chunk.data for chunk in LogDecoder().feed(keeper_lines(data, b"stdout"))) == data


def test_the_time_is_that_of_the_first_byte() -> None:
    (chunk,) = LogDecoder().feed(_STAMP + b" stdout F a\n2027-01-01T00:00:00.000000000+00:00 stdout F b\n")
    assert chunk.data == b"a\nb\n"
    assert chunk.time.seconds == 1795366659


async def test_following_ends_when_the_command_has_and_all_is_sent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    end = asyncio.Event()
    seen: list[bytes] = []

    async def follow() -> None:
        async for chunk in follow_log(log, offset=0, tail_lines=0, end=end):
            seen.append(chunk.data)
            if len(seen) == 1:
                with log.open("ab") as file:
                    file.write(_STAMP + b" stdout F two\n")
                end.set()

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    with log.open("ab") as file:
        file.write(_STAMP + b" stdout F one\n")
    await following
    assert seen == [b"one\n", b"two\n"]


async def test_a_missing_log_is_an_empty_one(tmp_path: Path) -> None:
    assert [c async for c in follow_log(tmp_path / "none", offset=0, tail_lines=3, end=asyncio.Event())] == []


async def test_many_followers_share_one_inotify_instance(tmp_path: Path) -> None:
    def instances() -> int:
        return sum(
            "inotify" in os.readlink(link)  # noqa: PTH115 - no path
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink()
        )

    before = instances()
    logs = [tmp_path / f"log-{number}" for number in range(20)]
    for log in logs:
        log.touch()
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(FileWatch(log)) for log in logs for _ in range(10)]
        assert instances() == before + 1
        logs[3].write_text("x")
        await watches[35].changed.wait()
        await watches[30].changed.wait()  # everybody who watches the same file is told
        assert not watches[40].changed.is_set()
        # One who goes leaves the others watching, and so does a file that goes.
        watches[30].changed.clear()
        with FileWatch(logs[3]) as another:
            logs[3].write_text("y")
            await another.changed.wait()
        await watches[30].changed.wait()
        logs[5].unlink()
        await watches[55].changed.wait()
        watches[190].changed.clear()
        logs[19].write_text("z")
        await watches[190].changed.wait()
        with pytest.raises(FileNotFoundError):
            FileWatch(tmp_path / "none")
    assert instances() == before
