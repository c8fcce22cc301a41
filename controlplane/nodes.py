"""The nodes of a centre: who has joined, who is in contact, what they have."""

from __future__ import annotations

import hmac
import random
import time
from collections.abc import Callable, Collection, MutableSequence
from dataclasses import dataclass

import grpc
import structlog

from controlplane.fleet import Geometry, GpuView, gpu_views
from controlplane.leases import START_GRACE_S, Contact, Lease, judge, lease_for
from controlplane.metering import gpu_slices
from controlplane.node_client import NodeClient
from controlplane.node_link import NodeLink
from controlplane.orphans import remove_orphans
from controlplane.records import NodeRecord
from controlplane.reservations import Reservations
from controlplane.store import Store
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import now, timestamp
from puhui.v1 import card_pb2, fleet_service_pb2, node_pb2

__all__ = ["Nodes"]

_log = structlog.get_logger(__name__)


@dataclass
class _Member:
    """One node and its connection."""

    node: fleet_service_pb2.Node
    link: NodeLink
    lease: Lease
    heard_at: float | None
    expires_at: float
    connect_error: str = ""
    version: int = 0
    """Changes whenever the inventory does."""
    views: tuple[object, list[GpuView]] = (None, [])
    """Its GPUs, with what they were made from."""

    def contact(self) -> Contact:
        return Contact(self.link.address, self.link.in_contact, self.connect_error, self.heard_at, self.expires_at)

    def take(self, inventory: node_pb2.NodeInventory) -> None:
        """Takes over what the node says that it has."""
        self.node.inventory.CopyFrom(inventory)
        self.version += 1

    def without(self, slice_uuid: str) -> MutableSequence[card_pb2.Slice]:
        """Takes a slice out of the inventory, and returns those that are left."""
        slices = self.node.inventory.slices
        for at, piece in enumerate(slices):
            if piece.uuid == slice_uuid:
                del slices[at]
                break
        self.version += 1
        return slices

    def gpus(self, centre: str, reservations: Reservations) -> list[GpuView]:
        """Returns its GPUs with what is held of them; made anew only when something has changed."""
        made_from = (self.version, self.link.in_contact, reservations.version(self.node.id))
        if self.views[0] != made_from:
            held = reservations.held(self.node.id)
            node = [(self.node, self.link.in_contact)]
            self.views = (
                made_from,
                gpu_views(node, held, centre, reservations.released, reservations.idle, reservations.leaving),
            )
        return self.views[1]


