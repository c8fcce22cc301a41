"""The tables of the SQLite store, and every change to them since the first release, in order.

A migration that has been released is never edited; a change is a new one below it.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

__all__ = ["migrations"]

migrations = Migrations("controlplane")


@migrations()
def m0001_first_tables(db: Database) -> None:
    """Jobs, their events, reservations, nodes, bundles, request ids and the centre's own values."""
    db.execute(
        """
        create table jobs (
            sequence integer primary key autoincrement,
            id text not null unique,
            state integer not null,
            tenant text not null,
            name text not null,
            create_time real not null,
            body blob not null,      -- puhui.v1.Job
            control text not null    -- JSON: what JobRecord holds beside the job
        )
        """
    )
    db.execute("create index jobs_by_state on jobs (state)")
    db.execute(
        """
        create table job_labels (
            sequence integer not null references jobs (sequence),
            key text not null,
            value text not null,
            primary key (key, value, sequence)
        ) without rowid
        """
    )
    db.execute(
        """
        create table job_events (
            cursor integer primary key autoincrement,
            job_id text not null,
            body blob not null       -- puhui.v1.JobEvent, without its cursor
        )
        """
    )
    db.execute("create index job_events_by_job on job_events (job_id, cursor)")
    db.execute(
        """
        create table reservations (
            job_id text not null,
            attempt integer not null,
            node_id text not null,
            gpu_uuid text not null,
            profile text not null,
            start integer not null,
            size integer not null,
            compute_slices integer not null,
            memory_mib integer not null,
            primary key (job_id, attempt)
        ) without rowid
        """
    )
    db.execute("create index reservations_by_gpu on reservations (node_id, gpu_uuid)")
    db.execute(
        """
        create table nodes (
            id text primary key,
            name text not null unique,
            event_cursor integer not null,
            body blob not null       -- puhui.v1.Node
        ) without rowid
        """
    )
    db.execute(
        """
        create table bundles (
            id text primary key,
            size_bytes integer not null,
            unpacked_bytes integer not null,
            sizes text not null      -- JSON: bytes by path
        ) without rowid
        """
    )
    db.execute(
        """
        create table requests (
            id text primary key,
            digest text not null,
            job_id text not null,
            time real not null
        ) without rowid
        """
    )
    db.execute("create index requests_by_time on requests (time)")
    db.execute("create table centre (key text primary key, value text not null) without rowid")


@migrations()
def m0002_warm_shares(db: Database) -> None:
    """Shares that are kept for their tenant although nobody is on them."""
    db.execute("alter table reservations add column tenant text not null default ''")
    db.execute("alter table reservations add column slice_uuid text not null default ''")
    db.execute("alter table reservations add column warm_until real not null default 0")


@migrations()
def m0003_runs(db: Database) -> None:
    """Runs of jobs."""
    db.execute(
        """
        create table runs (
            sequence integer primary key autoincrement,
            id text not null unique,
            job_id text not null,
            start blob not null,     -- puhui.v1.RunStart
            body blob not null       -- puhui.v1.Run
        )
        """
    )
    db.execute("create index runs_by_job on runs (job_id, sequence)")


@migrations()
def m0004_usage(db: Database) -> None:
    """Stretches of time in which shares were held, were reclaimed, or commands ran."""
    db.execute(
        """
        create table usage (
            job_id text not null,
            kind text not null,      -- hold, reclaimed, run
            number integer not null,
            run_id text not null,    -- '' but of a run
            attempt integer not null,
            tenant text not null,
            job_name text not null,
            profile text not null,
            gpu_model text not null,
            compute_slices integer not null,
            gpu_slices integer not null,
            emulated integer not null,
            start real not null,
            "end" real,              -- null while it lasts
            busy_s real not null,
            counter_s real,
            reclaim_mode integer not null,
            primary key (job_id, kind, number, run_id)
        ) without rowid
        """
    )
    db.execute('create index usage_by_end on usage ("end")')


@migrations()
def m0005_peers(db: Database) -> None:
    """Peers, what was sent to them, and what they have sent."""
    db.execute("create table peers (name text primary key, fingerprint text not null unique, body text not null)")
    db.execute("create table invitations (public_key text primary key, expires real not null, body text not null)")
    db.execute(
        """
        create table forwards (
            job_id text not null,
            attempt integer not null,
            peer text not null,
            stage text not null,
            body text not null,      -- JSON: ForwardRecord
            primary key (job_id, attempt)
        ) without rowid
        """
    )
    db.execute("create index forwards_by_stage on forwards (stage)")
    db.execute(
        """
        create table guests (
            peer text not null,
            origin_job text not null,
            attempt integer not null,
            job_id text not null,
            at real not null,
            body text not null,      -- JSON: GuestRecord
            primary key (peer, origin_job, attempt)
        ) without rowid
        """
    )
    db.execute("create index guests_by_job on guests (job_id)")


@migrations()
def m0006_observations(db: Database) -> None:
    """What was learnt from attempts about the code that they ran."""
    db.execute(
        """
        create table observations (
            job_id text not null,
            attempt integer not null,
            tenant text not null,
            fingerprint text not null,
            at real not null,
            peak_mib integer,        -- null: not known, or it did not come to its end
            at_least_mib integer,    -- null: it came to its end
            duration_s real not null,
            utilization real,
            profile text not null,
            gpu_model text not null,
            emulated integer not null,
            peer text not null,
            primary key (job_id, attempt)
        ) without rowid
        """
    )
    db.execute("create index observations_by_code on observations (tenant, fingerprint, at)")
