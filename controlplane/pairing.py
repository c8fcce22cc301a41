"""How two centres become peers: one invites, the other takes the invitation, once (decision 0013).

An invitation holds the inviting centre's certificate and a private key of its own. Whoever takes it connects with a
certificate of that key, which opens the door for nothing but `Pair`, and proves with the same key that the certificate
which is to be pinned comes from whoever was invited.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc

from controlplane.certificates import (
    CentreIdentity,
    InvalidCertificateError,
    certificate_of_key,
    key_from_secret,
    name_of_invitation,
    new_secret,
    pem_of,
    public_key_of,
    require_pinnable,
    sign,
    verify,
)
from controlplane.invitation_token import read_token, write_token
from controlplane.peer_client import PeerClient
from controlplane.peer_identity import certificate_of
from controlplane.peer_terms import TermsError, require_sound_terms
from controlplane.peers import Peer, Peers
from controlplane.records import InvitationRecord, PeerRecord
from controlplane.store import Store
from puhui.rpc.address import require_reachable_address
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, now, timestamp
from puhui.rpc.plain_text import plain_text
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import peer_service_pb2

__all__ = ["Pairing", "require_terms"]

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_ID = re.compile(r"[0-9a-f]{32}")
_LONGEST_VALID_S = 7 * 86400.0
_MOST_TRIES = 100
"""So often may whoever has an invitation try to take it."""

_NOT_LET_IN = frozenset({"UNKNOWN", "INVITATION_UNKNOWN"})

Connect = Callable[[CentreIdentity, str, bytes, str], PeerClient]


@dataclass
class _Door:
    """What the key of an invitation opens: the way to `Pair`."""

    certificate_pem: bytes
    expires: float
    tries: int = 0
    taken_by: bytes = b""
    """The certificate that was pinned for it: DER."""


class Pairing:
    """Makes peers of centres, and ends that.

    Args:
        store: where peers and invitations are.
        identity: who this centre is.
        centre: its name.
        centre_id: its id.
        peers: the peers there are.
        address: returns where peers reach this centre; "" when it serves none.
        connect: opens a connection to a centre, see `peers.connect`.
    """

    def __init__(
        self,
        store: Store,
        identity: CentreIdentity,
        centre: str,
        centre_id: str,
        peers: Peers,
        address: Callable[[], str],
        connect: Connect,
    ) -> None:
        self._store = store
        self._identity = identity
        self._centre = centre
        self._centre_id = centre_id
        self._peers = peers
        self._address = address
        self._connect = connect
        self._doors: dict[str, _Door] = {}
        """By public key of the invitation."""
        self._taking = asyncio.Lock()

    async def load(self) -> None:
        """Opens the doors of the invitations that are kept."""
        for record in await self._store.invitations():
            self._open_door(record.public_key, record.secret_certificate, record.expires)

    def _open_door(self, public_key: str, certificate: bytes, expires: float) -> None:
        at = now()
        self._doors = {key: door for key, door in self._doors.items() if door.expires > at}
        self._doors[public_key] = _Door(pem_of(certificate), expires)

    def pins(self) -> list[bytes]:
        """Returns the certificates of everybody who may come in: PEM. May be called from any thread."""
        at = now()
        doors = tuple(self._doors.values())
        return [*self._peers.pins(), *(door.certificate_pem for door in doors if door.expires > at)]

    # -- inviting

    async def invite(
        self, valid_s: float, address: str, name: str, terms: peer_service_pb2.PeerTerms
    ) -> tuple[str, float]:
        """Returns an invitation, and until when it holds, in seconds since the epoch.

        Raises:
            Refusal: FAILED_PRECONDITION with FEDERATION_OFF; INVALID_ARGUMENT with ADDRESS_INVALID, NAME_INVALID,
                TERMS_INVALID or VALIDITY_INVALID; ALREADY_EXISTS with PEER_EXISTS.
        """
        reached = self._reached(address)
        if not reached:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "FEDERATION_OFF",
                "this centre serves no peers, so nobody could come; start its control plane with --federation-listen "
                "HOST:PORT, or let the other centre invite",
            )
        require_terms(terms)
        if name:
            self._require_free(name, "choose another with --name")
        if not 0 < valid_s <= _LONGEST_VALID_S:
            raise _invalid("VALIDITY_INVALID", "an invitation holds for more than 0 s, and for 7 days at most")
        secret, expires = new_secret(), now() + valid_s
        key = key_from_secret(secret)
        certificate = certificate_of_key(key, name_of_invitation(key))
        public_key = public_key_of(certificate)
        await self._store.put_invitation(InvitationRecord(public_key, expires, name, terms, certificate))
        self._open_door(public_key, certificate, expires)
        said = peer_service_pb2.PeerInvitation(
            centre=self._centre,
            centre_id=self._centre_id,
            address=reached,
            certificate=self._identity.certificate,
            key=secret,
            expire_time=timestamp(expires),
            key_certificate=certificate,
        )
        return write_token(said), expires

    async def pair(self, request: wire.PairRequest, context: Any) -> wire.PairResponse:
        """Answers who takes an invitation.

        Raises:
            Refusal: UNAUTHENTICATED with INVITATION_UNKNOWN; INVALID_ARGUMENT; ALREADY_EXISTS with PEER_EXISTS.
        """
        answer = wire.PairResponse(
            centre=self._centre, centre_id=self._centre_id, certificate=self._identity.certificate
        )
        came_with = certificate_of(context)
        known = self._peers.by_certificate(came_with)
        if known is not None:
            # It has its own key with it, so it may say where it is now.
            if request.certificate != came_with or request.centre_id != known.record.centre_id:
                raise _unknown("you are a peer already, by another certificate; take the invitation with that one")
            async with self._taking:
                await self._moved(known, request.address)
            return answer
        public_key = public_key_of(came_with)
        door = self._doors.get(public_key)
        if door is None:
            raise _unknown("this invitation holds no longer; ask for a new one (`puhui peers invite`)")
        door.tries += 1
        if door.tries > _MOST_TRIES:
            del self._doors[public_key]
        if not verify(public_key, request.proof, request.certificate):
            raise _unknown("the certificate that is to be pinned is not signed with the key of the invitation")
        async with self._taking:
            await self._take(public_key, door, request)
        return answer

    async def _moved(self, known: Peer, address: str) -> None:
        if address != known.record.address:
            if address:
                _require_reachable(address)
            await self._peers.add(replace(known.record, address=address))

    async def _take(self, public_key: str, door: _Door, request: wire.PairRequest) -> None:
        if door.taken_by:
            if door.taken_by != request.certificate or self._peers.by_certificate(door.taken_by) is None:
                raise _unknown("this invitation was taken before; ask for a new one (`puhui peers invite`)")
            return  # the answer before this one was lost
        invitation = next((one for one in await self._store.invitations() if one.public_key == public_key), None)
        if invitation is None or invitation.expires <= now():
            raise _unknown("this invitation holds no longer; ask for a new one (`puhui peers invite`)")
        known = self._known(request.centre_id, request.certificate)
        if known is not None:
            # Whoever was invited has shown no more than a certificate, which is no secret: nothing changes by it.
            record = known.record
        else:
            name = invitation.name or _proposed(request.centre)
            self._require_free(name, f"let the operator of {self._centre} invite you with --name")
            address, terms = request.address, invitation.terms
            record = _new(name, request.centre_id, address, request.certificate, terms)
        if not await self._peers.take(record, public_key):
            raise _unknown("this invitation was taken before; ask for a new one (`puhui peers invite`)")
        # The door stays open for the answer that may be lost, but for nobody else: see above.
        door.taken_by = request.certificate

    # -- taking an invitation

    async def add(self, token: str, name: str, address: str, terms: peer_service_pb2.PeerTerms) -> Peer:
        """Takes an invitation. May be repeated after a failure.

        Raises:
            Refusal: INVALID_ARGUMENT with INVITATION_INVALID, NAME_INVALID, TERMS_INVALID or ADDRESS_INVALID;
                FAILED_PRECONDITION with INVITATION_EXPIRED; ALREADY_EXISTS with PEER_EXISTS; UNAVAILABLE when the other
                centre cannot be reached; and what that answers.
        """
        said = read_token(token)
        require_terms(terms)
        _require_reachable(said.address)
        if said.centre_id == self._centre_id:
            raise _invalid(
                "INVITATION_INVALID", "this invitation is this centre's own; give it to the other centre's operator"
            )
        if moment(said.expire_time) <= now():
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "INVITATION_EXPIRED",
                f"this invitation of {said.centre[:80]!r} holds no longer; ask for a new one (`puhui peers invite`)",
            )
        reached = self._reached(address)
        async with self._taking:
            known = self._known(said.centre_id, said.certificate)
            if known is None:
                chosen = name or _proposed(said.centre)
                self._require_free(chosen, "choose another with --name")
                record = _new(chosen, said.centre_id, said.address, said.certificate, terms)
            else:
                if name and name != known.record.name:
                    raise _exists(f"this centre is a peer already, named {known.record.name}; leave --name out")
                agreed = terms if terms.ByteSize() else known.record.terms
                record = replace(known.record, address=said.address, terms=agreed)
            await self._ask(said, reached, known is not None)
            return await self._peers.add(record)

    async def _ask(self, said: peer_service_pb2.PeerInvitation, reached: str, known: bool) -> None:
        """Asks the inviting centre to be its peer.

        The first try may have come through, and only its answer been lost: then the invitation opens nothing any more,
        but our own certificate does.
        """
        request = wire.PairRequest(
            centre=self._centre,
            centre_id=self._centre_id,
            address=reached,
            certificate=self._identity.certificate,
            proof=sign(said.key, self._identity.certificate),
        )
        invited = CentreIdentity.of_secret(said.key, said.key_certificate)
        first, second = (self._identity, invited) if known else (invited, self._identity)
        try:
            answer = await self._ask_as(first, said, request)
        except Refusal as refusal:
            if refusal.reason not in _NOT_LET_IN:
                raise _said_there(refusal, said) from refusal
            try:
                answer = await self._ask_as(second, said, request)
            except Refusal as again:
                # What the invitation brings about says more than what we are without it.
                raise _said_there(again if known else refusal, said) from again
        if answer.certificate != said.certificate:
            raise _invalid("INVITATION_INVALID", "the other centre is not who the invitation says; ask for another one")

    async def _ask_as(
        self, who: CentreIdentity, said: peer_service_pb2.PeerInvitation, request: wire.PairRequest
    ) -> wire.PairResponse:
        client = self._connect(who, said.address, said.certificate, said.centre_id)
        try:
            return await client.pair(request)
        finally:
            await client.close()

    # -- ending

    async def unpair(self, peer: Peer) -> None:
        """The peer has ended work with this centre: nothing more is sent there, or taken from it."""
        await self._peers.remove(peer.record.name)

    # -- parts

    def _reached(self, address: str) -> str:
        """Returns where peers reach this centre; "" when it serves none."""
        reached = address or self._address()
        if reached:
            _require_reachable(reached)
        return reached

    def _known(self, centre_id: str, certificate: bytes) -> Peer | None:
        """Returns the peer that a centre is already.

        Raises:
            Refusal: ALREADY_EXISTS with PEER_EXISTS: it is one by another certificate, or another one has this.
        """
        for peer in self._peers.all():
            same = peer.record.centre_id == centre_id, peer.record.certificate == certificate
            if all(same):
                return peer
            if any(same):
                raise _exists(
                    f"that centre is peer {peer.record.name} already, and had another certificate then; if it was made "
                    f"anew, end work with the old one first (`puhui peers remove {peer.record.name}`, where that is)"
                )
        return None

    def _require_free(self, name: str, how: str) -> None:
        if not _NAME.fullmatch(name):
            raise _invalid(
                "NAME_INVALID",
                f"{name[:80]!r} is no name of a peer: lower-case letters, digits, '_' and '-', at most 32; {how}",
            )
        if name == self._centre or self._peers.get(name) is not None:
            whose = "this centre's own name" if name == self._centre else "a peer already"
            raise _exists(f"{name} is {whose} at {self._centre}; {how}")


def _new(name: str, centre_id: str, address: str, certificate: bytes, terms: peer_service_pb2.PeerTerms) -> PeerRecord:
    """Returns a new peer, once it is certain that it can be one."""
    if not _ID.fullmatch(centre_id):
        raise _invalid("CENTRE_ID_INVALID", "a centre's id is 32 hexadecimal digits")
    if address:
        _require_reachable(address)
    try:
        require_pinnable(certificate, centre_id)
    except InvalidCertificateError as error:
        raise _invalid("CERTIFICATE_INVALID", str(error)) from error
    return PeerRecord(name, centre_id, address, certificate, terms, now())


def _proposed(centre: str) -> str:
    """Returns the name of a peer for the name that a centre gives itself.

    There is no dot in it: a peer's tenants are named PEER.TENANT here, and no two may become one.
    """
    return re.sub(r"[^a-z0-9_-]+", "-", centre[:256].lower()).strip("-_")[:32]


def _require_reachable(address: str) -> None:
    """Refuses where nobody could come to.

    Raises:
        Refusal: INVALID_ARGUMENT with ADDRESS_INVALID.
    """
    try:
        require_reachable_address(address)
    except ValueError as error:
        raise _invalid(
            "ADDRESS_INVALID",
            f"{error}; say with --address where the other centre reaches this one, or with --federation-address of its "
            "control plane once and for all",
        ) from error


def require_terms(terms: peer_service_pb2.PeerTerms) -> None:
    """Refuses terms that nobody can keep.

    Raises:
        Refusal: INVALID_ARGUMENT with TERMS_INVALID.
    """
    try:
        require_sound_terms(terms)
    except TermsError as error:
        raise _invalid("TERMS_INVALID", str(error)) from error


def _invalid(reason: str, message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


def _exists(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.ALREADY_EXISTS, "PEER_EXISTS", message)


def _said_there(refusal: Refusal, said: peer_service_pb2.PeerInvitation) -> Refusal:
    """Returns what the operator here is told about a refusal of the inviting centre, or about its silence."""
    text = plain_text(refusal.message, 300)
    if refusal.reason != "UNKNOWN":
        return Refusal(refusal.code, plain_text(refusal.reason, 64), text)
    return Refusal(
        refusal.code,
        "PEER_UNREACHABLE",
        f"nobody at {said.address} takes this invitation; look whether {said.centre[:80]!r} is up and the way there is "
        f"open, and if so, ask for a new invitation ({text})",
    )


def _unknown(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, "INVITATION_UNKNOWN", message)