class Nodes:
    """Every node of the centre. It is the `LinkOwner` of their links."""

    def __init__(
        self,
        store: Store,
        centre: str,
        join_token: str,
        connect: Callable[[str], NodeClient],
        reservations: Reservations,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._centre = centre
        self._join_token = join_token
        self._connect = connect
        self._reservations = reservations
        self._changed = changed
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self.dry_runs: Callable[[], Collection[str]] = tuple
        """Returns the ids of the dry runs whose containers may be there."""

    async def start(self) -> None:
        """Takes over the nodes that the store knows, and begins to connect to them."""
        for record in await self._store.nodes():
            member = self._member(record.node, record.event_cursor)
            member.expires_at = self._clock() + START_GRACE_S
            self._members[record.node.id] = member
            member.link.start()

    async def stop(self) -> None:
        """Ends every connection."""
        for member in self._members.values():
            await self._save(member)
            await member.link.stop()

    def _member(self, node: fleet_service_pb2.Node, cursor: int) -> _Member:
        link = NodeLink(node.id, self._centre, node.address, self._connect, self, cursor)
        return _Member(node, link, self._new_lease(), None, self._clock())

    def _new_lease(self) -> Lease:
        return lease_for(len(self._members) + 1, random.random())  # noqa: S311 - only spreads heartbeats

    # -- what nodes say

    async def register(self, join_token: str, address: str, inventory: node_pb2.NodeInventory) -> tuple[str, Lease]:
        """A daemon joins, or joins again. Returns the node's id and its lease.

        Raises:
            Refusal: UNAUTHENTICATED with JOIN_TOKEN_INVALID; INVALID_ARGUMENT with NODE_INVALID;
                ALREADY_EXISTS with NODE_NAME_TAKEN.
        """
        if not hmac.compare_digest(join_token.strip().encode(), self._join_token.encode()):
            raise Refusal(
                grpc.StatusCode.UNAUTHENTICATED,
                "JOIN_TOKEN_INVALID",
                "this is not the join token of this centre; give the node the file that `controlplane serve` "
                "was given with --join-token-file",
            )
        if not inventory.name or not address:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "NODE_INVALID",
                "a node registers with its address and a name in its inventory",
            )
        member = next((one for one in self._members.values() if one.node.inventory.name == inventory.name), None)
        if member is None:
            node = fleet_service_pb2.Node(
                id=new_id("n"), address=address, inventory=inventory, create_time=timestamp(now())
            )
            member = self._member(node, 0)
            self._members[node.id] = member
            self._heard(member)
            await self._save(member)
            member.link.start()
            _log.info("node joined", node=inventory.name, address=address, gpus=len(inventory.gpus))
        else:
            self._require_same_daemon(member, inventory)
            member.node.address = address
            member.take(inventory)
            member.lease = self._new_lease()
            self._heard(member)
            await self._save(member)
            await member.link.move(address)
            _log.info("node joined again", node=inventory.name, address=address)
        self._changed()
        return member.node.id, member.lease

    async def heartbeat(
        self, node_id: str, revision: int, inventory: node_pb2.NodeInventory | None
    ) -> tuple[Lease, bool]:
        """A daemon is alive. Returns its lease, and whether it should send its inventory.

        Raises:
            Refusal: NOT_FOUND with NODE_NOT_FOUND; the daemon registers then.
        """
        member = self._members.get(node_id)
        if member is None:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "NODE_NOT_FOUND",
                f"no node {node_id} has joined this centre; register again",
                node_id=node_id,
            )
        self._heard(member)
        if not member.link.in_contact:
            member.link.nudge()
        if inventory is not None:
            # Not worth a write: whoever takes up after this control plane asks the node itself.
            member.take(inventory)
            self._changed()
        return member.lease, member.node.inventory.revision != revision

    def _require_same_daemon(self, member: _Member, inventory: node_pb2.NodeInventory) -> None:
        """Refuses another daemon under the name of a node that is alive, or that jobs are placed on.

        Raises:
            Refusal: ALREADY_EXISTS with NODE_NAME_TAKEN.
        """
        known = member.node.inventory.daemon_id
        if not known or not inventory.daemon_id or known == inventory.daemon_id:
            return
        held = len(self._reservations.held(member.node.id))
        alive = member.link.in_contact or self._clock() < member.expires_at
        if not alive and not held:
            return
        has = f"jobs hold {held} shares of it" if held else "it was heard of just now"
        raise Refusal(
            grpc.StatusCode.ALREADY_EXISTS,
            "NODE_NAME_TAKEN",
            f"another daemon is node {inventory.name} of this centre, and {has}; start this one under another name "
            "(`nodedaemon serve --name`), or with the state directory of the one that it replaces",
            node_id=member.node.id,
            name=inventory.name[:200],
        )

    def _heard(self, member: _Member) -> None:
        member.heard_at = self._clock()
        member.expires_at = member.heard_at + member.lease.length_s
        member.node.last_heartbeat_time.CopyFrom(timestamp(now()))

    async def _save(self, member: _Member) -> None:
        stored = fleet_service_pb2.Node()
        stored.CopyFrom(member.node)
        await self._store.put_node(NodeRecord(stored, member.link.event_cursor))

    # -- what links learn

    async def synced(
        self, link: NodeLink, inventory: node_pb2.NodeInventory, containers: list[node_pb2.Container]
    ) -> None:
        """A link is in contact: takes over what the node has, and removes what belongs to attempts that are over.

        Raises:
            Refusal: ALREADY_EXISTS with NODE_NAME_TAKEN.
        """
        member = self._members[link.node_id]
        # It may be another daemon that has the address now.
        self._require_same_daemon(member, inventory)
        member.connect_error = ""
        member.take(inventory)
        self._heard(member)
        await remove_orphans(
            link.client,
            self._centre,
            self._store,
            self._reservations,
            list(inventory.slices),
            containers,
            self.dry_runs(),
        )
        await self._save(member)
        # The link counts as in contact right after this; whoever is woken runs later than that.
        self._changed()

    def happened(self, link: NodeLink, event: node_pb2.NodeEvent) -> None:
        """Keeps the inventory up to date with what happens."""
        member = self._members[link.node_id]
        if not event.HasField("slice"):
            return
        if event.kind == node_pb2.NODE_EVENT_KIND_SLICE_DESTROYED:
            self.slice_gone(link.node_id, event.slice.uuid)
            return
        if event.kind not in {node_pb2.NODE_EVENT_KIND_SLICE_CREATED, node_pb2.NODE_EVENT_KIND_SLICE_ERROR}:
            return
        member.without(event.slice.uuid).append(event.slice)

    def lost(self, link: NodeLink, why: str) -> None:
        """A link is out of contact."""
        member = self._members[link.node_id]
        if not member.connect_error:
            _log.warning("node out of contact", node=member.node.inventory.name, why=why)
        member.connect_error = why
        self._changed()

    def slice_gone(self, node_id: str, slice_uuid: str) -> None:
        """Notes that a slice no longer exists, before the node's next inventory says so."""
        member = self._members.get(node_id)
        if member is not None:
            member.without(slice_uuid)

    async def refresh(self, node_id: str) -> None:
        """Asks a node for its inventory now: what was thought about it turned out to be wrong.

        Raises:
            Refusal: it cannot be reached.
        """
        member = self._members[node_id]
        member.take(await member.link.client.inventory())

    # -- what others ask

    def link(self, node_id: str) -> NodeLink | None:
        """Returns the connection to a node; None for a node that is not known."""
        member = self._members.get(node_id)
        return member.link if member is not None else None

    def sandboxes(self) -> list[NodeLink]:
        """Returns the nodes in contact that run rootless containers."""
        podman = node_pb2.RUNTIME_KIND_PODMAN
        return [
            member.link
            for member in self._members.values()
            if member.link.in_contact and member.node.inventory.runtime.kind == podman
        ]

    def name(self, node_id: str) -> str:
        """Returns a node's name."""
        member = self._members.get(node_id)
        return member.node.inventory.name if member is not None else node_id

    def all(self) -> list[fleet_service_pb2.Node]:
        """Returns every node with its state, by name."""
        contacts = [member.contact() for member in self._members.values()]
        at = self._clock()
        shown = []
        for member in self._members.values():
            node = fleet_service_pb2.Node()
            node.CopyFrom(member.node)
            node.state, node.message = judge(member.contact(), contacts, at)
            shown.append(node)
        return sorted(shown, key=lambda node: node.inventory.name)

    def compute_slices(self, node_id: str, gpu_uuid: str) -> int:
        """Returns the compute slices of a whole GPU; 0 for one that is not known."""
        member = self._members.get(node_id)
        gpus = member.node.inventory.gpus if member is not None else ()
        return next((gpu_slices(gpu) for gpu in gpus if gpu.uuid == gpu_uuid), 0)

    def gpus(self) -> list[GpuView]:
        """Returns every GPU that can be cut, with what is held of it."""
        members = sorted(self._members.values(), key=lambda member: member.node.inventory.name)
        return [gpu for member in members for gpu in member.gpus(self._centre, self._reservations)]

    def geometries(self) -> list[Geometry]:
        """Returns what the GPUs of this centre can be cut into."""
        return list(dict.fromkeys(gpu.geometry for gpu in self.gpus()))

    def __len__(self) -> int:
        return len(self._members)
