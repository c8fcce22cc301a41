"""What the daemon intends, on disk: it forgets nothing when it is killed.

One SQLite file, written before anything is done to the driver or to Podman. Every method, or `atomic` block, is one
transaction that takes a fraction of a millisecond, so the event loop calls it directly, and two coroutines never
see each other's half-written rows.
"""

# ruff: noqa: S608 - what is put into statements here are names of columns, never values
from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from nodedaemon.driver_facts import Span
from nodedaemon.lease_table import LeaseTable
from nodedaemon.migrations import migrations
from nodedaemon.owner import Owner
from nodedaemon.records import (
    Answer,
    CardRecord,
    CheckpointRecord,
    CheckpointStage,
    ContainerRecord,
    ContainerStage,
    ExecRecord,
    ExecStage,
    IdleRecord,
    SliceRecord,
    SliceStage,
)

__all__ = ["Journal"]

_ANSWERS_KEPT_S = 24 * 3600
_EVENTS_KEPT_S = 7 * 24 * 3600
_TOKENS_KEPT_S = 90 * 24 * 3600


class Journal:
    """The journal of one daemon.

    Every commit survives the death of the process. A power cut may lose the last of them, fencing tokens and cursors
    too: it also ends every slice and every process of the node, and a reader whose cursor was lost is told so. To have
    each commit on the disk (synchronous=FULL) would add 1.5 ms to the making of a slice and 0.8 ms to its end, measured
    with `python -m bench.slices` on a virtual disk, where all that the daemon adds is 2.0 and 1.8 ms.

    Args:
        path: the SQLite file; made if missing. Only one daemon may have it open.

    Raises:
        sqlite3.Error: it cannot be opened, or another daemon has it open.
    """

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        connection = sqlite3.connect(path, timeout=1, check_same_thread=False)
        self._db = Database(connection)
        # One daemon per journal: the lock is held for as long as the process lives, however it dies.
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.enable_wal()
        self._db.execute("PRAGMA synchronous=NORMAL")
        migrations.apply(self._db)
        self.leases = LeaseTable(self._db)
        """Until when containers may run."""
        self.on_container: Callable[[Owner], None] = lambda _: None
        """Called after anything was written of an attempt's container, within the transaction."""

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    # Facts ------------------------------------------------------------------------------------------------

    def fact(self, name: str, default: str) -> str:
        """Returns a fact about this daemon, and keeps `default` as the fact when there is none yet."""
        self._write("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, default))
        return str(self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0])

    # Fencing and answers ----------------------------------------------------------------------------------

    def highest_token(self, owner: Owner) -> int:
        """Returns the highest fencing token seen for an attempt; 0 when none was."""
        row = self._db.execute(f"SELECT token FROM tokens WHERE {_OWNED}", _key(owner)).fetchone()
        return int(row[0]) if row else 0

    def raise_token(self, owner: Owner, token: int, now: float) -> None:
        """Notes a fencing token; a lower one than is known changes nothing."""
        self._write(
            "INSERT INTO tokens VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
            "SET token = max(token, excluded.token), time = excluded.time",
            (*_key(owner), token, now),
        )

    def answer(self, centre: str, request_id: str) -> Answer | None:
        """Returns what a request was answered, if it was."""
        row = self._db.execute(
            "SELECT rpc, digest, message FROM answers WHERE centre = ? AND request_id = ?", (centre, request_id)
        ).fetchone()
        return Answer(*row) if row else None

    def keep_answer(self, owner: Owner, request_id: str, answer: Answer, now: float) -> None:
        """Keeps what a request was answered, for 24 h."""
        self._write(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*_key(owner), request_id, answer.rpc, answer.digest, answer.message, now),
        )

    def forget_answers(self, owner: Owner) -> None:
        """Forgets the answers about an attempt: what they tell of is no longer so."""
        self._write(f"DELETE FROM answers WHERE {_OWNED}", _key(owner))

    # Slices -----------------------------------------------------------------------------------------------

    def add_slice(self, record: SliceRecord) -> SliceRecord:
        """Adds a slice, and returns it with its id."""
        row = _slice_row(record)
        del row["id"]
        names = ", ".join(row)
        cursor = self._write(
            f"INSERT INTO slices ({names}) VALUES ({', '.join('?' * len(row))})",
            tuple(row.values()),
        )
        return replace(record, id=int(cursor.lastrowid or 0))

    def update_slice(self, record: SliceRecord) -> SliceRecord:
        """Changes a slice, and returns it."""
        row = _slice_row(record)
        number = row.pop("id")
        names = ", ".join(f"{name} = ?" for name in row)
        self._write(f"UPDATE slices SET {names} WHERE id = ?", (*row.values(), number))
        return record

    def delete_slice(self, record: SliceRecord) -> None:
        """Forgets a slice that never came to be."""
        self._write("DELETE FROM slices WHERE id = ?", (record.id,))

    def slices(self) -> list[SliceRecord]:
        """Returns every slice that is not destroyed, the oldest first."""
        # The stage is written out: an index over a part of the rows is not used for a parameter.
        rows = self._db.query(f"SELECT * FROM slices WHERE stage != '{SliceStage.DESTROYED}' ORDER BY id")
        return [_slice_record(row) for row in rows]

    def slice(self, uuid: str) -> SliceRecord | None:
        """Returns a slice by its UUID, the newest of that UUID, destroyed or not."""
        rows = self._db.query("SELECT * FROM slices WHERE uuid = ? ORDER BY id DESC LIMIT 1", [uuid])
        return next((_slice_record(row) for row in rows), None)

    # Containers -------------------------------------------------------------------------------------------

    def put_container(self, record: ContainerRecord) -> ContainerRecord:
        """Adds or changes a container, and returns it."""
        row = _container_row(record)
        self._write(
            f"INSERT OR REPLACE INTO containers ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
            tuple(row.values()),
        )
        self.on_container(record.owner)
        return record

    def delete_container(self, owner: Owner) -> None:
        """Forgets a container whose results are discarded, or that never came to be, and what ran in it beside."""
        with self.atomic():
            self._db.execute(f"DELETE FROM execs WHERE {_OWNED}", _key(owner))
            self._db.execute(f"DELETE FROM idle WHERE {_OWNED}", _key(owner))
            self._db.execute(f"DELETE FROM containers WHERE {_OWNED}", _key(owner))
        self.on_container(owner)

    def container(self, owner: Owner) -> ContainerRecord | None:
        """Returns the container of an attempt, removed ones whose results are kept too."""
        rows = self._db.query(f"SELECT * FROM containers WHERE {_OWNED}", _key(owner))
        return next((_container_record(row) for row in rows), None)

    def containers(self) -> list[ContainerRecord]:
        """Returns every container, removed ones whose results are kept too, the oldest first."""
        return [_container_record(row) for row in self._db.query("SELECT * FROM containers ORDER BY create_time")]

    def viewers(self) -> dict[str, str]:
        """Returns the id of the living container that sees each slice, by the slice's UUID."""
        alive = [stage for stage in ContainerStage if stage.is_alive]
        rows = self._db.execute(
            f"SELECT slice_uuids, container_id FROM containers WHERE stage IN ({', '.join('?' * len(alive))})", alive
        )
        return {uuid: str(container_id) for uuids, container_id in rows for uuid in json.loads(uuids)}

    def put_idle(self, record: IdleRecord) -> IdleRecord:
        """Adds or changes what a container is watched for and what was counted, and returns it."""
        row = {field.name: getattr(record, field.name) for field in fields(record)}
        row = {**asdict(row.pop("owner")), **row}
        self._write(
            f"INSERT OR REPLACE INTO idle ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
        )
        return record

    def idle(self, owner: Owner) -> IdleRecord | None:
        """Returns what an attempt's container is watched for; None when it is not."""
        for row in self._db.query(f"SELECT * FROM idle WHERE {_OWNED}", _key(owner)):
            owned = Owner(row.pop("centre"), row.pop("job_id"), row.pop("attempt"))
            return IdleRecord(**{**row, "owner": owned, "used": bool(row["used"])})
        return None

    # Commands beside those of containers -------------------------------------------------------------------

    def put_exec(self, record: ExecRecord) -> ExecRecord:
        """Adds or changes a command, and returns it."""
        row = {field.name: getattr(record, field.name) for field in fields(record)}
        row = {**asdict(row.pop("owner")), **row}
        self._write(
            f"INSERT OR REPLACE INTO execs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
        )
        return record

    def delete_exec(self, exec_id: str) -> None:
        """Forgets a command."""
        self._write("DELETE FROM execs WHERE id = ?", (exec_id,))

    def exec(self, exec_id: str) -> ExecRecord | None:
        """Returns a command by its id."""
        return next(self._execs("id = ?", exec_id), None)

    def exec_by_request(self, centre: str, request_id: str) -> ExecRecord | None:
        """Returns the command that a request started."""
        return next(self._execs("centre = ? AND request_id = ?", centre, request_id), None)

    def execs(self, owner: Owner | None = None) -> list[ExecRecord]:
        """Returns the commands of an attempt, or all there are, the oldest first."""
        return list(self._execs(_OWNED, *_key(owner)) if owner is not None else self._execs("true"))

    def _execs(self, condition: str, *values: Any) -> Iterator[ExecRecord]:
        for row in self._db.query(f"SELECT * FROM execs WHERE {condition} ORDER BY start_time", values):
            owner = Owner(row.pop("centre"), row.pop("job_id"), row.pop("attempt"))
            changed = {"owner": owner, "stage": ExecStage(row["stage"]), "tty": bool(row["tty"])}
            yield ExecRecord(**{**row, **changed})

    # Events -----------------------------------------------------------------------------------------------

    def add_event(self, time: float, message: bytes) -> int:
        """Adds an event, and returns its cursor, which is higher than any before."""
        return int(self._write("INSERT INTO events (time, message) VALUES (?, ?)", (time, message)).lastrowid or 0)

    def events(self, after: int, most: int) -> list[tuple[int, bytes]]:
        """Returns up to `most` events after a cursor, in order."""
        return [
            (int(cursor), bytes(message))
            for cursor, message in self._db.execute(
                "SELECT cursor, message FROM events WHERE cursor > ? ORDER BY cursor LIMIT ?", (after, most)
            )
        ]

    def last_cursor(self) -> int:
        """Returns the highest cursor that was ever given; 0 when none was."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        return int(row[0]) if row else 0

    def first_cursor(self) -> int:
        """Returns the lowest cursor whose event is kept; the next to be given when none is."""
        row = self._db.execute("SELECT min(cursor) FROM events").fetchone()
        return self.last_cursor() + 1 if row[0] is None else int(row[0])

    def prune(self, now: float) -> None:
        """Drops what has been kept long enough: answers and destroyed slices 24 h, events 7 days, tokens 90 days."""
        with self.atomic():
            self._db.execute("DELETE FROM answers WHERE time < ?", (now - _ANSWERS_KEPT_S,))
            self._db.execute(
                "DELETE FROM slices WHERE stage = ? AND create_time < ?", (SliceStage.DESTROYED, now - _ANSWERS_KEPT_S)
            )
            self._db.execute("DELETE FROM events WHERE time < ?", (now - _EVENTS_KEPT_S,))
            self._db.execute("DELETE FROM tokens WHERE time < ?", (now - _TOKENS_KEPT_S,))

    @contextlib.contextmanager
    def atomic(self) -> Iterator[None]:
        """Makes what is written in the block one transaction: all of it is kept, or nothing.

        Raises:
            OSError: the disk is full (ENOSPC); nothing of it was kept.
        """
        with _full_disk_told(), self._db.atomic():
            yield

    def _write(self, statement: str, values: Iterable[Any]) -> sqlite3.Cursor:
        with _full_disk_told():
            return self._db.execute(statement, tuple(values))


@contextlib.contextmanager
def _full_disk_told() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise OSError(errno.ENOSPC, "the disk of the node daemon's state is full") from error


_OWNED = "centre = ? AND job_id = ? AND attempt = ?"


def _key(owner: Owner) -> tuple[str, str, int]:
    return owner.centre, owner.job_id, owner.attempt


def _slice_row(record: SliceRecord) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    return {**asdict(row.pop("owner")), **asdict(row.pop("span")), **row}


def _slice_record(row: dict[str, Any]) -> SliceRecord:
    owner = Owner(row.pop("centre"), row.pop("job_id"), row.pop("attempt"))
    span = Span(row.pop("start"), row.pop("size"))
    return SliceRecord(owner=owner, span=span, stage=SliceStage(row.pop("stage")), **row)


def _container_row(record: ContainerRecord) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    checkpoint = json.dumps(asdict(record.checkpoint)) if record.checkpoint is not None else ""
    changed = {"slice_uuids": json.dumps(record.slice_uuids), "checkpoint": checkpoint}
    return {**asdict(row.pop("owner")), **row, **changed}


def _container_record(row: dict[str, Any]) -> ContainerRecord:
    owner = Owner(row.pop("centre"), row.pop("job_id"), row.pop("attempt"))
    return ContainerRecord(
        **{
            **row,
            "owner": owner,
            "stage": ContainerStage(row["stage"]),
            "slice_uuids": tuple(json.loads(row["slice_uuids"])),
            "checkpoint": _checkpoint_record(row["checkpoint"]),
            "oom_killed": bool(row["oom_killed"]),
            "timed_out": bool(row["timed_out"]),
            "lease_expired": bool(row["lease_expired"]),
        }
    )


def _checkpoint_record(text: str) -> CheckpointRecord | None:
    if not text:
        return None
    kept = json.loads(text)
    return CheckpointRecord(
        stage=CheckpointStage(kept["stage"]),
        init=kept["init"],
        processes=tuple((pid, started) for pid, started in kept["processes"]),
        cards=tuple(CardRecord(**{**card, "nodes": tuple(card["nodes"])}) for card in kept["cards"]),
    )
