"""What a guest's origin is told of it: all about the guest, nothing about others. Pure."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf.message import Message

from puhui.v1 import job_pb2

__all__ = ["tell_answer", "told_event", "told_job", "told_text"]

_JOB = re.compile(r"(?:\bjob )?\b(j-[0-9a-hjkmnp-tv-z]{12})\b")
_ADDRESS = re.compile(
    r"\b(?:ipv4|ipv6|dns|unix)(?:-abstract)?:\S+"  # as gRPC writes them
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?\b"
    r"|\[[0-9a-fA-F:]*:[0-9a-fA-F:]*\](?::\d{1,5})?"
)
_ABOUT_OTHERS = ("for_job",)


def told_event(event: job_pb2.JobEvent) -> job_pb2.JobEvent:
    """Returns an event of a guest as its origin is told of it."""
    told = job_pb2.JobEvent()
    told.CopyFrom(event)
    told.message = told_text(event.message, event.job_id)
    for name in event.details:
        if name in _ABOUT_OTHERS:
            del told.details[name]
        else:
            told.details[name] = told_text(event.details[name], event.job_id)
    return told


def told_job(job: job_pb2.Job) -> job_pb2.Job:
    """Returns a guest's job as its origin is told of it."""
    told = job_pb2.Job()
    told.CopyFrom(job)
    told.message = told_text(job.message, job.id)
    return told


def tell_answer(answer: Any, own: str) -> None:
    """Leaves in an answer about a guest what its origin is told of it. Changes it in place.

    Args:
        answer: any message.
        own: id of the guest's job here.
    """
    if isinstance(answer, job_pb2.JobEvent):
        answer.CopyFrom(told_event(answer))
        return
    for field, value in answer.ListFields():
        if field.message_type is None:
            if field.name == "message" and not field.is_repeated:
                answer.message = told_text(value, own)
        elif not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else (value,):
                if isinstance(one, Message):
                    tell_answer(one, own)


def told_text(text: str, own: str) -> str:
    """Returns a sentence about a guest without other jobs' ids and without addresses."""
    if not text:
        return text
    known = _JOB.sub(lambda found: found[0] if found[1] == own else "another job", text)
    return _ADDRESS.sub("(an address)", known)
