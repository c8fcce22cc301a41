"""The table of usage in the SQLite store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from sqlite_utils import Database

from controlplane.metering import Kind, Owner, Stretch, UsageChange, meter
from puhui.v1 import job_pb2

__all__ = ["put_usage", "read_attempts_at_peers", "read_usage", "write_usage"]

_COLUMNS = ", ".join(f'"{field.name}"' for field in fields(Stretch))
_MARKS = ", ".join("?" for _ in fields(Stretch))


def write_usage(db: Database, job: job_pb2.Job, changes: Sequence[UsageChange]) -> None:
    """Writes what a job's change means for its usage."""
    if not changes:
        return
    rows = db.execute(
        f'select {_COLUMNS} from usage where job_id = ? and "end" is null '  # noqa: S608 - names of columns
        f"union select {_COLUMNS} from usage where job_id = ? and kind = 'hold' "
        "and number = (select max(number) from usage where job_id = ? and kind = 'hold')",
        [job.id, job.id, job.id],
    )
    owner = Owner(job.id, job.spec.tenant, job.spec.name)
    put_usage(db, meter([_stretch(row) for row in rows], owner, changes))


def put_usage(db: Database, stretches: Iterable[Stretch]) -> None:
    """Writes stretches as they are now."""
    for stretch in stretches:
        db.execute(f"insert or replace into usage ({_COLUMNS}) values ({_MARKS})", astuple(stretch))  # noqa: S608


def read_usage(db: Database, start: float, end: float, tenant: str, job_id: str) -> list[Stretch]:
    """Returns the stretches that overlap a time, in the order in which they began; see `Store.usage`."""
    rows = db.execute(
        f'select {_COLUMNS} from usage where start < ? and ("end" is null or "end" > ?) '  # noqa: S608
        "and (? = '' or tenant = ?) and (? = '' or job_id = ?) order by start, job_id, kind, number, run_id",
        [end, start, tenant, tenant, job_id, job_id],
    )
    return [_stretch(row) for row in rows]


def read_attempts_at_peers(db: Database, start: float, end: float) -> set[tuple[str, int]]:
    """Returns job and number of every attempt at a peer whose usage overlaps a time."""
    rows = db.execute(
        "select distinct usage.job_id, usage.attempt from usage join forwards "
        "on forwards.job_id = usage.job_id and forwards.attempt = usage.attempt "
        'where usage.start < ? and (usage."end" is null or usage."end" > ?)',
        [end, start],
    )
    return {(str(job_id), int(attempt)) for job_id, attempt in rows}


def _stretch(row: Sequence[object]) -> Stretch:
    values = dict(zip((field.name for field in fields(Stretch)), row, strict=True))
    values["kind"], values["emulated"] = Kind(str(values["kind"])), bool(values["emulated"])
    return Stretch(**values)  # type: ignore[arg-type]
