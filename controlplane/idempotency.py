"""Request ids: a mutation that comes again is not done again."""

from __future__ import annotations

import grpc
from google.protobuf.message import Message

from controlplane.records import JobRecord, Request
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import request_digest
from puhui.rpc.moment import now

__all__ = ["KEPT_S", "earlier_answer", "request_of", "reused"]

KEPT_S = 24 * 3600.0
"""How long a request id is remembered, in seconds."""

_MOST_CHARACTERS = 64


def request_of(rpc: str, message: Message, request_id: str) -> Request | None:
    """Returns what is remembered of a mutation; None when it has no request id.

    Raises:
        Refusal: INVALID_ARGUMENT with REQUEST_ID_INVALID.
    """
    if not request_id:
        return None
    if len(request_id) > _MOST_CHARACTERS:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "REQUEST_ID_INVALID",
            f"request_id has at most {_MOST_CHARACTERS} characters; a random UUID is a good one",
        )
    body = message.SerializeToString(deterministic=True)
    return Request(request_id, request_digest(rpc.encode() + b"\0" + body), now())


async def earlier_answer(store: Store, request: Request | None) -> JobRecord | None:
    """Returns the job that the same request was about before; None when it is new.

    Raises:
        Refusal: ALREADY_EXISTS with REQUEST_ID_REUSED.
    """
    known = await store.request(request.id) if request is not None else None
    if request is None or known is None:
        return None
    if known[0].digest != request.digest:
        raise reused(request.id)
    return await store.job(known[1])


def reused(request_id: str) -> Refusal:
    """Returns the refusal of a request id that came with another body before."""
    return Refusal(
        grpc.StatusCode.ALREADY_EXISTS,
        "REQUEST_ID_REUSED",
        "this request_id was used for another request within 24 h; use a new one for each request",
        request_id=request_id,
    )
