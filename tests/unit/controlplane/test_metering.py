"""When usage begins and ends, and how it adds up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.metering import (
    AllEnded,
    BusyCounted,
    HoldBegun,
    HoldEnded,
    Kind,
    Owner,
    ReclaimedBegun,
    ReclaimedEnded,
    RunBegun,
    RunEnded,
    Stretch,
    UsageChange,
    gpu_slices,
    meter,
)
from controlplane.tensor_peaks import slice_tflops, tensor_tflops
from controlplane.usage import Interval, added_up
from puhui.v1 import fleet_service_pb2 as wire
from puhui.v1 import job_pb2
from tests.unit.controlplane.samples import H100, gpu

OWNER = Owner("j-1", "lab", "train")
BEGUN = HoldBegun(10.0, 1, "2g.20gb", H100, 2, 7, emulated=True, counter_s=5.0)
TIMES = st.floats(0, 1000)
COUNTERS = st.none() | st.floats(0, 2000)
CHANGES = st.one_of(
    st.builds(
        HoldBegun,
        TIMES,
        st.integers(1, 3),
        st.just("2g.20gb"),
        st.just(H100),
        st.integers(1, 7),
        st.just(7),
        st.booleans(),
        st.floats(0, 2000),
    ),
    st.builds(HoldEnded, TIMES, COUNTERS, st.sampled_from(job_pb2.ReclaimMode.values())),
    st.builds(BusyCounted, st.floats(0, 2000)),
    st.builds(ReclaimedBegun, TIMES),
    st.builds(ReclaimedEnded, TIMES),
    st.builds(RunBegun, st.sampled_from(["r-1", "r-2"]), TIMES, COUNTERS),
    st.builds(RunEnded, st.sampled_from(["r-1", "r-2"]), TIMES, COUNTERS),
    st.builds(AllEnded, TIMES, COUNTERS),
)


def metered(*changes: UsageChange) -> list[Stretch]:
    return meter([], OWNER, changes)


def test_a_share_is_busy_as_the_counter_of_its_container_says() -> None:
    (hold,) = metered(BEGUN, BusyCounted(8.0))
    assert (hold.end, hold.busy_s, hold.tenant, hold.job_name) == (None, 3.0, "lab", "train")
    (hold,) = metered(BEGUN, BusyCounted(8.0), HoldEnded(20.0))
    assert (hold.end, hold.busy_s) == (20.0, 3.0)
    (hold,) = metered(BEGUN, BusyCounted(8.0), HoldEnded(20.0, 7.0))
    assert hold.busy_s == 3.0
    (hold,) = metered(BEGUN, HoldEnded(20.0, 99.0))
    assert hold.busy_s == 10.0


def test_what_ends_without_having_begun_is_nothing() -> None:
    assert metered(HoldEnded(1.0), ReclaimedBegun(1.0), ReclaimedEnded(2.0), AllEnded(3.0), RunEnded("r", 1.0)) == []


def test_a_share_that_begins_ends_what_was_before() -> None:
    first, reclaimed, second = metered(BEGUN, HoldEnded(20.0), ReclaimedBegun(20.0), replace(BEGUN, at=30.0))
    assert (first.number, reclaimed.number, second.number) == (1, 1, 2)
    assert (reclaimed.kind, reclaimed.start, reclaimed.end) == (Kind.RECLAIMED, 20.0, 30.0)
    assert [stretch.end for stretch in metered(BEGUN, replace(BEGUN, at=15.0))] == [15.0, None]


def test_the_end_of_an_attempt_ends_everything() -> None:
    stretches = metered(BEGUN, RunBegun("r-1", 11.0, 5.0), AllEnded(20.0, 8.0))
    assert [(one.kind, one.end, one.busy_s) for one in stretches] == [(Kind.HOLD, 20.0, 3.0), (Kind.RUN, 20.0, 3.0)]


def test_only_what_has_changed_is_written() -> None:
    known = metered(BEGUN, HoldEnded(20.0))
    (reclaimed,) = meter(known, OWNER, [ReclaimedBegun(20.0)])
    assert reclaimed.kind is Kind.RECLAIMED
    assert meter([*known, reclaimed], OWNER, [ReclaimedBegun(25.0)]) == []


def test_what_a_slice_can_compute_is_its_share_of_the_gpu() -> None:
    assert gpu_slices(gpu()) == 7
    assert slice_tflops(H100, 2, 7) == pytest.approx(989 * 2 / 7)
    assert tensor_tflops("NVIDIA A100-SXM4-80GB") == tensor_tflops("NVIDIA A100 80GB PCIe") == 312
    assert (tensor_tflops("NVIDIA H200"), tensor_tflops("NVIDIA H200 NVL")) == (989, 835)
    assert tensor_tflops("NVIDIA A1000") == tensor_tflops("") == slice_tflops(H100, 1, 0) == 0


@given(st.lists(CHANGES, max_size=12))
def test_changes_one_by_one_are_the_same_as_together(changes: list[UsageChange]) -> None:
    together = {stretch.key: stretch for stretch in metered(*changes)}
    one_by_one: dict[tuple[Kind, int, str], Stretch] = {}
    for change in changes:
        stretches = one_by_one.values()
        last = max((one.number for one in stretches if one.kind is Kind.HOLD), default=0)
        known = [one for one in stretches if one.end is None or (one.kind is Kind.HOLD and one.number == last)]
        one_by_one |= {stretch.key: stretch for stretch in meter(known, OWNER, [change])}
    assert one_by_one == together


@given(st.lists(CHANGES, max_size=12), st.lists(st.floats(-100, 1500), min_size=2, max_size=6, unique=True))
def test_usage_adds_up(changes: list[UsageChange], cuts: list[float]) -> None:
    stretches, cuts = metered(*changes), sorted(cuts)
    for group in (wire.USAGE_GROUP_TENANT, wire.USAGE_GROUP_JOB, wire.USAGE_GROUP_RUN):
        whole = totals(added_up(stretches, Interval(cuts[0], cuts[-1]), group, 0, 1200.0))
        parts = [
            totals(added_up(stretches, Interval(start, end), group, 0, 1200.0))
            for start, end in itertools.pairwise(cuts)
        ]
        assert [sum(values) for values in zip(*parts, strict=True)] == pytest.approx(whole, abs=1e-6)
        held, busy, held_slices, busy_slices, *_ = whole
        assert -1e-9 <= busy <= held + 1e-6
        assert busy_slices <= held_slices + 1e-6


@given(st.lists(CHANGES, max_size=12), st.floats(0, 500), st.floats(1, 1000), st.integers(1, 40))
def test_points_add_up_to_the_rows(changes: list[UsageChange], start: float, length: float, count: int) -> None:
    interval = Interval(start, start + length)
    usage = added_up(metered(*changes), interval, wire.USAGE_GROUP_JOB, count, 1200.0)
    step = (interval.end - interval.start) / count
    _, _, held, busy, _, reclaimed, *_ = totals(usage)
    assert len(usage.points) == count
    assert sum(point.held_slices for point in usage.points) * step == pytest.approx(held, abs=1e-6)
    assert sum(point.busy_slices for point in usage.points) * step == pytest.approx(busy, abs=1e-6)
    assert sum(point.reclaimed_slices for point in usage.points) * step == pytest.approx(reclaimed, abs=1e-6)


@pytest.mark.parametrize("group", [wire.USAGE_GROUP_TENANT, wire.USAGE_GROUP_JOB])
def test_what_was_held_at_peers_is_told_apart(group: wire.UsageGroup.ValueType) -> None:
    (there,) = metered(BEGUN, HoldEnded(20.0))
    here = replace(there, number=2, attempt=2, start=30.0, end=35.0)
    (row,) = added_up([there, here], Interval(0.0, 100.0), group, 0, 100.0, {("j-1", 1), ("j-2", 2)}).rows
    assert (row.held_slice_seconds, row.peer_slice_seconds) == (30.0, 20.0)
    (row,) = added_up([there, here], Interval(15.0, 100.0), group, 0, 100.0, {("j-1", 1)}).rows
    assert row.peer_slice_seconds == 10.0
    (row,) = added_up([there, here], Interval(0.0, 100.0), group, 0, 100.0).rows
    assert row.peer_slice_seconds == 0.0


def totals(usage: wire.GetUsageResponse) -> list[float]:
    names = [
        "held_seconds",
        "busy_seconds",
        "held_slice_seconds",
        "busy_slice_seconds",
        "tflops_hours",
        "reclaimed_slice_seconds",
        "reclaims",
    ]
    return [sum(float(getattr(row, name)) for row in usage.rows) for name in names]
