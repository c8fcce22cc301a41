"""An invitation as one word that people can copy. Pure."""

from __future__ import annotations

import base64
import binascii
import re

import grpc
from google.protobuf.message import DecodeError

from controlplane.certificates import (
    InvalidCertificateError,
    certificate_of_key,
    key_from_secret,
    public_key_of,
    require_pinnable,
    require_self_signed,
)
from puhui.rpc.errors import Refusal
from puhui.v1.peer_service_pb2 import PeerInvitation

__all__ = ["TOKEN_PREFIX", "read_token", "write_token"]

_FAMILY = "puhui-peer-"
TOKEN_PREFIX = f"{_FAMILY}1."
_MOST_CHARACTERS = 4096
_ID = re.compile(r"[0-9a-f]{32}")
_ALL_OF_IT = "copy what `puhui peers invite` printed, all of it"


def write_token(said: PeerInvitation) -> str:
    """Returns an invitation as a token."""
    return TOKEN_PREFIX + base64.urlsafe_b64encode(said.SerializeToString()).decode().rstrip("=")


def read_token(token: str) -> PeerInvitation:
    """Returns the invitation that a token is. Blanks and line ends that copying has put into it do not matter.

    Raises:
        Refusal: INVALID_ARGUMENT with INVITATION_INVALID, and what to do.
    """
    text = "".join(token.split())
    if not text.startswith(TOKEN_PREFIX):
        if text.startswith(_FAMILY):
            raise _invalid(
                "this invitation was made by another version of Puhui, which this one does not understand; update the "
                "older of the two centres, or let the other one invite"
            )
        raise _invalid(f"this is no invitation, which begins with {TOKEN_PREFIX!r}; {_ALL_OF_IT}")
    if len(text) > _MOST_CHARACTERS:
        raise _invalid(f"this is longer than any invitation; {_ALL_OF_IT}, and nothing else")
    body = text.removeprefix(TOKEN_PREFIX)
    try:
        said = PeerInvitation.FromString(base64.b64decode(body + "=" * (-len(body) % 4), b"-_", validate=True))
        _require_whole(said)
    except (binascii.Error, DecodeError, ValueError) as error:
        raise _invalid(f"this invitation is damaged, or cut off; {_ALL_OF_IT}") from error
    return said


def _require_whole(said: PeerInvitation) -> None:
    """Refuses what was not written by `write_token`, as far as that can be seen.

    Raises:
        ValueError: it was not.
    """
    if not _ID.fullmatch(said.centre_id) or not said.address or not said.HasField("expire_time"):
        raise ValueError("parts of it are missing")
    try:
        require_pinnable(said.certificate, said.centre_id)
        require_self_signed(said.key_certificate)
        of_key = public_key_of(certificate_of_key(key_from_secret(said.key), "of.the.key"))
    except InvalidCertificateError as error:
        raise ValueError(str(error)) from error
    if public_key_of(said.key_certificate) != of_key:
        raise ValueError("its key and the certificate of that do not belong together")


def _invalid(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVITATION_INVALID", message)
