"""What to do when the journal, the driver and the runtime may tell three different stories.

Pure: the stories in, a plan out. `nodedaemon.recovery` and `nodedaemon.slice_recovery` carry it out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from nodedaemon.driver_facts import GpuInstance
from nodedaemon.records import ContainerRecord, ContainerStage, SliceRecord, SliceStage
from nodedaemon.runtime import ContainerPhase, ContainerStatus

__all__ = ["ContainerPlan", "SlicePlan", "is_same", "plan_containers", "plan_slices"]


def is_same(record: SliceRecord, instance: GpuInstance) -> bool:
    """Says whether an instance on a GPU is a slice of the journal."""
    if (record.gpu_uuid, record.span, record.profile_id) != (
        instance.gpu_uuid,
        instance.span,
        instance.profile.profile_id,
    ):
        return False
    if record.gi is None:
        # It was being made, and its place was free when that was written down. Its compute instance comes only after
        # its id is written down, so one that has any is somebody else's.
        return not instance.compute_instances
    uuids = {compute.uuid for compute in instance.compute_instances if compute.uuid}
    return record.gi == instance.id and (not record.uuid or not uuids or record.uuid in uuids)


@dataclass
class SlicePlan:
    """What to do about slices. What is not named is foreign and is not touched."""

    adopt: list[SliceRecord] = field(default_factory=list)
    """Still there."""
    finish: list[tuple[SliceRecord, int]] = field(default_factory=list)
    """Half made: the GPU instance with this id is there."""
    destroy: list[SliceRecord] = field(default_factory=list)
    """Half destroyed."""
    drop: list[tuple[SliceRecord, str]] = field(default_factory=list)
    """Not there any more, and why."""


def plan_slices(
    journal: Sequence[SliceRecord], driver: Sequence[GpuInstance], boot_id: str, uncut: Collection[str] = ()
) -> SlicePlan:
    """Plans for the slices.

    Args:
        journal: every slice that is not destroyed.
        driver: every GPU instance of the node, whoever made it.
        boot_id: the host's boot now. No instance survives a boot, so whatever sits where a slice of an earlier boot
            was is somebody else's.
        uncut: UUIDs of the GPUs that have MIG mode off. A reset, or a reboot, turns it off; nobody can while there are
            slices.
    """
    plan = SlicePlan()
    cut = {instance.gpu_uuid for instance in driver}
    for record in journal:
        instance = next((i for i in driver if is_same(record, i)), None)
        if record.boot_id != boot_id:
            plan.drop.append((record, "the host was rebooted, which wipes every slice"))
        elif record.stage is SliceStage.CREATING:
            if instance is None:
                plan.drop.append((record, "the daemon ended before it was made"))
            else:
                plan.finish.append((record, instance.id))
        elif instance is None:
            if record.stage is SliceStage.DESTROYING:
                why = "it was being destroyed"
            elif record.gpu_uuid in uncut:
                why = "its GPU was reset, or the node rebooted, and has MIG mode off now"
            elif record.gpu_uuid not in cut:
                why = "its GPU has no slices any more: it was reset, or somebody else destroyed them"
            else:
                why = "somebody else destroyed it"
            plan.drop.append((record, why))
        elif record.stage is SliceStage.ACTIVE and instance.compute_instances:
            plan.adopt.append(record)
        else:
            # Half destroyed, by this daemon or by hand. One that lost its compute instance is not completed: it would
            # come back under another UUID than its owner was told.
            plan.destroy.append(record)
    return plan


@dataclass
class ContainerPlan:
    """What to do about containers of this daemon."""

    adopt: list[tuple[ContainerRecord, ContainerStatus]] = field(default_factory=list)
    """Their command still runs."""
    ended: list[tuple[ContainerRecord, ContainerStatus]] = field(default_factory=list)
    """Their command ended while nobody looked."""
    lost: list[ContainerRecord] = field(default_factory=list)
    """Somebody else removed them."""
    forget: list[ContainerRecord] = field(default_factory=list)
    """They never came to be."""
    remove: list[str] = field(default_factory=list)
    """Ids of containers that nobody owns, or that are half made."""


def plan_containers(journal: Sequence[ContainerRecord], runtime: Sequence[ContainerStatus]) -> ContainerPlan:
    """Plans for the containers.

    Args:
        journal: every container, removed ones whose results are kept too.
        runtime: every container that carries this daemon's label.
    """
    plan = ContainerPlan()
    by_owner = {
        (status.labels.get("puhui.centre"), status.labels.get("puhui.job"), status.labels.get("puhui.attempt")): status
        for status in runtime
    }
    for record in journal:
        status = by_owner.pop((record.owner.centre, record.owner.job_id, str(record.owner.attempt)), None)
        began = status is not None and status.phase is not ContainerPhase.CREATED
        if record.stage is ContainerStage.CREATING and not began:
            plan.forget.append(record)
            if status is not None:
                plan.remove.append(status.id)
        elif record.stage is ContainerStage.REMOVED:
            if status is not None:
                plan.remove.append(status.id)
        elif record.stage is ContainerStage.EXITED:
            continue
        elif status is None or not began:
            plan.lost.append(record)
            if status is not None:
                plan.remove.append(status.id)
        elif status.phase is ContainerPhase.EXITED:
            plan.ended.append((record, status))
        else:
            plan.adopt.append((record, status))
    plan.remove.extend(status.id for status in by_owner.values())
    return plan
