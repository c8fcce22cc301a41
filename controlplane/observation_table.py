"""The table of what was learnt from attempts, in the SQLite store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from sqlite_utils import Database

from controlplane.observing import ObservedAttempt

__all__ = ["put_observations", "read_observations"]

_KEPT = 200
"""So many attempts of one piece of code are kept, the newest; more tell nothing new."""
_COLUMNS = ", ".join(field.name for field in fields(ObservedAttempt))
_MARKS = ", ".join("?" for _ in fields(ObservedAttempt))


def put_observations(db: Database, observed: Iterable[ObservedAttempt]) -> None:
    """Writes what attempts showed; of one that was written before, what it shows now. The oldest of many go."""
    for one in observed:
        db.execute(f"insert or replace into observations ({_COLUMNS}) values ({_MARKS})", astuple(one))  # noqa: S608
        db.execute(
            "delete from observations where tenant = ? and fingerprint = ? and (job_id, attempt) not in ("
            "select job_id, attempt from observations where tenant = ? and fingerprint = ? "
            "order by at desc, job_id, attempt limit ?)",
            [one.tenant, one.fingerprint, one.tenant, one.fingerprint, _KEPT],
        )


def read_observations(db: Database, tenant: str, fingerprint: str, limit: int) -> list[ObservedAttempt]:
    """Returns what attempts of a tenant showed of one piece of code, the newest first; see `Store.observations`."""
    rows = db.execute(
        f"select {_COLUMNS} from observations where tenant = ? and fingerprint = ? "  # noqa: S608 - names of columns
        "order by at desc, job_id, attempt limit ?",
        [tenant, fingerprint, limit],
    )
    return [_observed(row) for row in rows]


def _observed(row: Sequence[object]) -> ObservedAttempt:
    values = dict(zip((field.name for field in fields(ObservedAttempt)), row, strict=True))
    values["emulated"] = bool(values["emulated"])
    return ObservedAttempt(**values)  # type: ignore[arg-type]
