from __future__ import annotations

import asyncio
import threading

import pytest

from controlplane.entrypoint import LARGEST_PARSED_BYTES, Entrypoint
from controlplane.lasting import Lasting
from controlplane.parsing import Parsing
from predictor_onnx import source
from puhui.rpc.errors import Refusal

PROGRAM = Entrypoint("x.py", python=True)


async def required(parsing: Parsing, code: bytes) -> str:
    return await parsing.require(PROGRAM, {"x.py": len(code)}, {"x.py": code})


def test_what_the_predictor_would_not_read_is_not_parsed() -> None:
    assert LARGEST_PARSED_BYTES == source.LARGEST_FILE_BYTES


async def test_a_program_is_parsed_up_to_the_limit_and_not_beyond() -> None:
    parsing = Parsing(Lasting())
    at_most = b"#" * (LARGEST_PARSED_BYTES - 4) + b"\n((("
    with pytest.raises(Refusal, match=r"x\.py, line 2"):
        await required(parsing, at_most)
    assert "was not parsed, as nothing over 384 KiB is; " in await required(parsing, at_most + b"(")
    assert await parsing.require(None, {}, {}) == ""
    assert await parsing.require(Entrypoint("run.sh", python=False), {"run.sh": 2**30}, {}) == ""


async def test_programs_are_parsed_one_at_a_time_even_if_nobody_waits() -> None:
    begun, go_on, at_work = threading.Event(), threading.Event(), threading.Lock()
    parsed: list[bytes] = []

    def parse(path: str, code: bytes) -> None:
        assert at_work.acquire(blocking=False), "two at once"
        begun.set()
        go_on.wait()
        parsed.append(code)
        at_work.release()

    parsing = Parsing(Lasting(), parse)
    tasks = [asyncio.create_task(required(parsing, code)) for code in (b"1", b"2", b"3")]
    await asyncio.to_thread(begun.wait)
    tasks[0].cancel()
    await asyncio.wait({tasks[0]}, timeout=0)
    go_on.set()
    await asyncio.gather(*tasks[1:])
    assert parsed == [b"1", b"2", b"3"]
