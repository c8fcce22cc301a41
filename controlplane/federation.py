"""A centre's part in a federation, put together: its identity, its peers, what goes there, and what comes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from controlplane.attempts import Attempts
from controlplane.bundles import Bundles
from controlplane.call_carrier import CallCarrier
from controlplane.cancelling import Cancelling
from controlplane.carried_calls import CarriedJobService
from controlplane.certificates import CentreIdentity
from controlplane.durations import Durations
from controlplane.elsewhere import elsewhere
from controlplane.federation_service import FederationService
from controlplane.forwarder import Forwarder
from controlplane.forwarding import Candidate
from controlplane.guest_leases import GuestLeases
from controlplane.hosting import Hosting
from controlplane.idle_policy import CentrePolicy
from controlplane.lasting import Lasting
from controlplane.log_reader import LogReader
from controlplane.nodes import Nodes
from controlplane.offer_desk import OfferDesk
from controlplane.outlook import Outlook
from controlplane.pairing import Pairing
from controlplane.peer_limits import PeerLimits
from controlplane.peer_service import PeerService
from controlplane.peer_terms import is_open
from controlplane.peers import Peers, Summary, connect
from controlplane.reach import Reach
from controlplane.results import Results
from controlplane.scheduler import Scheduler
from controlplane.store import Store
from controlplane.watch import Feed
from puhui.rpc.lease_clock import LeaseClock
from puhui.rpc.server import RpcServer
from puhui.rpc.tls import MutualTls
from puhui.v1 import job_pb2, prediction_pb2
from puhui.v1.federation_service_pb2_grpc import add_FederationServiceServicer_to_server
from puhui.v1.peer_service_pb2_grpc import add_PeerServiceServicer_to_server

__all__ = ["Federation", "FederationSettings", "Inside"]

_STOP_GRACE_S = 1.0


class FederationSettings(Protocol):
    """How a centre takes part; the settings of a control plane say so."""

    @property
    def state(self) -> Path:
        """Folder of everything that it must not forget."""

    @property
    def centre(self) -> str:
        """Its name."""

    @property
    def federation_listen(self) -> str:
        """Where peers are served; "" serves none."""

    @property
    def federation_address(self) -> str:
        """Where peers reach that; "" is where it listens."""

    @property
    def lease_s(self) -> float:
        """Length of leases."""

    @property
    def lease_margin_s(self) -> float:
        """Time that a peer gets to end what its lease no longer covers."""

    @property
    def keep_guests_s(self) -> float:
        """Results of guests are kept for this long."""

    @property
    def patience_s(self) -> float:
        """A waiting job lets itself be overtaken for this long."""

    @property
    def idle(self) -> CentrePolicy:
        """When unused shares are taken back."""


@dataclass(frozen=True)
class Inside:
    """What of the centre peers come to use."""

    feed: Feed
    bundles: Bundles
    results: Results
    logs: LogReader
    attempts: Attempts
    cancelling: Cancelling
    lasting: Lasting
    jobs: CarriedJobService


class Federation:
    """One centre among others. Make one with `open`; then `join` puts it to work."""

    def __init__(
        self,
        settings: FederationSettings,
        store: Store,
        nodes: Nodes,
        scheduler: Scheduler,
        centre_id: str,
    ) -> None:
        self._settings = settings
        self._store = store
        self._nodes = nodes
        self._scheduler = scheduler
        self._centre_id = centre_id
        folder = settings.state / "federation"
        self._identity = CentreIdentity.open(folder, centre_id)
        self._durations = Durations(store)
        self._outlook = Outlook(nodes, scheduler, self._durations, settings.patience_s)
        self.peers = Peers(store, self._identity, settings.centre, self._summary, self._news)
        """Who they are."""
        clock = LeaseClock(folder / "lease-clock")
        self.reach = Reach(
            self.peers, clock, centre_id, settings.lease_s, settings.lease_margin_s, settings.keep_guests_s
        )
        """What drivers of attempts at peers work with."""
        self._pairing = Pairing(
            store, self._identity, settings.centre, centre_id, self.peers, lambda: self.address, connect
        )
        self._forwarder: Forwarder | None = None
        self._server: RpcServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    address = ""
    """Where peers reach this centre; "" while it serves none."""

    @classmethod
    async def open(cls, settings: FederationSettings, store: Store, nodes: Nodes, scheduler: Scheduler) -> Federation:
        """Opens what is kept of a centre's part in a federation.

        Raises:
            OSError: the state cannot be read or written.
            ValueError: what is there is damaged.
        """
        federation = cls(settings, store, nodes, scheduler, await store.centre_id())
        await federation._durations.load()
        return federation

    def _summary(self) -> Summary:
        emulated = any(gpu.emulated for gpu in self._nodes.gpus())
        return self._outlook.summaries(), self._scheduler.queued, emulated

    def _news(self) -> None:
        if self._forwarder is not None:
            self._forwarder.wake()

    def why_here(self, job_id: str) -> str:
        """Returns why a waiting job was not sent to a peer, in a clause; "" when nothing is known about that."""
        return self._forwarder.why_here(job_id) if self._forwarder is not None else ""

    def elsewhere(self, spec: job_pb2.JobSpec, sizing: prediction_pb2.Sizing) -> str:
        """Returns which peers would have room for a job now, in a clause; "" when there are none, or none may have it.

        Args:
            spec: what is asked for.
            sizing: what it needs.
        """
        needed = Candidate("", spec.resources.profile, sizing.required_mib, spec.tenant, spec.peers, None)
        return elsewhere(needed, self.peers.all())

    def offered(self) -> dict[str, list[str]]:
        """Returns the peers there are now, by name, each with the profiles that it has."""
        return {peer.record.name: [one.profile for one in peer.profiles] for peer in self.peers.all()}

    async def connect(self) -> None:
        """Opens the connections to the peers, before anything that was sent there is taken up."""
        await self.peers.start()

    async def join(self, inside: Inside, server: RpcServer) -> None:
        """Serves the peers, and sends them what waits here.

        Args:
            inside: what of the centre they come to use.
            server: where operators are served; not started yet.

        Raises:
            OSError: the address for peers is taken.
            ValueError: it is none.
        """
        settings, clock = self._settings, self.reach.clock
        leases = GuestLeases(
            self._store, inside.results, inside.cancelling, clock, inside.lasting, settings.keep_guests_s
        )
        desk = OfferDesk(
            self._centre_id,
            self._outlook,
            clock,
            longest_lease_s=settings.lease_s,
            received=leases.received,
            bundle_there=lambda bundle_id: inside.bundles.path(bundle_id).exists(),
            is_open=is_open,
            start_s=lambda: self._durations.start_s,
        )
        self.peers.on_removed = desk.forget_peer
        hosting = Hosting(
            settings.centre,
            self._centre_id,
            self._store,
            inside.feed,
            inside.bundles,
            inside.results,
            inside.logs,
            desk,
            inside.cancelling,
            self._scheduler.add,
            self._nodes.geometries,
            settings.idle,
            clock,
            inside.lasting,
            settings.lease_s,
            leases,
        )
        self._forwarder = Forwarder(
            settings.centre, self._store, self._scheduler, self.peers, inside.attempts, self._outlook, self.reach
        )
        self._scheduler.on_planned = self._forwarder.wake
        server.add(
            "puhui.v1.PeerService",
            add_PeerServiceServicer_to_server,
            PeerService(
                settings.centre,
                self._store,
                self._identity,
                self.peers,
                self._pairing,
                lambda: self.address,
                lambda job_id, why: inside.lasting.do(inside.cancelling.end(job_id, why)),
            ),
        )
        await self._pairing.load()
        if settings.federation_listen:
            carrier = CallCarrier(self._store, inside.jobs)
            service = FederationService(self.peers, PeerLimits(), self._pairing, desk, hosting, carrier)
            await self._serve(service)
        self._tasks += [
            asyncio.create_task(self._forwarder.run(), name="forwarder"),
            asyncio.create_task(leases.run(), name="leases of guests"),
            asyncio.create_task(self._outlook.run(), name="outlook"),
        ]

    async def _serve(self, service: FederationService) -> None:
        listen = self._settings.federation_listen
        tls = MutualTls(self._identity.key_pem, self._identity.certificate_pem, self._pairing.pins)
        self._server = RpcServer(listen, tls)
        self._server.add("puhui.v1.FederationService", add_FederationServiceServicer_to_server, service)
        port = await self._server.start()
        self.address = self._settings.federation_address or f"{listen.rpartition(':')[0]}:{port}"

    async def leave(self) -> None:
        """Stops serving peers, and sends them nothing more."""
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Closes the connections to the peers, once nothing is driven any longer that was sent there."""
        await self.peers.stop()
