"""The table of reservations in the SQLite store: which share of which GPU is held for which attempt."""

from __future__ import annotations

from dataclasses import astuple, fields

from sqlite_utils import Database

from controlplane.records import Change, Reservation
from controlplane.store import ShareTaken

__all__ = ["read_reservations", "write_reservations"]

_MARKS = ", ".join("?" for _ in fields(Reservation))


def read_reservations(db: Database) -> list[Reservation]:
    """Returns every reservation that is held."""
    return [Reservation(*row) for row in db.execute("select * from reservations order by job_id, attempt")]


def write_reservations(db: Database, job_id: str, change: Change) -> None:
    """Writes what a job's change means for what is held.

    Raises:
        ShareTaken: a share is held by another attempt, or a warm one is no longer kept.
    """
    if change.take_over is not None:
        gone = db.execute(
            "delete from reservations where job_id = ? and attempt = ? and warm_until > 0", change.take_over
        )
        if not gone.rowcount:
            raise ShareTaken(f"the warm share of {change.take_over[0]}/{change.take_over[1]} is no longer kept")
    for attempt in change.release:
        db.execute("delete from reservations where job_id = ? and attempt = ?", [job_id, attempt])
    warm = change.release_warm
    if warm is not None:
        db.execute(
            "delete from reservations where job_id = ? and attempt = ? and slice_uuid = ? and warm_until > 0",
            [*warm.key, warm.slice_uuid],
        )
    new = change.reserve
    if new is not None:
        db.execute("delete from reservations where job_id = ? and attempt = ?", new.key)
        overlap = db.execute(
            "select job_id from reservations where node_id = ? and gpu_uuid = ? and start < ? and start + size > ?",
            [new.node_id, new.gpu_uuid, new.start + new.size, new.start],
        ).fetchone()
        if overlap is not None:
            raise ShareTaken(f"{new.gpu_uuid} {new.start}:{new.size} is held by {overlap[0]}")
        db.execute(f"insert into reservations values ({_MARKS})", astuple(new))  # noqa: S608
