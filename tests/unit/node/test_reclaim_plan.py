"""Which rung of the ladder is taken, whose a process is, and which card another is restored on."""

from __future__ import annotations

import pytest

from nodedaemon.checkpoint import Ability
from nodedaemon.holders import Holder
from nodedaemon.reclaim_plan import MismatchError, belongs_to_command, pair_cards, plan_rungs
from nodedaemon.records import CardRecord
from puhui.v1.job_pb2 import ReclaimMode

_DETACH = ReclaimMode.RECLAIM_MODE_DETACH
_CHECKPOINT = ReclaimMode.RECLAIM_MODE_CHECKPOINT
_STOP = ReclaimMode.RECLAIM_MODE_STOP
_ABLE = Ability("emulated")
_UNABLE = Ability("", "MIG slices cannot be checkpointed")
_HELD = [Holder(7, "python3 train.py")]


@pytest.mark.parametrize("hardest", [_DETACH, _CHECKPOINT, _STOP])
def test_what_nobody_holds_is_detached(hardest: ReclaimMode.ValueType) -> None:
    assert plan_rungs([], hardest, _UNABLE).rungs == (_DETACH,)


@pytest.mark.parametrize(
    ("hardest", "ability", "rungs"),
    [
        (_DETACH, _ABLE, ()),
        (_CHECKPOINT, _ABLE, (_CHECKPOINT,)),
        (_CHECKPOINT, _UNABLE, ()),
        (_STOP, _ABLE, (_CHECKPOINT, _STOP)),
        (_STOP, _UNABLE, (_STOP,)),
    ],
)
def test_what_is_held_takes_a_harder_rung(
    hardest: ReclaimMode.ValueType, ability: Ability, rungs: tuple[ReclaimMode.ValueType, ...]
) -> None:
    assert plan_rungs(_HELD, hardest, ability).rungs == rungs


def test_what_cannot_be_taken_is_said_with_holder_reason_and_remedy() -> None:
    why = plan_rungs(_HELD, _CHECKPOINT, _UNABLE).why_not
    assert "7 (python3 train.py)" in why
    assert "MIG slices cannot be checkpointed" in why
    assert "`stop`" in why


def test_the_first_child_of_init_is_the_command_and_a_later_one_is_not() -> None:
    parents = {10: 1, 11: 10, 12: 11, 20: 10, 21: 20, 30: 9}
    begun = {10: 100, 11: 101, 12: 102, 20: 150, 21: 151, 30: 160}
    assert [pid for pid in parents if belongs_to_command(pid, 10, parents, begun, has_init=True)] == [10, 11, 12]
    # Without an init process the first one is the command, and all that it started is of it.
    assert all(belongs_to_command(pid, 10, parents, begun, has_init=False) for pid in (10, 11, 12, 20, 21))
    assert not belongs_to_command(30, 10, parents, begun, has_init=False)


def _card(uuid: str, profile: str = "1g.10gb", model: str = "H100") -> CardRecord:
    return CardRecord(uuid, model, profile, ("nvidia-cap1", "nvidia-cap2"))


def test_processes_go_on_on_cards_of_the_same_profile_and_model_and_on_their_own_if_it_is_there() -> None:
    a, b, c = _card("a"), _card("b"), _card("c", "2g.20gb")
    assert pair_cards([a], [b]) == [(a, b)]
    assert dict(pair_cards([a, b, c], [c, b, _card("d")])) == {b: b, c: c, a: _card("d")}


@pytest.mark.parametrize("other", [_card("b", "2g.20gb"), _card("b", model="A100")])
def test_processes_go_on_on_no_other_card(other: CardRecord) -> None:
    with pytest.raises(MismatchError, match=r"1g\.10gb of an H100"):
        pair_cards([_card("a")], [other])
    with pytest.raises(MismatchError, match="no slice"):
        pair_cards([_card("a")], [])
