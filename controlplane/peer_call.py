"""One call of JobService that is carried to a job at a peer, and what may come back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError, Message

from controlplane.carried_methods import Method, speaks_only_of
from controlplane.forwards import ForwardRecord
from controlplane.peer_client import is_away
from controlplane.peer_request import origin_of
from controlplane.peer_results import invalid_answer
from controlplane.reach import Clock, KnownPeer
from puhui.rpc.errors import Refusal
from puhui.v1 import federation_service_pb2 as wire

__all__ = ["AtPeer", "call_there", "lease_left_s", "unreachable"]

_RETRY_S = 1.0
# It is about to be noticed here, and the job goes on otherwise.
_OVERTAKEN = frozenset({"GUEST_NOT_FOUND", "STALE_FENCING_TOKEN"})
# It was refused to this centre, not to whoever has called.
_TO_THE_CENTRE = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})


@dataclass(frozen=True)
class AtPeer:
    """A job that is at a peer.

    Attributes:
        forward: what was sent there.
        peer: which peer.
        clock: this centre's lease clock.
    """

    forward: ForwardRecord
    peer: KnownPeer
    clock: Clock


async def call_there(
    centre: str, method: Method, there: AtPeer, requests: AsyncIterator[Message]
) -> AsyncGenerator[Message, None]:
    """Carries one call to where a job is, and yields what comes back.

    Args:
        centre: name of this centre.
        method: what is called.
        there: where.
        requests: its request messages.

    Raises:
        Refusal: UNAVAILABLE with PEER_UNREACHABLE, GUEST_NOT_FOUND or STALE_FENCING_TOKEN; DATA_LOSS with
            PEER_ANSWER_INVALID; UNIMPLEMENTED with METHOD_NOT_CARRIED; and what the method refuses.
    """
    forward = there.forward

    async def parts() -> AsyncIterator[wire.CallForwardedJobRequest]:
        origin = origin_of(centre, forward)
        yield wire.CallForwardedJobRequest(header=wire.CallHeader(origin=origin, method=method.name))
        async for request in requests:
            yield wire.CallForwardedJobRequest(message=request.SerializeToString())
        yield wire.CallForwardedJobRequest(end=True)

    try:
        async with contextlib.aclosing(there.peer.client.call(parts())) as answers:
            async for answer in answers:
                yield _read(method, forward.job_id, answer.message)
    except Refusal as refusal:
        raise _passed_on(refusal, there, method) from refusal


def lease_left_s(forward: ForwardRecord, clock: Clock) -> float:
    """Returns how long a peer may still run what was sent there, in seconds, if it is not heard of again."""
    return max(0.0, forward.lease_end - forward.peer_time - (clock.now() - forward.read_at))


def unreachable(forward: ForwardRecord, clock: Clock, why: str = "is out of contact") -> Refusal:
    """Returns the refusal of what only an absent peer could answer.

    Args:
        forward: what was sent there.
        clock: this centre's lease clock.
        why: what is the matter with the peer, as the end of a clause.
    """
    left_s = lease_left_s(forward, clock)
    return Refusal(
        grpc.StatusCode.UNAVAILABLE,
        "PEER_UNREACHABLE",
        f"peer {forward.peer} {why}, so job {forward.job_id} cannot be asked. It is taken to be running there still, "
        f"for as long as its lease lasts: {left_s:.0f} s more, if nothing is heard of it; then it waits here again. "
        f"Try again later, or give it up with `puhui cancel {forward.job_id}`",
        retry_after_s=_RETRY_S,
        peer=forward.peer,
        job_id=forward.job_id,
        lease_left_s=f"{left_s:.0f}",
    )


def _read(method: Method, job_id: str, data: bytes) -> Message:
    response = method.response()
    try:
        response.ParseFromString(data)
    except DecodeError as error:
        raise invalid_answer("answers with something else than was asked for") from error
    response.DiscardUnknownFields()
    if not speaks_only_of(job_id, response):
        raise invalid_answer("answers about another job")
    return response


def _passed_on(refusal: Refusal, there: AtPeer, method: Method) -> Refusal:
    """Returns what a peer refuses as whoever has called here is told of it."""
    name = there.forward.peer
    if refusal.reason == "PEER_ANSWER_INVALID":
        return refusal
    if refusal.reason in _OVERTAKEN:
        return Refusal(
            grpc.StatusCode.UNAVAILABLE,
            refusal.reason,
            f"what peer {name} has of the job is changing; try again in a moment",
            retry_after_s=_RETRY_S,
            peer=name,
        )
    if refusal.code in _TO_THE_CENTRE:
        return unreachable(there.forward, there.clock, f"does not let this centre in ({refusal.reason})")
    if refusal.reason == "METHOD_NOT_CARRIED":
        return Refusal(
            grpc.StatusCode.UNIMPLEMENTED,
            refusal.reason,
            f"the job is at peer {name}, whose version of Puhui does not know {method.name} for jobs of others",
            peer=name,
        )
    if is_away(refusal) and refusal.retry_after_s is None:
        return unreachable(there.forward, there.clock)
    return Refusal(
        refusal.code,
        refusal.reason,
        f"at peer {name}: {refusal.message}",
        retry_after_s=refusal.retry_after_s,
        **{key: value for key, value in refusal.metadata.items() if key.isidentifier() and key not in _TAKEN},
    )


# Names of arguments, which a peer's metadata must not give again.
_TAKEN = frozenset({"code", "reason", "message", "retry_after_s", "self"})
