"""What the caller of a run sends: what to run, then input for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from controlplane.spec import require_valid_command
from puhui.rpc.errors import Refusal
from puhui.v1 import job_service_pb2 as wire
from puhui.v1 import node_service_pb2

__all__ = ["RunInput", "require_valid_start"]

# So much of a fast caller is kept for a slow command.
_MOST_WAITING = 16


def require_valid_start(start: wire.RunStart) -> None:
    """Refuses a run instruction that no job can carry out.

    Raises:
        Refusal: INVALID_ARGUMENT with SPEC_INVALID, its metadata naming the field.
    """
    require_valid_command(start.command, start.env)
    directory = start.working_directory
    if directory and (not directory.startswith("/") or "\0" in directory or len(directory) > 4096):
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "SPEC_INVALID",
            "working_directory is an absolute path in the container",
            field="working_directory",
        )


class RunInput:
    """The caller's messages, handed on to one node call after another. Close it with `aclose`."""

    def __init__(self, requests: AsyncIterator[wire.RunJobRequest]) -> None:
        self._requests = requests
        self._waiting: asyncio.Queue[node_service_pb2.ExecRequest] = asyncio.Queue(_MOST_WAITING)
        self._pump: asyncio.Task[None] | None = None

    async def start(self) -> wire.RunStart:
        """Returns what to run.

        Raises:
            Refusal: INVALID_ARGUMENT with START_MISSING.
        """
        async for request in self._requests:
            if request.HasField("start"):
                return request.start
            break
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "START_MISSING",
            "the first message of a run says what to run: its `start`",
        )

    async def for_node(self, start: node_service_pb2.ExecStart) -> AsyncIterator[node_service_pb2.ExecRequest]:
        """Yields what a node is sent: the start, then the input that no call before has taken."""
        yield node_service_pb2.ExecRequest(start=start)
        if self._pump is None:
            self._pump = asyncio.create_task(self._read())
        while True:
            yield await self._waiting.get()

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                await self._waiting.put(_for_exec(request))
        except (grpc.RpcError, grpc.aio.UsageError):
            return  # the caller is gone; whoever answers it notices that too
        # A caller that has ended its sending has no more input.
        await self._waiting.put(node_service_pb2.ExecRequest(stdin_closed=True))

    async def aclose(self) -> None:
        """Reads no more of the caller."""
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump


def _for_exec(request: wire.RunJobRequest) -> node_service_pb2.ExecRequest:
    match request.WhichOneof("part"):
        case "stdin":
            return node_service_pb2.ExecRequest(stdin=request.stdin)
        case "signal":
            return node_service_pb2.ExecRequest(signal=request.signal)
        case "terminal_size":
            size = request.terminal_size
            return node_service_pb2.ExecRequest(
                terminal_size=node_service_pb2.ExecTerminalSize(columns=size.columns, rows=size.rows)
            )
        case _:
            return node_service_pb2.ExecRequest(stdin_closed=True)
