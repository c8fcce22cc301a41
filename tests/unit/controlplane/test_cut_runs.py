"""The connection of a run at a peer is cut at each of its messages in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from puhui.rpc.errors import Refusal
from puhui.v1 import federation_service_pb2 as federation
from puhui.v1 import job_service_pb2 as wire
from tests.unit.controlplane.carried import Connection, Ends, ends
from tests.unit.controlplane.centres import eventually

PIECES = [b"one\n", b"\xff\x00two", b"three"]
ANSWERS = 2 + len(PIECES) + 1
"""That it is accepted, that it runs, its output, its exit code."""


class Scissors:
    """Cuts the connection once, before it lets its nth message through, in one direction.

    Takes the place of a connection's `call`. A connection that was cut at a request is to be mended.
    """

    def __init__(self, connection: Connection, *, answer: int = 0, request: int = 0) -> None:
        self.cuts = 0
        self._connection = connection
        self._call = connection.call
        self._answer = answer
        self._request = request
        connection.call = self  # type: ignore[method-assign]

    async def __call__(
        self, requests: AsyncIterator[federation.CallForwardedJobRequest]
    ) -> AsyncGenerator[federation.CallForwardedJobResponse, None]:
        broken = Refusal(grpc.StatusCode.UNAVAILABLE, "UNKNOWN", "the connection is broken")

        async def sent() -> AsyncIterator[federation.CallForwardedJobRequest]:
            number = 0
            async for request in requests:
                number += 1
                if number == self._request and not self.cuts:
                    self.cuts += 1
                    await self._connection.cut()
                    await asyncio.Event().wait()
                yield request

        number = 0
        async for answer in self._call(sent()):
            number += 1
            if number == self._answer and not self.cuts:
                self.cuts += 1
                raise broken
            yield answer
        if number == self._answer - 1 and not self.cuts:
            self.cuts += 1
            raise broken


async def carried_out(both: Ends, request_id: str, **start: Any) -> list[wire.RunJobResponse]:
    """Carries out a run that writes some output and ends with 9."""
    before = len(both.node.commands)
    async with both.run(request_id, command=["sh"], **start) as run:
        run.end()
        answers = []
        written = 0
        async for answer in run.answers:
            answers.append(answer)
            if answer.HasField("run") and answer.run.HasField("start_time"):
                await eventually(lambda: len(both.node.commands) > before)
            if len(both.node.commands) > before:
                command = both.node.commands[before]
                if written < len(PIECES):
                    await command.write(PIECES[written])
                    written += 1
                elif command.exit_code is None:
                    await command.end(9)
        assert len(both.node.commands) == before + 1, "it was run once"
        return answers


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[Ends]:
    async with ends(tmp_path) as running:
        await running.send()
        await running.bind()
        yield running


@pytest.mark.parametrize("number", range(2, ANSWERS + 2))
async def test_the_caller_gets_every_byte_once_wherever_it_is_cut(both: Ends, number: int) -> None:
    scissors = Scissors(both.peer, answer=number)
    answers = await carried_out(both, f"r-{number}")
    # The last message ends the call for the caller, so that there is nothing left to cut.
    assert scissors.cuts == (number <= ANSWERS)
    assert b"".join(answer.output.data for answer in answers) == b"".join(PIECES)
    offsets = [(answer.output.offset, len(answer.output.data)) for answer in answers if answer.HasField("output")]
    assert [at for at, _ in offsets] == [sum(length for _, length in offsets[:n]) for n in range(len(offsets))]
    assert [answer.exit_code for answer in answers if answer.HasField("exit_code")] == [9]
    assert [answer.run.HasField("start_time") for answer in answers if answer.HasField("run")] == [False, True]
    told = [answer.event.reason for answer in answers if answer.HasField("event")]
    assert told == ["PEER_OUT_OF_CONTACT"] * scissors.cuts


TYPED: list[dict[str, Any]] = [
    {"stdin": b"a"},
    {"terminal_size": wire.TerminalSize(columns=90, rows=30)},
    {"stdin": b"b"},
    {"signal": 2},
    {"stdin": b"c"},
    {"stdin_closed": True},
]
BEFORE = 2
"""What is called, and the start, are sent before what is typed."""


@pytest.mark.parametrize("number", range(1, BEFORE + len(TYPED) + 1))
async def test_what_is_typed_arrives_in_order_and_at_most_once_wherever_it_is_cut(both: Ends, number: int) -> None:
    scissors = Scissors(both.peer, request=number)
    async with both.run("r-1", command=["sh"], tty=True) as run:
        if number <= BEFORE:
            with pytest.raises(Refusal) as refused:
                await run.until("run")
            assert (refused.value.reason, both.node.commands) == ("PEER_UNREACHABLE", [])
            assert refused.value.retry_after_s, "whoever has called comes again"
            return
        await run.until("run")
        await run.until("run")
        command = await both.command()
        for part in TYPED:
            run.send(**part)
        assert (await run.until("event")).event.reason == "PEER_OUT_OF_CONTACT"
        await both.peer.mend()
        answers = asyncio.create_task(run.rest())
        await eventually(lambda: bool(command.input) and command.input[-1].stdin_closed)
        await command.write(b"done")
        await command.end(0)
        assert b"".join(answer.output.data for answer in await answers) == b"done"
        assert scissors.cuts == 1
        got = b"".join(one.stdin for one in command.input)
        lost = TYPED[number - BEFORE - 1].get("stdin", b"")
        assert got == b"abc".replace(lost, b""), "what a person sees missing, they type again"
        assert [one.signal for one in command.input if one.signal] == ([] if number == BEFORE + 4 else [2])
    assert len(both.node.commands) == 1
