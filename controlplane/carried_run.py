"""A run at a peer. When the connection to the peer breaks, the same run is taken up again where its output was."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Self

import grpc

from controlplane.carried_methods import Method
from controlplane.faults import retry_delay_s
from controlplane.peer_call import AtPeer, call_there, unreachable
from controlplane.peer_client import is_away
from controlplane.peer_results import invalid_answer
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, timestamp
from puhui.v1 import job_pb2
from puhui.v1 import job_service_pb2 as wire

__all__ = ["CarriedInput", "run_there"]

_LOOK_AGAIN_S = 5.0
_MOST_WAITING = 16
# A peer takes messages of 2 MiB; whoever calls here may send larger ones.
_MOST_STDIN = 2**20
# So often a peer that is in contact may end the call without a word before that is passed on.
_MOST_SILENT = 20
# A connection whose other end is gone without a word is noticed within this time, by its keepalive.
_DOUBT_S = 45.0


class CarriedInput:
    """What the caller of a run sends after its start, handed on to one connection after another.

    Use it as an asynchronous context.
    """

    def __init__(self, start: wire.RunStart, messages: AsyncIterator[wire.RunJobRequest]) -> None:
        self._start = start
        self._messages = messages
        self._waiting: deque[wire.RunJobRequest] = deque()
        self._changed = asyncio.Condition()
        self._connection = 0
        self._ended = False
        self._closed = False
        self._size: wire.TerminalSize | None = None
        self._sent_at: float | None = None
        self._pump: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begins to read."""
        self._pump = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Reads no more of the caller."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)

    @property
    def in_doubt(self) -> bool:
        """Whether a connection that breaks now may have lost input, and nobody sees that.

        Input has no receipt. A command on a terminal may go on, as a person sees what is missing; any other would work
        on half its input and say nothing.
        """
        return not self._start.tty and self._sent_at is not None and time.monotonic() - self._sent_at < _DOUBT_S

    async def to_send(self, output_offset: int) -> AsyncIterator[wire.RunJobRequest]:
        """Yields what a new connection is given: the start, then the input that none before has taken.

        Args:
            output_offset: first byte of output that is wanted.
        """
        self._connection += 1
        mine = self._connection
        start = wire.RunStart()
        start.CopyFrom(self._start)
        start.output_offset = output_offset
        if self._size is not None:
            start.terminal_size.CopyFrom(self._size)
        yield wire.RunJobRequest(start=start)
        if self._closed:
            yield wire.RunJobRequest(stdin_closed=True)
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._connection != mine or self._waiting or self._ended)
                if self._connection != mine or not self._waiting:
                    return
                request = self._waiting.popleft()
                self._note(request)
                self._changed.notify_all()
            yield request

    async def broke(self) -> None:
        """The connection is over: it takes nothing more."""
        async with self._changed:
            self._connection += 1
            self._changed.notify_all()

    def _note(self, request: wire.RunJobRequest) -> None:
        part = request.WhichOneof("part")
        if part == "stdin":
            self._sent_at = time.monotonic()
        elif part == "stdin_closed":
            self._closed = True
        elif part == "terminal_size":
            self._size = request.terminal_size

    async def _read(self) -> None:
        try:
            async for request in self._messages:
                for piece in _pieces(request):
                    async with self._changed:
                        await self._changed.wait_for(lambda: len(self._waiting) < _MOST_WAITING)
                        self._waiting.append(piece)
                        self._changed.notify_all()
        except (grpc.RpcError, grpc.aio.UsageError):
            return  # the caller is gone; whoever answers it notices that too
        async with self._changed:
            self._ended = True
            self._changed.notify_all()


def _pieces(request: wire.RunJobRequest) -> Iterator[wire.RunJobRequest]:
    if len(request.stdin) <= _MOST_STDIN:
        yield request
        return
    for at in range(0, len(request.stdin), _MOST_STDIN):
        yield wire.RunJobRequest(stdin=request.stdin[at : at + _MOST_STDIN])


