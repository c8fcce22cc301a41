"""Plans over busy, idle, warm, leaving and foreign shares: whatever the fleet looks like, some things never happen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.capacity import gpu_capacity, profile_capacity
from controlplane.fleet import GpuView, Use, span
from controlplane.placement import fit
from controlplane.records import Reservation
from controlplane.reservations import Reservations
from controlplane.schedule import Plan, QueuedJob, make_plan
from tests.unit.controlplane.samples import GEOMETRY, H100, H100_PROFILES, view

PROFILES = [row[0] for row in H100_PROFILES]
MODES = ("busy", "idle", "warm", "leaving", "foreign")


def use(profile: str, start: int, mode: str = "busy", owner: str = "o", tenant: str = "a", until: float = 50.0) -> Use:
    foreign = mode == "foreign"
    return Use(
        profile,
        start,
        GEOMETRY.by_profile[profile].size,
        foreign,
        key=None if foreign else (owner, 1),
        tenant="" if foreign else tenant,
        slice_uuid=f"MIG-{owner}",
        warm_until=until if mode == "warm" else 0.0,
        idle=mode in {"idle", "warm", "leaving"},
        idle_since=until if mode == "idle" else 0.0,
        leaving=mode == "leaving",
    )


@st.composite
def fleets(draw: st.DrawFn, nodes: int = 2) -> list[GpuView]:
    gpus = []
    for index in range(draw(st.integers(1, 3))):
        held = 0
        uses: list[Use] = []
        for number in range(draw(st.integers(0, 7))):
            shape = GEOMETRY.by_profile[draw(st.sampled_from(PROFILES))]
            found = fit(GEOMETRY, shape, held)
            if found is None or sum(one.profile == shape.profile for one in uses) >= shape.max_instances:
                continue
            mode, tenant = draw(st.sampled_from(MODES)), draw(st.sampled_from("ab"))
            until = draw(st.floats(1, 99))
            uses.append(use(shape.profile, found.start, mode, f"o-{index}-{number}", tenant, until))
            held |= uses[-1].mask
        usable = draw(st.integers(0, 9)) > 0
        gpus.append(view(f"GPU-{index}", tuple(uses), usable=usable, node=f"n-{index % nodes}"))
    return gpus


@st.composite
def queues(draw: st.DrawFn) -> list[QueuedJob]:
    queue = []
    for number in range(draw(st.integers(0, 12))):
        person = draw(st.booleans())
        queue.append(
            QueuedJob(
                f"q-{number}",
                draw(st.integers(-1, 1)),
                number,
                draw(st.sampled_from(PROFILES)),
                0,
                draw(st.sampled_from([0.0, 90.0])),
                tenant=draw(st.sampled_from("ab")),
                person=person,
                home=draw(st.sampled_from(["", "", "n-0", "n-1"])),
                may_move=draw(st.booleans()),
                rest=not person and draw(st.integers(0, 3)) == 0,
            )
        )
    return sorted(queue, key=lambda one: one.rank)


def plan_of(queue: Sequence[QueuedJob], gpus: Sequence[GpuView], before: Plan | None = None) -> Plan:
    promised = before.promised if before is not None else {}
    return make_plan(queue, gpus, 100.0, 60.0, nodes_known=2, promised=promised)


def after(gpus: Sequence[GpuView], plan: Plan, *, gone: bool) -> list[GpuView]:
    """Returns the fleet when a plan is carried out, and what leaves has gone or has not."""
    taken = {decision.take_over for _, decision, _ in plan.placed if decision.take_over is not None}
    fleet = []
    for gpu in gpus:
        uses = [replace(one, leaving=one.leaving or one.key in plan.evict) for one in gpu.uses if one.key not in taken]
        uses = [one for one in uses if not (gone and one.leaving)]
        uses += [
            use(decision.shape.profile, decision.start, "busy", job.id, job.tenant)
            for job, decision, _ in plan.placed
            if decision.gpu.key == gpu.key
        ]
        fleet.append(view(gpu.gpu_uuid, tuple(uses), usable=gpu.usable, node=gpu.node_id))
    return fleet


def assert_nothing_twice(gpus: Sequence[GpuView]) -> None:
    for gpu in gpus:
        held = 0
        for one in gpu.uses:
            assert not held & one.mask
            held |= one.mask
            assert one.start in GEOMETRY.by_profile[one.profile].starts
        for shape in GEOMETRY.shapes:
            assert gpu.count(shape.profile) <= shape.max_instances
        assert sum(GEOMETRY.by_profile[one.profile].compute_slices for one in gpu.uses) <= 7


@settings(max_examples=500, deadline=None)
@given(fleets(), queues())
def test_take_over_placement_and_eviction_never_book_anything_twice(
    gpus: list[GpuView], queue: list[QueuedJob]
) -> None:
    shares = {one.key: one for gpu in gpus for one in gpu.uses if one.key is not None}
    plan = plan_of(queue, gpus)
    assert_nothing_twice(after(gpus, plan, gone=False))
    assert len({job.id for job, _, _ in plan.placed} | set(plan.waiting)) == len(queue)
    taken = [decision.take_over for _, decision, _ in plan.placed if decision.take_over is not None]
    assert len(taken) == len(set(taken))
    assert not set(taken) & set(plan.evict)
    for job, decision, _ in plan.placed:
        assert decision.gpu.usable
        assert decision.shape.profile == job.profile
        assert decision.move == (job.home not in {"", decision.gpu.node_id})
        assert not decision.move or (job.person and job.may_move)
        if decision.take_over is not None:
            share = shares[decision.take_over]
            assert share.warm
            assert not share.leaving
            assert (share.tenant, share.profile, share.start) == (job.tenant, job.profile, decision.start)
            assert decision.slice_uuid == share.slice_uuid
    jobs = {job.id: job for job in queue}
    for key, waiter in plan.evict.items():
        assert shares[key].evictable, "only what is idle, ours, and does not leave yet"
        assert waiter in plan.waiting
        assert not jobs[waiter].rest
        assert "reclaimed for it" in plan.waiting[waiter]


@settings(max_examples=500, deadline=None)
@given(fleets(), queues())
def test_who_something_was_evicted_for_gets_it_and_nothing_more_is_evicted(
    gpus: list[GpuView], queue: list[QueuedJob]
) -> None:
    first = plan_of(queue, gpus)
    placed = {job.id for job, _, _ in first.placed}
    rest = [job for job in queue if job.id not in placed]
    meanwhile = after(gpus, first, gone=False)
    second = plan_of(rest, meanwhile, first)
    assert not set(second.evict.values()) & set(first.promised)
    sooner = {job.id for job, _, _ in second.placed}
    assert set(first.promised) <= set(second.promised) | sooner
    then = after(meanwhile, second, gone=True)
    third = plan_of([job for job in rest if job.id not in sooner], then, second)
    assert set(first.promised) <= {job.id for job, _, _ in third.placed} | sooner
    assert_nothing_twice(after(then, third, gone=False))


def told(plan: Plan, ids: set[str]) -> object:
    placed = [(job.id, decision.gpu.key, decision.start, decision.take_over) for job, decision, _ in plan.placed]
    return [one for one in placed if one[0] in ids], {key: job for key, job in plan.evict.items() if job in ids}


@settings(max_examples=300, deadline=None)
@given(fleets(), queues())
def test_persons_are_served_as_if_nobody_else_were_there(gpus: list[GpuView], queue: list[QueuedJob]) -> None:
    persons = [job for job in queue if job.person]
    ids = {job.id for job in persons}
    assert told(plan_of(queue, gpus), ids) == told(plan_of(persons, gpus), ids)


@settings(max_examples=300, deadline=None)
@given(fleets(), queues())
def test_rest_delays_nobody(gpus: list[GpuView], queue: list[QueuedJob]) -> None:
    others = [job for job in queue if not job.rest]
    ids = {job.id for job in others}
    plan = plan_of(queue, gpus)
    assert told(plan, ids) == told(plan_of(others, gpus), ids)
    waiting = [job for job in others if job.id in plan.waiting]
    for job, decision, _ in plan.placed:
        if not job.rest:
            continue
        mask = span(decision.start, decision.shape.size)
        for other in waiting:
            if "" in other.nodes or decision.gpu.node_id in other.nodes:
                shape = GEOMETRY.by_profile[other.profile]
                assert not any(mask & span(start, shape.size) for start in shape.starts)


@settings(max_examples=300, deadline=None)
@given(fleets())
def test_every_memory_slice_is_busy_idle_free_or_foreign(gpus: list[GpuView]) -> None:
    for gpu, card in zip(gpus, gpu_capacity(gpus), strict=True):
        parts = (
            card.memory_slices_busy,
            card.memory_slices_idle,
            card.memory_slices_free,
            card.memory_slices_foreign,
        )
        assert sum(parts) == card.memory_slices_total
        assert card.memory_slices_idle == sum(one.size for one in gpu.uses if one.idle)
        by_name = {entry.profile: entry for entry in card.profiles}
        for profile in PROFILES:
            mine = [one for one in gpu.uses if one.profile == profile and not one.foreign]
            assert by_name[profile].idle == sum(one.idle for one in mine)
            assert by_name[profile].busy == len(mine) - by_name[profile].idle
    for entry in profile_capacity(gpus):
        cards = [one for card in gpu_capacity(gpus) for one in card.profiles if one.profile == entry.profile]
        assert (entry.free, entry.busy, entry.idle, entry.total) == (
            sum(one.free for one in cards),
            sum(one.busy for one in cards),
            sum(one.idle for one in cards),
            sum(one.total for one in cards),
        )


@dataclass
class Life:
    share: Use
    gpu: int
    ends: float


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_is_booked_twice_and_nobody_starves_over_a_life(data: st.DataObject) -> None:
    """Jobs come, run, fall idle, turn warm and leave, at random; a whole-card job starts all the same."""
    gpus = 2
    shares: list[Life] = []
    big = QueuedJob("big", 0, 0, "7g.80gb", 0, 0.0, tenant="a")
    queue: list[QueuedJob] = [big]
    before = Plan()
    number = 0
    for at in range(1, 120):
        shares = [one for one in shares if not (one.ends <= at or (one.share.leaving and data.draw(st.booleans())))]
        for one in shares:
            change = data.draw(st.sampled_from(["", "", "idle", "warm"]))
            if change and not one.share.idle and at < 60:
                one.share = replace(one.share, idle=True, warm_until=at + 9.0 if change == "warm" else 0.0)
        for _ in range(data.draw(st.integers(0, 2))):
            number += 1
            profile = data.draw(st.sampled_from(["1g.10gb", "2g.20gb", "3g.40gb"]))
            tenant = data.draw(st.sampled_from("ab"))
            queue.append(QueuedJob(f"q-{number}", 0, number, profile, 0, float(at), tenant=tenant))
        fleet = [view(f"GPU-{index}", tuple(one.share for one in shares if one.gpu == index)) for index in range(gpus)]
        assert_nothing_twice(fleet)
        plan = make_plan(queue, fleet, float(at), 10.0, nodes_known=1, promised=before.promised)
        for one in shares:
            if one.share.key in plan.evict:
                assert one.share.evictable
                one.share = replace(one.share, leaving=True)
        taken = {decision.take_over for _, decision, _ in plan.placed}
        shares = [one for one in shares if one.share.key not in taken]
        for job, decision, _ in plan.placed:
            share = use(decision.shape.profile, decision.start, "busy", job.id, job.tenant)
            shares.append(Life(share, int(decision.gpu.gpu_uuid[-1]), at + 3.0))
        placed = {job.id for job, _, _ in plan.placed}
        if "big" in placed:
            assert at <= 20
            return
        queue = [job for job in queue if job.id not in placed]
        before = plan
    raise AssertionError("the whole-card job starved")


# -- one case each


def job(number: int, profile: str, **fields: object) -> QueuedJob:
    made = QueuedJob(f"q-{number}", 0, number, profile, 0, 0.0, tenant="a")
    return replace(made, **fields)  # type: ignore[arg-type]


def test_a_warm_slice_goes_to_its_own_job_then_to_whom_it_would_be_dropped_soonest() -> None:
    seen = view(
        uses=(
            use("1g.10gb", 0, "warm", "q-1", until=90.0),
            use("1g.10gb", 1, "warm", "x", until=30.0),
            use("1g.10gb", 2, "warm", "y", until=20.0),
            use("1g.10gb", 3, "warm", "z", tenant="b", until=10.0),
        )
    )
    plan = plan_of([job(1, "1g.10gb"), job(2, "1g.10gb")], [seen])
    assert [decision.take_over for _, decision, _ in plan.placed] == [("q-1", 1), ("y", 1)]
    assert [decision.slice_uuid for _, decision, _ in plan.placed] == ["MIG-q-1", "MIG-y"]


def test_warm_shares_go_before_idle_ones_and_the_fewest_and_oldest_first() -> None:
    seen = [
        view("GPU-0", (use("3g.40gb", 0, "idle", "i"), use("3g.40gb", 4, "busy", "k"))),
        view("GPU-1", (use("3g.40gb", 0, "warm", "new", "b", until=80.0), use("3g.40gb", 4, "busy", "l"))),
        view("GPU-2", (use("3g.40gb", 0, "warm", "old", "b", until=20.0), use("3g.40gb", 4, "busy", "m"))),
    ]
    assert plan_of([job(1, "2g.20gb")], seen).evict == {("old", 1): "q-1"}
    assert plan_of([job(1, "2g.20gb")], seen[:2]).evict == {("new", 1): "q-1"}
    plan = plan_of([job(1, "2g.20gb")], seen[:1])
    assert plan.evict == {("i", 1): "q-1"}
    assert plan.waiting["q-1"] == (
        f"1st in the queue; waits for 2g.20gb: 0 of 3 placements free on 1 {H100}; "
        "one idle share is being reclaimed for it on GPU 0 of n-1"
    )


def test_a_profile_of_which_there_may_be_one_is_had_by_evicting_that_one() -> None:
    seen = view(uses=(use("1g.10gb+me", 6, "warm", "m", "b"),))
    plan = plan_of([job(1, "1g.10gb+me")], [seen])
    assert plan.evict == {("m", 1): "q-1"}
    assert not plan_of([job(1, "1g.10gb+me")], [view(uses=(use("1g.10gb+me", 6, "busy", "m"),))]).evict


def test_what_is_being_vacated_is_not_given_to_one_who_finds_room_elsewhere() -> None:
    """The vacated room would be the better fit for the person; it waits for somebody."""
    busy = use("3g.40gb", 0, "busy", "k")
    full = [view("GPU-0", (busy, use("3g.40gb", 4, "idle", "i"))), view("GPU-1", (use("7g.80gb", 0),))]
    first = plan_of([job(1, "2g.20gb")], full)
    assert first.evict == {("i", 1): "q-1"}
    person = job(2, "3g.40gb", person=True)
    vacated = [view("GPU-0", (busy,)), view("GPU-1", ())]
    plan = plan_of([person, job(1, "2g.20gb")], vacated, first)
    assert {one.id: decision.gpu.gpu_uuid for one, decision, _ in plan.placed} == {"q-2": "GPU-1", "q-1": "GPU-0"}
    pressed = plan_of([person, job(1, "2g.20gb")], [vacated[0], full[1]], first)
    assert [one.id for one, _, _ in pressed.placed] == ["q-2"], "a person does not wait where there is room"


def test_nobody_moves_whose_node_can_serve_it_and_nobody_but_a_person() -> None:
    idle_home = view("GPU-0", (use("7g.80gb", 0, "idle", "i"),), node="n-0")
    busy_home = view("GPU-0", (use("7g.80gb", 0, "busy", "i"),), node="n-0")
    away_home = view("GPU-0", (), usable=False, node="n-0")
    other = view("GPU-1", (), node="n-1")
    person = job(1, "1g.10gb", home="n-0", person=True, may_move=True)
    assert plan_of([person], [idle_home, other]).evict == {("i", 1): "q-1"}
    ((_, decision, _),) = plan_of([person], [busy_home, other]).placed
    assert decision.move
    assert decision.gpu.node_id == "n-1"
    assert not plan_of([replace(person, may_move=False)], [busy_home, other]).placed
    assert not plan_of([replace(person, person=False)], [busy_home, other]).placed
    lost = plan_of([person], [away_home, other])
    assert not lost.placed
    assert lost.waiting["q-1"] == (
        "1st in the queue; waits for n-0, where its container lives: nothing can be placed there until it is in "
        "contact again"
    )


def test_a_checkpoint_goes_back_to_the_model_that_it_was_taken_from() -> None:
    assert plan_of([job(1, "1g.10gb", gpu_model=H100)], [view()]).placed
    plan = plan_of([job(1, "1g.10gb", gpu_model="NVIDIA A30")], [view()])
    assert "1g.10gb on a NVIDIA A30, which is what it was taken from" in plan.waiting["q-1"]


def test_a_patient_job_keeps_warm_slices_too() -> None:
    seen = view(uses=(use("1g.10gb", 0, "warm", "w"), use("3g.40gb", 4, "busy", "k")))
    plan = plan_of([job(1, "7g.80gb"), job(2, "1g.10gb", since=99.0)], [seen])
    assert not plan.placed
    assert plan.waiting["q-1"].endswith("; the room that becomes free soonest is kept for it")


# -- the mirror of what is held


def test_marks_are_told_of_and_end_with_the_share() -> None:
    told: list[int] = []
    held = Reservations(lambda: told.append(1))
    share = Reservation("j-1", 1, "n-1", "GPU-0", "1g.10gb", 0, 1, 1, 9984, tenant="a")
    held.mark_idle(("j-1", 1), True, 5.0)
    held.mark_leaving(("j-1", 1), "j-2")
    assert (dict(held.idle), dict(held.leaving), told) == ({}, {}, []), "it holds nothing"
    held.hold(share)
    versions = [held.version("n-1")]
    held.mark_idle(("j-1", 1), True, 5.0)
    held.mark_leaving(("j-1", 1), "j-2")
    versions.append(held.version("n-1"))
    assert (dict(held.idle), dict(held.leaving), len(told)) == ({("j-1", 1): 5.0}, {("j-1", 1): "j-2"}, 2)
    held.mark_idle(("j-1", 1), True, 5.0)
    assert len(told) == 2, "nothing new"
    held.mark_leaving(("j-1", 1), leaving=False)
    held.mark_idle(("j-1", 1), False)
    assert (dict(held.idle), dict(held.leaving)) == ({}, {})
    held.mark_idle(("j-1", 1), True)
    held.hold(replace(share, warm_until=9.0))
    assert not held.idle
    held.mark_leaving(("j-1", 1))
    held.release(("j-1", 1))
    assert not held.leaving
    assert versions == sorted(set(versions))


def test_an_attempt_that_resumes_on_another_node_leaves_nothing_behind() -> None:
    held = Reservations(lambda: None)
    share = Reservation("j-1", 1, "n-1", "GPU-0", "1g.10gb", 0, 1, 1, 9984)
    held.hold(share)
    held.release(share.key)
    assert share.key in held.released
    held.hold(replace(share, node_id="n-2"))
    assert share.key not in held.released
    held.hold(replace(share, node_id="n-3"))
    assert [len(held.held(node)) for node in ("n-1", "n-2", "n-3")] == [0, 0, 1]
