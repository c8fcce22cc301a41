"""Makes the centres of this machine peers of each other."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puhui.cli.local_state import CentreRecord
from puhui.client import Centre, Refusal
from puhui.v1.peer_service_pb2 import ListPeersResponse, Peer

__all__ = ["Outdated", "Pairing", "pair", "pairings"]

_CONTACT_S = 20.0
_LOOK_S = 0.05


@dataclass(frozen=True)
class Outdated:
    """What a centre knows of a peer and is true no longer."""

    at: str
    """Name of the centre that knows it."""
    peer: str
    """Name of the peer."""
    gone: bool
    """The peer has another certificate: who had the old one is no more, nor is what it ran."""


@dataclass(frozen=True)
class Pairing:
    """Two centres that are to be made peers."""

    inviting: str
    """Name of the centre that invites the other."""
    invited: str
    """Name of the centre that takes the invitation."""
    outdated: tuple[Outdated, ...] = ()
    """What is removed first."""


def pairings(known: Mapping[str, ListPeersResponse]) -> list[Pairing]:
    """Returns which centres have to be made peers.

    Args:
        known: what each centre says of itself and of its peers, by its name, in the order of the centres.
    """
    found = []
    for one, other in itertools.combinations(known, 2):
        ways = ((one, other), (other, one))
        knows = {at: _entry(known[at], peer) for at, peer in ways}
        right = [_is_right(knows[at], known[peer]) for at, peer in ways]
        if not all(right):
            gone = {at: entry.fingerprint != known[entry.name].fingerprint for at, entry in knows.items() if entry}
            outdated = tuple(Outdated(at, other if at == one else one, is_gone) for at, is_gone in gone.items())
            found.append(Pairing(one, other, outdated))
    return found


def pair(centres: Sequence[CentreRecord]) -> list[str]:
    """Makes centres peers of each other, as far as they are not, and waits until all are in contact.

    Returns:
        What is still amiss, a sentence each.

    Raises:
        Refusal: one of them refuses to be a peer or cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        clients = {centre.name: stack.enter_context(Centre(centre.address)) for centre in centres}
        known = {name: client.peers() for name, client in clients.items()}
        for pairing in pairings(known):
            for entry in pairing.outdated:
                _remove(clients[entry.at], entry)
            invitation = clients[pairing.inviting].invite_peer(name=pairing.invited)
            clients[pairing.invited].add_peer(invitation.token, name=pairing.inviting)
        return _out_of_contact(clients)


def _remove(centre: Centre, entry: Outdated) -> None:
    try:
        centre.remove_peer(entry.peer, force=entry.gone)
    except Refusal as refusal:
        if refusal.reason != "PEER_NOT_FOUND":  # the other one, when it was removed there, has said so here
            raise


def _out_of_contact(clients: Mapping[str, Centre]) -> list[str]:
    """Waits until all peers of each other are in contact, and returns which are not when that takes too long."""
    deadline = time.monotonic() + _CONTACT_S
    while True:
        silent = [
            f"{name} is not in contact with its peer {peer.name}{': ' if peer.message else ''}{peer.message}"
            for name, client in clients.items()
            for peer in client.peers().peers
            if peer.name in clients and not peer.in_contact
        ]
        if not silent or time.monotonic() > deadline:
            return silent
        time.sleep(_LOOK_S)


def _entry(known: ListPeersResponse, name: str) -> Peer | None:
    return next((peer for peer in known.peers if peer.name == name), None)


def _is_right(entry: Peer | None, there: ListPeersResponse) -> bool:
    """Says whether what a centre knows of another is what that one says of itself."""
    return entry is not None and entry.address == there.address and entry.fingerprint == there.fingerprint
