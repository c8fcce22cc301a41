"""Which calls of JobService are carried to where a job is (decision 0014), and how ids are exchanged. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor, message_factory
from google.protobuf.message import Message

from puhui.v1 import job_pb2, job_service_pb2

__all__ = ["CARRIED", "LOCAL", "Method", "exchange", "job_id_of", "ours", "request_id_of", "speaks_only_of"]

LOCAL = frozenset({"GetJob", "WatchJob", "CancelJob", "ReadLogs", "GetArtifacts"})
"""Calls about one job that the origin answers itself, also while the peer is away: it has mirrored what they tell, or
has a call of its own for it."""

_MOST_REQUEST_ID = 64


@dataclass(frozen=True)
class Method:
    """A call of JobService that is carried."""

    name: str
    request: type[Message]
    response: type[Message]
    streams_requests: bool
    streams_responses: bool


def _about_one_job(request: descriptor.Descriptor) -> bool:
    """Whether a request names one job, itself or in the part that comes first."""
    if "job_id" in request.fields_by_name:
        return True
    return any(
        part.message_type is not None and "job_id" in part.message_type.fields_by_name
        for group in request.oneofs
        for part in group.fields
    )


def _carried() -> dict[str, Method]:
    service = job_service_pb2.DESCRIPTOR.services_by_name["JobService"]
    return {
        one.name: Method(
            one.name,
            message_factory.GetMessageClass(one.input_type),
            message_factory.GetMessageClass(one.output_type),
            one.client_streaming,
            one.server_streaming,
        )
        for one in service.methods
        if one.name not in LOCAL and _about_one_job(one.input_type)
    }


CARRIED: Mapping[str, Method] = _carried()
"""Every call of JobService that is about one job, but for those in LOCAL: also one that is added later."""


def job_id_of(request: Message) -> str:
    """Returns the job that a request, or the first message of a stream of them, is about; "" when it names none."""
    return next((str(value.job_id) for value in (request, *_parts(request)) if _has(value, "job_id")), "")


def _parts(request: Message) -> list[Any]:
    """Returns the messages in the singular fields of a message."""
    return [value for field, value in request.ListFields() if field.message_type is not None and not field.is_repeated]


def _has(message: Message, field: str) -> bool:
    return field in message.DESCRIPTOR.fields_by_name


def exchange(message: Message, old: str, new: str, attempt: int) -> None:
    """Puts one job's id in the place of another's, wherever a message has it, also within text; and the attempt.

    Args:
        message: changed in place.
        old: id of the job at the side where the message comes from.
        new: its id at the side where the message goes.
        attempt: number of the attempt there; 0 is the newest.
    """
    for field, value in message.ListFields():
        if field.message_type is not None:
            if _is_map(field):
                _exchange_map(value, field, old, new, attempt)
            else:
                for one in value if field.is_repeated else (value,):
                    exchange(one, old, new, attempt)
        elif field.type == field.TYPE_STRING:
            if field.is_repeated:
                value[:] = [text.replace(old, new) for text in value]
            else:
                setattr(message, field.name, value.replace(old, new))
        elif field.name == "attempt" and value:
            setattr(message, field.name, attempt)


def _is_map(field: Any) -> bool:
    return bool(field.message_type.GetOptions().map_entry)


def _exchange_map(values: Any, field: Any, old: str, new: str, attempt: int) -> None:
    kind = field.message_type.fields_by_name["value"]
    for key in list(values):
        if kind.message_type is not None:
            exchange(values[key], old, new, attempt)
        elif kind.type == kind.TYPE_STRING:
            values[key] = values[key].replace(old, new)


def ours(peer: str, job_id: str, request: Message) -> None:
    """Makes a peer's request one of this centre. Changes it in place.

    Args:
        peer: name of the peer; its request ids become such as nobody else here has.
        job_id: the job that it has here, which is meant whatever was named.
        request: a request message.
    """
    for one in _within(request):
        if _has(one, "job_id"):
            one.job_id = job_id
        if _has(one, "attempt"):
            one.ClearField("attempt")
        if _has(one, "request_id") and one.request_id:
            one.request_id = request_id_of(peer, one.request_id)


def request_id_of(peer: str, given: str) -> str:
    """Returns the request id under which this centre remembers a peer's; too long when the given one is."""
    name = f"{peer}/{given}"
    if len(name) <= _MOST_REQUEST_ID or len(given) > _MOST_REQUEST_ID:
        return name
    return hashlib.sha256(name.encode()).hexdigest()


def speaks_only_of(job_id: str, response: Message) -> bool:
    """Returns whether a response names no other job than this one, in no field that is for ids of jobs."""
    return all(
        named in ("", job_id)
        for one in _within(response)
        for named in ([one.job_id] if _has(one, "job_id") else [one.id] if isinstance(one, job_pb2.Job) else [])
    )


def _within(message: Any) -> Iterator[Any]:
    """Yields a message and every message in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if _is_map(field):
            inner = value.values() if field.message_type.fields_by_name["value"].message_type is not None else ()
        else:
            inner = value if field.is_repeated else (value,)
        for one in inner:
            yield from _within(one)
