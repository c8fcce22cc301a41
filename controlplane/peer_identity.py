"""Which peer calls: told by the certificate of the connection, never by the message."""

from __future__ import annotations

import functools
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from controlplane.peers import Peer, Peers
from puhui.rpc.errors import Refusal

__all__ = ["caller", "certificate_of", "unknown_peer"]


def certificate_of(context: Any) -> bytes:
    """Returns the certificate of whoever calls: DER.

    Raises:
        Refusal: UNAUTHENTICATED with CERTIFICATE_MISSING.
    """
    for pem in context.auth_context().get("x509_pem_cert", ()):
        return _der(pem)
    raise Refusal(
        grpc.StatusCode.UNAUTHENTICATED,
        "CERTIFICATE_MISSING",
        "peers are served over mutual TLS only; become one with `puhui peers add`",
    )


def caller(context: Any, peers: Peers) -> Peer:
    """Returns the peer that calls.

    Raises:
        Refusal: UNAUTHENTICATED with CERTIFICATE_MISSING or PEER_UNKNOWN.
    """
    peer = peers.by_certificate(certificate_of(context))
    if peer is None:
        raise unknown_peer()
    return peer


def unknown_peer() -> Refusal:
    """Returns the answer to whoever is no peer."""
    return Refusal(
        grpc.StatusCode.UNAUTHENTICATED,
        "PEER_UNKNOWN",
        "this centre is no peer of yours (any longer); its operator can invite you with `puhui peers invite`",
    )


@functools.lru_cache(maxsize=1024)
def _der(pem: bytes) -> bytes:
    # What the handshake let pass can be read.
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
