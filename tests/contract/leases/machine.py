"""What may happen to an origin, executing centres, their nodes, and the network between them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.contract.leases.world import KILL_S, LEASE_S, MARGIN_S, Executor, Message, Origin, Protocol, World

PPM = 1e-6
# The clocks sync their files, and there are thousands of them.
_IN_MEMORY = Path("/dev/shm")

_PICK = st.integers(0, 10_000)
_RATES = st.sampled_from([1 - 500 * PPM, 1.0, 1 + 500 * PPM])
_OFFSETS_S = st.sampled_from([0.0, 3600.0, -3600.0, 0.5, 86_400.0 * 400])
_SHORT_S = st.sampled_from([0.0, 0.1, 3.0, LEASE_S / 2])
_PACE_S = st.sampled_from([0.1, 3.0, LEASE_S / 10, LEASE_S / 4])
_WAIT_S = st.sampled_from([0.0, 1.0, LEASE_S / 3, LEASE_S - 1, LEASE_S, LEASE_S + MARGIN_S + 1, 600.0, 7200.0])
_STEPS_S = st.sampled_from([-7200.0, -60.0, 0.0, 60.0, 7200.0])
_SELDOM = st.sampled_from([False, False, False, True])
_PASSES: dict[str, Callable[[Message], bool]] = {
    "all": lambda one: True,
    "none": lambda one: False,
    "requests": lambda one: not one.answer,
    "answers": lambda one: bool(one.answer),
    "not b": lambda one: one.peer != "b",
    "no renewals": lambda one: one.what != "renew",
    "no binding": lambda one: one.what != "forward",
}
_WAYS = st.sampled_from(["all", "all", "all", "all", *_PASSES])
_WHO = st.sampled_from(["a", "b", "c"])
_THERE = st.sampled_from(["b", "c"])


class LeaseMachine(RuleBasedStateMachine):
    """Two jobs, their origin, and two centres that execute for it."""

    protocol: ClassVar[Protocol] = Protocol()

    def __init__(self) -> None:
        super().__init__()
        folder = tempfile.mkdtemp(prefix="puhui-leases-", dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None)
        self.folder = Path(folder)

    @initialize(
        rates=st.lists(st.tuples(_RATES, _RATES), min_size=3, max_size=3),
        offsets_s=st.lists(_OFFSETS_S, min_size=3, max_size=3),
        apart=st.booleans(),
        kill_s=st.sampled_from([0.0, KILL_S]),
        work_s=st.sampled_from([5.0, LEASE_S / 2, LEASE_S * 2, LEASE_S * 30]),
    )
    def begin(
        self, rates: list[tuple[float, float]], offsets_s: list[float], apart: bool, kill_s: float, work_s: float
    ) -> None:
        self.world = World(self.folder, self.protocol, rates, offsets_s, apart=apart, kill_s=kill_s)
        self.world.work_s = work_s
        self.world.origin.submit("j1")
        self.world.origin.submit("j2")

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self._come_to_rest()
        finally:
            shutil.rmtree(self.folder)

    def _come_to_rest(self) -> None:
        """With nothing in the way any more, everything comes to its end, and nothing that was finished is lost."""
        world = self.world
        world.has_room, world.full = False, True
        world.network.clear()
        for who in "abc":
            self._start(who)
        for executor in world.executors.values():
            executor.reaches_node = True
        for seconds in [*[1.0] * 10, LEASE_S, world.work_s, LEASE_S, *[LEASE_S] * 3, *[1.0] * 10]:
            world.flow()
            world.passes(seconds)
        left = [(forward.key, forward.stage) for forward in world.origin.forwards()]
        assert not left, f"it goes on for ever about {left}"
        for key in world.witness.finished - world.origin.collected - world.origin.node.finished:
            assert key[0] in world.origin.cancelled, f"the result of {key} is lost"

    # -- what people and centres do all the time

    @rule(times=st.integers(1, 12), seconds=_PACE_S, where=st.sampled_from("abbcc"), way=_WAYS)
    def live(self, times: int, seconds: float, where: str, way: str) -> None:
        """Life goes on for a while; meanwhile the network may let through only what it likes.

        Args:
            times: rounds.
            seconds: that pass in each.
            where: waiting jobs go there.
            way: what passes through the network. The rest may still arrive, later.
        """
        origin = self.world.origin
        for _ in range(times):
            self._place(where)
            self.world.flow(_PASSES[way])
            self.world.passes(seconds)
        if all(state == "done" for state in origin.jobs.values()):
            origin.submit(f"j{len(origin.jobs) + 1}")

    def _place(self, where: str) -> None:
        origin = self.world.origin
        for job in [job for job, state in origin.jobs.items() if state == "queued"]:
            if where == "a":
                origin.place_here(job)
            elif (there := self.world.executors[where].clock) is not None and origin.clock is not None:
                origin.place_at(job, where, there.now(), origin.clock.now())

    @rule(where=_THERE, transit_s=_SHORT_S)
    def place_slowly(self, where: str, transit_s: float) -> None:
        """The offer takes its time to come, or to be taken."""
        origin, there = self.world.origin, self.world.executors[where].clock
        queued = [job for job, state in origin.jobs.items() if state == "queued"]
        if queued and there is not None and origin.clock is not None:
            offered = there.now()
            self.world.passes(transit_s)
            origin.place_at(queued[0], where, offered, origin.clock.now())

    @rule(pick=_PICK, seldom=st.integers(0, 2))
    def cancel(self, pick: int, seldom: int) -> None:
        jobs = [job for job, state in self.world.origin.jobs.items() if state != "done"]
        if jobs and not seldom:
            self.world.origin.cancel(jobs[pick % len(jobs)])

    @rule(full=_SELDOM, crowded=_SELDOM)
    def change_room(self, full: bool, crowded: bool) -> None:
        self.world.full, self.world.has_room = full, not crowded

    @rule(who=_WHO)
    def act(self, who: str) -> None:
        if who == "a":
            self.world.origin.step()
        else:
            self.world.executors[who].look()

    @rule(seconds=_WAIT_S)
    def wait(self, seconds: float) -> None:
        self.world.passes(seconds)

    # -- the network

    @precondition(lambda self: self.world.network)
    @rule(picks=st.lists(_PICK, min_size=1, max_size=4))
    def deliver(self, picks: list[int]) -> None:
        """Any messages arrive, in any order, any time after they were sent."""
        for pick in picks:
            if self.world.network:
                self.world.deliver(self.world.network.pop(pick % len(self.world.network)))

    @precondition(lambda self: self.world.network)
    @rule(pick=_PICK, every=_SELDOM)
    def lose(self, pick: int, every: bool) -> None:
        self.world.network.pop(pick % len(self.world.network))
        if every:
            self.world.network.clear()

    @precondition(lambda self: self.world.network)
    @rule(pick=_PICK)
    def duplicate(self, pick: int) -> None:
        message = self.world.network[pick % len(self.world.network)]
        # Of a first request to bind nobody but its origin makes a second one, and that knows of it.
        if not (message.what == "forward" and message.first):
            self.world.send(message)

    # -- what breaks

    @rule(
        what=st.sampled_from(["kill", "kill", "start", "restart", "reboot", "wall clock", "node", "way"]),
        who=_WHO,
        down_s=_WAIT_S,
        step_s=_STEPS_S,
    )
    def disturb(self, what: str, who: str, down_s: float, step_s: float) -> None:
        centre = self._centre(who)
        if what in ("kill", "restart"):
            centre.kill()
        if what in ("start", "restart"):
            self._start(who)
        if what == "wall clock":
            centre.host.offset_s += step_s
        if what == "reboot":
            self._reboot(centre, down_s, step_s)
        if isinstance(centre, Executor) and what == "node" and self.world.apart:
            centre.node.reboot()
        if isinstance(centre, Executor) and what == "way":
            centre.reaches_node = not centre.reaches_node

    def _reboot(self, centre: Origin | Executor, down_s: float, step_s: float) -> None:
        """A host goes down, and comes up with its wall clock wrong."""
        centre.kill()
        if centre.node.host is centre.host:
            for key in list(centre.node.containers):
                centre.node.stop(key)
        self.world.passes(down_s)
        centre.host.reboot()
        centre.host.offset_s += step_s
        centre.start()

    def _start(self, who: str) -> None:
        if self._centre(who).clock is None:
            self._centre(who).start()

    def _centre(self, who: str) -> Origin | Executor:
        return self.world.origin if who == "a" else self.world.executors[who]
