from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.capacity import gpu_capacity, profile_capacity
from controlplane.fleet import Use, gpu_views, span
from controlplane.placement import fit, most_slices, room_left
from controlplane.records import Reservation
from controlplane.room import Room
from controlplane.schedule import QueuedJob, make_plan
from puhui.v1 import card_pb2, fleet_service_pb2
from puhui.v1.prediction_pb2 import ProfileChoice
from tests.unit.controlplane.samples import GEOMETRY, H100, H100_PROFILES, inventory, view

NAMES = [row[0] for row in H100_PROFILES]
profiles = st.sampled_from(NAMES)


def choice(profile: str) -> list[ProfileChoice]:
    return [ProfileChoice(profile=profile, gpu_model=H100)]


def place_all(wanted: list[str], gpus: int = 2) -> list[tuple[str, int, int, str]]:
    room = Room([view(f"GPU-{index}") for index in range(gpus)])
    placed = []
    for profile in wanted:
        decision = room.best(choice(profile))
        if decision is not None:
            room.take(decision)
            placed.append((decision.gpu.gpu_uuid, decision.start, decision.shape.size, profile))
    return placed


@settings(max_examples=300, deadline=None)
@given(st.lists(profiles, max_size=25))
def test_slices_never_overlap_and_stay_on_reported_placements(wanted: list[str]) -> None:
    held: dict[str, int] = {}
    counts: dict[tuple[str, str], int] = {}
    for uuid, start, size, profile in place_all(wanted):
        shape = GEOMETRY.by_profile[profile]
        assert start in shape.starts
        mask = span(start, size)
        assert not held.get(uuid, 0) & mask
        held[uuid] = held.get(uuid, 0) | mask
        counts[uuid, profile] = counts.get((uuid, profile), 0) + 1
        assert counts[uuid, profile] <= shape.max_instances
    for uuid in held:
        compute = sum(
            GEOMETRY.by_profile[profile].compute_slices * count
            for (where, profile), count in counts.items()
            if where == uuid
        )
        assert compute <= 7


@settings(max_examples=200, deadline=None)
@given(st.lists(profiles, max_size=12), profiles)
def test_a_miss_means_that_no_placement_is_free(wanted: list[str], last: str) -> None:
    room = Room([view("GPU-0"), view("GPU-1")])
    held = {"GPU-0": 0, "GPU-1": 0}
    counts: dict[tuple[str, str], int] = {}
    for profile in wanted:
        decision = room.best(choice(profile))
        if decision is not None:
            room.take(decision)
            held[decision.gpu.gpu_uuid] |= span(decision.start, decision.shape.size)
            key = (decision.gpu.gpu_uuid, profile)
            counts[key] = counts.get(key, 0) + 1
    shape = GEOMETRY.by_profile[last]
    possible = any(
        not mask & span(start, shape.size) and counts.get((uuid, last), 0) < shape.max_instances
        for uuid, mask in held.items()
        for start in shape.starts
    )
    assert (room.best(choice(last)) is not None) == possible


def test_small_slices_go_where_they_leave_most_room() -> None:
    (_, first, _, _), (_, second, _, _) = place_all(["1g.10gb", "1g.10gb"], gpus=1)
    assert first == 6, "memory slice 6 takes part in the fewest other placements"
    after = fit(GEOMETRY, GEOMETRY.by_profile["3g.40gb"], span(first, 1) | span(second, 1))
    assert after is not None
    assert after.start == 0


def test_the_fuller_gpu_is_filled_first() -> None:
    placed = place_all(["3g.40gb", "1g.10gb"])
    assert len({uuid for uuid, *_ in placed}) == 1


def test_the_first_choice_that_fits_is_taken() -> None:
    full = view("GPU-0", (Use("3g.40gb", 4, 4, False),))
    room = Room([full])
    decision = room.best([*choice("7g.80gb"), *choice("4g.40gb")])
    assert decision is not None
    assert decision.shape.profile == "4g.40gb"


def test_nothing_goes_on_a_gpu_out_of_contact() -> None:
    assert Room([view(usable=False)]).best(choice("1g.10gb")) is None


def test_nodes_with_equal_gpu_uuids_are_told_apart() -> None:
    room = Room([view("GPU-0", node="n-1"), view("GPU-0", node="n-2")])
    nodes = set()
    for _ in range(2):
        decision = room.best(choice("7g.80gb"))
        assert decision is not None
        room.take(decision)
        nodes.add(decision.gpu.node_id)
    assert nodes == {"n-1", "n-2"}
    assert room.best(choice("1g.10gb")) is None


