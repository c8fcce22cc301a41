"""JobService, wherever a job is: calls about one that is at a peer are carried there, all others are answered here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from controlplane.carried_methods import CARRIED, Method, job_id_of
from controlplane.forwards import ForwardRecord, ForwardStage
from controlplane.job_service import JobService
from controlplane.peer_client import is_away
from controlplane.peer_request import origin_of
from controlplane.peer_results import invalid_answer
from controlplane.reach import KnownPeer, Reach
from controlplane.store import Store
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import job_service_pb2

__all__ = ["CarriedJobService"]

_RETRY_S = 1.0
_BOUND_S = 30.0
_THERE = frozenset({ForwardStage.BOUND, ForwardStage.ENDING})


@dataclass(frozen=True)
class _Away:
    """A job that is at a peer."""

    forward: ForwardRecord
    peer: KnownPeer


class CarriedJobService:
    """Serves JobService for one centre and what it has at peers.

    Args:
        centre: its name.
        here: JobService for what is here.
        store: where jobs and forwards are.
        feed: tells of what was stored.
        reach: how peers are worked with.
    """

    def __init__(self, centre: str, here: JobService, store: Store, feed: Feed, reach: Reach) -> None:
        self._centre = centre
        self._here = here
        self._store = store
        self._feed = feed
        self._reach = reach
        for name in _NAMES:
            method = CARRIED.get(name)
            setattr(self, name, getattr(here, name) if method is None else self._routed(method))

    def _routed(self, method: Method) -> Callable[[Any, Any], Any]:
        """Returns what serves a method, here or at a peer."""
        if method.streams_responses:

            async def stream(request: Any, context: Any) -> AsyncIterator[Message]:
                first, requests = await _first(method, request)
                away = await self._away(job_id_of(first)) if first is not None else None
                if away is not None:
                    answers = self._carry(method, away, requests)
                else:
                    answers = getattr(self._here, method.name)(requests, context)
                async with contextlib.aclosing(answers):
                    async for response in answers:
                        yield response

            return stream

        async def single(request: Any, context: Any) -> Message:
            away = await self._away(job_id_of(request))
            if away is None:
                answer: Message = await getattr(self._here, method.name)(request, context)
                return answer
            async with contextlib.aclosing(self._carry(method, away, request)) as answers:
                async for response in answers:
                    return _shown(method, away, response)
            raise invalid_answer("answers a call with nothing")

        return single

    async def _away(self, job_id: str) -> _Away | None:
        """Returns where a job is when that is at a peer; None when it is here, or nowhere.

        Raises:
            Refusal: UNAVAILABLE with PEER_UNREACHABLE: it has not arrived there yet, or the peer is gone.
        """
        with self._feed.watching(job_id) as news, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BOUND_S):
                while True:
                    news.clear()
                    record = await self._store.job(job_id)
                    if record is None or not record.job.attempts or not record.attempt.peer:
                        return None
                    forward = await self._store.forward(job_id, record.attempt.number)
                    if forward is None or forward.stage not in {*_THERE, ForwardStage.SENDING}:
                        return None
                    peer = self._reach.peers.get(forward.peer)
                    if forward.stage in _THERE and peer is not None:
                        return _Away(forward, peer)
                    await news.wait()
        raise _unreachable("the peer to which it goes")

    async def _carry(self, method: Method, away: _Away, request: Any) -> AsyncGenerator[Message, None]:
        """Carries a call to where the job is, and yields what comes back.

        A connection that breaks ends the call. Whoever has called comes back as to a centre that was started again,
        with the same request id and from the offset of the output that it has.

        Raises:
            Refusal: UNAVAILABLE with PEER_UNREACHABLE; DATA_LOSS with PEER_ANSWER_INVALID; and what the method refuses.
        """
        forward = away.forward

        async def parts() -> AsyncIterator[wire.CallForwardedJobRequest]:
            origin = origin_of(self._centre, forward)
            yield wire.CallForwardedJobRequest(header=wire.CallHeader(origin=origin, method=method.name))
            async for message in request if method.streams_requests else _once(request):
                yield wire.CallForwardedJobRequest(message=message.SerializeToString())
            yield wire.CallForwardedJobRequest(end=True)

        try:
            async with contextlib.aclosing(away.peer.client.call(parts())) as answers:
                async for answer in answers:
                    response = method.response()
                    try:
                        response.ParseFromString(answer.message)
                    except DecodeError as error:
                        raise invalid_answer("answers with something else than was asked for") from error
                    if job_id_of(response) not in ("", forward.job_id):
                        raise invalid_answer("answers about another job")
                    yield response
        except Refusal as refusal:
            if not is_away(refusal) or refusal.retry_after_s is not None:
                raise
            raise _unreachable(f"peer {forward.peer}") from refusal


_NAMES = [method.name for method in job_service_pb2.DESCRIPTOR.services_by_name["JobService"].methods]


async def _first(method: Method, request: Any) -> tuple[Message | None, Any]:
    """Returns the first message of a request, and all of it."""
    if not method.streams_requests:
        return request, request
    messages = aiter(request)
    first = await anext(messages, None)

    async def all_of_it() -> AsyncIterator[Message]:
        if first is not None:
            yield first
        async for message in messages:
            yield message

    return first, all_of_it()


async def _once(request: Message) -> AsyncIterator[Message]:
    yield request


def _shown(method: Method, away: _Away, response: Message) -> Message:
    if isinstance(response, job_service_pb2.ExplainJobResponse):
        response.message = f"at peer {away.forward.peer}: {response.message}"
    return response


def _unreachable(whom: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.UNAVAILABLE,
        "PEER_UNREACHABLE",
        f"{whom} is out of contact, so the job cannot be asked; it is taken to be running there still; try again later",
        retry_after_s=_RETRY_S,
    )
