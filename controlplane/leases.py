"""When a node counts as out of contact. Nomad's semantics: "cannot reach" is not "failed".

The time to live of a lease grows with the fleet, so that heartbeats never exceed a rate that one control plane
handles easily. After a start of the control plane every node has a long grace. And when no node at all is in
contact, the control plane takes itself to be the one that is cut off, and lets no lease run out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from puhui.v1.fleet_service_pb2 import NODE_STATE_READY, NODE_STATE_UNREACHABLE, NodeState

__all__ = ["START_GRACE_S", "Contact", "Lease", "judge", "lease_for"]

START_GRACE_S = 300.0
"""After a start of the control plane, nodes have this long to be heard of."""

_LEAST_INTERVAL_S = 5.0
_HEARTBEATS_PER_S = 50.0
_MISSED = 3
_SLACK_S = 10.0


@dataclass(frozen=True)
class Lease:
    """How often a node should be heard of."""

    heartbeat_interval_s: float
    length_s: float


def lease_for(nodes: int, jitter: float) -> Lease:
    """Returns the lease for one node of a fleet.

    Args:
        nodes: size of the fleet.
        jitter: from 0 to 1, another one for each lease, so that heartbeats spread.
    """
    interval_s = max(_LEAST_INTERVAL_S, nodes / _HEARTBEATS_PER_S) * (0.9 + 0.2 * jitter)
    return Lease(interval_s, _MISSED * interval_s + _SLACK_S)


@dataclass(frozen=True)
class Contact:
    """What is known about the contact with one node. Times are in seconds on one monotonic clock."""

    address: str
    connected: bool
    """The control plane's own connection to the daemon is up."""
    connect_error: str
    """Why it is not."""
    heard_at: float | None
    """The node was last heard of at; None: not since this control plane started."""
    expires_at: float
    """End of its lease."""


def judge(contact: Contact, everybody: Iterable[Contact], at: float) -> tuple[NodeState.ValueType, str]:
    """Returns the state of a node, and a sentence when something is wrong with the contact.

    Args:
        contact: the node.
        everybody: every node of the centre, this one too.
        at: now, on the same clock.
    """
    if contact.connected:
        return NODE_STATE_READY, ""
    fresh = contact.heard_at is not None and at < contact.expires_at
    why = f" ({contact.connect_error})" if contact.connect_error else ""
    if fresh:
        return (
            NODE_STATE_READY,
            f"it sends heartbeats, but this control plane cannot reach it at {contact.address}{why}; "
            "nothing is placed on it until it can",
        )
    if at < contact.expires_at:
        return (
            NODE_STATE_READY,
            f"not heard of yet since this control plane started, and not reached at {contact.address}{why}",
        )
    silent = f"not heard of for {at - contact.heard_at:.0f} s" if contact.heard_at is not None else "never heard of"
    if not any(other.connected or (other.heard_at is not None and at < other.expires_at) for other in everybody):
        return (
            NODE_STATE_READY,
            f"{silent}; no node is in contact, so this control plane takes itself to be cut off{why}",
        )
    return NODE_STATE_UNREACHABLE, f"{silent}; its jobs are taken to be running still{why}"
