"""Whatever happens in whatever order, a node never leaks a slice, never books a place twice, touches nothing foreign.

A hypothesis state machine over create, destroy, attach, detach, kill -9 after any step, reboot, faults of the driver,
outsiders that hold slices, and people who make and destroy slices by hand. The driver is emulated.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import pynvml
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nodedaemon.bundles import Bundles
from nodedaemon.driver import Driver
from nodedaemon.driver_facts import GpuInstance, ProfileFacts, Span
from nodedaemon.emulation import EmulatedDriver, Fault, UuidPolicy, When, installed, parse_cards
from nodedaemon.emulation.gpu_instances import free_placements
from nodedaemon.owner import Owner
from nodedaemon.records import SliceRecord, SliceStage
from puhui.rpc.bundle import pack_files
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import digest_of
from puhui.v1.card_pb2 import SliceState
from puhui.v1.node_service_pb2 import NodeServicePutBundleRequest
from puhui.v1.stream_pb2 import BundleHeader
from tests.contract.slices.world import Life, World

P = ParamSpec("P")
T = TypeVar("T")

CARDS = "A100-40GB:1,H100-80GB-SXM5:1"
EXAMPLES = int(os.environ.get("PUHUI_MACHINE_EXAMPLES", "80"))
STEPS = 50
LEAST_STEPS = 2000

_steps_taken = 0

_BREAKABLE = st.sampled_from(
    [
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        "nvmlGpuInstanceCreateComputeInstance",
        "nvmlGpuInstanceGetInfo",
        "nvmlComputeInstanceGetInfo",
        "nvmlDeviceGetGpuInstanceById",
        "nvmlDeviceGetGpuInstances",
        "nvmlDeviceGetMigDeviceHandleByIndex",
        "nvmlDeviceGetUUID",
        "nvmlComputeInstanceDestroy",
        "nvmlGpuInstanceDestroy",
    ]
)
_LISTS = ["nvmlDeviceGetGpuInstances", "nvmlGpuInstanceGetComputeInstances", "nvmlDeviceGetMigDeviceHandleByIndex"]
_CODES = st.sampled_from([pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_TIMEOUT])
# Most deeds live; the others die after so many lines, wherever that is.
_LINES = st.sampled_from([None] * 3 + [1]).flatmap(lambda dies: st.none() if dies is None else st.integers(0, 12))
_SELDOM = st.integers(0, 3)
_PICK = st.integers(0, 10_000)


def _only_if(condition: Callable[[SliceMachine], object]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Has a rule do nothing where it cannot do anything; that is no step then.

    Not hypothesis's precondition: what it draws would depend on where a death at some line left the node, and that
    is not the same each time: it takes that for a faulty test.
    """

    def wrap(act: Callable[P, None]) -> Callable[P, None]:
        @wraps(act)
        def acts(*arguments: P.args, **named: P.kwargs) -> None:
            global _steps_taken
            machine = cast("SliceMachine", arguments[0])
            if condition(machine):
                act(*arguments, **named)
            else:
                _steps_taken -= 1

        return acts

    return wrap


