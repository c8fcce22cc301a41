"""Mutations: fenced, one at a time per attempt, carried out to the end, and answered the same when repeated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import grpc
import structlog
from google.protobuf.message import Message

from nodedaemon.journal import Journal
from nodedaemon.owner import Owner
from nodedaemon.records import Answer
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import request_digest
from puhui.rpc.moment import now
from puhui.v1.card_pb2 import AttemptRef

__all__ = ["Beside", "Mutation", "Mutations"]

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")
_Response = TypeVar("_Response", bound=Message)


@dataclass(frozen=True)
class Beside:
    """An attempt that a mutation touches beside the one it is for."""

    owner: Owner
    token: int | None = None
    """By what right; None where the mutation's own right is enough."""


class Mutation(Protocol):
    """A request that changes something for an attempt."""

    @property
    def owner(self) -> AttemptRef:
        """For whom, and by what right."""

    @property
    def request_id(self) -> str:
        """Makes the request idempotent; empty does not."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:  # noqa: N802 - protobuf's name
        """Returns the request's bytes."""


class Mutations:
    """Carries out mutations."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        # A lock is there for as long as somebody holds or awaits it.
        self._locks: WeakValueDictionary[Owner, asyncio.Lock] = WeakValueDictionary()
        self._running: set[asyncio.Task[Any]] = set()

    async def carry_out(
        self,
        request: Mutation,
        kind: type[_Response],
        act: Callable[[Owner, int], Awaitable[_Response]],
        *,
        beside: Sequence[Beside] = (),
    ) -> _Response:
        """Carries a mutation out, unless it was already, and answers it.

        A caller that goes away does not stop it: when it repeats the request it gets the answer.

        Args:
            request: the request.
            kind: class of the response.
            act: does it, given the owner and the fencing token.
            beside: other attempts that it touches; nothing else happens to them meanwhile.

        Raises:
            Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN; ALREADY_EXISTS with REQUEST_ID_REUSED;
                INVALID_ARGUMENT with OWNER_INVALID; and whatever `act` raises, which is not kept.
        """
        owner, token = Owner.of(request.owner), request.owner.fencing_token
        name = f"{kind.DESCRIPTOR.name.removesuffix('Response')} for {owner}"
        turn = self._in_turn([Beside(owner, token), *beside], lambda: self._answered(owner, token, request, kind, act))
        return await self._to_the_end(turn, name)

    async def carry_out_once(self, ref: AttemptRef, name: str, act: Callable[[Owner, int], Awaitable[_T]]) -> _T:
        """Carries out a mutation whose answer is not kept. A caller that goes away does not stop it.

        Args:
            ref: for whom, and by what right.
            name: what is done, for the log.
            act: does it, given the owner and the fencing token.

        Raises:
            Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN; INVALID_ARGUMENT with OWNER_INVALID; and whatever
                `act` raises.
        """
        owner, token = Owner.of(ref), ref.fencing_token
        turn = self._in_turn([Beside(owner, token)], lambda: act(owner, token))
        return await self._to_the_end(turn, f"{name} for {owner}")

    async def _to_the_end(self, work: Coroutine[Any, Any, _T], name: str) -> _T:
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _in_turn(self, touched: Sequence[Beside], act: Callable[[], Awaitable[_T]]) -> _T:
        async with contextlib.AsyncExitStack() as turns:
            # In one order for all: two that touch the same attempts must not wait for each other.
            for owner in sorted({one.owner for one in touched}):
                await turns.enter_async_context(self._locks.setdefault(owner, asyncio.Lock()))
            for one in touched:
                if one.token is not None:
                    self.require_command(one.owner, one.token)
            for one in touched:
                if one.token is not None:
                    self.fence(one.owner, one.token)
            return await act()

    async def _answered(
        self,
        owner: Owner,
        token: int,
        request: Mutation,
        kind: type[_Response],
        act: Callable[[Owner, int], Awaitable[_Response]],
    ) -> _Response:
        digest = _digest(request)
        known = self._journal.answer(owner.centre, request.request_id) if request.request_id else None
        if known is not None:
            if (known.rpc, known.digest) != (kind.DESCRIPTOR.name, digest):
                raise Refusal(
                    grpc.StatusCode.ALREADY_EXISTS,
                    "REQUEST_ID_REUSED",
                    f"request_id {request.request_id!r} was used for another request; use a new one",
                    request_id=request.request_id,
                )
            return kind.FromString(known.message)
        response = await act(owner, token)
        if request.request_id:
            answer = Answer(kind.DESCRIPTOR.name, digest, response.SerializeToString())
            self._journal.keep_answer(owner, request.request_id, answer, now())
        return response

    def require_command(self, owner: Owner, token: int) -> None:
        """Refuses who no longer commands an attempt.

        Raises:
            Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN.
        """
        highest = self._journal.highest_token(owner)
        if token < highest:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "STALE_FENCING_TOKEN",
                f"fencing token {token} is lower than {highest}, the highest seen for {owner}: another control plane "
                "commands this attempt now",
                highest_token=str(highest),
            )

    def fence(self, owner: Owner, token: int) -> None:
        """Refuses who no longer commands an attempt, and notes who does, for what need not wait for its turn.

        Raises:
            Refusal: FAILED_PRECONDITION with STALE_FENCING_TOKEN.
        """
        self.require_command(owner, token)
        if token > self._journal.highest_token(owner):
            self._journal.raise_token(owner, token, now())

    async def settle(self, limit_s: float) -> None:
        """Waits until every mutation that has begun has ended, but no longer than `limit_s` seconds.

        What is left then is as after a crash: the next start makes it good.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._running:
                    await asyncio.wait(self._running)
        for task in self._running:
            _log.warning("left a mutation to the next start", mutation=task.get_name())


def _digest(request: Any) -> str:
    # Who takes over an attempt repeats its requests with a token of its own.
    same = type(request)()
    same.CopyFrom(request)
    for name in ("owner", "new_owner"):
        if name in same.DESCRIPTOR.fields_by_name:
            getattr(same, name).fencing_token = 0
    if "lease_expire_time" in same.DESCRIPTOR.fields_by_name:
        same.ClearField("lease_expire_time")  # it has grown since
    return request_digest(same.SerializeToString(deterministic=True))
