"""What is done at a start, decided from three stories."""

from __future__ import annotations

from dataclasses import replace

from nodedaemon.driver_facts import ComputeInstance, GpuInstance, ProfileFacts, Span
from nodedaemon.owner import Owner
from nodedaemon.reconcile import plan_containers, plan_slices
from nodedaemon.records import ContainerRecord, ContainerStage, SliceRecord, SliceStage
from nodedaemon.runtime import ContainerPhase, ContainerStatus

_OWNER = Owner("centre", "j-1", 1)
_PROFILE = ProfileFacts("3g.40gb", 9, 40448, 3, 60, 2, (Span(0, 4), Span(4, 4)))
_SLICE = SliceRecord(
    id=1,
    owner=_OWNER,
    token=1,
    gpu_uuid="GPU-1",
    profile="3g.40gb",
    profile_id=9,
    span=Span(4, 4),
    memory_mib=40448,
    stage=SliceStage.ACTIVE,
    create_time=0,
    boot_id="boot",
    gi=2,
    ci=0,
    uuid="MIG-1",
)
_CREATING = replace(_SLICE, stage=SliceStage.CREATING, gi=None, ci=None, uuid="")
_INSTANCE = GpuInstance("GPU-1", 2, _PROFILE, Span(4, 4), (ComputeInstance(0, 3, "MIG-1"),))


def test_a_slice_that_is_there_is_adopted() -> None:
    plan = plan_slices([_SLICE], [_INSTANCE], "boot")
    assert (plan.adopt, plan.finish, plan.destroy, plan.drop) == ([_SLICE], [], [], [])


def test_a_half_made_slice_is_finished_and_one_not_begun_is_dropped() -> None:
    assert plan_slices([_CREATING], [replace(_INSTANCE, compute_instances=())], "boot").finish == [(_CREATING, 2)]
    assert [record for record, _ in plan_slices([_CREATING], [], "boot").drop] == [_CREATING]


def test_a_reset_is_not_taken_for_somebody_who_destroys() -> None:
    other = replace(_INSTANCE, id=5, span=Span(0, 4), compute_instances=(ComputeInstance(0, 3, "MIG-9"),))
    for instances, uncut, words in (
        ([], ["GPU-1"], "reset, or the node rebooted"),
        ([], [], "it was reset, or somebody else destroyed"),
        ([other], [], "somebody else destroyed it"),
    ):
        ((_, why),) = plan_slices([_SLICE], instances, "boot", uncut).drop
        assert words in why


def test_a_half_destroyed_slice_is_destroyed() -> None:
    for stage in (SliceStage.DESTROYING, SliceStage.ERROR):
        record = replace(_SLICE, stage=stage)
        assert plan_slices([record], [replace(_INSTANCE, compute_instances=())], "boot").destroy == [record]
        assert [r for r, _ in plan_slices([record], [], "boot").drop] == [record]


def test_a_slice_without_its_compute_instance_is_destroyed_not_renamed() -> None:
    assert plan_slices([_SLICE], [replace(_INSTANCE, compute_instances=())], "boot").destroy == [_SLICE]


def test_what_is_not_ours_is_never_named() -> None:
    strangers = [
        replace(_INSTANCE, gpu_uuid="GPU-2"),
        replace(_INSTANCE, id=3),
        replace(_INSTANCE, span=Span(0, 4)),
        replace(_INSTANCE, compute_instances=(ComputeInstance(0, 3, "MIG-2"),)),
    ]
    for stranger in strangers:
        plan = plan_slices([_SLICE], [stranger], "boot")
        assert (plan.adopt, plan.finish, plan.destroy) == ([], [], [])
        assert [record for record, _ in plan.drop] == [_SLICE]


def test_nothing_survives_a_boot_not_even_in_the_same_place() -> None:
    for record in (_SLICE, _CREATING):
        plan = plan_slices([record], [_INSTANCE], "another boot")
        assert (plan.adopt, plan.finish, plan.destroy) == ([], [], [])
        assert "reboot" in plan.drop[0][1]


_CONTAINER = ContainerRecord(
    owner=_OWNER,
    token=1,
    stage=ContainerStage.RUNNING,
    image="image",
    bundle_id="sha256:0",
    slice_uuids=(),
    stop_grace_s=10,
    create_time=0,
    container_id="c1",
)
_LABELS = {"puhui.centre": "centre", "puhui.job": "j-1", "puhui.attempt": "1"}
_RUNNING = ContainerStatus("c1", _LABELS, ContainerPhase.RUNNING)
_CREATED = replace(_RUNNING, phase=ContainerPhase.CREATED)
_EXITED = replace(_RUNNING, phase=ContainerPhase.EXITED, exit_code=3)


def test_a_running_container_is_adopted_even_when_its_start_was_not_written_down() -> None:
    for stage in (ContainerStage.RUNNING, ContainerStage.CREATING):
        record = replace(_CONTAINER, stage=stage)
        assert plan_containers([record], [_RUNNING]).adopt == [(record, _RUNNING)]
        assert plan_containers([record], [_EXITED]).ended == [(record, _EXITED)]


def test_a_half_made_container_is_rolled_back() -> None:
    record = replace(_CONTAINER, stage=ContainerStage.CREATING)
    plan = plan_containers([record], [_CREATED])
    assert (plan.forget, plan.remove, plan.adopt) == ([record], ["c1"], [])
    assert plan_containers([record], []).forget == [record]


def test_a_container_removed_by_hand_is_lost() -> None:
    assert plan_containers([_CONTAINER], []).lost == [_CONTAINER]


def test_a_removal_that_was_cut_short_is_completed() -> None:
    record = replace(_CONTAINER, stage=ContainerStage.REMOVED)
    assert plan_containers([record], [_EXITED]).remove == ["c1"]
    assert plan_containers([record], []).remove == []


def test_a_container_that_nobody_owns_is_removed_and_an_ended_one_is_left() -> None:
    assert plan_containers([], [_RUNNING]).remove == ["c1"]
    plan = plan_containers([replace(_CONTAINER, stage=ContainerStage.EXITED)], [_EXITED])
    assert (plan.remove, plan.ended, plan.lost) == ([], [], [])
