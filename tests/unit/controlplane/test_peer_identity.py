"""Who calls is told by the whole certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest

from controlplane.certificates import CentreIdentity, key_from_secret, new_secret
from controlplane.peer import Peer
from controlplane.peer_identity import caller
from controlplane.peers import Peers
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal
from puhui.v1.peer_service_pb2 import PeerTerms

KEY = key_from_secret(new_secret())
PINNED = CentreIdentity.of_key(KEY, "a" * 32)
SAME_KEY_AND_NAME = CentreIdentity.of_key(KEY, "a" * 32)


@dataclass
class Call:
    """The context of a call."""

    shown: bytes = b""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self.shown]} if self.shown else {"transport_security_type": [b"none"]}


class One:
    """Peers of whom there is one."""

    def __init__(self) -> None:
        self.peer = Peer.of(PeerRecord("a", "a" * 32, "", PINNED.certificate, PeerTerms(), 0.0), None)

    def by_certificate(self, certificate: bytes) -> Peer | None:
        return self.peer if certificate == self.peer.record.certificate else None


def test_who_shows_the_pinned_certificate_is_that_peer() -> None:
    peers: Any = One()
    for _ in range(2):
        assert caller(Call(PINNED.certificate_pem), cast("Peers", peers)) is peers.peer


def test_who_shows_another_or_none_is_nobody() -> None:
    peers: Any = One()
    for shown, reason in ((SAME_KEY_AND_NAME.certificate_pem, "PEER_UNKNOWN"), (b"", "CERTIFICATE_MISSING")):
        with pytest.raises(Refusal) as caught:
            caller(Call(shown), cast("Peers", peers))
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
        assert "puhui peers" in caught.value.message
