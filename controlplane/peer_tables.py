"""The tables of the SQLite store about peers, what was sent to them, and what they have sent."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from google.protobuf import json_format
from sqlite_utils import Database

from controlplane.forwards import ForwardRecord, ForwardStage
from controlplane.guests import GuestKey, GuestRecord, GuestStage
from controlplane.jobs import FINAL_STATES
from controlplane.records import InvitationRecord, PeerRecord
from puhui.rpc.moment import moment
from puhui.v1 import job_pb2, peer_service_pb2

__all__ = [
    "count_unbound",
    "delete_guest",
    "delete_peer",
    "find_guest",
    "find_guest_of",
    "read_forward",
    "read_forwards",
    "read_guests",
    "read_invitations",
    "read_old_guests",
    "read_peers",
    "take_invitation",
    "write_forward",
    "write_guest",
    "write_invitation",
    "write_peer",
]

_FINAL = ", ".join(str(int(state)) for state in sorted(FINAL_STATES))


def write_forward(db: Database, forward: ForwardRecord) -> None:
    """Writes a forward as it is now."""
    db.execute(
        "insert or replace into forwards values (?, ?, ?, ?, ?)",
        [forward.job_id, forward.attempt, forward.peer, forward.stage, json.dumps(asdict(forward))],
    )


def read_forwards(db: Database) -> list[ForwardRecord]:
    """Returns every forward that is not settled."""
    rows = db.execute("select body from forwards where stage != ?", [ForwardStage.SETTLED])
    return [_forward(body) for (body,) in rows]


def read_forward(db: Database, job_id: str, attempt: int) -> ForwardRecord | None:
    """Returns a forward."""
    row = db.execute("select body from forwards where job_id = ? and attempt = ?", [job_id, attempt]).fetchone()
    return _forward(row[0]) if row is not None else None


def _forward(body: str) -> ForwardRecord:
    kept = json.loads(body)
    return ForwardRecord(**{**kept, "stage": ForwardStage(kept["stage"])})


def write_guest(db: Database, guest: GuestRecord) -> None:
    """Writes a guest as it is now."""
    db.execute(
        "insert or replace into guests values (?, ?, ?, ?, ?, ?)",
        [*guest.key, guest.job_id, guest.at, json.dumps(asdict(guest))],
    )


def find_guest(db: Database, key: GuestKey) -> GuestRecord | None:
    """Returns a guest."""
    where = "peer = ? and origin_job = ? and attempt = ?"
    row = db.execute(f"select body from guests where {where}", list(key)).fetchone()  # noqa: S608
    return _guest(row[0]) if row is not None else None


def find_guest_of(db: Database, job_id: str) -> GuestRecord | None:
    """Returns the guest that a job is."""
    row = db.execute("select body from guests where job_id = ?", [job_id]).fetchone()
    return _guest(row[0]) if row is not None else None


def read_guests(db: Database) -> list[GuestRecord]:
    """Returns every guest whose job has not ended."""
    rows = db.execute(
        "select guests.body from guests join jobs on jobs.id = guests.job_id "  # noqa: S608 - numbers of states
        f"where jobs.state not in ({_FINAL})"
    )
    return [_guest(body) for (body,) in rows]


def read_old_guests(db: Database, before: float) -> list[GuestRecord]:
    """Returns guests whose job ended, or that were refused, before a time (seconds since the epoch)."""
    rows = db.execute(
        "select guests.body, jobs.body from guests left join jobs on jobs.id = guests.job_id "  # noqa: S608 - likewise
        f"where guests.at < ? and (jobs.state is null or jobs.state in ({_FINAL}))",
        [before],
    )
    return [
        _guest(guest) for guest, job in rows if job is None or moment(job_pb2.Job.FromString(job).end_time) < before
    ]


def count_unbound(db: Database, peer: str) -> int:
    """Returns how many guests of a peer were never bound."""
    (count,) = db.execute("select count(*) from guests where peer = ? and job_id = ''", [peer]).fetchone()
    return int(count)


def delete_guest(db: Database, key: GuestKey) -> None:
    """Forgets a guest."""
    db.execute("delete from guests where peer = ? and origin_job = ? and attempt = ?", list(key))


def _guest(body: str) -> GuestRecord:
    kept = json.loads(body)
    return GuestRecord(**{**kept, "stage": GuestStage(kept["stage"])})


def write_peer(db: Database, peer: PeerRecord) -> None:
    """Writes a peer as it is now.

    Raises:
        sqlite3.IntegrityError: another peer has its certificate.
    """
    kept = {
        **{name: value for name, value in vars(peer).items() if name not in ("terms", "certificate")},
        "certificate": peer.certificate.hex(),
        "terms": json_format.MessageToDict(peer.terms),
    }
    db.execute(
        "insert into peers values (?, ?, ?) "
        "on conflict (name) do update set fingerprint = excluded.fingerprint, body = excluded.body",
        [peer.name, peer.fingerprint, json.dumps(kept)],
    )


def read_peers(db: Database) -> list[PeerRecord]:
    """Returns every peer, by name."""
    return [_peer(json.loads(body)) for (body,) in db.execute("select body from peers order by name")]


def _peer(kept: dict[str, Any]) -> PeerRecord:
    terms = json_format.ParseDict(kept.pop("terms"), peer_service_pb2.PeerTerms(), ignore_unknown_fields=True)
    return PeerRecord(terms=terms, certificate=bytes.fromhex(kept.pop("certificate")), **kept)


def delete_peer(db: Database, name: str) -> None:
    """Removes a peer. What it had sent is left to its leases, under a name that nobody can have."""
    db.execute("delete from peers where name = ?", [name])
    gone = f"{name}/{uuid.uuid4().hex[:12]}"
    for (body,) in db.execute("select body from guests where peer = ?", [name]).fetchall():
        guest = _guest(body)
        delete_guest(db, guest.key)
        write_guest(db, replace(guest, peer=gone))


def write_invitation(db: Database, invitation: InvitationRecord, at: float) -> None:
    """Writes an invitation, and forgets those that hold no longer at a time (seconds since the epoch)."""
    db.execute("delete from invitations where expires < ?", [at])
    kept = {
        "name": invitation.name,
        "terms": json_format.MessageToDict(invitation.terms),
        "certificate": invitation.secret_certificate.hex(),
    }
    db.execute(
        "insert into invitations values (?, ?, ?)", [invitation.public_key, invitation.expires, json.dumps(kept)]
    )


def read_invitations(db: Database) -> list[InvitationRecord]:
    """Returns the invitations that were not taken."""
    rows: Sequence[tuple[str, float, str]] = list(db.execute("select public_key, expires, body from invitations"))
    return [_invitation(public_key, expires, json.loads(body)) for public_key, expires, body in rows]


def _invitation(public_key: str, expires: float, kept: dict[str, Any]) -> InvitationRecord:
    terms = json_format.ParseDict(kept["terms"], peer_service_pb2.PeerTerms(), ignore_unknown_fields=True)
    return InvitationRecord(public_key, expires, kept["name"], terms, bytes.fromhex(kept["certificate"]))


def take_invitation(db: Database, public_key: str, peer: PeerRecord) -> bool:
    """Writes a peer in exchange for its invitation; nothing when that is gone."""
    if not db.execute("delete from invitations where public_key = ?", [public_key]).rowcount:
        return False
    write_peer(db, peer)
    return True
