"""How two GPM readings become a utilization."""

from collections.abc import Mapping

import pynvml
import pytest

from nodedaemon.emulation.gpm import ProcessTime, Reading, Samples, Share, answer, check_pair
from nodedaemon.emulation.refusal import Code, Refusal

SM_UTIL = pynvml.NVML_GPM_METRIC_SM_UTIL


def _reading(at: float, processes: Mapping[int, ProcessTime], *, unseen: bool = False) -> Reading:
    return Reading(0, 7, at, at, (Share(7, 1.0, processes, unseen),))


def _percent(first: Mapping[int, ProcessTime], second: Mapping[int, ProcessTime]) -> float:
    metric = answer(SM_UTIL, _reading(100.0, first), _reading(102.0, second))
    assert metric.code is Code.SUCCESS
    return metric.percent


def test_utilization_is_the_cpu_time_between_the_readings() -> None:
    assert _percent({1: ProcessTime(5, 10.0)}, {1: ProcessTime(5, 10.5)}) == pytest.approx(25)


def test_many_processes_add_up_to_all_of_it_at_most() -> None:
    before = {1: ProcessTime(5, 0), 2: ProcessTime(5, 0)}
    assert _percent(before, {1: ProcessTime(5, 0.5), 2: ProcessTime(5, 0.5)}) == pytest.approx(50)
    assert _percent(before, {1: ProcessTime(5, 2.0), 2: ProcessTime(5, 2.0)}) == 100


def test_a_process_that_began_in_between_counts_with_all_it_has_used() -> None:
    assert _percent({}, {1: ProcessTime(101, 0.5)}) == pytest.approx(25)


def test_an_older_process_that_took_the_slice_in_between_counts_as_busy_not_as_idle() -> None:
    assert _percent({}, {1: ProcessTime(5, 90.0)}) == 100


def test_a_pid_that_came_back_is_another_process() -> None:
    assert _percent({1: ProcessTime(5, 90.0)}, {1: ProcessTime(101, 0.5)}) == pytest.approx(25)


def test_a_process_that_ended_counts_no_more() -> None:
    assert _percent({1: ProcessTime(5, 90.0)}, {}) == 0


def test_a_card_is_the_weighted_sum_of_its_instances() -> None:
    def card(at: float, used: float) -> Reading:
        busy, idle = Share(7, 3 / 7, {1: ProcessTime(5, used)}, False), Share(8, 2 / 7, {}, False)
        return Reading(0, None, at, at, (busy, idle))

    assert answer(SM_UTIL, card(100, 0), card(101, 1)).percent == pytest.approx(100 * 3 / 7)


def test_a_holder_that_was_not_seen_leaves_it_unknown() -> None:
    first, second = _reading(100, {}), _reading(102, {}, unseen=True)
    assert answer(SM_UTIL, first, second).code is Code.UNKNOWN


def test_readings_less_than_100_ms_apart_say_nothing() -> None:
    assert answer(SM_UTIL, _reading(100, {}), _reading(100.09, {})).code is Code.NO_DATA
    assert answer(SM_UTIL, _reading(100, {}), _reading(100.11, {})).code is Code.SUCCESS


def test_readings_in_no_order_are_refused() -> None:
    with pytest.raises(Refusal):
        check_pair(_reading(102, {}), _reading(100, {}))


def test_a_number_of_a_freed_buffer_does_not_come_back() -> None:
    samples = Samples()
    first = samples.allocate()
    samples.free(first)
    assert samples.allocate() != first
    with pytest.raises(Refusal):
        samples.reading(first)