class SliceMachine(RuleBasedStateMachine):
    """One node and everybody who touches it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        emulated = EmulatedDriver(folder / "emulation", parse_cards(CARDS))
        self.stack.enter_context(installed(emulated))
        operator = Driver()
        self.stack.callback(operator.close)
        runner = self.stack.enter_context(asyncio.Runner())
        bundle_id = runner.run(_put_code(folder))
        self.world = World(emulated, folder, operator, runner, bundle_id)
        self.stack.callback(self.world.end)
        self.world.start()
        self.attempts = 0
        self.gpus = [gpu.uuid for gpu in operator.gpus()]

    def teardown(self) -> None:
        self.world.faults.clear()
        for uuid in list(self.world.held):
            self.world.let_go(uuid)
        # With nothing in the way any more, a look leaves nothing half done.
        self.world.look()
        assert {record.stage for record in self.world.records()} <= {SliceStage.ACTIVE}
        self.stack.close()

    # The daemon's own work

    @rule(gpu=_PICK, profile=_PICK, place=_PICK)
    def create_and_run(self, gpu: int, profile: int, place: int) -> None:
        """Gives the other rules something to meet."""
        self.world.faults.clear()
        uuid, shape, span = self._somewhere(gpu, profile, place)
        if not self._is_free(uuid, shape, span):
            return
        owner = self._new_owner()

        async def act(life: Life) -> None:
            made = await life.slices.create(owner, 1, uuid, shape.name, span)
            await life.containers.create(owner, 1, self.world.request([made.uuid]))

        self.world.do(act)
        assert self.world.seen(owner)

    @rule(gpu=_PICK, profile=_PICK, place=_PICK, pick=_PICK)
    def create_for_a_running_one(self, gpu: int, profile: int, place: int, pick: int) -> None:
        """Gives an attempt whose container runs another slice."""
        alive = [one.owner for one in self.world.life.journal.containers() if one.stage.is_alive]
        uuid, shape, span = self._somewhere(gpu, profile, place)
        if not alive or not self._is_free(uuid, shape, span):
            return
        self.world.faults.clear()

        async def act(life: Life) -> None:
            await life.slices.create(alive[pick % len(alive)], 1, uuid, shape.name, span)

        self.world.do(act)

    @rule(gpu=_PICK, profile=_PICK, place=_PICK, lines=_LINES)
    def create(self, gpu: int, profile: int, place: int, lines: int | None) -> None:
        uuid, shape, span = self._somewhere(gpu, profile, place)
        owner = self._new_owner()
        free = self._is_free(uuid, shape, span)
        faulty = bool(self.world.faults)

        async def act(life: Life) -> str:
            return (await life.slices.create(owner, 1, uuid, shape.name, span)).uuid

        made, refusal = self._do(act, lines)
        if refusal is not None:
            assert faulty or not free, f"a free place was refused: {refusal!r}"
        elif made is not None:
            assert free, "a taken place was given"
            assert made in [compute.uuid for one in self._instances() for compute in one.compute_instances]

    @rule(pick=_PICK, lines=_LINES)
    @_only_if(lambda self: self._mine())
    def destroy(self, pick: int, lines: int | None) -> None:
        record = self._pick(pick)
        faulty = bool(self.world.faults)

        async def act(life: Life) -> bool:
            await life.slices.destroy(record.owner, record.uuid, life.containers.holder_of)
            return True

        held, attached = record.uuid in self.world.held, record.uuid in self._attached()
        done, refusal = self._do(act, lines)
        if refusal is None:
            assert done is None or record.uuid not in [one.uuid for one in self.world.records()]
        elif refusal.reason == "SLICE_IN_USE" and not attached:
            assert held, refusal.message
            assert faulty or str(os.getpid()) in refusal.message, "the holder was not named"
        else:
            assert faulty or attached, repr(refusal)

    @rule(pick=_PICK, lines=_LINES)
    @_only_if(lambda self: self._mine())
    def run_container(self, pick: int, lines: int | None) -> None:
        record = self._pick(pick)

        async def act(life: Life) -> None:
            await life.containers.create(record.owner, 1, self.world.request([record.uuid]))

        self._may_refuse(act, lines, "SLICE_NOT_FOUND", "CONTAINER_EXISTS", "CAP_NODE_MISSING")

    @rule(pick=_PICK, lines=_LINES)
    @_only_if(lambda self: self._mine() and self.world.running)
    def attach(self, pick: int, lines: int | None) -> None:
        record = self._pick(pick)

        async def act(life: Life) -> None:
            await life.attachments.attach(record.owner, record.uuid)

        self._may_refuse(
            act, lines, "CONTAINER_NOT_FOUND", "CONTAINER_NOT_RUNNING", "SLICE_NOT_FOUND", "CAP_NODE_MISSING"
        )

    @rule(pick=_PICK, lines=_LINES)
    @_only_if(lambda self: self._mine() and self.world.running)
    def detach(self, pick: int, lines: int | None) -> None:
        record = self._pick(pick)

        async def act(life: Life) -> None:
            await life.attachments.detach(record.owner, record.uuid)

        reasons = ["CONTAINER_NOT_FOUND", "CONTAINER_NOT_RUNNING", "SLICE_NOT_FOUND", "CAP_NODE_MISSING"]
        if record.uuid in self.world.held:
            reasons.append("SLICE_IN_USE")
        self._may_refuse(act, lines, *reasons)

    @rule(pick=_PICK, lines=_LINES, live=st.booleans())
    @_only_if(lambda self: self._mine())
    def transfer(self, pick: int, lines: int | None, live: bool) -> None:
        """Gives a slice to an attempt that is new, or whose container runs."""
        record = self._pick(pick)
        alive = [one.owner for one in self.world.life.journal.containers() if one.stage.is_alive]
        heir = alive[pick % len(alive)] if live and alive else self._new_owner()
        faulty, held, attached = bool(self.world.faults), set(self.world.held), self._attached()
        whole = record.uuid in [compute.uuid for one in self._instances() for compute in one.compute_instances]

        async def act(life: Life) -> str:
            return (await life.transfers.transfer(record.owner, record.uuid, heir, 1)).uuid

        given, refusal = self._do(act, lines)
        now = next((one.owner for one in self.world.records() if one.uuid == record.uuid), None)
        if refusal is None:
            # One that was destroyed by hand is missed, at the latest by the daemon that comes after this one.
            assert given is None or now == heir or (now is None and not whole)
            assert given is None or heir == record.owner or record.uuid not in held | attached, "it was in use"
        elif refusal.reason == "SLICE_IN_USE":
            assert held | attached >= {record.uuid}, refusal.message
        else:
            assert faulty or refusal.reason == "SLICE_NOT_FOUND", repr(refusal)
        assert now in (record.owner, heir, None), "somebody else has it"

    def _may_refuse(self, act: Callable[[Life], Awaitable[None]], lines: int | None, *reasons: str) -> None:
        faulty = bool(self.world.faults)
        _, refusal = self._do(act, lines)
        assert refusal is None or faulty or refusal.reason in reasons, repr(refusal)

    def _do(self, act: Callable[[Life], Awaitable[T]], lines: int | None) -> tuple[T | None, Refusal | None]:
        """Has the daemon do something, and returns what came of it: nothing at all when it died."""
        try:
            return self.world.do(act, lines=lines), None
        except Refusal as refusal:
            return None, refusal

    @rule(pick=_PICK, lines=_LINES)
    @_only_if(lambda self: self.world.running)
    def remove_container(self, pick: int, lines: int | None) -> None:
        containers = self.world.life.journal.containers()
        if not containers:
            return
        owner = containers[pick % len(containers)].owner

        async def act(life: Life) -> None:
            await life.containers.remove(owner, discard_results=True)

        self.world.do(act, lines=lines)

    @rule(lines=_LINES)
    def look(self, lines: int | None) -> None:
        faulty = bool(self.world.faults)

        async def act(life: Life) -> None:
            await life.recovery.look()

        _, refusal = self._do(act, lines)
        assert refusal is None or faulty, repr(refusal)

    @rule(gpu=_PICK, profile=_PICK, place=_PICK, skip=st.integers(0, 20))
    def create_and_look_at_lists_that_lag(self, gpu: int, profile: int, place: int, skip: int) -> None:
        uuid, shape, span = self._somewhere(gpu, profile, place)
        if not self._is_free(uuid, shape, span):
            return
        owner = self._new_owner()
        self.world.faults[:] = [Fault("nvmlDeviceGetGpuInstances", count=40, skip=skip, stale=True)]

        async def act(life: Life) -> str:
            made = await life.slices.create(owner, 1, uuid, shape.name, span)
            await life.recovery.look()
            return made.uuid

        made, refusal = self._do(act, None)
        assert refusal is None, repr(refusal)
        assert made in [record.uuid for record in self._mine()]

    # What happens to it

    @rule(lines=st.none() | st.integers(0, 30))
    def kill(self, lines: int | None) -> None:
        self.world.end()
        self.world.start(lines=lines)

    @rule(seldom=_SELDOM)
    def reboot(self, seldom: int) -> None:
        if seldom:
            return
        self.world.reboot()
        assert self.world.instances() == []
        assert self.world.records() == []

    @rule(function=_BREAKABLE, code=_CODES, count=st.integers(1, 3), skip=st.integers(0, 3), when=st.sampled_from(When))
    def break_driver(self, function: str, code: int, count: int, skip: int, when: When) -> None:
        self.world.faults.append(Fault(function, code, count=count, skip=skip, when=when))

    @rule(function=st.sampled_from(_LISTS), count=st.integers(1, 8))
    def let_lists_lag(self, function: str, count: int) -> None:
        self.world.faults.append(Fault(function, count=count, stale=True))

    @rule(pick=_PICK)
    @_only_if(lambda self: self._mine())
    def hold(self, pick: int) -> None:
        if any(self._pick(pick).uuid in [c.uuid for c in i.compute_instances] for i in self._instances()):
            self.world.hold(self._pick(pick))

    @rule(pick=_PICK)
    @_only_if(lambda self: self.world.held)
    def let_go(self, pick: int) -> None:
        self.world.let_go(sorted(self.world.held)[pick % len(self.world.held)])

    @rule(policy=st.sampled_from(UuidPolicy))
    def choose_uuids(self, policy: UuidPolicy) -> None:
        self.world.emulated.operator.set_uuid_policy(policy)

    @rule(gpu=_PICK, profile=_PICK, place=_PICK)
    def cut_by_hand(self, gpu: int, profile: int, place: int) -> None:
        # With UUIDs that come again, a slice made by hand where one of the daemon's was destroyed a moment ago is
        # the same slice for everybody who looks. Let it have looked in between.
        self.world.faults.clear()
        self.world.look()
        uuid, shape, span = self._somewhere(gpu, profile, place)
        if self._is_free(uuid, shape, span):
            self.world.cut_by_hand(uuid, shape, span)

    @rule(pick=_PICK, half=st.booleans())
    def destroy_by_hand(self, pick: int, half: bool) -> None:
        held = set(self.world.held)
        there = [i for i in self._instances() if not held & {c.uuid for c in i.compute_instances}]
        if there:
            one = there[pick % len(there)]
            # What others made half is theirs to look after.
            self.world.destroy_by_hand(one, half=half and (one.gpu_uuid, one.id) not in self.world.foreign)

    # What must always be so

    @invariant()
    def count(self) -> None:
        global _steps_taken
        _steps_taken += 1

    @invariant()
    def nothing_overlaps(self) -> None:
        for gpu in self.gpus:
            spans = [one.span for one in self._instances() if one.gpu_uuid == gpu]
            assert not any(a.overlaps(b) for n, a in enumerate(spans) for b in spans[n + 1 :]), spans

    @invariant()
    def nothing_leaks_and_nothing_foreign_is_touched(self) -> None:
        there = {(one.gpu_uuid, one.id) for one in self._instances()}
        assert self.world.foreign <= there, "a foreign slice was touched"
        known = {(record.gpu_uuid, record.gi) for record in self.world.records()}
        for one in self._instances():
            if (one.gpu_uuid, one.id) in self.world.foreign:
                continue
            begun = [
                r for r in self.world.records() if r.gi is None and (r.gpu_uuid, r.span) == (one.gpu_uuid, one.span)
            ]
            assert (one.gpu_uuid, one.id) in known or begun, f"nobody knows {one}"

    @invariant()
    def capacity_is_what_nvml_says(self) -> None:
        told = self.world.inventory()
        for gpu in told.gpus:
            there = [one for one in self._instances() if one.gpu_uuid == gpu.uuid]
            for profile in gpu.profiles:
                shape = next(one for one in self.world.operator.profiles(gpu.uuid) if one.name == profile.name)
                assert profile.remaining_instances == self.world.operator.remaining(gpu.uuid, profile.profile_id)
                assert profile.remaining_instances == _room(shape, there), (profile.name, there)
        foreign = {
            (one.gpu_uuid, one.gpu_instance_id) for one in told.slices if one.state == SliceState.SLICE_STATE_FOREIGN
        }
        assert self.world.foreign <= foreign

    @invariant()
    def the_events_tell_it_all(self) -> None:
        self.world.news()
        assert self.world.there == {record.uuid for record in self.world.records() if record.uuid}

    @invariant()
    def a_container_sees_its_own_slices_and_no_others(self) -> None:
        records = {record.uuid: record for record in self.world.records()}
        for container in self.world.life.journal.containers():
            if container.stage.is_alive:
                meant: set[str] = set()
                for uuid in container.slice_uuids:
                    if uuid in records:
                        meant |= self.world.nodes_of(records[uuid])
                seen = self.world.seen(container.owner)
                assert not seen - meant, "a container sees a slice that is not its own"
                # Of a slice that was destroyed by hand there may be nothing to see any more, before that is noticed.
                there = {name for name in meant if (self.world.emulated.caps.directory / name).exists()}
                assert seen >= there, "a container does not see what is attached to it"

    # Help

    def _attached(self) -> set[str]:
        return {
            uuid
            for container in self.world.life.journal.containers()
            if container.stage.is_alive
            for uuid in container.slice_uuids
        }

    def _new_owner(self) -> Owner:
        self.attempts += 1
        return Owner("centre", f"j-{self.attempts}", 1)

    def _somewhere(self, gpu: int, profile: int, place: int) -> tuple[str, ProfileFacts, Span]:
        uuid = self.gpus[gpu % len(self.gpus)]
        shapes = self.world.operator.profiles(uuid)
        shape = shapes[profile % len(shapes)]
        return uuid, shape, shape.placements[place % len(shape.placements)]

    def _is_free(self, gpu: str, shape: ProfileFacts, span: Span) -> bool:
        """Says whether the silicon would take it now, asked without the daemon."""
        state = next(one for one in self.world.emulated.read().gpus if one.uuid == gpu)
        profile = state.card.profile(shape.profile_id)
        assert profile is not None
        return any((place.start, place.size) == (span.start, span.size) for place in free_placements(state, profile))

    def _instances(self) -> list[GpuInstance]:
        return self.world.instances()

    def _mine(self) -> list[SliceRecord]:
        return [record for record in self.world.records() if record.uuid]

    def _pick(self, pick: int) -> SliceRecord:
        mine = self._mine()
        return mine[pick % len(mine)]


def _room(shape: ProfileFacts, there: Sequence[GpuInstance]) -> int:
    """Returns how many more of a profile fit, counted here: places that nobody wants, taken from the left."""
    same = sum(one.profile.profile_id == shape.profile_id for one in there)
    most = shape.max_instances - same
    if "+me" in shape.name or shape.compute_slices == 7:
        # There is one set of media engines to give; the widest profile has it, too.
        used = any("+me" in one.profile.name or one.profile.compute_slices == 7 for one in there)
        most = 0 if used else min(most, 1)
    count, end = 0, 0
    for place in sorted(shape.placements):
        if place.start >= end and not any(place.overlaps(one.span) for one in there):
            count, end = count + 1, place.start + place.size
    return max(min(count, most), 0)


async def _put_code(folder: Path) -> str:
    archive = pack_files({"main.py": b"pass\n"})
    (folder / "code.tar.gz").write_bytes(archive)

    async def parts() -> AsyncIterator[NodeServicePutBundleRequest]:
        yield NodeServicePutBundleRequest(
            header=BundleHeader(bundle_id=digest_of(folder / "code.tar.gz"), size_bytes=len(archive))
        )
        yield NodeServicePutBundleRequest(chunk=archive)

    bundle, _ = await Bundles(folder / "bundles").put(parts(), set)
    return bundle.id


# It takes a minute where nobody else is.
TestSlices = pytest.mark.timeout(600)(SliceMachine.TestCase)
TestSlices.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # A step is real work on files; shrinking would take minutes. The steps and a blob to repeat them are printed.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    print_blob=True,
)


def test_enough_was_tried() -> None:
    assert _steps_taken >= LEAST_STEPS
