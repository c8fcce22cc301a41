"""How much of a centre is busy, idle, free and foreign (step S9). Pure: GPUs in, capacity out.

A share is busy while its owner uses it, and idle when it can be had by reclaiming it: its owner does not use it, or
nobody is on it and it is kept warm for its tenant. Every memory slice of a GPU is exactly one of busy, idle, foreign
and free.
"""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.fleet import GpuView, Shape
from controlplane.placement import most_slices
from puhui.v1 import fleet_service_pb2

__all__ = ["gpu_capacity", "profile_capacity"]


def profile_capacity(gpus: Sequence[GpuView]) -> list[fleet_service_pb2.ProfileCapacity]:
    """Returns the capacity for each profile over all GPUs of a model, by GPU model and memory."""
    found: dict[tuple[str, str], fleet_service_pb2.ProfileCapacity] = {}
    for gpu in gpus:
        for one in _profiles(gpu):
            entry = found.setdefault((one.gpu_model, one.profile), one)
            if entry is not one:
                entry.free += one.free
                entry.busy += one.busy
                entry.idle += one.idle
                entry.total += one.total
    return sorted(found.values(), key=_order)


def gpu_capacity(gpus: Sequence[GpuView]) -> list[fleet_service_pb2.GpuCapacity]:
    """Returns the capacity of each GPU, in the order given."""
    return [_of_gpu(gpu) for gpu in gpus]


def _of_gpu(gpu: GpuView) -> fleet_service_pb2.GpuCapacity:
    busy = _mask(gpu, foreign=False, idle=False)
    idle = _mask(gpu, foreign=False, idle=True) & ~busy
    profiles = sorted(_profiles(gpu), key=_order)
    return fleet_service_pb2.GpuCapacity(
        node_id=gpu.node_id,
        gpu_uuid=gpu.gpu_uuid,
        gpu_index=gpu.gpu_index,
        gpu_model=gpu.geometry.gpu_model,
        emulated=gpu.emulated,
        memory_slices_total=gpu.geometry.memory_slices,
        memory_slices_free=gpu.geometry.memory_slices - gpu.held.bit_count(),
        memory_slices_busy=busy.bit_count(),
        memory_slices_idle=idle.bit_count(),
        memory_slices_foreign=(gpu.foreign & ~(busy | idle)).bit_count(),
        free_profiles=[shape.profile for shape in gpu.geometry.shapes if _free(gpu, shape)],
        profiles=profiles,
    )


def _profiles(gpu: GpuView) -> list[fleet_service_pb2.ProfileCapacity]:
    busy: dict[str, int] = {}
    idle: dict[str, int] = {}
    for use in gpu.uses:
        if not use.foreign:
            count = idle if use.idle else busy
            count[use.profile] = count.get(use.profile, 0) + 1
    return [
        fleet_service_pb2.ProfileCapacity(
            gpu_model=gpu.geometry.gpu_model,
            profile=shape.profile,
            memory_mib=shape.memory_mib,
            free=_free(gpu, shape),
            busy=busy.get(shape.profile, 0),
            idle=idle.get(shape.profile, 0),
            total=most_slices(shape, 0),
        )
        for shape in gpu.geometry.shapes
    ]


def _order(entry: fleet_service_pb2.ProfileCapacity) -> tuple[str, int, str]:
    return entry.gpu_model, entry.memory_mib, entry.profile


def _free(gpu: GpuView, shape: Shape) -> int:
    if not gpu.usable:
        return 0
    return max(0, min(most_slices(shape, gpu.held), shape.max_instances - gpu.count(shape.profile)))


def _mask(gpu: GpuView, *, foreign: bool, idle: bool) -> int:
    mask = 0
    for use in gpu.uses:
        if use.foreign is foreign and use.idle is idle:
            mask |= use.mask
    return mask
