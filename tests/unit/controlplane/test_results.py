from __future__ import annotations

import tempfile
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.results import Results
from puhui.rpc.moment import timestamp
from puhui.v1 import stream_pb2


def write(results: Results, pieces: list[bytes]) -> bytes:
    whole = b""
    with results.write_log("j-1", 1) as log:
        for number, piece in enumerate(pieces):
            log.write(
                stream_pb2.LogChunk(
                    offset=len(whole),
                    data=piece,
                    stream=stream_pb2.LOG_STREAM_STDOUT if number % 2 else stream_pb2.LOG_STREAM_STDERR,
                    time=timestamp(float(number)),
                )
            )
            whole += piece
        log.keep()
        assert log.size_bytes == len(whole)
    results.settle("j-1", 1)
    return whole


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=40) | st.just(b"line\n") | st.just(b"x" * 200_000), max_size=12),
    st.data(),
)
def test_any_offset_and_any_tail_of_a_log_can_be_read(pieces: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder))
        whole = write(results, pieces)
        offset = data.draw(st.integers(0, len(whole) + 5))
        read = list(results.log("j-1", 1, offset))
        assert b"".join(chunk.data for chunk in read) == whole[offset:]
        assert not read or read[0].offset == offset
        lines = data.draw(st.integers(1, 8))
        tail = b"".join(chunk.data for chunk in results.log("j-1", 1, results.tail("j-1", 1, lines)))
        assert tail == b"".join(whole.splitlines(keepends=True)[-lines:]) or has_other_line_ends(whole)


def has_other_line_ends(whole: bytes) -> bool:
    """bytes.splitlines knows more line ends than a log does."""
    return any(mark in whole for mark in (b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\x85"))


def test_streams_and_times_survive(tmp_path: Path) -> None:
    results = Results(tmp_path)
    write(results, [b"a", b"b"])
    first, second = results.log("j-1", 1)
    assert (first.stream, second.stream) == (stream_pb2.LOG_STREAM_STDERR, stream_pb2.LOG_STREAM_STDOUT)
    assert second.time == timestamp(1.0)


def test_a_log_that_is_not_whole_is_not_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with results.write_log("j-1", 1) as log:
        log.write(stream_pb2.LogChunk(data=b"half"))
    assert not results.has_log("j-1", 1)
    assert list(results.log("j-1", 1)) == []
    assert list(results.folder("j-1", 1).iterdir()) == []


def test_what_is_sent_twice_is_written_once(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with results.write_log("j-1", 1) as log:
        log.write(stream_pb2.LogChunk(offset=0, data=b"abc"))
        log.write(stream_pb2.LogChunk(offset=1, data=b"bcde"))
        log.write(stream_pb2.LogChunk(offset=0, data=b"ab"))
        log.keep()
    assert b"".join(chunk.data for chunk in results.log("j-1", 1)) == b"abcde"


def test_artifacts_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    results = Results(tmp_path)
    manifest = stream_pb2.ArtifactManifest(
        digest="sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        size_bytes=3,
        files=[stream_pb2.ArtifactFile(path="a")],
    )
    with results.write_artifacts("j-1", 1) as archive:
        archive.write(b"ab")
        assert not archive.matches(manifest)
    assert results.manifest("j-1", 1) is None
    assert list(results.folder("j-1", 1).iterdir()) == []
    with results.write_artifacts("j-1", 1) as archive:
        archive.write(b"abc")
        assert archive.matches(manifest)
        archive.keep(manifest)
    assert results.manifest("j-1", 1) == manifest
    assert results.archive("j-1", 1).read_bytes() == b"abc"


def test_the_end_of_a_large_log_is_found_at_once(tmp_path: Path) -> None:
    results = Results(tmp_path)
    whole = write(results, [b"x" * 2**18] * 80 + [b"a\nb\n"])
    started = time.process_time()
    assert results.tail("j-1", 1, 1) == len(whole) - 2
    assert results.tail("j-1", 1, 3) == 0
    assert time.process_time() - started < 0.25  # byte by byte it takes seconds
    assert results.tail("j-1", 2, 1) == 0