def test_room_on_an_empty_card_is_what_the_driver_says() -> None:
    for name, _, _, _, most, _, starts in H100_PROFILES:
        shape = GEOMETRY.by_profile[name]
        assert most_slices(shape, 0) == most
        assert sum(not 0 & span(start, shape.size) for start in starts) == len(starts)
    assert room_left(GEOMETRY, 0) == sum(len(row[6]) for row in H100_PROFILES)
    assert room_left(GEOMETRY, 0xFF) == 0


def node(slices: list[card_pb2.Slice]) -> fleet_service_pb2.Node:
    made = fleet_service_pb2.Node(id="n-1", inventory=inventory("node-1"))
    made.inventory.slices.extend(slices)
    return made


def a_slice(start: int, size: int, owner: card_pb2.AttemptRef | None, profile: str = "1g.10gb") -> card_pb2.Slice:
    return card_pb2.Slice(
        uuid=f"MIG-{start}",
        gpu_uuid="GPU-node-1-0",
        profile=profile,
        placement=card_pb2.Placement(start=start, size=size),
        owner=owner,
    )


def test_what_either_side_says_is_held_is_held() -> None:
    reservation = Reservation("j-1", 1, "n-1", "GPU-node-1-0", "3g.40gb", 4, 4, 3, 40448)
    ours = card_pb2.AttemptRef(centre="here", job_id="j-1", attempt=1)
    ghost = card_pb2.AttemptRef(centre="here", job_id="j-9", attempt=1)
    slices = [a_slice(4, 4, ours, "3g.40gb"), a_slice(0, 1, ghost), a_slice(1, 1, None)]
    (seen,) = gpu_views([(node(slices), True)], [reservation], "here")
    assert seen.held == 0b1111_0011
    assert [use.foreign for use in seen.uses] == [False, False, True]
    (later,) = gpu_views([(node(slices), True)], [reservation], "here", released=[("j-9", 1)])
    assert later.held == 0b1111_0010, "a report that is older than the release does not count"


def test_capacity_counts_free_held_and_foreign() -> None:
    seen = view("GPU-0", (Use("3g.40gb", 4, 4, False), Use("1g.10gb", 0, 1, True)))
    (card,) = gpu_capacity([seen])
    assert (card.memory_slices_total, card.memory_slices_free) == (8, 3)
    assert (card.memory_slices_busy, card.memory_slices_foreign) == (4, 1)
    assert list(card.free_profiles) == ["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb"]
    by_name = {entry.profile: entry for entry in profile_capacity([seen])}
    assert (by_name["3g.40gb"].free, by_name["3g.40gb"].busy, by_name["3g.40gb"].total) == (0, 1, 2)
    assert by_name["1g.10gb"].free == 3
    assert by_name["1g.10gb"].busy == 0


# -- the plan


def job(number: int, profile: str, priority: int = 0, since: float = 0.0) -> QueuedJob:
    return QueuedJob(f"j-{number}", priority, number, profile, 0, since)


def planned(queue: list[QueuedJob], gpus: int = 1, at: float = 10.0, patience_s: float = 60.0):  # type: ignore[no-untyped-def]
    queue.sort(key=lambda one: one.rank)
    return make_plan(queue, [view(f"GPU-{i}") for i in range(gpus)], at, patience_s, nodes_known=1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(profiles, st.integers(-2, 2), st.floats(0, 100)), max_size=30), st.floats(0, 200))
def test_a_plan_never_books_a_memory_slice_twice(wanted: list[tuple[str, int, float]], at: float) -> None:
    queue = [job(number, profile, priority, since) for number, (profile, priority, since) in enumerate(wanted)]
    plan = planned(queue, gpus=2, at=at)
    held: dict[str, int] = {}
    for _, decision, _ in plan.placed:
        mask = span(decision.start, decision.shape.size)
        assert not held.get(decision.gpu.gpu_uuid, 0) & mask
        held[decision.gpu.gpu_uuid] = held.get(decision.gpu.gpu_uuid, 0) | mask
    assert {one.id for one, _, _ in plan.placed} | set(plan.waiting) == {one.id for one in queue}
    assert all(" in the queue; waits for " in why for why in plan.waiting.values())


