"""PeerService: what operators say about peers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from controlplane.certificates import CentreIdentity
from controlplane.forwards import ForwardStage
from controlplane.pairing import Pairing, require_terms
from controlplane.peers import Peer, Peers
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import seconds, timestamp
from puhui.v1 import peer_service_pb2 as wire
from puhui.v1.peer_service_pb2_grpc import PeerServiceServicer

__all__ = ["PeerService"]

_Context = grpc.aio.ServicerContext[Any, Any]
_VALID_S = 3600.0
_UNDER_WAY = frozenset({ForwardStage.SENDING, ForwardStage.BOUND, ForwardStage.ENDING, ForwardStage.ENDED})


class PeerService(PeerServiceServicer):
    """Serves PeerService for one centre.

    Args:
        centre: its name.
        store: where forwards and guests are.
        identity: who it is to its peers.
        peers: the peers there are.
        pairing: makes and ends them.
        address: returns where peers reach this centre; "" when it serves none.
        end_guest: has a guest's job ended.
    """

    def __init__(
        self,
        centre: str,
        store: Store,
        identity: CentreIdentity,
        peers: Peers,
        pairing: Pairing,
        address: Callable[[], str],
        end_guest: Callable[[str, str], Any],
    ) -> None:
        self._centre = centre
        self._store = store
        self._identity = identity
        self._peers = peers
        self._pairing = pairing
        self._address = address
        self._end_guest = end_guest

    async def InvitePeer(self, request: wire.InvitePeerRequest, context: _Context) -> wire.InvitePeerResponse:  # noqa: N802 - named by the contract
        """Makes an invitation."""
        valid_s = seconds(request.valid) if request.HasField("valid") else _VALID_S
        token, expires = await self._pairing.invite(valid_s, request.address, request.name, request.terms)
        return wire.InvitePeerResponse(token=token, expire_time=timestamp(expires))

    async def AddPeer(self, request: wire.AddPeerRequest, context: _Context) -> wire.AddPeerResponse:  # noqa: N802
        """Takes an invitation."""
        peer = await self._pairing.add(request.token, request.name, request.address, request.terms)
        return wire.AddPeerResponse(peer=await self._described(peer))

    async def ListPeers(self, request: wire.ListPeersRequest, context: _Context) -> wire.ListPeersResponse:  # noqa: N802
        """Returns the peers."""
        return wire.ListPeersResponse(
            peers=[await self._described(peer) for peer in self._peers.all()],
            centre=self._centre,
            address=self._address(),
            fingerprint=self._identity.fingerprint,
        )

    async def SetPeerTerms(self, request: wire.SetPeerTermsRequest, context: _Context) -> wire.SetPeerTermsResponse:  # noqa: N802
        """Changes terms."""
        peer = self._require(request.name)
        require_terms(request.terms)
        await self._peers.agree(peer, request.terms)
        return wire.SetPeerTermsResponse(peer=await self._described(peer))

    async def RemovePeer(self, request: wire.RemovePeerRequest, context: _Context) -> wire.RemovePeerResponse:  # noqa: N802
        """Ends work with a peer."""
        peer = self._require(request.name)
        sent, guests = await self._sent(peer), await self._guests(peer)
        if (sent or guests) and not request.force:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "PEER_BUSY",
                f"{sent} of our jobs are at {peer.record.name} and {len(guests)} of its jobs are here; send it nothing "
                f"more and wait (`puhui peers set {peer.record.name} --no-send --no-receive`), or --force: ours then "
                "run on until their leases end and wait here again, results that have not come home are lost, and its "
                "jobs here are cancelled",
                sent=str(sent),
                received=str(len(guests)),
            )
        with contextlib.suppress(Refusal):  # one that cannot be told learns of it at its next call
            await peer.client.unpair()
        await self._peers.remove(peer.record.name)
        # Nothing of it can come any more, so these are all.
        for job_id in await self._left_behind(peer.record.name):
            await self._end_guest(job_id, f"work with peer {peer.record.name} was ended")
        return wire.RemovePeerResponse()

    async def _described(self, peer: Peer) -> wire.Peer:
        return peer.described(await self._sent(peer), len(await self._guests(peer)))

    async def _sent(self, peer: Peer) -> int:
        forwards = await self._store.forwards()
        return sum(one.peer == peer.record.name and one.stage in _UNDER_WAY for one in forwards)

    async def _guests(self, peer: Peer) -> list[str]:
        return [one.job_id for one in await self._store.guests() if one.peer == peer.record.name]

    async def _left_behind(self, name: str) -> list[str]:
        """Returns the guests of a peer that was removed. They may be kept under NAME/SOMETHING, which is nobody."""
        return [one.job_id for one in await self._store.guests() if one.peer.partition("/")[0] == name]

    def _require(self, name: str) -> Peer:
        peer = self._peers.get(name)
        if peer is None:
            names = ", ".join(one.record.name for one in self._peers.all()) or "none"
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "PEER_NOT_FOUND",
                f"no peer {name[:80]!r}; there are: {names}",
                name=name[:80],
            )
        return peer
