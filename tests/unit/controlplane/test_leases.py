from __future__ import annotations

from controlplane.leases import Contact, judge, lease_for
from puhui.v1.fleet_service_pb2 import NODE_STATE_READY, NODE_STATE_UNREACHABLE


def contact(*, connected: bool = False, heard_at: float | None = 0.0, expires_at: float = 25.0) -> Contact:
    return Contact("127.0.0.1:1", connected, "" if connected else "connection refused", heard_at, expires_at)


def test_leases_grow_with_the_fleet_and_spread() -> None:
    small, large = lease_for(1, 0.5), lease_for(1000, 0.5)
    assert small.heartbeat_interval_s == 5.0
    assert large.heartbeat_interval_s == 20.0
    assert 1000 / large.heartbeat_interval_s <= 50
    assert small.length_s > 3 * small.heartbeat_interval_s
    assert lease_for(1, 0.0).heartbeat_interval_s < lease_for(1, 1.0).heartbeat_interval_s


def test_a_silent_node_is_unreachable_once_its_lease_has_run_out_and_others_are_heard() -> None:
    silent, loud = contact(), contact(connected=True)
    assert judge(silent, [silent, loud], 24.0)[0] == NODE_STATE_READY
    state, message = judge(silent, [silent, loud], 30.0)
    assert state == NODE_STATE_UNREACHABLE
    assert "not heard of for 30 s" in message
    assert "taken to be running still" in message


def test_when_nobody_is_in_contact_nothing_expires() -> None:
    silent = contact()
    state, message = judge(silent, [silent, contact()], 1000.0)
    assert state == NODE_STATE_READY
    assert "takes itself to be cut off" in message


def test_which_direction_is_broken_is_said() -> None:
    heard = contact(heard_at=10.0, expires_at=35.0)
    state, message = judge(heard, [heard], 12.0)
    assert state == NODE_STATE_READY
    assert "sends heartbeats, but this control plane cannot reach it at 127.0.0.1:1 (connection refused)" in message


def test_after_a_start_nodes_have_a_long_grace() -> None:
    unheard = contact(heard_at=None, expires_at=300.0)
    loud = contact(connected=True)
    assert judge(unheard, [unheard, loud], 200.0)[0] == NODE_STATE_READY
    assert judge(unheard, [unheard, loud], 301.0)[0] == NODE_STATE_UNREACHABLE
