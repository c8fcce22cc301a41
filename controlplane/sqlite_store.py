"""The store on SQLite: write-ahead log, full synchronisation, one writer with group commit."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from sqlite_utils import Database

from controlplane import job_tables, peer_tables
from controlplane.forwards import ForwardRecord
from controlplane.group_commit import GroupCommit
from controlplane.guests import GuestKey, GuestRecord
from controlplane.metering import Stretch
from controlplane.migrations import migrations
from controlplane.observation_table import put_observations, read_observations
from controlplane.observing import ObservedAttempt
from controlplane.records import (
    BundleRecord,
    Decide,
    InvitationRecord,
    JobQuery,
    JobRecord,
    NodeRecord,
    PeerRecord,
    Request,
    Reservation,
)
from controlplane.reservation_table import read_reservations, write_reservations
from controlplane.store import DecideGuest
from controlplane.usage_table import put_usage, read_attempts_at_peers, read_usage, write_usage
from controlplane.watch import Feed
from puhui.rpc.moment import now
from puhui.v1 import fleet_service_pb2, job_pb2, job_service_pb2

__all__ = ["SqliteStore"]


class SqliteStore:
    """A `Store` in one SQLite file. Open it with `SqliteStore.open`."""

    def __init__(self, writer: GroupCommit, written: Database, read: Database, feed: Feed) -> None:
        self._writer = writer
        self._written = written
        self._read = read
        self._feed = feed

    @classmethod
    async def open(cls, path: Path, feed: Feed) -> SqliteStore:
        """Opens the store, and makes or migrates its tables.

        Args:
            path: the database file; its folder exists.
            feed: told of every job that has changed.

        Raises:
            OSError: the disk is full.
            sqlite3.Error: the file is no database of ours, or cannot be written.
        """
        written = _connect(path)
        written.conn.execute("pragma journal_mode = wal")
        written.conn.execute("pragma synchronous = full")
        written.conn.execute("pragma foreign_keys = on")
        migrations.apply(written)
        read = _connect(path)
        read.conn.execute("pragma query_only = on")
        return cls(GroupCommit(written), written, read, feed)

    async def close(self) -> None:
        """Finishes what was begun, and closes."""
        await self._writer.close()
        self._read.close()
        self._written.close()

    @property
    def commits(self) -> int:
        """Transactions that were committed since it was opened."""
        return self._writer.commits

    async def centre_id(self) -> str:
        """Returns a random id that belongs to this store for ever."""

        def act(db: Database) -> str:
            db.execute("insert or ignore into centre values ('id', ?)", [secrets.token_hex(16)])
            return str(db.execute("select value from centre where key = 'id'").fetchone()[0])

        return await self._writer.write(act)

    async def add_job(
        self,
        record: JobRecord,
        events: Sequence[job_pb2.JobEvent],
        request: Request | None = None,
        bundle: BundleRecord | None = None,
        guest: DecideGuest | None = None,
    ) -> JobRecord:
        """Stores a new job with its first events and its bundle; returns it with its sequence and last cursor."""

        def act(db: Database) -> JobRecord:
            if request is not None:
                earlier = job_tables.note_request(db, request, record.id)
                if earlier is not None:
                    return job_tables.require_job(db, earlier)
            if guest is not None:
                its = record.job.guest
                bound = guest(peer_tables.find_guest(db, (its.peer, its.job_id, its.attempt)))
                peer_tables.write_guest(db, bound)
                if bound.job_id != record.id:
                    return job_tables.require_job(db, bound.job_id)
            if bundle is not None:
                _write_bundle(db, bundle)
            return job_tables.insert_job(db, record, events)

        stored = await self._writer.write(act)
        self._feed.publish([stored.id])
        return stored

    async def change_job(self, job_id: str, decide: Decide) -> JobRecord:
        """Lets `decide` change a job, and returns the job afterwards."""

        def act(db: Database) -> tuple[JobRecord, bool]:
            before = job_tables.require_job(db, job_id)
            row = db.execute("select value from centre where key = 'fencing_token'").fetchone()
            token = int(row[0]) + 1 if row is not None else 1
            change = decide(before, token)
            if change is None:
                return before, False
            if change.request is not None and job_tables.note_request(db, change.request, job_id) is not None:
                return before, False
            if change.token_taken:
                db.execute("insert or replace into centre values ('fencing_token', ?)", [str(token)])
            write_reservations(db, job_id, change)
            for run in change.runs:
                job_tables.write_run(db, job_id, run, change.run_start)
            write_usage(db, change.record.job, change.usage)
            put_usage(db, change.usage_there)
            put_observations(db, change.observed)
            if change.forward is not None:
                peer_tables.write_forward(db, change.forward)
            return job_tables.write_job(db, before.sequence, change.record, change.events), True

        after, changed = await self._writer.write(act)
        if changed:
            self._feed.publish([job_id])
        return after

    async def job(self, job_id: str) -> JobRecord | None:
        """Returns a job."""
        return job_tables.find_job(self._read, job_id)

    async def jobs(self, query: JobQuery) -> list[JobRecord]:
        """Returns jobs, the newest first."""
        return job_tables.read_jobs(self._read, query)

    async def unfinished_jobs(self) -> list[JobRecord]:
        """Returns every job that is not in a final state, the oldest first."""
        return job_tables.read_unfinished(self._read)

    async def events(self, job_id: str, after_cursor: int, limit: int = 500) -> list[job_pb2.JobEvent]:
        """Returns events of a job, in order."""
        return job_tables.read_events(self._read, job_id, after_cursor, limit)

    async def runs(self, job_id: str, before: int | None, limit: int) -> list[tuple[int, job_pb2.Run]]:
        """Returns runs of a job with their sequence, the newest first."""
        return job_tables.read_runs(self._read, job_id, before, limit)

    async def run(self, run_id: str) -> tuple[job_pb2.Run, job_service_pb2.RunStart] | None:
        """Returns a run, and what was asked for of it."""
        return job_tables.find_run(self._read, run_id)

    async def reservations(self) -> list[Reservation]:
        """Returns every reservation that is held."""
        return read_reservations(self._read)

    async def usage(self, start: float, end: float, tenant: str = "", job_id: str = "") -> list[Stretch]:
        """Returns the stretches of usage that overlap a time, in the order in which they began."""
        return read_usage(self._read, start, end, tenant, job_id)

    async def attempts_at_peers(self, start: float, end: float) -> set[tuple[str, int]]:
        """Returns job and number of every attempt at a peer whose usage overlaps a time."""
        return read_attempts_at_peers(self._read, start, end)

    async def observations(self, tenant: str, fingerprint: str, limit: int = 50) -> list[ObservedAttempt]:
        """Returns what a tenant's own attempts showed of one piece of code, the newest first."""
        return read_observations(self._read, tenant, fingerprint, limit)

    async def request(self, request_id: str) -> tuple[Request, str] | None:
        """Returns a request that was carried out, with the id of the job that it was about."""
        return job_tables.find_request(self._read, request_id)

    async def put_node(self, record: NodeRecord) -> None:
        """Stores a node."""
        row = {
            "id": record.node.id,
            "name": record.node.inventory.name,
            "event_cursor": record.event_cursor,
            "body": record.node.SerializeToString(),
        }
        await self._writer.write(lambda db: db.table("nodes").upsert(row, pk="id") and None)

    async def nodes(self) -> list[NodeRecord]:
        """Returns every node, by name."""
        rows = self._read.execute("select body, event_cursor from nodes order by name")
        return [NodeRecord(fleet_service_pb2.Node.FromString(body), cursor) for body, cursor in rows]

    async def put_bundle(self, bundle: BundleRecord) -> None:
        """Stores that a bundle is on disk."""
        await self._writer.write(lambda db: _write_bundle(db, bundle))

    async def bundle(self, bundle_id: str) -> BundleRecord | None:
        """Returns a bundle."""
        row = self._read.execute(
            "select id, size_bytes, unpacked_bytes, sizes from bundles where id = ?", [bundle_id]
        ).fetchone()
        return BundleRecord(row[0], row[1], row[2], json.loads(row[3])) if row is not None else None

    async def forwards(self) -> list[ForwardRecord]:
        """Returns every forward that is not settled."""
        return peer_tables.read_forwards(self._read)

    async def forward(self, job_id: str, attempt: int) -> ForwardRecord | None:
        """Returns a forward."""
        return peer_tables.read_forward(self._read, job_id, attempt)

    async def guest(self, key: GuestKey) -> GuestRecord | None:
        """Returns a guest."""
        return peer_tables.find_guest(self._read, key)

    async def guests(self) -> list[GuestRecord]:
        """Returns every guest whose job has not ended."""
        return peer_tables.read_guests(self._read)

    async def guest_of(self, job_id: str) -> GuestRecord | None:
        """Returns the guest that a job is."""
        return peer_tables.find_guest_of(self._read, job_id)

    async def unbound_guests(self, peer: str) -> int:
        """Returns how many guests of a peer were never bound, and never will be."""
        return peer_tables.count_unbound(self._read, peer)

    async def change_guest(self, key: GuestKey, decide: DecideGuest) -> GuestRecord:
        """Lets `decide` change a guest, and returns it afterwards."""

        def act(db: Database) -> GuestRecord:
            after = decide(peer_tables.find_guest(db, key))
            peer_tables.write_guest(db, after)
            return after

        return await self._writer.write(act)

    async def old_guests(self, before: float) -> list[GuestRecord]:
        """Returns guests whose job ended, or that were refused, before a time."""
        return peer_tables.read_old_guests(self._read, before)

    async def forget_guest(self, key: GuestKey) -> None:
        """Forgets a guest."""
        await self._writer.write(lambda db: peer_tables.delete_guest(db, key))

    async def put_peer(self, record: PeerRecord) -> None:
        """Stores a peer."""
        await self._writer.write(lambda db: peer_tables.write_peer(db, record))

    async def peers(self) -> list[PeerRecord]:
        """Returns every peer, by name."""
        return peer_tables.read_peers(self._read)

    async def remove_peer(self, name: str) -> None:
        """Removes a peer."""
        await self._writer.write(lambda db: peer_tables.delete_peer(db, name))

    async def put_invitation(self, record: InvitationRecord) -> None:
        """Stores an invitation, and forgets those that hold no longer."""
        await self._writer.write(lambda db: peer_tables.write_invitation(db, record, now()))

    async def invitations(self) -> list[InvitationRecord]:
        """Returns the invitations that were not taken."""
        return peer_tables.read_invitations(self._read)

    async def take_invitation(self, public_key: str, peer: PeerRecord) -> bool:
        """Stores a peer in exchange for its invitation."""
        return await self._writer.write(lambda db: peer_tables.take_invitation(db, public_key, peer))

    async def forget_requests(self, before: float) -> None:
        """Forgets requests that were made before a time (seconds since the epoch)."""
        await self._writer.write(lambda db: db.execute("delete from requests where time < ?", [before]) and None)


def _connect(path: Path) -> Database:
    conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    return Database(conn)


def _write_bundle(db: Database, bundle: BundleRecord) -> None:
    db.execute(
        "insert or ignore into bundles values (?, ?, ?, ?)",
        [bundle.id, bundle.size_bytes, bundle.unpacked_bytes, json.dumps(dict(bundle.sizes))],
    )
