"""When a container is idle, whatever is sampled, and whenever."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodedaemon import idle
from nodedaemon.idle import Glance, IdlePolicy, IdleState, policy_of, sampling_interval_s
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration, moment
from puhui.v1.idle_pb2 import IdleWatch
from puhui.v1.node_service_pb2 import UtilizationSample, UtilizationSource

_GPM = UtilizationSource.UTILIZATION_SOURCE_GPM
_PROCESSES = UtilizationSource.UTILIZATION_SOURCE_PROCESSES
_UNAVAILABLE = UtilizationSource.UTILIZATION_SOURCE_UNAVAILABLE

_POLICY = IdlePolicy(10.0, 1.0, 30.0)


def gpm(percent: float, engine: float = 0.0) -> UtilizationSample:
    return UtilizationSample(
        uuid="MIG-1", source=_GPM, multiprocessor_percent=percent, engine_percent=engine, memory_used_mib=5, processes=1
    )


def presence(processes: int, memory_mib: int = 5) -> UtilizationSample:
    return UtilizationSample(uuid="MIG-1", source=_PROCESSES, processes=processes, memory_used_mib=memory_mib)


def silent() -> UtilizationSample:
    return UtilizationSample(uuid="MIG-1", source=_UNAVAILABLE, notice="GPU 0 does not answer")


def after(*seen: tuple[float, UtilizationSample], policy: IdlePolicy = _POLICY, started_s: float = -100) -> IdleState:
    """Returns the state of a container whose cards were seen like this."""
    state = idle.hold(IdleState(), 0)
    for at_s, sample in seen:
        state = idle.step(policy, state, Glance(at_s, [sample]), started_s)
    return state


def quiet(*times_s: float) -> list[tuple[float, UtilizationSample]]:
    return [(at_s, gpm(0.2)) for at_s in times_s]


def test_a_card_is_not_taken_from_under_a_command_that_may_still_open_it() -> None:
    nobody = UtilizationSample(uuid="MIG-1", source=_GPM, multiprocessor_percent=0.0, engine_percent=0.0)
    holder = gpm(0.0)
    for sample, idle_then in ((nobody, False), (holder, True)):
        state = idle.hold(IdleState(), 0)
        for at_s in range(2, 60, 2):
            state = idle.step(_POLICY, state, Glance(at_s, [sample], commands=1), -100)
        assert state.idle is idle_then
    # Not used is not used, whatever it waits for.
    waits = idle.hold(IdleState(), 0)
    for at_s in range(2, 60, 2):
        waits = idle.step(_POLICY, waits, Glance(at_s, [nobody], commands=2), -100)
    told = idle.describe(waits, 60, 1_000_000)
    assert (told.signal, told.message) == (
        "command",
        "counts as busy: 2 commands run in it and may still open its card",
    )
    assert told.busy_seconds <= 4
    # When it has ended, the clock begins.
    for at_s in range(60, 72, 2):
        waits = idle.step(_POLICY, waits, Glance(at_s, [nobody]), -100)
    assert waits.idle


def test_a_command_that_begins_ends_idleness() -> None:
    state = idle.begin(after(*quiet(2, 4, 6, 8, 10, 12)))
    assert (state.idle, state.unused_since_s, state.signal) == (False, None, "command")


def test_unused_for_the_whole_threshold_is_idle_and_not_a_moment_sooner() -> None:
    assert not after(*quiet(2, 4, 6, 8, 10, 11.9)).idle
    state = after(*quiet(2, 4, 6, 8, 10, 12))
    assert (state.idle, state.signal, state.unused_since_s) == (True, "multiprocessors", 2)
    told = idle.describe(state, 13, 1_000_000)
    assert moment(told.unused_since) == 1_000_000 - 11
    assert told.message == "has not used its card since 1970-01-12 13:46:29 UTC: multiprocessors 0.2 % (below 1 %)"


def test_one_sample_with_use_ends_idleness_and_the_clock_begins_anew() -> None:
    state = after(*quiet(2, 4, 6, 8, 10, 12), (14, gpm(1.0)))
    assert (state.idle, state.signal, state.unused_since_s) == (False, "multiprocessors", None)
    assert after((1, gpm(0, engine=40.0))).signal == "engine"


def test_a_gap_is_unknown() -> None:
    state = after(*quiet(2, 4, 6, 8, 10, 12), *quiet(18.1))
    assert (state.idle, state.unused_since_s) == (False, 18.1)
    assert "not looked at for 6.1 s" in state.reading


def test_what_cannot_be_read_is_busy_and_no_first_use() -> None:
    state = after(*quiet(2, 4, 6, 8, 10, 12), (14, silent()))
    assert (state.idle, state.signal, state.used) == (False, "unavailable", False)
    assert "does not answer" in idle.describe(state, 14, 0).message
    bare = UtilizationSample(uuid="MIG-1", source=_GPM)
    assert after((1, bare)).signal == "unavailable"
    assert after((1, gpm(float("nan")))).signal == "unavailable"


def test_with_gpm_presence_keeps_nothing_busy_not_even_in_the_first_sample_which_has_no_figures() -> None:
    state = after((0.1, presence(1)), started_s=0)
    assert (state.signal, state.used) == ("unavailable", False)
    state = after((0.1, presence(1)), *quiet(2, 4, 6, 8, 10, 12))
    assert state.idle


def test_before_hopper_a_holder_is_use_and_so_is_memory_that_changes() -> None:
    state = after(*((at_s, presence(1)) for at_s in range(0, 30, 2)))
    assert (state.idle, state.signal, state.used) == (False, "processes", True)
    assert after((0, presence(0)), (2, presence(0, memory_mib=900))).signal == "memory"
    state = after(*((at_s, presence(0)) for at_s in range(0, 14, 2)))
    assert (state.idle, state.signal) == (True, "processes")


def test_setup_is_not_idleness() -> None:
    assert after(*quiet(2, 4, 6, 8, 10, 12), started_s=0).signal == "start_grace"
    over = after(*quiet(*range(2, 44, 2)), started_s=0)
    assert (over.idle, over.unused_since_s) == (True, 30)
    # A first use ends the grace.
    assert after((2, gpm(50)), *quiet(4, 6, 8, 10, 12, 14), started_s=0).idle


def test_the_clock_begins_anew_with_another_card_and_stands_without_one() -> None:
    state = after(*quiet(2, 4, 6, 8, 10, 12))
    without = idle.release(state, 13)
    assert (without.idle, without.signal, without.held_seconds) == (False, "", 13)
    again = idle.hold(without, 100)
    assert (again.idle, again.unused_since_s, again.held_seconds) == (False, None, 13)
    assert idle.release(again, 101).held_seconds == 14
    assert idle.describe(without, 100, 0).message == "has no card"


def test_a_frozen_container_holds_its_card_and_does_not_use_it() -> None:
    state = idle.pause(after((2, gpm(50)), (4, gpm(50))), 5)
    assert (state.held_seconds, state.busy_seconds, state.idle) == (5, 5, False)
    thawed = idle.hold(idle.pause(state, 60), 61)
    assert (thawed.held_seconds, thawed.busy_seconds) == (61, 5)


def test_what_ends_before_it_is_looked_at_was_busy() -> None:
    assert idle.release(after(), 1.5).busy_seconds == 1.5


@pytest.mark.parametrize(
    ("idle_after_s", "interval_s"), [(0.3, 0.1), (0.5, 0.1), (1, 0.2), (10, 2), (25, 5), (300, 5), (86400, 5)]
)
def test_a_fifth_of_the_threshold_is_sampled(idle_after_s: float, interval_s: float) -> None:
    assert sampling_interval_s(idle_after_s) == pytest.approx(interval_s)
    assert policy_of(IdleWatch(idle_after=duration(idle_after_s), idle_below_percent=1)).interval_s == interval_s


@pytest.mark.parametrize(
    ("watch", "reason"),
    [
        (IdleWatch(idle_after=duration(0.299), idle_below_percent=1), "IDLE_AFTER_TOO_SHORT"),
        (IdleWatch(idle_below_percent=1), "IDLE_AFTER_TOO_SHORT"),
        (IdleWatch(idle_after=duration(60), idle_below_percent=0), "SPEC_INVALID"),
        (IdleWatch(idle_after=duration(60), idle_below_percent=float("nan")), "SPEC_INVALID"),
        (IdleWatch(idle_after=duration(60), idle_below_percent=1, start_grace=duration(-1)), "SPEC_INVALID"),
    ],
)
def test_what_cannot_be_watched_is_refused(watch: IdleWatch, reason: str) -> None:
    with pytest.raises(Refusal) as refused:
        policy_of(watch)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


@dataclass(frozen=True)
class _Seen:
    at_s: float
    samples: list[UtilizationSample]
    state: IdleState


_samples = st.one_of(
    st.floats(0, 0.99).map(gpm),
    st.floats(0, 0.99).map(gpm),
    st.floats(0, 0.99).map(gpm),
    st.floats(1, 100).map(gpm),
    st.just(silent()),
    st.integers(0, 1).map(presence),
)
_lives = st.lists(
    st.tuples(
        st.sampled_from([0.1, 1.0, 2.0, 2.0, 2.0, 3.0, 5.9, 6.5, 40.0]),
        st.lists(_samples, min_size=1, max_size=2),
        st.sampled_from(["look"] * 9 + ["hold", "pause", "release"]),
    ),
    max_size=60,
)


@given(_lives, st.sampled_from([0.0, -30.0, -100.0]))
def test_invariants(life: list[tuple[float, list[UtilizationSample], str]], started_s: float) -> None:
    at_s = 0.0
    state = idle.hold(IdleState(), at_s)
    seen: list[_Seen] = []
    for passed_s, samples, act in life:
        at_s += passed_s
        before = state
        if act == "look" and state.held_to_s is not None:
            state = idle.step(_POLICY, state, Glance(at_s, samples), started_s)
            seen.append(_Seen(at_s, samples, state))
        elif act != "look":
            state = {"hold": idle.hold, "pause": idle.pause, "release": idle.release}[act](state, at_s)
            seen.clear()
            assert not state.idle
        assert state.busy_seconds >= before.busy_seconds
        assert state.held_seconds >= before.held_seconds
        assert state.busy_seconds <= state.held_seconds + 1e-6
        assert state.held_seconds <= at_s + 1e-6
        assert idle.describe(state, at_s, 0).held_seconds >= before.held_seconds
        assert state.idle == (state.idle and state.unused_since_s is not None)
        if state.idle:
            _require_idle(seen)


def _require_idle(seen: list[_Seen]) -> None:
    """Asserts that what was seen last was all without use, for long enough, and without a gap."""
    run: list[_Seen] = []
    for one in reversed(seen):
        unknown = any(sample.source == _UNAVAILABLE for sample in one.samples)
        used = any(sample.multiprocessor_percent >= _POLICY.idle_below_percent for sample in one.samples)
        if unknown or used or (run and run[-1].at_s - one.at_s > _POLICY.gap_s):
            break
        run.append(one)
    assert len(run) >= idle.FEWEST_SAMPLES
    assert run[0].at_s - run[-1].at_s >= _POLICY.idle_after_s


def test_the_most_memory_that_was_seen_in_use_is_told_also_after_the_card_is_gone() -> None:
    held = after((2, presence(1, 700)), (4, presence(1, 9000)), (6, presence(1, 800)))
    for state in (held, idle.release(held, 7), idle.hold(idle.release(held, 7), 8)):
        told = idle.describe(state, 8, 1_000_000)
        assert (told.peak_memory_mib, told.memory_samples) == (9000, 3)
    assert not idle.describe(after((2, presence(0, 12)), (4, silent())), 4, 0).HasField("peak_memory_mib")
