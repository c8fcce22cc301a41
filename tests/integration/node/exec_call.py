"""One Exec, as a caller makes it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self

import grpc

from puhui.v1.card_pb2 import AttemptRef
from puhui.v1.node_service_pb2 import ExecRequest, ExecResponse, ExecStart, ExecTerminalSize
from puhui.v1.stream_pb2 import LogStream
from tests.integration.node.client import Node

_numbers = itertools.count(1)


class Exec:
    """A call that can be fed, read and left.

    Usage::

        async with Exec(node, owner, ["cat"]) as call:
            await call.send(stdin=b"hello")
            await call.send(stdin_closed=True)
            assert await call.rest() == b"hello"
            assert call.exit_code == 0
    """

    def __init__(
        self,
        node: Node,
        owner: AttemptRef,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        size: tuple[int, int] | None = None,
        timeout_s: float = 60,
        **start: Any,
    ) -> None:
        terminal = ExecTerminalSize(columns=size[0], rows=size[1]) if size else None
        self.start = ExecStart(owner=owner, command=command, env=env or {}, terminal_size=terminal, **start)
        self._call = node.stub.Exec(timeout=timeout_s)  # type: ignore[call-arg]  # it is written to instead
        self.output = b""
        self.errors = b""
        self.exit_code: int | None = None

    async def __aenter__(self) -> Self:
        await self._call.write(ExecRequest(start=self.start))
        return self

    async def __aexit__(self, *details: object) -> None:
        self._call.cancel()

    async def send(self, **part: Any) -> None:
        """Sends input; what comes too late for the command is dropped."""
        if await self._runs():
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._call.write(ExecRequest(**part))

    async def half_close(self) -> None:
        if await self._runs():
            await self._call.done_writing()

    async def _runs(self) -> bool:
        """Waits until the command runs; gRPC's client would hide the reason of a refusal behind what it cannot send."""
        await self._call.initial_metadata()
        return not self._call.done()

    async def responses(self) -> AsyncIterator[ExecResponse]:
        async for response in self._received():
            if response.WhichOneof("part") == "exit_code":
                self.exit_code = response.exit_code
            elif response.output.stream == LogStream.LOG_STREAM_STDERR:
                self.errors += response.output.data
            else:
                self.output += response.output.data
            yield response

    async def _received(self) -> AsyncIterator[ExecResponse]:
        try:
            async for response in self._call:
                yield response
        except grpc.aio.AioRpcError:
            # gRPC's client takes input that came too late for a failure of the call, which had said all it had to say.
            if self.exit_code is None:
                raise

    async def until(self, words: bytes) -> None:
        """Reads until the output ends with these words."""
        async for _ in self.responses():
            if self.output.endswith(words):
                return
        raise AssertionError(f"the output was {self.output!r}, then {self.errors!r}")

    async def rest(self) -> bytes:
        """Reads to the end, and returns all output of this call."""
        async for _ in self.responses():
            pass
        return self.output

    def leave(self) -> None:
        """Goes away without a word."""
        self._call.cancel()


async def run(node: Node, owner: AttemptRef, *command: str, **arguments: Any) -> Exec:
    """Runs a command to its end without input."""
    async with Exec(node, owner, command, **arguments) as call:
        await asyncio.gather(call.send(stdin_closed=True), call.rest())
    return call


def request_id() -> str:
    return f"exec-test-{next(_numbers)}"
