"""What an operator does about the peers of a centre: PeerService."""

from __future__ import annotations

from collections.abc import Callable

from puhui.client.connection import CALL_S, Connection
from puhui.client.patience import Patience, Trouble
from puhui.rpc.moment import duration
from puhui.v1 import peer_service_pb2
from puhui.v1.peer_service_pb2_grpc import PeerServiceStub

__all__ = ["PeerCalls"]


class PeerCalls(Connection):
    """The calls of PeerService. `Centre` has them."""

    def __init__(
        self, address: str, patience: Patience | None = None, on_trouble: Callable[[Trouble], None] | None = None
    ) -> None:
        super().__init__(address, patience, on_trouble)
        self._peers = PeerServiceStub(self._channel)

    def peers(self) -> peer_service_pb2.ListPeersResponse:
        """Returns the peers of the centre, by name, and what it says of itself to them.

        Raises:
            Refusal: the centre cannot be reached.
        """
        request = peer_service_pb2.ListPeersRequest()
        return self._contact.call(lambda: self._peers.ListPeers(request, timeout=CALL_S))

    def invite_peer(
        self,
        *,
        name: str = "",
        address: str = "",
        valid_s: float = 0.0,
        terms: peer_service_pb2.PeerTerms | None = None,
    ) -> peer_service_pb2.InvitePeerResponse:
        """Makes an invitation, which another centre takes once with `add_peer`.

        Args:
            name: name that the new peer gets here; "" is its own.
            address: where the other centre reaches this one, when it is not where it listens.
            valid_s: the invitation holds for so long, in seconds; 0 is as long as the centre thinks right.
            terms: terms that the new peer gets here.

        Raises:
            Refusal: the centre refuses it or cannot be reached.
        """
        request = peer_service_pb2.InvitePeerRequest(name=name, address=address, terms=terms)
        if valid_s:
            request.valid.CopyFrom(duration(valid_s))
        return self._contact.call(lambda: self._peers.InvitePeer(request, timeout=CALL_S))

    def add_peer(
        self,
        token: str,
        *,
        name: str = "",
        address: str = "",
        terms: peer_service_pb2.PeerTerms | None = None,
    ) -> peer_service_pb2.Peer:
        """Takes an invitation, and returns the new peer.

        Args:
            token: the invitation.
            name: name that the new peer gets here; "" is its own.
            address: where the other centre reaches this one, when it is not where it listens.
            terms: terms that the new peer gets here.

        Raises:
            Refusal: the invitation does not hold, the other centre cannot be reached, or this one cannot.
        """
        request = peer_service_pb2.AddPeerRequest(token=token, name=name, address=address, terms=terms)
        return self._contact.call(lambda: self._peers.AddPeer(request, timeout=CALL_S)).peer

    def set_peer_terms(self, name: str, terms: peer_service_pb2.PeerTerms) -> peer_service_pb2.Peer:
        """Replaces all terms of a peer, and returns it.

        Raises:
            Refusal: there is no such peer, the terms cannot be, or the centre cannot be reached.
        """
        request = peer_service_pb2.SetPeerTermsRequest(name=name, terms=terms)
        return self._contact.call(lambda: self._peers.SetPeerTerms(request, timeout=CALL_S)).peer

    def remove_peer(self, name: str, *, force: bool = False) -> None:
        """Ends work with a peer.

        Args:
            name: the peer.
            force: even while attempts are there, which run until their leases end, or guests are here, which are
                cancelled.

        Raises:
            Refusal: there is no such peer, attempts are there or guests here, or the centre cannot be reached.
        """
        request = peer_service_pb2.RemovePeerRequest(name=name, force=force)
        self._contact.call(lambda: self._peers.RemovePeer(request, timeout=CALL_S))