async def run_there(
    centre: str,
    method: Method,
    there: AtPeer,
    start: wire.RunStart,
    messages: AsyncIterator[wire.RunJobRequest],
    find: Callable[[], Awaitable[AtPeer | None]],
) -> AsyncGenerator[wire.RunJobResponse, None]:
    """Carries a run to where its session is, and yields what comes back: events, the run, output, the exit code.

    With a request id, a connection that breaks is taken up once the peer is in contact again, for as long as the
    session is there; no byte of output is lost or comes twice. Not while input was sent lately that may be lost: then
    the call ends, and its caller decides.

    Args:
        centre: name of this centre.
        method: RunJob.
        there: where the session is.
        start: what to run.
        messages: what its caller sends after that.
        find: looks up where the session is; None when it is at no peer any longer.

    Raises:
        Refusal: UNAVAILABLE with PEER_UNREACHABLE; FAILED_PRECONDITION with RUN_LOST; ABORTED with RUN_HUNG_UP; and
            what `call_there` raises.
    """
    name, told = there.forward.peer, _Told(start.output_offset)
    silent, tries = 0, 0
    async with CarriedInput(start, messages) as given:
        while True:
            why = unreachable(there.forward, there.clock, "ended the call without saying how the run ended")
            try:
                requests = given.to_send(told.offset)
                async with contextlib.aclosing(call_there(centre, method, there, requests)) as answers:
                    async for answer in answers:
                        if not isinstance(answer, wire.RunJobResponse):
                            raise TypeError(f"RunJob was answered with a {type(answer).__name__}")
                        silent = tries = 0
                        if told.takes(answer, name):
                            yield answer
                        if answer.HasField("exit_code"):
                            return
            except Refusal as refusal:
                why = refusal
            await given.broke()
            silent += there.peer.in_contact
            if is_away(why) and told.heard and not start.request_id:
                raise _hung_up(there) from why
            if not (is_away(why) and told.heard) or given.in_doubt or silent > _MOST_SILENT:
                raise why
            tries += 1
            if tries == 1:
                yield _out_of_contact(there)
            there = await _back(there, find, tries)


class _Told:
    """What the caller of a run has been told already."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.heard = False
        self._accepted = False
        self._started = False

    def takes(self, answer: wire.RunJobResponse, peer: str) -> bool:
        """Returns whether an answer is news; changes it to what of it is.

        Raises:
            Refusal: DATA_LOSS with PEER_ANSWER_INVALID.
        """
        self.heard = True
        part = answer.WhichOneof("part")
        if part == "run":
            known = self._started if answer.run.HasField("start_time") else self._accepted
            self._accepted, self._started = True, self._started or answer.run.HasField("start_time")
            return not known
        if part == "event":
            answer.event.ClearField("cursor")  # the peer's
            answer.event.peer = peer
        if part != "output":
            return part is not None
        chunk = answer.output
        end = chunk.offset + len(chunk.data)
        if chunk.offset > self.offset:
            raise invalid_answer("left out output of a run")
        if end <= self.offset:
            return False
        if chunk.offset < self.offset:
            chunk.data, chunk.offset = chunk.data[self.offset - chunk.offset :], self.offset
        self.offset = end
        return True


async def _back(there: AtPeer, find: Callable[[], Awaitable[AtPeer | None]], tries: int) -> AtPeer:
    """Waits until asking the peer again makes sense, and returns where the session is then."""
    await asyncio.sleep(min(_LOOK_AGAIN_S, retry_delay_s(tries)))
    while True:
        found = await find()
        if found is None or found.forward.attempt != there.forward.attempt:
            job_id, name = there.forward.job_id, there.forward.peer
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "RUN_LOST",
                f"job {job_id} is no longer at peer {name}, where the run was, and the rest of its output cannot be "
                f"had; `puhui runs {job_id}` shows what is known of it",
                job_id=job_id,
            )
        if found.peer.in_contact:
            return found
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_AGAIN_S):
                await found.peer.contact()


def _hung_up(there: AtPeer) -> Refusal:
    forward = there.forward
    return Refusal(
        grpc.StatusCode.ABORTED,
        "RUN_HUNG_UP",
        f"the connection to peer {forward.peer} broke, and the run was hung up there: without a request id, it cannot "
        "be taken up again; run it again",
        job_id=forward.job_id,
        peer=forward.peer,
    )


def _out_of_contact(there: AtPeer) -> wire.RunJobResponse:
    forward = there.forward
    return wire.RunJobResponse(
        event=job_pb2.JobEvent(
            time=timestamp(now()),
            job_id=forward.job_id,
            attempt=forward.attempt,
            state=job_pb2.JOB_STATE_RUNNING,
            reason="PEER_OUT_OF_CONTACT",
            message=f"the connection to peer {forward.peer} broke; the run goes on there, and is taken up again",
        )
    )
