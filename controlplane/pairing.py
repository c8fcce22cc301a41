"""How two centres become peers: one invites, the other takes the invitation, once (decision 0013).

An invitation holds the inviting centre's certificate and a private key of its own. Whoever takes it connects with a
certificate of that key, which opens the door for nothing but `Pair`, and proves with the same key that the certificate
which is to be pinned comes from whoever was invited.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from controlplane.certificates import (
    CentreIdentity,
    InvalidCertificateError,
    certificate_of_key,
    key_from_secret,
    name_of_invitation,
    new_secret,
    pem_of,
    public_key_of,
    sign,
    verify,
)
from controlplane.peer_client import PeerClient
from controlplane.peer_identity import certificate_of
from controlplane.peer_terms import TermsError, require_sound_terms
from controlplane.peers import Peer, Peers
from controlplane.records import InvitationRecord, PeerRecord
from controlplane.store import Store
from puhui.rpc.address import require_address
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, now, timestamp
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1 import peer_service_pb2

__all__ = ["TOKEN_PREFIX", "Pairing", "require_terms"]

TOKEN_PREFIX = "puhui-peer-1."  # noqa: S105 - what a token begins with, not one
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_ID = re.compile(r"[0-9a-f]{32}")
_LONGEST_VALID_S = 7 * 86400.0
_MOST_TOKEN = 4096

Connect = Callable[[CentreIdentity, str, bytes, str], PeerClient]


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
        self._doors: dict[str, tuple[bytes, float]] = {}
        """By public key of an open invitation: the certificate that opens the door, and until when."""

    async def load(self) -> None:
        """Opens the doors of the invitations that are kept."""
        for record in await self._store.invitations():
            self._open_door(record.public_key, record.secret_certificate, record.expires)

    def _open_door(self, public_key: str, certificate: bytes, expires: float) -> None:
        self._doors[public_key] = (pem_of(certificate), expires)

    def pins(self) -> list[bytes]:
        """Returns the certificates of everybody who may come in: PEM. May be called from any thread."""
        at = now()
        return [*self._peers.pins(), *(pem for pem, expires in tuple(self._doors.values()) if expires > at)]

    # -- inviting

    async def invite(
        self, valid_s: float, address: str, name: str, terms: peer_service_pb2.PeerTerms
    ) -> tuple[str, float]:
        """Returns an invitation, and until when it holds, in seconds since the epoch.

        Raises:
            Refusal: FAILED_PRECONDITION with FEDERATION_OFF; INVALID_ARGUMENT with ADDRESS_INVALID, NAME_INVALID,
                TERMS_INVALID or VALIDITY_INVALID; ALREADY_EXISTS with PEER_EXISTS.
        """
        reached = address or self._address()
        if not reached:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "FEDERATION_OFF",
                "this centre serves no peers, so nobody could come; start its control plane with --federation-listen "
                "HOST:PORT, or let the other centre invite",
            )
        _require_address(reached)
        require_terms(terms)
        if name:
            self._require_free(name)
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
        return TOKEN_PREFIX + base64.urlsafe_b64encode(said.SerializeToString()).decode().rstrip("="), expires

    async def pair(self, request: wire.PairRequest, context: Any) -> wire.PairResponse:
        """Answers who takes an invitation.

        Raises:
            Refusal: UNAUTHENTICATED with INVITATION_UNKNOWN; INVALID_ARGUMENT; ALREADY_EXISTS with PEER_EXISTS.
        """
        answer = wire.PairResponse(
            centre=self._centre, centre_id=self._centre_id, certificate=self._identity.certificate
        )
        came_with = certificate_of(context)
        public_key = public_key_of(came_with)
        if not verify(public_key, request.proof, request.certificate):
            raise Refusal(
                grpc.StatusCode.UNAUTHENTICATED,
                "INVITATION_UNKNOWN",
                "the certificate that is to be pinned is not signed with the key of an invitation",
            )
        if self._peers.by_certificate(request.certificate) is not None:
            return answer  # the answer before this one was lost
        invitation = next((one for one in await self._store.invitations() if one.public_key == public_key), None)
        if invitation is None or invitation.expires <= now():
            raise Refusal(
                grpc.StatusCode.UNAUTHENTICATED,
                "INVITATION_UNKNOWN",
                "this invitation was taken before, or holds no longer; ask for a new one (`puhui peers invite`)",
            )
        record = self._record(
            invitation.name or request.centre,
            request.centre_id,
            request.address,
            request.certificate,
            invitation.terms,
        )
        if not await self._store.take_invitation(public_key, record):
            raise Refusal(
                grpc.StatusCode.UNAUTHENTICATED, "INVITATION_UNKNOWN", "this invitation is being taken already"
            )
        await self._peers.add(record)
        # The door stays open for the answer that may be lost, but for nobody else: see above.
        return answer

    # -- taking an invitation

    async def add(self, token: str, name: str, address: str, terms: peer_service_pb2.PeerTerms) -> Peer:
        """Takes an invitation. May be repeated after a failure.

        Raises:
            Refusal: INVALID_ARGUMENT with INVITATION_INVALID, NAME_INVALID, TERMS_INVALID or ADDRESS_INVALID;
                FAILED_PRECONDITION with INVITATION_EXPIRED; ALREADY_EXISTS with PEER_EXISTS; UNAVAILABLE when the other
                centre cannot be reached; and what that answers.
        """
        said = _read_token(token)
        require_terms(terms)
        if said.centre_id == self._centre_id:
            raise _invalid(
                "INVITATION_INVALID", "this invitation is this centre's own; give it to the other centre's operator"
            )
        if moment(said.expire_time) <= now():
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "INVITATION_EXPIRED",
                f"this invitation of {said.centre} holds no longer; ask for a new one (`puhui peers invite`)",
            )
        record = self._record(name or said.centre, said.centre_id, said.address, said.certificate, terms)
        reached = address or self._address()
        if reached:
            _require_address(reached)
        await self._ask(said, reached)
        await self._store.put_peer(record)
        return await self._peers.add(record)

    async def _ask(self, said: peer_service_pb2.PeerInvitation, reached: str) -> None:
        invited = CentreIdentity.of_secret(said.key, said.key_certificate)
        client = self._connect(invited, said.address, said.certificate, said.centre_id)
        request = wire.PairRequest(
            centre=self._centre,
            centre_id=self._centre_id,
            address=reached,
            certificate=self._identity.certificate,
            proof=sign(said.key, self._identity.certificate),
        )
        try:
            answer = await client.pair(request)
        except Refusal as refusal:
            if refusal.reason != "UNKNOWN":
                raise
            raise Refusal(
                refusal.code,
                "PEER_UNREACHABLE",
                f"{said.centre} cannot be reached at {said.address}, or does not take this invitation any longer; look "
                f"whether it is up and the way there is open, or ask for a new invitation ({refusal.message[:200]})",
                retry_after_s=5.0,
            ) from refusal
        finally:
            await client.close()
        if answer.certificate != said.certificate:
            raise _invalid("INVITATION_INVALID", f"{said.centre} is not who the invitation says; ask for a new one")

    # -- ending

    async def unpair(self, peer: Peer) -> None:
        """The peer has ended work with this centre: nothing more is sent there, or taken from it."""
        await self._peers.remove(peer.record.name)

    # -- parts

    def _record(
        self, name: str, centre_id: str, address: str, certificate: bytes, terms: peer_service_pb2.PeerTerms
    ) -> PeerRecord:
        """Returns a new peer, once it is certain that it can be one."""
        if not _ID.fullmatch(centre_id):
            raise _invalid("CENTRE_ID_INVALID", "a centre's id is 32 hexadecimal digits")
        if address:
            _require_address(address)
        try:
            public_key_of(certificate)
        except InvalidCertificateError as error:
            raise _invalid("CERTIFICATE_INVALID", str(error)) from error
        known = next((one for one in self._peers.all() if one.record.centre_id == centre_id), None)
        if known is None:
            self._require_free(name)
            return PeerRecord(name, centre_id, address, certificate, terms, now())
        # The same centre with another key, or another address: it paired again.
        return replace(known.record, address=address, certificate=certificate)

    def _require_free(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise _invalid(
                "NAME_INVALID",
                f"{name[:80]!r} is no name of a peer: lower-case letters, digits, '.', '_' and '-', at most 32; "
                "choose one with --name",
            )
        if name == self._centre or self._peers.get(name) is not None:
            whose = "this centre's own name" if name == self._centre else "a peer already"
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS, "PEER_EXISTS", f"{name} is {whose}; choose another name with --name"
            )


def _read_token(token: str) -> peer_service_pb2.PeerInvitation:
    text = "".join(token.split())
    if not text.startswith(TOKEN_PREFIX) or len(text) > _MOST_TOKEN:
        raise _invalid(
            "INVITATION_INVALID",
            f"this is no invitation of a centre of this version: it begins with {TOKEN_PREFIX!r}; copy what `puhui "
            "peers invite` printed, all of it",
        )
    body = text.removeprefix(TOKEN_PREFIX)
    try:
        said = peer_service_pb2.PeerInvitation.FromString(base64.b64decode(body + "=" * (-len(body) % 4), b"-_", True))
        key_from_secret(said.key)
        pem_of(said.certificate), pem_of(said.key_certificate)
        require_address(said.address)
    except (binascii.Error, DecodeError, ValueError) as error:
        raise _invalid(
            "INVITATION_INVALID", "this invitation is damaged; copy what `puhui peers invite` printed, all of it"
        ) from error
    return said


def _require_address(address: str) -> None:
    try:
        require_address(address)
    except ValueError as error:
        raise _invalid("ADDRESS_INVALID", str(error)) from error


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
