"""How much of a centre is free, held and foreign (step S9). Pure: GPUs in, capacity out."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.fleet import GpuView, Shape, span
from controlplane.placement import most_slices
from puhui.v1 import fleet_service_pb2

__all__ = ["gpu_capacity", "profile_capacity"]


def profile_capacity(gpus: Sequence[GpuView]) -> list[fleet_service_pb2.ProfileCapacity]:
    """Returns the capacity for each profile, by GPU model and memory."""
    found: dict[tuple[str, str], fleet_service_pb2.ProfileCapacity] = {}
    for gpu in gpus:
        for shape in gpu.geometry.shapes:
            entry = found.setdefault(
                (gpu.geometry.gpu_model, shape.profile),
                fleet_service_pb2.ProfileCapacity(
                    gpu_model=gpu.geometry.gpu_model, profile=shape.profile, memory_mib=shape.memory_mib
                ),
            )
            entry.free += _free(gpu, shape)
            entry.busy += sum(use.profile == shape.profile and not use.foreign for use in gpu.uses)
            entry.total += most_slices(shape, 0)
    return sorted(found.values(), key=lambda entry: (entry.gpu_model, entry.memory_mib, entry.profile))


def gpu_capacity(gpus: Sequence[GpuView]) -> list[fleet_service_pb2.GpuCapacity]:
    """Returns the capacity of each GPU, in the order given."""
    return [
        fleet_service_pb2.GpuCapacity(
            node_id=gpu.node_id,
            gpu_uuid=gpu.gpu_uuid,
            gpu_index=gpu.gpu_index,
            gpu_model=gpu.geometry.gpu_model,
            emulated=gpu.emulated,
            memory_slices_total=gpu.geometry.memory_slices,
            memory_slices_free=gpu.geometry.memory_slices - gpu.held.bit_count(),
            memory_slices_busy=_mask(gpu, foreign=False).bit_count(),
            memory_slices_foreign=_mask(gpu, foreign=True).bit_count(),
            free_profiles=[shape.profile for shape in gpu.geometry.shapes if _free(gpu, shape)],
        )
        for gpu in gpus
    ]


def _free(gpu: GpuView, shape: Shape) -> int:
    if not gpu.usable:
        return 0
    return max(0, min(most_slices(shape, gpu.held), shape.max_instances - gpu.count(shape.profile)))


def _mask(gpu: GpuView, *, foreign: bool) -> int:
    mask = 0
    for use in gpu.uses:
        if use.foreign is foreign:
            mask |= span(use.start, use.size)
    return mask
