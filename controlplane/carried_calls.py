"""JobService, wherever a job is: calls about one that is at a peer are carried there, all others are answered here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import Message

from controlplane.carried_methods import CARRIED, Method, job_id_of
from controlplane.carried_run import run_there
from controlplane.forwards import ForwardStage
from controlplane.guests import has_lease
from controlplane.job_service import JobService
from controlplane.jobs import FINAL_STATES
from controlplane.peer_call import AtPeer, call_there, lease_left_s, unreachable
from controlplane.peer_results import invalid_answer
from controlplane.reach import Reach
from controlplane.runs import WENT_TO_PEER
from controlplane.store import Store
from controlplane.watch import Feed
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import now, timestamp
from puhui.v1 import job_pb2, job_service_pb2
from puhui.v1 import job_service_pb2 as wire

__all__ = ["CarriedJobService"]

_MIRRORED_S = 5.0
_EXPLAINED_S = 8.0
_LEAST_S = 0.5
_IN_TIME_S = 2.0
"""Whoever calls is told that a peer has not answered so long before the time that it gave is over."""
_THERE = frozenset({ForwardStage.BOUND, ForwardStage.ENDING})
_NAMES = [method.name for method in job_service_pb2.DESCRIPTOR.services_by_name["JobService"].methods]


class CarriedJobService:
    """Serves JobService for one centre and what it has at peers.

    Args:
        centre: its name.
        here: JobService for what is here.
        store: where jobs and forwards are.
        feed: tells of what was stored.
        reach: how peers are worked with.
        explained_s: a peer that has not said within so many seconds why a job waits is not waited for.
    """

    def __init__(
        self,
        centre: str,
        here: JobService,
        store: Store,
        feed: Feed,
        reach: Reach,
        explained_s: float = _EXPLAINED_S,
    ) -> None:
        self._explained_s = explained_s
        self._centre = centre
        self._here = here
        self._store = store
        self._feed = feed
        self._reach = reach
        for name in _NAMES:
            method = CARRIED.get(name)
            setattr(self, name, getattr(here, name) if method is None else self._routed(method))
        self.GetJob = self._get

    def _routed(self, method: Method) -> Callable[[Any, Any], Any]:
        """Returns what serves a method, here or at a peer."""
        if method.name == "RunJob":
            return self._run
        if method.name == "ExplainJob":
            return self._explain
        if method.streams_responses:
            return lambda request, context: self._stream(method, request, context)
        return lambda request, context: self._single(method, request, context)

    async def _single(self, method: Method, request: Any, context: Any) -> Message:
        first, requests = await _begun(method, request)
        there = await self._at_peer(job_id_of(first)) if first is not None else None
        if there is None:
            answer: Message = await getattr(self._here, method.name)(requests, context)
            return answer
        messages = requests if method.streams_requests else _once(request)
        try:
            async with asyncio.timeout(_time_for(context)):
                async with contextlib.aclosing(call_there(self._centre, method, there, messages)) as answers:
                    async for response in answers:
                        await self._as_here(there, response, context)
                        return response
        except TimeoutError as error:
            why = "has not answered in time, though it may still do what was asked"
            raise unreachable(there.forward, there.clock, why) from error
        raise invalid_answer("answers a call with nothing")

    async def _stream(self, method: Method, request: Any, context: Any) -> AsyncIterator[Message]:
        first, requests = await _begun(method, request)
        there = await self._at_peer(job_id_of(first)) if first is not None else None
        if there is None:
            answers = getattr(self._here, method.name)(requests, context)
        else:
            messages = requests if method.streams_requests else _once(request)
            answers = call_there(self._centre, method, there, messages)
        async with contextlib.aclosing(answers):
            async for response in answers:
                yield response

    async def _get(self, request: wire.GetJobRequest, context: Any) -> wire.GetJobResponse:
        """Returns one job, with the leases that hold: under which it is at a peer, or is here as a peer's."""
        response = await self._here.GetJob(request, context)
        job, clock = response.job, self._reach.clock
        if job.state in FINAL_STATES:
            return response
        if job.attempts and job.attempts[-1].peer:
            forward = await self._store.forward(job.id, job.attempts[-1].number)
            if forward is not None and forward.stage in {*_THERE, ForwardStage.SENDING}:
                until = now() + lease_left_s(forward, clock)
                job.attempts[-1].lease_expire_time.CopyFrom(timestamp(until))
        guest = await self._store.guest_of(job.id) if job.HasField("guest") else None
        if guest is not None and has_lease(guest, clock.now(), clock.boot):
            job.guest.lease_expire_time.CopyFrom(timestamp(now() + guest.lease_end - clock.now()))
        return response

    async def _explain(self, request: wire.ExplainJobRequest, context: Any) -> wire.ExplainJobResponse:
        """Says why a job waits. While its peer is away, what is known here."""
        try:
            there = await self._at_peer(request.job_id)
        except Refusal as refusal:
            known = await self._here.ExplainJob(request, context)
            peer = refusal.metadata["peer"]
            known.message = (
                f"peer {peer} is no peer of this centre any longer; what was last heard of it: {known.message}"
            )
            return known
        if there is None:
            return await self._here.ExplainJob(request, context)
        name, why = there.forward.peer, "does not answer"
        try:
            async with asyncio.timeout(self._explained_s):
                return await self._explained_by(there, request)
        except TimeoutError:
            pass
        except Refusal as refusal:
            if refusal.reason != "PEER_UNREACHABLE":
                raise
            why = "is out of contact"
        known = await self._here.ExplainJob(request, context)
        # What is known may be no more than just that.
        if not known.message.startswith(f"peer {name} is out of contact"):
            known.message = f"peer {name} {why}; what was last heard of it: {known.message}"
        return known

    async def _explained_by(self, there: AtPeer, request: wire.ExplainJobRequest) -> wire.ExplainJobResponse:
        method = CARRIED["ExplainJob"]
        async with contextlib.aclosing(call_there(self._centre, method, there, _once(request))) as answers:
            async for response in answers:
                if isinstance(response, wire.ExplainJobResponse):
                    response.message = f"at peer {there.forward.peer}: {response.message}"
                    return response
        raise invalid_answer("answers a call with nothing")

    async def _run(
        self, requests: AsyncIterator[wire.RunJobRequest], context: Any
    ) -> AsyncIterator[wire.RunJobResponse]:
        """Carries out a run instruction, here or at a peer; also when its session goes there while it waits."""
        messages = aiter(requests)
        first = await anext(messages, None)
        job_id = job_id_of(first) if first is not None else ""
        told = False
        while True:
            peer = await self._on_its_way_to(job_id)
            if peer:
                yield _forwarding(job_id, peer)
            there = await self._arrived(job_id)
            if there is None or first is None:
                answers: Any = self._here.RunJob(_after(first, messages), context)
            else:
                answers = run_there(
                    self._centre, CARRIED["RunJob"], there, first.start, messages, lambda: self._at_peer(job_id)
                )
            try:
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        accepted = answer.HasField("run") and not answer.run.HasField("start_time")
                        if not (accepted and told):
                            yield answer
                        told = told or accepted
                return
            except Refusal as refusal:
                if there is not None or refusal.reason != WENT_TO_PEER:
                    raise

    async def _at_peer(self, job_id: str) -> AtPeer | None:
        """Returns where a job is when that is at a peer, which has bound it; None otherwise.

        Raises:
            Refusal: UNAVAILABLE with PEER_UNREACHABLE: work with the peer was ended.
        """
        record = await self._store.job(job_id) if job_id else None
        if record is None or not record.job.attempts or not record.attempt.peer:
            return None
        forward = await self._store.forward(job_id, record.attempt.number)
        if forward is None or forward.stage not in _THERE:
            return None
        peer = self._reach.peers.get(forward.peer)
        if peer is None or peer.record.create_time != forward.paired:
            raise unreachable(forward, self._reach.clock, "is no peer of this centre any longer")
        return AtPeer(forward, peer, self._reach.clock)

    async def _arrived(self, job_id: str) -> AtPeer | None:
        """Waits while a job is on its way to a peer; then as `_at_peer`."""
        with self._feed.watching(job_id) as news:
            while True:
                news.clear()
                there = await self._at_peer(job_id)
                if there is not None or not await self._on_its_way_to(job_id):
                    return there
                await news.wait()

    async def _on_its_way_to(self, job_id: str) -> str:
        """Returns the peer to which a job is being sent; "" when it is not."""
        record = await self._store.job(job_id) if job_id else None
        if record is None or not record.job.attempts or not record.attempt.peer or record.cancel_requested:
            return ""
        forward = await self._store.forward(job_id, record.attempt.number)
        return forward.peer if forward is not None and forward.stage is ForwardStage.SENDING else ""

    async def _as_here(self, there: AtPeer, response: Any, context: Any) -> None:
        """Puts the job as this centre knows it in the place of the job as the peer does."""
        for field, value in response.ListFields():
            if field.message_type is not job_pb2.Job.DESCRIPTOR or field.is_repeated:
                continue
            await self._mirrored(there, value.last_cursor)
            request = wire.GetJobRequest(job_id=there.forward.job_id)
            value.CopyFrom((await self._get(request, context)).job)

    async def _mirrored(self, there: AtPeer, cursor: int) -> None:
        """Waits, not for long, until what the peer has answered has been told here too."""
        key = there.forward.key
        with self._feed.watching(there.forward.job_id) as news, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MIRRORED_S):
                while True:
                    news.clear()
                    forward = await self._store.forward(*key)
                    if forward is None or forward.stage not in _THERE or forward.cursor >= cursor:
                        return
                    await news.wait()


def _time_for(context: Any) -> float | None:
    """Returns how long a peer may take to answer, in seconds; None where whoever calls waits for ever."""
    left_s = context.time_remaining() if context is not None else None
    return None if left_s is None else max(_LEAST_S, left_s - _IN_TIME_S)


def _forwarding(job_id: str, peer: str) -> wire.RunJobResponse:
    return wire.RunJobResponse(
        event=job_pb2.JobEvent(
            time=timestamp(now()),
            job_id=job_id,
            state=job_pb2.JOB_STATE_STARTING,
            reason="FORWARDING",
            message=f"the session is on its way to peer {peer}; the run begins there",
        )
    )


async def _begun(method: Method, request: Any) -> tuple[Message | None, Any]:
    """Returns the first message of a request, and all of it."""
    if not method.streams_requests:
        return request, request
    messages = aiter(request)
    first = await anext(messages, None)
    return first, _after(first, messages)


async def _after(first: Any, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    if first is not None:
        yield first
    async for message in messages:
        yield message


async def _once(request: Message) -> AsyncIterator[Message]:
    yield request
