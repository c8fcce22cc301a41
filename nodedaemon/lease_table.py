"""Where the journal keeps until when attempts may run."""

from __future__ import annotations

from sqlite_utils import Database

from nodedaemon.owner import Owner

__all__ = ["LeaseTable", "create_lease_table"]

_OWNED = "centre = ? AND job_id = ? AND attempt = ?"


def create_lease_table(db: Database) -> None:
    """Creates the table of leases, and says of containers whether theirs ran out."""
    db.execute(
        """CREATE TABLE leases (centre TEXT NOT NULL, job_id TEXT NOT NULL, attempt INTEGER NOT NULL,
        expire_time REAL NOT NULL, PRIMARY KEY (centre, job_id, attempt))"""
    )
    db.execute("ALTER TABLE containers ADD COLUMN lease_expired INTEGER NOT NULL DEFAULT 0")


class LeaseTable:
    """The leases of this node. Times are of its lease clock, in seconds.

    Args:
        db: the journal's file.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def get(self, owner: Owner) -> float | None:
        """Returns until when an attempt may run; None when it has no lease."""
        row = self._db.execute(f"SELECT expire_time FROM leases WHERE {_OWNED}", _key(owner)).fetchone()  # noqa: S608
        return float(row[0]) if row else None

    def extend(self, owner: Owner, expire_time: float) -> float:
        """Has an attempt run until then, or until later if it may already. Returns until when."""
        self._db.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
            "SET expire_time = max(expire_time, excluded.expire_time)",
            (*_key(owner), expire_time),
        )
        return self.get(owner) or expire_time

    def prune(self, before: float) -> None:
        """Forgets the leases that ran out before a time, of attempts that have no container here."""
        self._db.execute(
            "DELETE FROM leases WHERE expire_time < ? AND NOT EXISTS (SELECT 1 FROM containers WHERE "
            "containers.centre = leases.centre AND containers.job_id = leases.job_id "
            "AND containers.attempt = leases.attempt)",
            (before,),
        )


def _key(owner: Owner) -> tuple[str, str, int]:
    return owner.centre, owner.job_id, owner.attempt
