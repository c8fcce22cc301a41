"""Compute instances inside a GPU instance. Decisions only; no file, no process.

Two widths are known well enough to be offered: the full width of the GPU instance, and one compute
slice. Where the widths in between may sit is not recorded, so they are NOT_SUPPORTED.
"""

from dataclasses import dataclass

from nodedaemon.emulation.geometry import (
    GpuInstanceProfile,
    Placement,
    compute_instance_limits,
    known,
)
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import ComputeInstance, Gpu, GpuInstance, Node, UuidPolicy, mig_uuid

# NVML_COMPUTE_INSTANCE_PROFILE_* of nvml.h: enum, which is also the profile id, to compute slices.
_WIDTHS = {0: 1, 1: 2, 2: 3, 3: 4, 4: 7}
PROFILE_ENUMS = 9


@dataclass(frozen=True, slots=True)
class ComputeProfile:
    """One row of ``nvidia-smi mig -lcip`` for one GPU instance profile.

    Attributes:
        id: Id and enum, which are the same number.
        name: Such as ``3g.40gb`` at full width, ``1c.3g.40gb`` below it.
        slices: Width in compute slices.
        max_instances: How many fit into an empty GPU instance.
        sm: Streaming multiprocessors, None when not recorded.
    """

    id: int
    name: str
    slices: int
    max_instances: int
    sm: int | None


def owner_profile(gpu: Gpu, instance: GpuInstance) -> GpuInstanceProfile:
    """Return the profile of a GPU instance that exists."""
    return known(gpu.card.profile(instance.profile_id))


def compute_profile(gpu: Gpu, instance: GpuInstance, profile_id: int) -> ComputeProfile:
    """Return a compute instance profile of this GPU instance.

    Raises:
        Refusal: NOT_SUPPORTED, when it does not fit or is not recorded.
    """
    owner = owner_profile(gpu, instance)
    limits = compute_instance_limits().get(owner.compute_slices, {})
    width = known(_WIDTHS.get(profile_id))
    most = known(limits.get(profile_id))
    if width == owner.compute_slices:
        return ComputeProfile(profile_id, owner.name, width, most, owner.sm)
    per_slice = gpu.card.sm_per_compute_slice
    sm = None if per_slice is None else per_slice * width
    return ComputeProfile(profile_id, f"{width}c.{owner.name}", width, most, sm)


def placements(gpu: Gpu, instance: GpuInstance, profile: ComputeProfile) -> list[Placement]:
    """Return where instances of the profile may sit in an empty GPU instance.

    Raises:
        Refusal: NOT_SUPPORTED, for a width whose places or multiprocessors are not recorded.
    """
    known(profile.sm)
    owner = owner_profile(gpu, instance)
    if profile.slices == owner.compute_slices:
        return [Placement(0, profile.slices)]
    if profile.slices == 1:
        return [Placement(start, 1) for start in range(owner.compute_slices)]
    raise Refusal(Code.NOT_SUPPORTED)


def free_placements(gpu: Gpu, instance: GpuInstance, profile: ComputeProfile) -> list[Placement]:
    """Return where one more could sit now; they never overlap each other."""
    taken = [compute.placement for compute in instance.compute_instances]
    return [p for p in placements(gpu, instance, profile) if not any(p.overlaps(other) for other in taken)]


def create(
    node: Node,
    gpu: Gpu,
    instance: GpuInstance,
    profile: ComputeProfile,
    wanted: Placement | None,
    policy: UuidPolicy,
) -> ComputeInstance:
    """Add a compute instance, and with it a MIG device.

    Raises:
        Refusal: INVALID_ARGUMENT for a placement that the profile never has,
            INSUFFICIENT_RESOURCES when nothing or not this place is free, NOT_SUPPORTED as in
            `placements`.
    """
    if wanted is not None and wanted not in placements(gpu, instance, profile):
        raise Refusal(Code.INVALID_ARGUMENT)
    free = free_placements(gpu, instance, profile)
    if not free or (wanted is not None and wanted not in free):
        raise Refusal(Code.INSUFFICIENT_RESOURCES)
    placement = free[0] if wanted is None else wanted
    number = _lowest_free({compute.id for compute in instance.compute_instances})
    serial = node.next_serial()
    compute = ComputeInstance(
        number,
        serial,
        profile.id,
        placement.start,
        placement.size,
        _lowest_free({other.mig_index for _, other in gpu.mig_devices()}),
        mig_uuid(gpu, instance, number, serial, policy),
    )
    instance.compute_instances.append(compute)
    return compute


def _lowest_free(taken: set[int]) -> int:
    return next(i for i in range(len(taken) + 1) if i not in taken)
