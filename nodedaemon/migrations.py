"""The tables of the journal, and every change to them since the first release, in order.

A migration that has been released is never edited; a change is a new one below it.
"""

from __future__ import annotations

from typing import Any

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from nodedaemon.lease_table import create_lease_table
from nodedaemon.records import SliceStage

__all__ = ["migrations"]

migrations: Any = Migrations("nodedaemon")


@migrations()  # type: ignore[untyped-decorator]
def m001_first(db: Database) -> None:
    """Creates the first tables."""
    owner = "centre TEXT NOT NULL, job_id TEXT NOT NULL, attempt INTEGER NOT NULL"
    key = "PRIMARY KEY (centre, job_id, attempt)"
    for statement in (
        "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        f"CREATE TABLE tokens ({owner}, token INTEGER NOT NULL, time REAL NOT NULL, {key})",
        f"""CREATE TABLE slices (id INTEGER PRIMARY KEY AUTOINCREMENT, {owner}, token INTEGER NOT NULL,
            gpu_uuid TEXT NOT NULL, profile TEXT NOT NULL, profile_id INTEGER NOT NULL, start INTEGER NOT NULL,
            size INTEGER NOT NULL, memory_mib INTEGER NOT NULL, stage TEXT NOT NULL, create_time REAL NOT NULL,
            boot_id TEXT NOT NULL, gi INTEGER, ci INTEGER, uuid TEXT NOT NULL, notice TEXT NOT NULL)""",
        f"""CREATE TABLE containers ({owner}, token INTEGER NOT NULL, stage TEXT NOT NULL, image TEXT NOT NULL,
            bundle_id TEXT NOT NULL, slice_uuids TEXT NOT NULL, stop_grace_s REAL NOT NULL, create_time REAL NOT NULL,
            max_duration_s REAL, container_id TEXT NOT NULL, pid INTEGER NOT NULL, start_time REAL, end_time REAL,
            exit_code INTEGER, oom_killed INTEGER NOT NULL, timed_out INTEGER NOT NULL, {key})""",
        f"""CREATE TABLE answers ({owner}, request_id TEXT NOT NULL, rpc TEXT NOT NULL, digest TEXT NOT NULL,
            message BLOB NOT NULL, time REAL NOT NULL, PRIMARY KEY (centre, request_id))""",
        "CREATE TABLE events (cursor INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, message BLOB NOT NULL)",
    ):
        db.execute(statement)


@migrations()  # type: ignore[untyped-decorator]
def m002_execs(db: Database) -> None:
    """Creates the table of commands beside those of containers."""
    db.execute(
        """CREATE TABLE execs (id TEXT PRIMARY KEY, centre TEXT NOT NULL, job_id TEXT NOT NULL,
        attempt INTEGER NOT NULL, token INTEGER NOT NULL, request_id TEXT NOT NULL, digest TEXT NOT NULL,
        stage TEXT NOT NULL, tty INTEGER NOT NULL, stop_grace_s REAL NOT NULL, start_time REAL NOT NULL,
        end_time REAL, exit_code INTEGER)"""
    )
    db.execute("CREATE INDEX execs_by_request ON execs (centre, request_id)")


@migrations()  # type: ignore[untyped-decorator]
def m003_indexes(db: Database) -> None:
    """Lets a slice be found without a look at all those that were destroyed since yesterday."""
    db.execute(f"CREATE INDEX slices_there ON slices (id) WHERE stage != '{SliceStage.DESTROYED}'")
    db.execute("CREATE INDEX slices_by_uuid ON slices (uuid, id)")
    db.execute("CREATE INDEX containers_by_stage ON containers (stage)")


@migrations()  # type: ignore[untyped-decorator]
def m004_requests(db: Database) -> None:
    """Keeps of a container what was asked for, and whose workspace it began with."""
    db.execute("ALTER TABLE containers ADD COLUMN digest TEXT NOT NULL DEFAULT ''")
    db.execute("ALTER TABLE containers ADD COLUMN workspace_of INTEGER NOT NULL DEFAULT 0")


@migrations()  # type: ignore[untyped-decorator]
def m005_idle(db: Database) -> None:
    """Creates the table of what containers are watched for, and what was counted of them."""
    db.execute(
        """CREATE TABLE idle (centre TEXT NOT NULL, job_id TEXT NOT NULL, attempt INTEGER NOT NULL,
        idle_after_s REAL NOT NULL, idle_below_percent REAL NOT NULL, start_grace_s REAL NOT NULL, started_s REAL,
        used INTEGER NOT NULL, held_to_s REAL, busy_seconds REAL NOT NULL, held_seconds REAL NOT NULL,
        PRIMARY KEY (centre, job_id, attempt))"""
    )


@migrations()  # type: ignore[untyped-decorator]
def m006_checkpoints(db: Database) -> None:
    """Keeps what of a container is checkpointed."""
    db.execute("ALTER TABLE containers ADD COLUMN checkpoint TEXT NOT NULL DEFAULT ''")


@migrations()  # type: ignore[untyped-decorator]
def m007_leases(db: Database) -> None:
    """Keeps until when containers may run."""
    create_lease_table(db)


@migrations()  # type: ignore[untyped-decorator]
def m008_memory_peaks(db: Database) -> None:
    """Keeps the most device memory that containers were seen to use."""
    db.execute("ALTER TABLE idle ADD COLUMN peak_memory_mib INTEGER NOT NULL DEFAULT 0")
    db.execute("ALTER TABLE idle ADD COLUMN memory_samples INTEGER NOT NULL DEFAULT 0")
