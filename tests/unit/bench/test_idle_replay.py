"""The replay of a day of sessions: no work is lost or invented, and reclaim never needs more than none."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.idle_day import DAY_S, Arrival, Run, Session, arrivals_of, busiest_day, required_mib, sessions_of, slower
from bench.idle_fleet import geometry
from bench.idle_replay import replay
from bench.idle_simulation import Rules, samples_until_idle, simulate

H100 = geometry("H100-80GB-SXM5")
NEVER = Rules(math.inf)
LONGEST_S = 4000.0


@st.composite
def days(draw: st.DrawFn) -> list[Session]:
    times = st.floats(0, LONGEST_S, allow_nan=False)
    sessions = []
    for number in range(draw(st.integers(1, 12))):
        pauses = [0.0, *draw(st.lists(times, max_size=4))]
        profile = draw(st.sampled_from(["", "", "3g.40gb", "7g.80gb"]))
        sessions.append(
            Session(
                f"s-{number}",
                draw(st.sampled_from("ab")),
                draw(times),
                profile,
                0 if profile else draw(st.sampled_from([1000, 15000, 30000])),
                tuple(Run(pause_s, draw(st.floats(1, 900))) for pause_s in pauses),
                draw(times),
            )
        )
    return sessions


def size_of(session: Session) -> int:
    """Returns the memory slices of a session's share, or -1 where slices of two sizes have enough memory."""
    if session.profile:
        return H100.by_profile[session.profile].size
    return {1000: 1, 15000: 2, 30000: 4}[session.required_mib]


@settings(max_examples=60, deadline=None)
@given(days(), st.sampled_from([60.0, 300.0, 900.0]), st.sampled_from([0.0, 60.0, 3600.0]))
def test_every_run_runs_once_for_as_long_as_it_takes(sessions: list[Session], after_s: float, warm_s: float) -> None:
    outcome = simulate(sessions, H100, Rules(after_s, warm_s))

    assert len(outcome.waits_s) == sum(len(one.runs) for one in sessions)
    assert outcome.busy_slice_s == pytest.approx(sum(size_of(one) * one.busy_s for one in sessions))
    assert outcome.shares["kept"] + outcome.shares["warm"] + outcome.shares["cut"] == len(outcome.waits_s)
    assert set(outcome.waits_s) == {0.0}, "the fleet grows, so nobody waits"
    assert outcome.busy_slice_s <= outcome.held_slice_s * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(days(), st.sampled_from([60.0, 300.0, 900.0]), st.sampled_from([0.0, 60.0]))
def test_reclaim_never_needs_more_than_none(sessions: list[Session], after_s: float, warm_s: float) -> None:
    with_it, without = simulate(sessions, H100, Rules(after_s, warm_s)), simulate(sessions, H100, NEVER)

    assert with_it.held_slice_s <= without.held_slice_s * (1 + 1e-9)
    assert with_it.busy_slice_s == pytest.approx(without.busy_slice_s)


@settings(max_examples=30, deadline=None)
@given(days())
def test_a_threshold_that_is_never_reached_is_no_reclaim(sessions: list[Session]) -> None:
    without, hardly = simulate(sessions, H100, NEVER), simulate(sessions, H100, Rules(10 * LONGEST_S))

    assert hardly == without
    held = sum(size_of(one) * (one.busy_s + sum(run.pause_s for run in one.runs) + one.closing_s) for one in sessions)
    assert without.held_slice_s == pytest.approx(held)


@settings(max_examples=30, deadline=None)
@given(days(), st.sampled_from([60.0, 300.0, math.inf]))
def test_on_a_small_fleet_everybody_comes_to_an_end(sessions: list[Session], after_s: float) -> None:
    outcome = simulate(sessions, H100, Rules(after_s), 1)

    assert outcome.gpus == 1
    assert len(outcome.waits_s) == sum(len(one.runs) for one in sessions)
    assert min(outcome.waits_s) >= 0


def one_session(pause_s: float) -> Sequence[Session]:
    return [Session("s", "a", 0.0, "7g.80gb", 0, (Run(0.0, 100.0), Run(pause_s, 100.0)), 0.0)]


