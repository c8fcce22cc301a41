"""What every store promises. Runs on a real database of each kind."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane import happenings, metering
from controlplane.endings import Ending
from controlplane.jobs import IllegalTransition, transition
from controlplane.observing import ObservedAttempt
from controlplane.records import (
    BundleRecord,
    Change,
    JobQuery,
    JobRecord,
    NodeRecord,
    Request,
    Reservation,
)
from controlplane.sqlite_store import SqliteStore
from controlplane.store import RequestReused, ShareTaken, Store
from controlplane.watch import Feed
from puhui.v1 import fleet_service_pb2, job_pb2
from tests.contract.store.conftest import Open
from tests.unit.controlplane.samples import first_events, inventory, queued


async def add(store: Store, number: int = 0, request: Request | None = None, **spec: object) -> JobRecord:
    record, events = first_events(queued(f"j-{number:012}", at=1000.0 + number, **spec))
    return await store.add_job(record, events, request)


def reserve(start: int, size: int = 1, gpu: str = "GPU-0") -> Callable[[JobRecord, int], Change]:
    def decide(record: JobRecord, token: int) -> Change:
        happening = happenings.Reserved(job_pb2.Attempt(fencing_token=token), record.job.sizing, "node-1")
        after, event = transition(record, happening, 1.0)
        held = Reservation(record.id, len(after.job.attempts), "n-1", gpu, "1g.10gb", start, size, 1, 9984)
        return Change(after, (event,), reserve=held, token_taken=True)

    return decide


async def test_a_job_comes_back_as_it_was_stored(opener: Open) -> None:
    added = await add(await opener(), labels={"a": "b"})
    again = await opener()
    assert await again.job(added.id) == added
    assert added.sequence == 1
    events = await again.events(added.id, 0)
    assert [event.reason for event in events] == ["SUBMITTED", "PREDICTED"]
    assert added.job.last_cursor == events[-1].cursor
    assert await again.job("j-absent") is None


async def test_what_users_do_not_see_comes_back_too(opener: Open) -> None:
    store = await opener()
    added = await add(store)
    full = replace(
        added,
        cancel_requested=True,
        cancel_message="enough",
        ending=Ending(job_pb2.JOB_STATE_FAILED, "EXIT_CODE", "3"),
        results_collected=True,
        results_lost="the disk of the node is broken",
    )
    await store.change_job(added.id, lambda record, _: Change(full))
    assert await (await opener()).job(added.id) == full


async def test_events_have_one_order_and_can_be_read_from_any_cursor(store: Store) -> None:
    first, second = await add(store, 1), await add(store, 2)
    for record in (first, second, first):
        await store.change_job(record.id, lambda r, _: changed(r, happenings.Waits("full")))
    events = await store.events(first.id, 0)
    assert [event.reason for event in events] == ["SUBMITTED", "PREDICTED", "WAITING_FOR_SLICE", "WAITING_FOR_SLICE"]
    cursors = [event.cursor for event in events]
    assert cursors == sorted(set(cursors))
    assert await store.events(first.id, cursors[1]) == events[2:]
    assert await store.events(first.id, 0, limit=1) == events[:1]
    assert await store.events(first.id, 2**64 - 1) == []


def changed(record: JobRecord, happening: happenings.Happening) -> Change:
    after, event = transition(record, happening, 1.0)
    return Change(after, (event,))


async def test_a_change_that_raises_changes_nothing(store: Store) -> None:
    added = await add(store)

    def decide(record: JobRecord, token: int) -> Change:
        raise IllegalTransition("no")

    with pytest.raises(IllegalTransition):
        await store.change_job(added.id, decide)
    with pytest.raises(KeyError):
        await store.change_job("j-absent", decide)
    assert await store.change_job(added.id, lambda record, _: None) == added
    assert len(await store.events(added.id, 0)) == 2


async def test_one_failure_among_many_takes_nobody_with_it(store: Store) -> None:
    added = [await add(store, number) for number in range(10)]

    def decide(record: JobRecord, _: int) -> Change:
        if record.sequence == 5:
            raise ValueError("this one fails")
        return changed(record, happenings.Waits("full"))

    outcomes = await asyncio.gather(*(store.change_job(record.id, decide) for record in added), return_exceptions=True)
    assert [isinstance(outcome, ValueError) for outcome in outcomes] == [n == 4 for n in range(10)]
    for record in added:
        assert len(await store.events(record.id, 0)) == (2 if record.sequence == 5 else 3)


async def test_fencing_tokens_only_grow_and_survive(opener: Open) -> None:
    store = await opener()
    tokens = []
    for number in range(3):
        record = await store.change_job((await add(store, number)).id, reserve(number))
        tokens.append(record.attempt.fencing_token)
    store = await opener()
    record = await store.change_job((await add(store, 3)).id, reserve(3))
    assert [*tokens, record.attempt.fencing_token] == [1, 2, 3, 4]


async def test_what_was_learnt_is_the_tenants_own_and_survives(opener: Open) -> None:
    store = await opener()
    added = await add(store)

    def seen(attempt: int, tenant: str = "astro", peak_mib: int | None = 9000) -> ObservedAttempt:
        return ObservedAttempt(
            added.id, attempt, tenant, "f", float(attempt), peak_mib, None, 60.0, None, "1g.10gb", "H100", True, ""
        )

    first, second, third, theirs = seen(1), seen(2), seen(3, peak_mib=None), seen(4, "bio")
    await store.change_job(added.id, lambda record, _: Change(record, observed=(first, second, third, theirs)))
    again = replace(second, peak_mib=9100)
    await store.change_job(added.id, lambda record, _: Change(record, observed=(again,)))
    store = await opener()
    assert await store.observations("astro", "f") == [third, again, first]
    assert await store.observations("astro", "f", limit=1) == [third]
    assert await store.observations("bio", "f") == [theirs]
    assert await store.observations("astro", "other") == []


async def test_a_share_is_held_by_one_attempt_until_it_is_released(opener: Open) -> None:
    store = await opener()
    first, second = await add(store, 1), await add(store, 2)
    await store.change_job(first.id, reserve(0, 4))
    for start, size in [(0, 4), (3, 1), (2, 4), (0, 8)]:
        with pytest.raises(ShareTaken):
            await store.change_job(second.id, reserve(start, size))
    assert (await store.job(second.id)) == second
    store = await opener()
    assert [held.key for held in await store.reservations()] == [(first.id, 1)]
    await store.change_job(second.id, reserve(4, 4))
    await store.change_job(first.id, lambda record, _: Change(record, release=(1,)))
    assert [held.key for held in await store.reservations()] == [(second.id, 1)]


async def test_the_same_request_makes_one_job(store: Store) -> None:
    request = Request("r-1", "digest", 5.0)
    first = await add(store, 1, request)
    assert (await add(store, 2, request)).id == first.id
    with pytest.raises(RequestReused):
        await add(store, 3, Request("r-1", "another", 5.0))
    assert await store.request("r-1") == (request, first.id)
    assert [record.id for record in await store.jobs(JobQuery())] == [first.id]
    await store.forget_requests(before=6.0)
    assert await store.request("r-1") is None


async def test_racing_requests_make_one_job(store: Store) -> None:
    request = Request("r-1", "digest", 5.0)
    made = await asyncio.gather(*(add(store, number, request) for number in range(8)))
    assert len({record.id for record in made}) == 1
    assert len(await store.jobs(JobQuery())) == 1


async def test_a_repeated_change_is_made_once(store: Store) -> None:
    added = await add(store)
    request = Request("r-1", "digest", 5.0)

    def decide(record: JobRecord, _: int) -> Change:
        return replace(changed(record, happenings.Waits("full")), request=request)

    await store.change_job(added.id, decide)
    await store.change_job(added.id, decide)
    assert len(await store.events(added.id, 0)) == 3


async def test_jobs_are_found_by_every_filter(store: Store) -> None:
    for number in range(6):
        await add(
            store, number, name=f"{'even' if number % 2 == 0 else 'odd'}-{number}", labels={"mod3": str(number % 3)}
        )
    await store.change_job("j-000000000004", reserve(0))

    async def found(query: JobQuery) -> list[int]:
        return [int(record.id[-1]) for record in await store.jobs(query)]

    assert await found(JobQuery()) == [5, 4, 3, 2, 1, 0]
    assert await found(JobQuery(limit=2)) == [5, 4]
    assert await found(JobQuery(before_sequence=3)) == [1, 0]
    assert await found(JobQuery(states=(job_pb2.JOB_STATE_STARTING,))) == [4]
    assert await found(JobQuery(name_prefix="even")) == [4, 2, 0]
    assert await found(JobQuery(name_prefix="%")) == []
    assert await found(JobQuery(labels={"mod3": "1"})) == [4, 1]
    assert await found(JobQuery(labels={"mod3": "1"}, name_prefix="odd")) == [1]
    assert await found(JobQuery(created_since=1004.0)) == [5, 4]
    assert await found(JobQuery(tenant="nobody")) == []
    assert [record.sequence for record in await store.unfinished_jobs()] == [1, 2, 3, 4, 5, 6]


async def test_nodes_and_bundles_come_back(opener: Open) -> None:
    store = await opener()
    centre_id = await store.centre_id()
    for name in ("node-2", "node-1"):
        await store.put_node(NodeRecord(fleet_service_pb2.Node(id=f"n-{name}", inventory=inventory(name)), 7))
    await store.put_node(NodeRecord(fleet_service_pb2.Node(id="n-node-2", inventory=inventory("node-2")), 9))
    bundle = BundleRecord("sha256:00", 10, 20, {"a.py": 20})
    await store.put_bundle(bundle)
    store = await opener()
    assert [(record.node.inventory.name, record.event_cursor) for record in await store.nodes()] == [
        ("node-1", 7),
        ("node-2", 9),
    ]
    assert await store.bundle("sha256:00") == bundle
    assert await store.bundle("sha256:11") is None
    assert await store.centre_id() == centre_id


# -- SQLite's own


async def test_many_submissions_share_commits(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", Feed())
    before = store.commits
    await asyncio.gather(*(add(store, number) for number in range(200)))
    assert store.commits - before <= 20
    await store.close()


async def test_a_full_disk_stores_nothing_and_says_so(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", Feed())
    added = await add(store)
    limit = "pragma max_page_count = 1"  # as large as the file is now
    await store._writer.write(lambda db: db.execute(limit).fetchone())

    async def fill() -> None:
        for number in range(1, 100):
            await add(store, number, name="x" * 63, env={"X": "y" * 4000})

    with pytest.raises(OSError, match="full") as full:
        await fill()
    assert full.value.errno == errno.ENOSPC
    stored = await store.jobs(JobQuery(limit=200))
    assert added in stored
    for one in stored:
        assert [event.reason for event in await store.events(one.id, 0)] == ["SUBMITTED", "PREDICTED"]
    await store._writer.write(lambda db: db.execute("pragma max_page_count = 1000000").fetchone())
    await add(store, 100)
    await store.close()


BEGUN = metering.HoldBegun(
    at=10.0, attempt=1, profile="2g.20gb", gpu_model="H", compute_slices=2, gpu_slices=7, emulated=True, counter_s=1.0
)


async def test_usage_is_stored_with_the_change_that_means_it(opener: Open) -> None:
    store = await opener()
    first, second = await add(store, 1, name="one"), await add(store, 2)

    async def use(job: JobRecord, *changes: metering.UsageChange) -> None:
        await store.change_job(job.id, lambda record, _: Change(record, usage=changes))

    await use(first, BEGUN, metering.RunBegun("r-1", 11.0, 1.0))
    (hold, run) = await store.usage(0.0, 100.0)
    assert (hold.kind, hold.number, hold.tenant, hold.job_name) == (metering.Kind.HOLD, 1, "default", "one")
    assert (hold.start, hold.end, hold.busy_s, hold.compute_slices, hold.emulated) == (10.0, None, 0.0, 2, True)
    assert (run.kind, run.run_id, run.start) == (metering.Kind.RUN, "r-1", 11.0)
    await use(first, metering.RunEnded("r-1", 14.0, 3.0))
    detached = metering.HoldEnded(20.0, 4.0, job_pb2.RECLAIM_MODE_DETACH)
    await use(first, detached, metering.ReclaimedBegun(20.0))
    store = await opener()
    await use(second, replace(BEGUN, at=30.0))
    await use(first, replace(BEGUN, at=50.0))
    rows = await store.usage(0.0, 100.0)
    assert [(row.job_id, row.kind, row.number, row.start, row.end, row.busy_s) for row in rows] == [
        (first.id, "hold", 1, 10.0, 20.0, 3.0),
        (first.id, "run", 1, 11.0, 14.0, 2.0),
        (first.id, "reclaimed", 1, 20.0, 50.0, 0.0),
        (second.id, "hold", 1, 30.0, None, 0.0),
        (first.id, "hold", 2, 50.0, None, 0.0),
    ]
    assert rows[0].reclaim_mode == job_pb2.RECLAIM_MODE_DETACH
    assert [row.start for row in await store.usage(14.0, 50.0)] == [10.0, 20.0, 30.0]
    assert [row.start for row in await store.usage(0.0, 100.0, job_id=second.id)] == [30.0]
    assert await store.usage(0.0, 100.0, tenant="another") == []


async def test_usage_of_a_refused_change_is_not_stored(store: Store) -> None:
    first, second = await add(store, 1), await add(store, 2)
    await store.change_job(first.id, reserve(0))
    with pytest.raises(ShareTaken):
        await store.change_job(second.id, lambda record, token: replace(reserve(0)(record, token), usage=(BEGUN,)))
    assert await store.usage(0.0, 100.0) == []