def test_priority_then_age() -> None:
    plan = planned([job(1, "7g.80gb"), job(2, "7g.80gb", priority=5), job(3, "7g.80gb")])
    assert [one.id for one, _, _ in plan.placed] == ["j-2"]
    assert list(plan.waiting) == ["j-1", "j-3"]
    assert plan.waiting["j-1"] == f"1st in the queue; waits for 7g.80gb: 0 of 1 placements free on 1 {H100}"
    assert plan.waiting["j-3"].startswith("2nd in the queue; waits for 7g.80gb: ")


def test_small_jobs_overtake_a_big_one_but_not_for_ever() -> None:
    small_runs = view("GPU-0", (Use("1g.10gb", 6, 1, False),))
    queue = [job(1, "7g.80gb", since=0.0), job(2, "1g.10gb")]
    early = make_plan(queue, [small_runs], 59.0, 60.0, nodes_known=1)
    assert [one.id for one, _, _ in early.placed] == ["j-2"]
    assert early.wake_at == 60.0
    late = make_plan(queue, [small_runs], 60.0, 60.0, nodes_known=1)
    assert not late.placed, "the card is kept for the big job now"
    assert set(late.waiting) == {"j-1", "j-2"}


def test_a_kept_placement_does_not_keep_the_rest_of_the_fleet() -> None:
    busy = view("GPU-0", (Use("3g.40gb", 0, 4, False),))
    fuller = view("GPU-1", (Use("3g.40gb", 0, 4, False), Use("2g.20gb", 4, 2, False)))
    queue = [job(1, "7g.80gb", since=0.0), job(2, "1g.10gb")]
    plan = make_plan(queue, [busy, fuller], 100.0, 60.0, nodes_known=1)
    assert [(one.id, decision.gpu.gpu_uuid) for one, decision, _ in plan.placed] == [("j-2", "GPU-1")]


def test_a_starving_job_gets_its_card_when_the_small_ones_end() -> None:
    """Small jobs keep arriving; each runs for 3 rounds. The whole-card job must start all the same."""
    running = [(6, 1, 3)]
    big = job(0, "7g.80gb", since=0.0)
    number = 0
    for at in range(200):
        running = [(start, size, end) for start, size, end in running if end > at]
        arrivals = []
        for _ in range(4):
            number += 1
            arrivals.append(job(number, "1g.10gb", since=float(at)))
        seen = view("GPU-0", tuple(Use("1g.10gb", start, size, False) for start, size, _ in running))
        plan = make_plan([big, *arrivals], [seen], float(at), 20.0, nodes_known=1)
        for one, decision, _ in plan.placed:
            if one is big:
                assert 20 <= at <= 24
                return
            running.append((decision.start, decision.shape.size, at + 3))
    raise AssertionError("the big job starved")


def test_why_a_job_waits_when_there_is_no_card_for_it() -> None:
    def why(queue: list[QueuedJob], gpus: int, known: int) -> str:
        views = [view(f"GPU-{i}") for i in range(gpus)]
        return make_plan(queue, views, 0.0, 60.0, nodes_known=known).waiting["j-1"]

    large = QueuedJob("j-1", 0, 1, "", 200_000, 0.0)
    assert "none has joined" in why([large], 0, 0)
    assert "no node of this centre has one" in why([large], 0, 1)
    assert "no card here is that large (the largest slice is 7g.80gb with 81152 MiB)" in why([large], 1, 1)
    assert "no GPU of this centre offers it" in why([job(1, "9g.99gb")], 1, 1)
    away = make_plan([job(1, "1g.10gb")], [view(usable=False)], 0.0, 60.0, nodes_known=1)
    assert away.waiting["j-1"].endswith("(1 more out of contact)")


def test_ten_thousand_waiting_jobs_are_planned_quickly() -> None:
    queue = [job(number, NAMES[number % len(NAMES)]) for number in range(10_000)]
    gpus = [view(f"GPU-{index}", (Use("7g.80gb", 0, 8, False),)) for index in range(1_000)]
    make_plan(queue[:1], gpus, 0.0, 60.0, nodes_known=1)
    started = time.process_time()
    plan = make_plan(queue, gpus, 0.0, 60.0, nodes_known=1)
    assert len(plan.waiting) == 10_000
    assert time.process_time() - started < 1.0
