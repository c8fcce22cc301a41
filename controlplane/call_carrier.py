"""Carries calls of JobService that come from a peer to the job that it has here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from controlplane.carried_methods import CARRIED, Method, exchange, ours
from controlplane.guests import GuestRecord, require_command
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["CallCarrier"]


class CallCarrier:
    """Carries calls.

    Args:
        store: where guests are.
        jobs: JobService, as this centre serves it.
    """

    def __init__(self, store: Store, jobs: object) -> None:
        self._store = store
        self._jobs = jobs

    async def serve(
        self, peer: str, requests: AsyncIterator[wire.CallForwardedJobRequest]
    ) -> AsyncGenerator[wire.CallForwardedJobResponse, None]:
        """Carries one call: its header, its request messages, and back its responses.

        Raises:
            Refusal: INVALID_ARGUMENT with HEADER_MISSING or MESSAGE_INVALID; UNIMPLEMENTED with METHOD_NOT_CARRIED;
                NOT_FOUND with GUEST_NOT_FOUND; FAILED_PRECONDITION with STALE_FENCING_TOKEN; and what the method
                refuses.
        """
        first = await anext(requests, None)
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
                    exchange(response, guest.job_id, guest.origin_job, guest.attempt)
                    yield wire.CallForwardedJobResponse(message=response.SerializeToString())
        except Refusal as refusal:
            refusal.message = refusal.message.replace(guest.job_id, guest.origin_job)
            raise

    async def _called(self, method: Method, messages: AsyncGenerator[Message, None]) -> AsyncGenerator[Message, None]:
        """Calls the method here. It is given no context: it must not need more of its caller than the messages."""
        call: Any = getattr(self._jobs, method.name)
        async with contextlib.aclosing(messages):
            request: Any = messages
            if not method.streams_requests:
                request = await anext(messages, None)
                if request is None:
                    raise _invalid("MESSAGE_INVALID", "the request is missing")
            if not method.streams_responses:
                yield await call(request, None)
                return
            async with contextlib.aclosing(call(request, None)) as responses:
                async for response in responses:
                    yield response


async def _messages(
    peer: str, guest: GuestRecord, method: Method, requests: AsyncIterator[wire.CallForwardedJobRequest]
) -> AsyncGenerator[Message, None]:
    """Yields the request messages of a call, about the job that the guest is here."""
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
        yield message


def _invalid(reason: str, message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
