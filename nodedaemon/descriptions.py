"""Slices and containers, as they go over the wire."""

from __future__ import annotations

from collections.abc import Callable

from nodedaemon.driver_facts import GpuFacts, GpuInstance
from nodedaemon.records import ContainerRecord, ContainerStage, SliceRecord, SliceStage
from puhui.rpc.moment import timestamp
from puhui.v1.card_pb2 import Placement, Slice, SliceState
from puhui.v1.idle_pb2 import Idleness
from puhui.v1.node_pb2 import Container, ContainerState, RuntimeKind

__all__ = ["IdlenessOf", "describe_container", "describe_foreign", "describe_slice", "unwatched"]

IdlenessOf = Callable[[ContainerRecord], Idleness | None]
"""Tells whether a container uses its cards."""

_SLICE_STATES = {
    SliceStage.CREATING: SliceState.SLICE_STATE_CREATING,
    SliceStage.DESTROYING: SliceState.SLICE_STATE_DESTROYING,
    SliceStage.ERROR: SliceState.SLICE_STATE_ERROR,
    SliceStage.DESTROYED: SliceState.SLICE_STATE_UNSPECIFIED,
}
_CONTAINER_STATES = {
    ContainerStage.CREATING: ContainerState.CONTAINER_STATE_CREATING,
    ContainerStage.RUNNING: ContainerState.CONTAINER_STATE_RUNNING,
    ContainerStage.SUSPENDED: ContainerState.CONTAINER_STATE_SUSPENDED,
    ContainerStage.EXITED: ContainerState.CONTAINER_STATE_EXITED,
    ContainerStage.REMOVED: ContainerState.CONTAINER_STATE_EXITED,
}


def describe_slice(record: SliceRecord, gpu: GpuFacts, *, emulated: bool, viewer: str) -> Slice:
    """Returns a slice of this daemon.

    Args:
        record: the slice.
        gpu: its GPU.
        emulated: whether the GPU is emulated.
        viewer: id of the living container that sees it; empty when none does.
    """
    whole = SliceState.SLICE_STATE_ACTIVE if viewer else SliceState.SLICE_STATE_IDLE
    return Slice(
        uuid=record.uuid,
        gpu_uuid=gpu.uuid,
        gpu_index=gpu.index,
        profile=record.profile,
        placement=Placement(start=record.span.start, size=record.span.size),
        gpu_instance_id=record.gi or 0,
        compute_instance_id=record.ci or 0,
        memory_mib=record.memory_mib,
        state=_SLICE_STATES.get(record.stage, whole),
        owner=record.owner.ref(record.token),
        emulated=emulated,
        create_time=timestamp(record.create_time),
        notice=record.notice,
        container_id=viewer,
    )


def describe_foreign(instance: GpuInstance, gpu: GpuFacts, *, emulated: bool) -> Slice:
    """Returns a slice that this daemon did not make."""
    compute = instance.compute_instances[0] if instance.compute_instances else None
    return Slice(
        uuid=compute.uuid if compute else "",
        gpu_uuid=gpu.uuid,
        gpu_index=gpu.index,
        profile=instance.profile.name,
        placement=Placement(start=instance.span.start, size=instance.span.size),
        gpu_instance_id=instance.id,
        compute_instance_id=compute.id if compute else 0,
        memory_mib=instance.profile.memory_mib,
        state=SliceState.SLICE_STATE_FOREIGN,
        emulated=emulated,
        notice="not made by this daemon; it is worked around and never touched",
    )


def unwatched(record: ContainerRecord) -> Idleness | None:
    """Says of every container that nobody asked to watch whether it uses its cards."""
    return None


def describe_container(record: ContainerRecord, runtime: RuntimeKind.ValueType, idleness: Idleness | None) -> Container:
    """Returns a container of this daemon.

    Args:
        record: the container.
        runtime: what runs it.
        idleness: whether it uses its cards; None when it is not watched.
    """
    seeing = record.stage is ContainerStage.CREATING or record.stage.is_alive
    container = Container(
        id=record.container_id,
        owner=record.owner.ref(record.token),
        state=_CONTAINER_STATES[record.stage],
        image=record.image,
        slice_uuids=record.slice_uuids if seeing else (),
        pid=record.pid,
        exit_code=record.exit_code,
        oom_killed=record.oom_killed,
        timed_out=record.timed_out,
        lease_expired=record.lease_expired and not record.stage.is_alive,
        create_time=timestamp(record.create_time),
        runtime=runtime,
        idleness=idleness,
        checkpointed=record.checkpoint is not None and record.stage.is_alive,
    )
    if record.start_time is not None:
        container.start_time.CopyFrom(timestamp(record.start_time))
    if record.end_time is not None:
        container.end_time.CopyFrom(timestamp(record.end_time))
    return container