def test_a_share_is_held_until_the_node_would_call_it_idle() -> None:
    # Samples come every 5 s; the first that has not seen the run is that of 105 s, and 300 s later it is idle.
    outcome = simulate(one_session(1000.0), H100, Rules(300.0))

    assert outcome.held_slice_s == pytest.approx(8 * (105.0 + 300.0 + 100.0))
    assert samples_until_idle(300.0) == 61


@pytest.mark.parametrize(("pause_s", "how"), [(200.0, "kept"), (340.0, "warm"), (1000.0, "cut")])
def test_a_run_gets_what_is_left_of_its_share(pause_s: float, how: str) -> None:
    outcome = simulate(one_session(pause_s), H100, Rules(300.0, 60.0))

    assert outcome.shares[how] == (2 if how == "cut" else 1)


def test_who_waits_gets_a_share_as_soon_as_it_is_reclaimed() -> None:
    late = replace(one_session(5000.0)[0], id="late", begins_s=50.0)
    sessions = [*one_session(5000.0), late]

    with_it, without = simulate(sessions, H100, Rules(300.0), 1), simulate(sessions, H100, NEVER, 1)

    assert max(with_it.waits_s) == pytest.approx(405.0 - 50.0)
    assert max(without.waits_s) == pytest.approx(5200.0 - 50.0)


def test_what_fits_on_no_card_is_refused() -> None:
    with pytest.raises(ValueError, match=r"9g\.90gb fits on no H100"):
        simulate([replace(one_session(1.0)[0], profile="9g.90gb")], H100, NEVER)


def test_a_day_is_drawn_alike_for_one_seed_and_otherwise_for_another() -> None:
    arrivals = [Arrival(10.0 * number, "LM (batch size 80)", 1 + number % 2) for number in range(20)]

    first = sessions_of(arrivals, "vc", "7g.80gb", 1)

    assert first == sessions_of(arrivals, "vc", "7g.80gb", 1)
    assert first != sessions_of(arrivals, "vc", "7g.80gb", 2)
    assert [one.profile for one in first[:2]] == ["", "7g.80gb"]
    assert first[0].required_mib == required_mib("LM (batch size 80)")
    assert all(one.runs[0].pause_s == 0 for one in first)


def test_longer_pauses_change_nothing_else() -> None:
    sessions = sessions_of([Arrival(0.0, "A3C", 1)], "vc", "7g.80gb", 1)

    [slow] = slower(sessions, 2.0)

    assert [run.length_s for run in slow.runs] == [run.length_s for run in sessions[0].runs]
    assert [run.pause_s for run in slow.runs] == [2 * run.pause_s for run in sessions[0].runs]


def test_a_model_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="not known here: GPT-9"):
        required_mib("GPT-9 (batch size 1)")


def trace(path: Path, times_s: Sequence[float]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"A3C\tpython3 train.py\t-n\t1\t1000\t{at_s:f}\t1\n" for at_s in times_s)


def test_the_busiest_day_of_a_trace_begins_at_its_midnight(tmp_path: Path) -> None:
    trace(tmp_path / "vc.trace.gz", [5.0, DAY_S + 7.0, DAY_S + 9.0, 3 * DAY_S])

    assert busiest_day(arrivals_of(tmp_path / "vc.trace.gz")) == [Arrival(7.0, "A3C", 1), Arrival(9.0, "A3C", 1)]


def test_without_traces_there_is_a_note_and_no_figure(tmp_path: Path) -> None:
    figures, notes = replay(tmp_path, 1)

    assert figures == []
    assert "left out" in notes[0]


def test_a_replay_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("ee9e8c", "ed69ec", "0e4a51", "6214e9"):
        trace(tmp_path / f"{name}.trace.gz", [600.0 * number for number in range(12)])

    figures, _ = replay(tmp_path, 1)
    found = {figure.name: figure.value for figure in figures}

    assert replay(tmp_path, 1)[0] == figures
    assert found["replay_after_60s_held_gpu_hours"] < found["replay_after_900s_held_gpu_hours"]
    assert found["replay_after_900s_held_gpu_hours"] < found["replay_without_held_gpu_hours"]
    assert found["replay_used_gpu_hours"] < found["replay_after_60s_held_gpu_hours"]
