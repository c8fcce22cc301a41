"""Which fault a call meets, and that a reader never takes an old state for the present one."""

from pathlib import Path

import pytest

from nodedaemon.emulation.faults import Fault, strike
from nodedaemon.emulation.state import Node, new_node
from nodedaemon.emulation.store import DamagedStateError, StateStore


def _nobody() -> int | None:
    raise AssertionError("no fault depends on the card")


def test_faults_of_one_function_strike_in_order_and_are_used_up() -> None:
    faults = [Fault("a", 1, count=2), Fault("b", 2), Fault("a", 3)]
    met = [strike(faults, "a", _nobody) for _ in range(4)]
    assert [fault.code if fault else None for fault in met] == [1, 1, 3, None]
    assert faults == [Fault("b", 2)]


def test_a_fault_counts_the_calls_it_lets_pass_once_each() -> None:
    faults = [Fault("a", 1, skip=2), Fault("a", 2)]
    met = [strike(faults, "a", _nobody) for _ in range(5)]
    assert [fault.code if fault else None for fault in met] == [None, None, 1, 2, None]


def test_a_fault_of_another_card_does_not_stand_in_the_way() -> None:
    faults = [Fault("a", 1, gpu=3), Fault("a", 2)]
    met = strike(faults, "a", lambda: 0)
    assert met is not None
    assert met.code == 2


@pytest.mark.parametrize("numbers", [{"count": 0}, {"skip": -1}, {"delay_seconds": -0.1}, {"code": -1}, {"code": 0}])
def test_a_fault_that_makes_no_sense_is_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="fault"):
        Fault(**{"function": "a", "code": 1, **numbers})  # type: ignore[arg-type]


def _node(serial: int) -> Node:
    node = new_node(["A30-24GB"], boot_id="boot", mig_enabled=True)
    node.last_serial = serial
    return node


def test_a_reader_sees_each_of_many_quick_changes_by_another(tmp_path: Path) -> None:
    writer, reader = StateStore(tmp_path), StateStore(tmp_path)
    with writer.locked():
        for serial in range(100, 400):  # one length, one clock tick, inodes that come back
            writer.write(_node(serial))
            assert reader.read().last_serial == serial
            assert writer.read().last_serial == serial


def test_an_unchanged_state_is_read_once(tmp_path: Path) -> None:
    writer, reader = StateStore(tmp_path), StateStore(tmp_path)
    with writer.locked():
        writer.write(_node(1))
    assert reader.read() is reader.read()
    assert reader.load() is not reader.load()


def test_a_change_that_fails_is_not_seen(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    with store.locked():
        store.write(_node(1))

    def change_and_fail() -> None:
        with store.transaction() as change:
            change.node.last_serial = 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change_and_fail()
    assert store.read().last_serial == 1


def test_a_state_that_went_away_is_told(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    with store.locked():
        store.write(_node(1))
    (tmp_path / "state.json").unlink()
    with pytest.raises(DamagedStateError, match="cannot be read"):
        store.read()


def test_what_a_killed_writer_left_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / "state.new").write_text("half")
    (tmp_path / "state.new").chmod(0o400)
    store = StateStore(tmp_path)
    with store.locked():
        store.write(_node(7))
    assert store.read().last_serial == 7
