"""When a daemon that ended is started again."""

from puhui.cli.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S, MOST_FAILURES, WELL_AFTER_S, Restarts


def test_what_was_never_ready_is_given_up_at_once() -> None:
    assert Restarts().ended(1.0) is None


def test_the_pause_doubles_up_to_the_longest() -> None:
    restarts, at, pauses = Restarts(), 0.0, []
    for _ in range(8):
        restarts.ready(at)
        at += WELL_AFTER_S / 2
        pauses.append(restarts.ended(at))
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_a_minute_of_being_well_makes_up_for_what_was() -> None:
    restarts = Restarts()
    restarts.ready(0.0)
    restarts.ended(1.0)
    restarts.ready(2.0)
    assert restarts.ended(3.0) == 2 * FIRST_PAUSE_S
    restarts.ready(4.0)
    assert restarts.ended(4.0 + WELL_AFTER_S) == FIRST_PAUSE_S


def test_it_is_given_up_when_it_was_not_ready_five_times_in_a_row() -> None:
    restarts = Restarts()
    restarts.ready(0.0)
    restarts.ended(1.0)
    for _ in range(MOST_FAILURES - 1):
        assert restarts.ended(2.0) is not None
    restarts.ready(3.0)  # it was, for once
    assert restarts.ended(4.0) is not None
    for _ in range(MOST_FAILURES - 1):
        assert restarts.ended(5.0) is not None
    assert restarts.ended(6.0) is None
