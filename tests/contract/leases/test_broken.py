"""Each rule of the protocol is needed: without it there is a story in which the checker sees a job run twice.

Every story is told with the real protocol, too, under which all is well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane import forwards, guests
from controlplane.forwards import ForwardRecord
from controlplane.guests import GuestRecord, GuestStage
from tests.contract.leases.world import KILL_S, LEASE_S, MARGIN_S, Message, Protocol, RanTwiceError, World


def _over_by_its_own_clock(forward: ForwardRecord, at: float, margin_s: float) -> bool:
    return at > forward.lease_end + margin_s


def _over_without_margin(forward: ForwardRecord, at: float, margin_s: float) -> bool:
    return forwards.is_surely_over(forward, at, 0.0)


def _over_when_asked_last(forward: ForwardRecord, at: float, margin_s: float) -> bool:
    return at - forward.read_at > LEASE_S


def _lease_by_length(
    known: GuestRecord | None, token: int, until: float, at: float, longest_s: float, *, boot: str
) -> GuestRecord:
    return guests.renew(known, token, at + LEASE_S, at, longest_s, boot=boot)


def _renew_what_has_run_out(
    known: GuestRecord | None, token: int, until: float, at: float, longest_s: float, *, boot: str
) -> GuestRecord:
    guests.require_command(known, token)
    if known is None or not known.job_id:
        return guests.renew(known, token, until, at, longest_s, boot=boot)
    stage = GuestStage.LIVE if known.stage is GuestStage.EXPIRED else known.stage
    return replace(known, token=token, stage=stage, lease_end=max(known.lease_end, at + LEASE_S))


def _bind_whenever_it_comes(known: GuestRecord | None, wanted: GuestRecord, at: float, longest_s: float) -> GuestRecord:
    if known is None:
        return replace(wanted, lease_end=at + LEASE_S)
    return guests.bind(known, wanted, at, longest_s)


def _cancel_without_tombstone(known: GuestRecord | None, asked: GuestRecord) -> GuestRecord:
    return asked if known is None else guests.cancel(known, asked)


def _never_expires(known: GuestRecord, at: float, boot: str) -> GuestRecord:
    return known


def _holds_over_reboots(known: GuestRecord, at: float, boot: str) -> GuestRecord:
    return guests.expire(known, at, known.boot)


def _time_stands_still_while_rebooting(forward: ForwardRecord, boot: str, at: float) -> ForwardRecord:
    return forward


def _a_lease_of_its_own(node_s: float, lease_end: float, at: float) -> float:
    return node_s + LEASE_S * 2


# -- stories

UNREACHED_S = LEASE_S * 4 / 3 + 2 * MARGIN_S
"""After so long the origin has given up a peer that it does not reach."""


def _goes_to(world: World, peer: str) -> None:
    there, here = world.executors[peer].clock, world.origin.clock
    assert there is not None
    assert here is not None
    world.origin.place_at("j1", peer, there.now(), here.now())


def _goes_on_without_b(world: World, seconds: float) -> None:
    """Nobody reaches b; as soon as the job waits again it goes to c."""
    for _ in range(int(seconds * 2)):
        world.passes(0.5)
        if world.origin.jobs["j1"] == "queued":
            _goes_to(world, "c")
        world.flow(lambda one: one.peer == "c")


def _stuck(world: World, what: str) -> Message:
    found = [one for one in world.network if one.what == what and not one.answer]
    world.network.clear()
    return found[0]


def _b_dies(world: World) -> None:
    """The control plane of b dies; its node, and what runs there, does not."""
    _goes_to(world, "b")
    world.flow()
    world.passes(LEASE_S / 2)
    world.flow()
    world.executors["b"].kill()
    _goes_on_without_b(world, 3 * LEASE_S)


def _both_die(world: World) -> None:
    """The origin asks for nothing until the lease is nearly over."""
    _goes_to(world, "b")
    world.flow()
    world.flow()
    world.executors["b"].kill()
    world.origin.kill()
    world.passes(LEASE_S - 2)
    world.origin.start()
    _goes_on_without_b(world, 2 * MARGIN_S)


def _renewal_comes_late(world: World) -> None:
    _goes_to(world, "b")
    world.flow()
    world.flow()
    world.passes(LEASE_S / 3 + 1)
    world.origin.step()
    renewal = _stuck(world, "renew")
    world.origin.kill()
    world.passes(LEASE_S / 2)
    world.deliver(renewal)
    world.executors["b"].look()
    world.executors["b"].kill()
    world.origin.start()
    _goes_on_without_b(world, 2 * LEASE_S)


def _renewal_comes_after_the_end(world: World) -> None:
    world.has_room = False
    _goes_to(world, "b")
    world.flow()
    world.flow()
    world.passes(LEASE_S / 3 + 1)
    world.origin.step()
    renewal = _stuck(world, "renew")
    world.executors["b"].reaches_node = False
    world.passes(LEASE_S - 30)
    world.flow(lambda one: one.what != "renew")
    assert world.origin.jobs["j1"] == "queued"
    _goes_to(world, "c")
    world.has_room = True
    world.flow(lambda one: one.peer == "c")
    world.executors["b"].reaches_node = True
    world.deliver(replace(renewal, until=1e9))
    world.executors["b"].look()


def _binding_comes_after_the_lease(world: World) -> None:
    _goes_to(world, "b")
    world.origin.step()
    binding = _stuck(world, "forward")
    _goes_on_without_b(world, UNREACHED_S)
    world.deliver(binding)
    world.executors["b"].look()


def _binding_comes_after_the_end(world: World) -> None:
    _goes_to(world, "b")
    world.origin.step()
    binding = _stuck(world, "forward")
    _goes_on_without_b(world, 20)
    world.flow(lambda one: one.what == "cancel")
    _goes_on_without_b(world, 4)
    world.deliver(binding)
    world.executors["b"].look()


def _b_has_room_after_the_lease(world: World) -> None:
    world.has_room = False
    _goes_to(world, "b")
    world.flow()
    _goes_on_without_b(world, UNREACHED_S)
    world.has_room = True
    world.flow(lambda one: False)


def _b_reboots_with_its_wall_clock_behind(world: World) -> None:
    world.has_room = False
    _goes_to(world, "b")
    world.flow()
    there = world.executors["b"]
    there.kill()
    _goes_on_without_b(world, UNREACHED_S)
    world.has_room = True
    world.flow(lambda one: one.peer == "c")
    there.host.reboot()
    there.host.offset_s -= 7200.0
    there.start()
    there.look()


def _a_reboots_with_its_wall_clock_ahead(world: World) -> None:
    _goes_to(world, "b")
    world.flow()
    world.flow()
    world.origin.kill()
    world.origin.host.reboot()
    world.origin.host.offset_s += 7200.0
    world.origin.start()
    _goes_on_without_b(world, 10)


STORIES: dict[str, tuple[Callable[[World], None], Protocol]] = {
    "no margin for the node that kills": (_both_die, Protocol(is_surely_over=_over_without_margin)),
    "the origin takes its own clock for the peer's": (_both_die, Protocol(is_surely_over=_over_by_its_own_clock)),
    "the origin counts from the first answer": (_both_die, Protocol(is_surely_over=_over_when_asked_last)),
    "the node gives leases of its own": (_b_dies, Protocol(node_lease_end=_a_lease_of_its_own)),
    "leases are given by length": (_renewal_comes_late, Protocol(renew=_lease_by_length)),
    "renewals revive what has run out": (_renewal_comes_after_the_end, Protocol(renew=_renew_what_has_run_out)),
    "a request to bind is good for ever": (_binding_comes_after_the_lease, Protocol(bind=_bind_whenever_it_comes)),
    "an end that comes first leaves no trace": (
        _binding_comes_after_the_end,
        Protocol(cancel=_cancel_without_tombstone),
    ),
    "nobody ends what has no lease": (
        _b_has_room_after_the_lease,
        Protocol(expire=_never_expires, node_lease_end=_a_lease_of_its_own),
    ),
    "leases hold over a reboot of the executing centre": (
        _b_reboots_with_its_wall_clock_behind,
        Protocol(expire=_holds_over_reboots),
    ),
    "the origin takes its wall clock's word for how long its reboot took": (
        _a_reboots_with_its_wall_clock_ahead,
        Protocol(rebooted=_time_stands_still_while_rebooting),
    ),
}


def _world(folder: Path, protocol: Protocol) -> World:
    # Everything at b is slow, and its wall clock is 100 s behind that of the origin; that of c is 500 s ahead.
    rates = [(1.0005, 1.0), (0.9995, 0.9995), (1.0, 1.0)]
    world = World(folder, protocol, rates, [0.0, 900.0, 1000.0], apart=True, kill_s=KILL_S)
    world.work_s = 100 * LEASE_S
    world.origin.submit("j1")
    return world


@pytest.mark.parametrize("name", STORIES)
def test_without_this_rule_a_job_runs_twice(name: str, tmp_path: Path) -> None:
    story, protocol = STORIES[name]
    with pytest.raises(RanTwiceError, match="begins at"):
        story(_world(tmp_path, protocol))


@pytest.mark.parametrize("name", STORIES)
def test_with_it_all_is_well(name: str, tmp_path: Path) -> None:
    story, _ = STORIES[name]
    world = _world(tmp_path, Protocol())
    story(world)
    assert world.witness.begun, "nothing has happened"


def _asks_for_more_and_more(forward: ForwardRecord, at: float, lease_s: float) -> float:
    return max(forward.lease_end, forward.peer_time + (at - forward.read_at) + lease_s)


def test_a_job_comes_back_from_a_peer_that_is_not_reached(tmp_path: Path) -> None:
    world = _world(tmp_path, Protocol())
    _b_dies(world)
    assert world.witness.running["j1"][0] == ("j1", 2)


def test_it_would_not_if_each_renewal_asked_for_more(tmp_path: Path) -> None:
    world = _world(tmp_path, Protocol(lease_to_ask=_asks_for_more_and_more))
    _b_dies(world)
    assert not world.witness.running
