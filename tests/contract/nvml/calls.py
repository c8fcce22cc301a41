"""pynvml's calls with their output arguments turned into results, so that tests read well."""

from ctypes import byref, c_uint
from typing import Any

import pynvml

from nodedaemon.emulation import EmulatedDriver

Handle = Any


def profiles(device: Handle) -> dict[str, Any]:
    """Every GPU instance profile that the driver knows, by its name without ``MIG``."""
    found = {}
    for enum in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, enum)
        except pynvml.NVMLError_NotSupported:
            continue
        found[info.name.removeprefix("MIG ")] = info
    return found


def placements(device: Handle, profile_id: int) -> list[tuple[int, int]]:
    count = c_uint()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile_id, None, byref(count))
    found = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile_id, found, byref(count))
    return [(p.start, p.size) for p in found]


def remaining(device: Handle, profile_id: int) -> int:
    count: int = pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(device, profile_id)
    return count


def create(device: Handle, profile_id: int, start: int, size: int) -> Handle:
    wanted = pynvml.c_nvmlGpuInstancePlacement_t(start, size)
    return pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(device, profile_id, byref(wanted))


def create_full_compute(instance: Handle) -> Handle:
    """Create the compute instance as wide as its GPU instance."""
    for enum in reversed(range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT)):
        try:
            info = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, enum, 0)
        except pynvml.NVMLError_NotSupported:
            continue
        return pynvml.nvmlGpuInstanceCreateComputeInstance(instance, info.id)
    raise AssertionError("the GPU instance has no compute instance profile")


def instances(device: Handle, profile_id: int) -> list[Handle]:
    count = c_uint(16)
    found = (pynvml.c_nvmlGpuInstance_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstances(device, profile_id, found, byref(count))
    return list(found[: count.value])


def compute_instances(instance: Handle, profile_id: int) -> list[Handle]:
    count = c_uint(8)
    found = (pynvml.c_nvmlComputeInstance_t * count.value)()
    pynvml.nvmlGpuInstanceGetComputeInstances(instance, profile_id, found, byref(count))
    return list(found[: count.value])


def all_placements(device: Handle) -> list[tuple[int, int]]:
    """Where every GPU instance of the device sits."""
    infos = [
        pynvml.nvmlGpuInstanceGetInfo(instance)
        for profile in profiles(device).values()
        for instance in instances(device, profile.id)
    ]
    return sorted((info.placement.start, info.placement.size) for info in infos)


def cap_node(driver: EmulatedDriver, path: str) -> Any:
    """The cap node of a path such as ``gpu0/gi1/access``, looked up as the node daemon does."""
    lines = driver.caps.minors_file.read_text().splitlines()
    minors = dict(line.split() for line in lines)
    return driver.caps.directory / f"nvidia-cap{minors[path]}"
