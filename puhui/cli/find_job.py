"""Which job people mean: by its id, the beginning of its id, or its name."""

from __future__ import annotations

import itertools
import re

import grpc

from puhui.client import Centre, Refusal
from puhui.client.centre import FINAL_STATES
from puhui.v1 import job_pb2
from puhui.v1.job_service_pb2 import JobFilter

__all__ = ["find_job", "find_session"]

_ID = re.compile(r"j-[a-z0-9]{12}")
_PREFIX = re.compile(r"j-[a-z0-9]{0,11}")
_LOOKED_AT = 5000
_LIVING = tuple(state for state in job_pb2.JobState.values() if state and state not in FINAL_STATES)


def find_job(centre: Centre, word: str) -> job_pb2.Job:
    """Returns the job that a word means: one that lives, or else the newest that has ended.

    Raises:
        Refusal: NOT_FOUND with JOB_NOT_FOUND; FAILED_PRECONDITION with JOB_AMBIGUOUS; the centre cannot be reached.
    """
    if _ID.fullmatch(word):
        return centre.get(word)
    living = _matching(centre, word, JobFilter(states=_LIVING))
    if len(living) > 1:
        ids = ", ".join(job.id for job in living[:5]) + (", …" if len(living) > 5 else "")
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "JOB_AMBIGUOUS",
            f"{word} could be any of {len(living)} jobs ({ids}); name one by its id",
            name=word,
        )
    found = living or _matching(centre, word, JobFilter())
    if not found and word.startswith("j-"):
        return centre.get(word)  # which says that there is none
    if not found:
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "JOB_NOT_FOUND",
            f"no job is called {word}, and no id begins so; see `puhui ps --all`",
            name=word,
        )
    return found[0]


def find_session(centre: Centre, word: str) -> job_pb2.Job:
    """Returns the session that a word means.

    Raises:
        Refusal: as `find_job` does; FAILED_PRECONDITION with NOT_A_SESSION.
    """
    job = find_job(centre, word)
    if job.spec.kind != job_pb2.JOB_KIND_SESSION:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "NOT_A_SESSION",
            f"{job.id} is a batch job, which runs its own command to the end; `puhui session start` starts a session, "
            "and `puhui session ls` lists them",
            job_id=job.id,
        )
    return job


def _matching(centre: Centre, word: str, where: JobFilter) -> list[job_pb2.Job]:
    by_id = _PREFIX.fullmatch(word) is not None
    if not by_id:
        where.name_prefix = word
    jobs = itertools.islice(centre.jobs(where), _LOOKED_AT)
    return [job for job in jobs if job.spec.name == word or (by_id and job.id.startswith(word))]
