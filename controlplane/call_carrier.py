"""Carries calls of JobService that come from a peer to the job that it has here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from controlplane.carried_methods import CARRIED, Method, exchange, ours
from controlplane.guest_telling import tell_answer, told_text
from controlplane.guests import GuestRecord, require_command
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["CallCarrier", "CarriedContext"]


class CarriedContext:
    """What a method may ask of its call when that was carried here. It ends when the call is closed or cancelled."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        """Refuses the call."""
        raise Refusal(code, "REFUSED", details)

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns what came with the call beside its messages: nothing, as no peer speaks for people here."""
        return ()


class CallCarrier:
    """Carries calls.

    Args:
        store: where guests are.
        jobs: JobService, as this centre serves it.
        silent_s: who does not say what is called is not waited for any longer, in seconds.
    """

    def __init__(self, store: Store, jobs: object, silent_s: float = 30.0) -> None:
        self._silent_s = silent_s
        self._store = store
        self._jobs = jobs

    async def serve(
        self, peer: str, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncGenerator[wire.CallForwardedJobResponse, None]:
        """Carries one call: its header, its request messages, and back its responses.

        Raises:
            Refusal: INVALID_ARGUMENT with HEADER_MISSING or MESSAGE_INVALID; DEADLINE_EXCEEDED with HEADER_MISSING;
                UNIMPLEMENTED with METHOD_NOT_CARRIED;
                NOT_FOUND with GUEST_NOT_FOUND; FAILED_PRECONDITION with STALE_FENCING_TOKEN; and what the method
                refuses.
        """
        try:
            async with asyncio.timeout(self._silent_s):
                first = await anext(requests, None)
        except TimeoutError as error:
            why = f"nothing has come for {self._silent_s:.0f} s"
            raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "HEADER_MISSING", why) from error
        if first is None or first.WhichOneof("part") != "header":
            raise _invalid("HEADER_MISSING", "the first message says what is called")
        header = first.header
        method = CARRIED.get(header.method)
        if method is None:
            raise Refusal(
                grpc.StatusCode.UNIMPLEMENTED,
                "METHOD_NOT_CARRIED",
                f"{header.method[:64]!r} is no call about one job that this version carries",
            )
        guest = await self._store.guest((peer, header.origin.job_id, header.origin.attempt))
        if guest is None or not guest.job_id:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "GUEST_NOT_FOUND", "this attempt was never bound here")
        require_command(guest, header.origin.fencing_token)
        messages = _messages(peer, guest, method, requests)
        try:
            async with contextlib.aclosing(self._called(method, messages)) as responses:
                async for response in responses:
                    tell_answer(response, guest.job_id)
                    exchange(response, guest.job_id, guest.origin_job, guest.attempt)
                    yield wire.CallForwardedJobResponse(message=response.SerializeToString())
        except Refusal as refusal:
            raise _told(refusal, guest) from refusal

    async def _called(self, method: Method, messages: AsyncGenerator[Message, None]) -> AsyncGenerator[Message, None]:
        """Calls the method here."""
        context = CarriedContext()
        call: Any = getattr(self._jobs, method.name)
        request: Any = messages  # of a stream, the method takes what it wants, perhaps in a task of its own
        if not method.streams_requests:
            async with contextlib.aclosing(messages):
                request = await anext(messages, None)
            if request is None:
                raise _invalid("MESSAGE_INVALID", "the request is missing")
        if not method.streams_responses:
            yield await call(request, context)
            return
        async with contextlib.aclosing(call(request, context)) as responses:
            async for response in responses:
                yield response


async def _messages(
    peer: str, guest: GuestRecord, method: Method, requests: AsyncIterator[wire.CallForwardedJobRequest]
) -> AsyncGenerator[Message, None]:
    """Yields the request messages of a call, about the job that the guest is here.

    A connection that breaks may look as if its other end had stopped sending. That is not the end of the messages:
    a command would take half of its input for all of it. Such a call waits until it is ended.
    """
    none_yet = True
    async for request in requests:
        which = request.WhichOneof("part")
        if which == "end":
            return
        if which != "message":
            raise _invalid("MESSAGE_INVALID", "the header comes once, and first")
        message = method.request()
        try:
            message.ParseFromString(request.message)
        except DecodeError as error:
            raise _invalid("MESSAGE_INVALID", f"this is no {method.request.DESCRIPTOR.name}") from error
        message.DiscardUnknownFields()
        ours(peer, guest.job_id, message)
        none_yet = False
        yield message
    if method.streams_requests and not none_yet:
        await asyncio.Event().wait()


def _told(refusal: Refusal, guest: GuestRecord) -> Refusal:
    """Returns a refusal as the guest's origin is told of it."""

    def told(text: str) -> str:
        return told_text(text, guest.job_id).replace(guest.job_id, guest.origin_job)

    metadata = {key: told(value) for key, value in refusal.metadata.items()}
    return Refusal(refusal.code, refusal.reason, told(refusal.message), retry_after_s=refusal.retry_after_s, **metadata)


def _invalid(reason: str, message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
