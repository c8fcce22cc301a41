"""What is asked of the driver for one slice: sequences of calls, for the thread of its GPU."""

from __future__ import annotations

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import ComputeInstance, GpuInstance, Span
from nodedaemon.reconcile import is_same
from nodedaemon.records import SliceRecord

__all__ = ["fill", "find", "in_the_way", "remove", "whole"]


def in_the_way(driver: Driver, gpu_uuid: str, span: Span) -> list[GpuInstance]:
    """Returns the GPU instances that want a memory slice of a place, whoever made them."""
    listed = [one for one in driver.instances(gpu_uuid, compute=False) if one.span.overlaps(span)]
    # The list may lag behind; what is asked for by its id does not.
    really = [driver.instance(gpu_uuid, one.id) for one in listed]
    return [one for one in really if one is not None and one.span.overlaps(span)]


def fill(driver: Driver, record: SliceRecord, compute_slices: int, new: bool) -> GpuInstance | None:
    """Gives a GPU instance its full-width compute instance, and returns what the driver lists then."""
    assert record.gi is not None, "it has a GPU instance"  # noqa: S101 - for the type checker
    gi = record.gi
    # One that is not new may have been given its compute instance just before the daemon died.
    if new or not driver.has_compute_instance(record.gpu_uuid, gi):
        driver.create_compute_instance(record.gpu_uuid, gi, compute_slices)
    return driver.instance(record.gpu_uuid, gi)


def find(driver: Driver, record: SliceRecord) -> GpuInstance | None:
    """Returns the GPU instance of a record, asked for by id, or None: it is not there, or what is there is not ours."""
    if record.gi is None:
        found = driver.instance_at(record.gpu_uuid, record.profile_id, record.span)
        if found is not None and driver.has_compute_instance(record.gpu_uuid, found.id):
            return None  # somebody else's, though the list may not show it yet
    else:
        found = driver.instance(record.gpu_uuid, record.gi)
    return found if found is not None and is_same(record, found) else None


def remove(driver: Driver, record: SliceRecord) -> None:
    """Takes away what there is of a slice."""
    instance = find(driver, record)
    if instance is None:
        return  # somebody else was quicker
    for compute in instance.compute_instances:
        driver.destroy_compute_instance(record.gpu_uuid, instance.id, compute.id)
    driver.destroy_gpu_instance(record.gpu_uuid, instance.id)


def whole(instance: GpuInstance | None, record: SliceRecord, compute_slices: int) -> ComputeInstance | None:
    """Returns the full-width compute instance of a slice, when instance and compute instance are as they should be."""
    if instance is None or instance.span != record.span or len(instance.compute_instances) != 1:
        return None
    (compute,) = instance.compute_instances
    return compute if compute.compute_slices == compute_slices and compute.uuid else None
