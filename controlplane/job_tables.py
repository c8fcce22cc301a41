"""The tables of the SQLite store about jobs: their labels, events and runs, and the requests that were carried out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlite_utils import Database

from controlplane.endings import Ending
from controlplane.jobs import FINAL_STATES
from controlplane.records import JobQuery, JobRecord, Request, TakeOver
from controlplane.store import RequestReused
from puhui.rpc.moment import moment
from puhui.v1 import job_pb2, job_service_pb2

__all__ = [
    "find_job",
    "find_request",
    "find_run",
    "insert_job",
    "note_request",
    "read_events",
    "read_jobs",
    "read_runs",
    "read_unfinished",
    "require_job",
    "write_job",
    "write_run",
]

_JOB = "sequence, body, control"
# asdict copies what it finds, and the message is stored beside the rest.
_NO_JOB = job_pb2.Job()


def insert_job(db: Database, record: JobRecord, events: Sequence[job_pb2.JobEvent]) -> JobRecord:
    """Writes a new job with its first events; returns it with its sequence and last cursor."""
    job = record.job
    sequence = db.execute(
        "insert into jobs (id, state, tenant, name, create_time, body, control) values (?, ?, ?, ?, ?, ?, ?)",
        [job.id, job.state, job.spec.tenant, job.spec.name, moment(job.create_time), b"", "{}"],
    ).lastrowid
    db.conn.executemany(
        "insert into job_labels values (?, ?, ?)",
        [(sequence, key, value) for key, value in job.spec.labels.items()],
    )
    return write_job(db, sequence or 0, record, events)


def write_job(db: Database, sequence: int, record: JobRecord, events: Sequence[job_pb2.JobEvent]) -> JobRecord:
    """Writes a job as it is now, with what happened to it; returns it with its last cursor."""
    job = job_pb2.Job()
    job.CopyFrom(record.job)
    for event in events:
        cursor = db.execute(
            "insert into job_events (job_id, body) values (?, ?)", [job.id, event.SerializeToString()]
        ).lastrowid
        job.last_cursor = cursor or 0
    control = asdict(replace(record, job=_NO_JOB))
    del control["job"], control["sequence"]
    db.execute(
        "update jobs set state = ?, body = ?, control = ? where sequence = ?",
        [job.state, job.SerializeToString(), json.dumps(control), sequence],
    )
    return replace(record, job=job, sequence=sequence)


def find_job(db: Database, job_id: str) -> JobRecord | None:
    """Returns a job."""
    row = db.execute(f"select {_JOB} from jobs where id = ?", [job_id]).fetchone()  # noqa: S608
    return _job_of(row) if row is not None else None


def require_job(db: Database, job_id: str) -> JobRecord:
    """Returns a job.

    Raises:
        KeyError: there is none with this id.
    """
    record = find_job(db, job_id)
    if record is None:
        raise KeyError(job_id)
    return record


def read_jobs(db: Database, query: JobQuery) -> list[JobRecord]:
    """Returns jobs, the newest first."""
    conditions, values = _conditions(query)
    rows = db.execute(
        f"select {_JOB} from jobs where {' and '.join(conditions)} order by sequence desc limit ?",  # noqa: S608
        [*values, query.limit],
    )
    return [_job_of(row) for row in rows]


def read_unfinished(db: Database) -> list[JobRecord]:
    """Returns every job that is not in a final state, the oldest first."""
    states = sorted(set(job_pb2.JobState.values()) - FINAL_STATES)
    rows = db.execute(
        f"select {_JOB} from jobs where state in ({_marks(states)}) order by sequence",  # noqa: S608
        states,
    )
    return [_job_of(row) for row in rows]


def read_events(db: Database, job_id: str, after_cursor: int, limit: int) -> list[job_pb2.JobEvent]:
    """Returns events of a job, in order."""
    rows = db.execute(
        "select cursor, body from job_events where job_id = ? and cursor > ? order by cursor limit ?",
        # A cursor from elsewhere may exceed what SQLite can hold.
        [job_id, min(after_cursor, 2**63 - 1), limit],
    )
    events = []
    for cursor, body in rows:
        event = job_pb2.JobEvent.FromString(body)
        event.cursor = cursor
        events.append(event)
    return events


def write_run(db: Database, job_id: str, run: job_pb2.Run, start: job_service_pb2.RunStart | None) -> None:
    """Writes a run as it is now, and what was asked for of it if it is new."""
    db.execute(
        "insert into runs (id, job_id, start, body) values (?, ?, ?, ?) "
        "on conflict (id) do update set body = excluded.body where job_id = excluded.job_id",
        [run.id, job_id, start.SerializeToString() if start is not None else b"", run.SerializeToString()],
    )


def read_runs(db: Database, job_id: str, before: int | None, limit: int) -> list[tuple[int, job_pb2.Run]]:
    """Returns runs of a job with their sequence, the newest first."""
    rows = db.execute(
        "select sequence, body from runs where job_id = ? and sequence < ? order by sequence desc limit ?",
        [job_id, before if before is not None else 2**62, limit],
    )
    return [(sequence, job_pb2.Run.FromString(body)) for sequence, body in rows]


def find_run(db: Database, run_id: str) -> tuple[job_pb2.Run, job_service_pb2.RunStart] | None:
    """Returns a run, and what was asked for of it."""
    row = db.execute("select body, start from runs where id = ?", [run_id]).fetchone()
    return (job_pb2.Run.FromString(row[0]), job_service_pb2.RunStart.FromString(row[1])) if row else None


def note_request(db: Database, request: Request, job_id: str) -> str | None:
    """Notes a request; returns the job of the same request if it was carried out before.

    Raises:
        RequestReused: it was carried out before, and asked for something else.
    """
    row = db.execute("select digest, job_id from requests where id = ?", [request.id]).fetchone()
    if row is None:
        db.execute("insert into requests values (?, ?, ?, ?)", [request.id, request.digest, job_id, request.at])
        return None
    if row[0] != request.digest:
        raise RequestReused(request.id)
    return str(row[1])


def find_request(db: Database, request_id: str) -> tuple[Request, str] | None:
    """Returns a request that was carried out, with the id of the job that it was about."""
    row = db.execute("select id, digest, time, job_id from requests where id = ?", [request_id]).fetchone()
    return (Request(row[0], row[1], row[2]), row[3]) if row is not None else None


def _conditions(query: JobQuery) -> tuple[list[str], list[Any]]:
    conditions, values = ["true"], list[Any]()
    if query.states:
        conditions.append(f"state in ({_marks(query.states)})")
        values += query.states
    if query.tenant:
        conditions.append("tenant = ?")
        values.append(query.tenant)
    if query.name_prefix:
        conditions.append("substr(name, 1, ?) = ?")
        values += [len(query.name_prefix), query.name_prefix]
    for key, value in query.labels.items():
        conditions.append("sequence in (select sequence from job_labels where key = ? and value = ?)")
        values += [key, value]
    if query.created_since:
        conditions.append("create_time >= ?")
        values.append(query.created_since)
    if query.before_sequence is not None:
        conditions.append("sequence < ?")
        values.append(query.before_sequence)
    return conditions, values


def _job_of(row: tuple[int, bytes, str]) -> JobRecord:
    sequence, body, control = row
    kept = json.loads(control)
    kept["not_at"] = tuple(kept.get("not_at", ()))
    ending, take_over = kept.pop("ending", None), kept.pop("take_over", None)
    return JobRecord(
        job_pb2.Job.FromString(body),
        sequence,
        ending=Ending(**ending) if ending is not None else None,
        take_over=TakeOver(**take_over) if take_over is not None else None,
        **kept,
    )


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" for _ in values)
