"""NVML calls about GPU instances."""

from typing import Any

import pynvml

from nodedaemon.emulation import gpu_instances
from nodedaemon.emulation.abi import (
    UINT,
    UINT_OUT,
    CallTable,
    PointerTo,
    set_fields,
    write_array,
)
from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.geometry import GpuInstanceProfile, Placement, known
from nodedaemon.emulation.handles import Kind, gpu_handle, instance_handle
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import Gpu, GpuInstance
from nodedaemon.emulation.system_calls import DEVICE

GPU_INSTANCE = pynvml.c_nvmlGpuInstance_t
_GPU_INSTANCE_OUT = PointerTo(GPU_INSTANCE)
_PLACEMENT = pynvml.c_nvmlGpuInstancePlacement_t

table = CallTable()


def _handle(instance: GpuInstance) -> Any:
    return instance_handle(Kind.GPU_INSTANCE, instance.serial, GPU_INSTANCE)


def _fill(info: Any, profile: GpuInstanceProfile) -> None:
    set_fields(
        info,
        id=profile.id,
        isP2pSupported=0,
        sliceCount=profile.compute_slices,
        instanceCount=profile.max_instances,
        multiprocessorCount=known(profile.sm),
        copyEngineCount=known(profile.copy_engines),
        decoderCount=known(profile.decoders),
        encoderCount=known(profile.encoders),
        jpegCount=known(profile.jpeg),
        ofaCount=known(profile.ofa),
        memorySizeMB=known(profile.memory_mib),
    )


def _profile_by_enum(driver: EmulatedDriver, handle: Any, enum: int) -> GpuInstanceProfile:
    gpu = driver.gpu(driver.read(), handle)
    if enum >= pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT:
        raise Refusal(Code.INVALID_ARGUMENT)
    gpu_instances.require_mig(gpu)
    return known(gpu.card.profile_by_enum(enum))


def _check_version(info: Any) -> None:
    if info.contents.version != pynvml.nvmlGpuInstanceProfileInfo_v2:
        raise Refusal(Code.INVALID_ARGUMENT)


@table.export(
    "nvmlDeviceGetGpuInstanceProfileInfo",
    arguments=(DEVICE, UINT, PointerTo(pynvml.c_nvmlGpuInstanceProfileInfo_t)),
)
def _profile_info(driver: EmulatedDriver, handle: Any, enum: int, info: Any) -> None:
    _fill(info, _profile_by_enum(driver, handle, enum))


@table.export(
    "nvmlDeviceGetGpuInstanceProfileInfoV",
    arguments=(DEVICE, UINT, PointerTo(pynvml.c_nvmlGpuInstanceProfileInfo_v2_t)),
)
def _profile_info_v(driver: EmulatedDriver, handle: Any, enum: int, info: Any) -> None:
    _check_version(info)
    profile = _profile_by_enum(driver, handle, enum)
    _fill(info, profile)
    set_fields(info, name=f"MIG {profile.name}")


@table.export(
    "nvmlDeviceGetGpuInstanceProfileInfoByIdV",
    arguments=(DEVICE, UINT, PointerTo(pynvml.c_nvmlGpuInstanceProfileInfo_v2_t)),
)
def _profile_info_by_id(driver: EmulatedDriver, handle: Any, number: int, info: Any) -> None:
    _check_version(info)
    gpu = driver.gpu(driver.read(), handle)
    gpu_instances.require_mig(gpu)
    profile = gpu_instances.profile_with_id(gpu, number, Code.NOT_SUPPORTED)
    _fill(info, profile)
    set_fields(info, name=f"MIG {profile.name}")


def _managed_gpu(driver: EmulatedDriver, handle: Any) -> Gpu:
    """Return the card, for a caller who may manage its instances."""
    gpu = driver.gpu(driver.read(), handle)
    gpu_instances.require_mig(gpu)
    driver.require_config()
    return gpu


@table.export(
    "nvmlDeviceGetGpuInstancePossiblePlacements",
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2",
    arguments=(DEVICE, UINT, PointerTo(_PLACEMENT, nullable=True), UINT_OUT),
)
def _placements(driver: EmulatedDriver, handle: Any, number: int, placements: Any, count: Any) -> None:
    gpu = _managed_gpu(driver, handle)
    profile = gpu_instances.profile_with_id(gpu, number, Code.NOT_SUPPORTED)
    write_array((_PLACEMENT(*p) for p in known(profile.placements)), placements, count)


@table.export("nvmlDeviceGetGpuInstanceRemainingCapacity", arguments=(DEVICE, UINT, UINT_OUT))
def _remaining(driver: EmulatedDriver, handle: Any, number: int, count: Any) -> None:
    gpu = _managed_gpu(driver, handle)
    profile = gpu_instances.profile_with_id(gpu, number, Code.NOT_SUPPORTED)
    count[0] = gpu_instances.remaining_capacity(gpu, profile)


def _create(driver: EmulatedDriver, handle: Any, number: int, wanted: Placement | None, out: Any) -> None:
    with driver.change() as change:
        gpu = driver.gpu(change.node, handle)
        gpu_instances.require_mig(gpu)
        driver.require_config()
        profile = gpu_instances.profile_with_id(gpu, number, Code.INVALID_ARGUMENT)
        instance = gpu_instances.create(change.node, gpu, profile, wanted)
        driver.caps.add(driver.caps.gpu_instance(gpu, instance))
    out[0] = _handle(instance)


@table.export("nvmlDeviceCreateGpuInstance", arguments=(DEVICE, UINT, _GPU_INSTANCE_OUT))
def _create_anywhere(driver: EmulatedDriver, handle: Any, number: int, out: Any) -> None:
    _create(driver, handle, number, None, out)


@table.export(
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    arguments=(DEVICE, UINT, PointerTo(_PLACEMENT), _GPU_INSTANCE_OUT),
)
def _create_placed(driver: EmulatedDriver, handle: Any, number: int, placement: Any, out: Any) -> None:
    wanted = Placement(placement.contents.start, placement.contents.size)
    _create(driver, handle, number, wanted, out)


@table.export("nvmlGpuInstanceDestroy", arguments=(GPU_INSTANCE,))
def _destroy(driver: EmulatedDriver, handle: Any) -> None:
    with driver.change() as change:
        gpu, instance = driver.gpu_instance(change.node, handle)
        driver.require_config()
        if instance.compute_instances:
            raise Refusal(Code.IN_USE)
        node = driver.caps.gpu_instance(gpu, instance)
        driver.refuse_if_held(node)
        gpu.instances.remove(instance)
        change.after_commit(lambda: driver.caps.remove(node))


@table.export("nvmlDeviceGetGpuInstances", arguments=(DEVICE, UINT, _GPU_INSTANCE_OUT, UINT_OUT))
def _list(driver: EmulatedDriver, handle: Any, number: int, instances: Any, count: Any) -> None:
    gpu = _managed_gpu(driver, handle)
    gpu_instances.profile_with_id(gpu, number, Code.INVALID_ARGUMENT)
    found = (_handle(instance) for instance in gpu.instances if instance.profile_id == number)
    write_array(found, instances, count)


@table.export("nvmlDeviceGetGpuInstanceById", arguments=(DEVICE, UINT, _GPU_INSTANCE_OUT))
def _by_id(driver: EmulatedDriver, handle: Any, number: int, out: Any) -> None:
    gpu = _managed_gpu(driver, handle)
    instance = next((i for i in gpu.instances if i.id == number), None)
    if instance is None:
        raise Refusal(Code.NOT_FOUND)
    out[0] = _handle(instance)


@table.export(
    "nvmlGpuInstanceGetInfo",
    arguments=(GPU_INSTANCE, PointerTo(pynvml.c_nvmlGpuInstanceInfo_t)),
)
def _info(driver: EmulatedDriver, handle: Any, info: Any) -> None:
    gpu, instance = driver.gpu_instance(driver.read(), handle)
    set_fields(
        info,
        device=gpu_handle(gpu.minor, DEVICE),
        id=instance.id,
        profileId=instance.profile_id,
        placement=_PLACEMENT(*instance.placement),
    )
