"""NVML calls about compute instances."""

from typing import Any

import pynvml

from nodedaemon.emulation import compute_instances
from nodedaemon.emulation.abi import (
    UINT,
    UINT_OUT,
    CallTable,
    PointerTo,
    set_fields,
    write_array,
)
from nodedaemon.emulation.compute_instances import PROFILE_ENUMS, ComputeProfile, compute_profile
from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.geometry import Placement, known
from nodedaemon.emulation.gpu_instance_calls import GPU_INSTANCE
from nodedaemon.emulation.handles import Kind, gpu_handle, instance_handle
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import ComputeInstance, Gpu, GpuInstance
from nodedaemon.emulation.system_calls import DEVICE

COMPUTE_INSTANCE = pynvml.c_nvmlComputeInstance_t
_COMPUTE_INSTANCE_OUT = PointerTo(COMPUTE_INSTANCE)
_PLACEMENT = pynvml.c_nvmlComputeInstancePlacement_t

table = CallTable()


def _handle(compute: ComputeInstance) -> Any:
    return instance_handle(Kind.COMPUTE_INSTANCE, compute.serial, COMPUTE_INSTANCE)


def _described(driver: EmulatedDriver, handle: Any, profile: int, engine_profile: int, info: Any) -> ComputeProfile:
    """Fill what both versions of the profile info share."""
    gpu, instance = driver.gpu_instance(driver.read(), handle)
    if profile >= PROFILE_ENUMS or engine_profile != pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED:
        raise Refusal(Code.INVALID_ARGUMENT)
    row = compute_profile(gpu, instance, profile)
    owner = compute_instances.owner_profile(gpu, instance)
    set_fields(
        info,
        id=row.id,
        sliceCount=row.slices,
        instanceCount=row.max_instances,
        multiprocessorCount=known(row.sm),
        sharedCopyEngineCount=known(owner.copy_engines),
        sharedDecoderCount=known(owner.decoders),
        sharedEncoderCount=known(owner.encoders),
        sharedJpegCount=known(owner.jpeg),
        sharedOfaCount=known(owner.ofa),
    )
    return row


@table.export(
    "nvmlGpuInstanceGetComputeInstanceProfileInfo",
    arguments=(GPU_INSTANCE, UINT, UINT, PointerTo(pynvml.c_nvmlComputeInstanceProfileInfo_t)),
)
def _profile_info(driver: EmulatedDriver, handle: Any, profile: int, engine_profile: int, info: Any) -> None:
    _described(driver, handle, profile, engine_profile, info)


@table.export(
    "nvmlGpuInstanceGetComputeInstanceProfileInfoV",
    arguments=(GPU_INSTANCE, UINT, UINT, PointerTo(pynvml.c_nvmlComputeInstanceProfileInfo_v2_t)),
)
def _profile_info_v(driver: EmulatedDriver, handle: Any, profile: int, engine_profile: int, info: Any) -> None:
    if info.contents.version != pynvml.nvmlComputeInstanceProfileInfo_v2:
        raise Refusal(Code.INVALID_ARGUMENT)
    row = _described(driver, handle, profile, engine_profile, info)
    set_fields(info, name=f"MIG {row.name}")


def _managed(driver: EmulatedDriver, handle: Any, number: int) -> tuple[Gpu, GpuInstance, ComputeProfile]:
    """Return what a caller who may manage instances asks about."""
    gpu, instance = driver.gpu_instance(driver.read(), handle)
    driver.require_config()
    return gpu, instance, compute_profile(gpu, instance, number)


@table.export("nvmlGpuInstanceGetComputeInstanceRemainingCapacity", arguments=(GPU_INSTANCE, UINT, UINT_OUT))
def _remaining(driver: EmulatedDriver, handle: Any, number: int, count: Any) -> None:
    count[0] = len(compute_instances.free_placements(*_managed(driver, handle, number)))


@table.export(
    "nvmlGpuInstanceGetComputeInstancePossiblePlacements",
    arguments=(GPU_INSTANCE, UINT, PointerTo(_PLACEMENT, nullable=True), UINT_OUT),
)
def _placements(driver: EmulatedDriver, handle: Any, number: int, placements: Any, count: Any) -> None:
    possible = compute_instances.placements(*_managed(driver, handle, number))
    write_array((_PLACEMENT(*p) for p in possible), placements, count)


def _create(driver: EmulatedDriver, handle: Any, number: int, wanted: Placement | None, out: Any) -> None:
    with driver.change() as change:
        gpu, instance = driver.gpu_instance(change.node, handle)
        driver.require_config()
        profile = compute_profile(gpu, instance, number)
        compute = compute_instances.create(change.node, gpu, instance, profile, wanted, change.node.uuid_policy)
        driver.caps.add(driver.caps.compute_instance(gpu, instance, compute))
    out[0] = _handle(compute)


@table.export(
    "nvmlGpuInstanceCreateComputeInstance",
    arguments=(GPU_INSTANCE, UINT, _COMPUTE_INSTANCE_OUT),
)
def _create_anywhere(driver: EmulatedDriver, handle: Any, number: int, out: Any) -> None:
    _create(driver, handle, number, None, out)


@table.export(
    "nvmlGpuInstanceCreateComputeInstanceWithPlacement",
    arguments=(GPU_INSTANCE, UINT, PointerTo(_PLACEMENT), _COMPUTE_INSTANCE_OUT),
)
def _create_placed(driver: EmulatedDriver, handle: Any, number: int, placement: Any, out: Any) -> None:
    wanted = Placement(placement.contents.start, placement.contents.size)
    _create(driver, handle, number, wanted, out)


@table.export("nvmlComputeInstanceDestroy", arguments=(COMPUTE_INSTANCE,))
def _destroy(driver: EmulatedDriver, handle: Any) -> None:
    with driver.change() as change:
        mig = driver.compute_instance(change.node, handle)
        driver.require_config()
        node = driver.caps.compute_instance(mig.gpu, mig.instance, mig.compute)
        driver.refuse_if_held(node)
        mig.instance.compute_instances.remove(mig.compute)
        change.after_commit(lambda: driver.caps.remove(node))


@table.export(
    "nvmlGpuInstanceGetComputeInstances",
    arguments=(GPU_INSTANCE, UINT, _COMPUTE_INSTANCE_OUT, UINT_OUT),
)
def _list(driver: EmulatedDriver, handle: Any, number: int, found: Any, count: Any) -> None:
    _, instance, _ = _managed(driver, handle, number)
    same = (_handle(c) for c in instance.compute_instances if c.profile_id == number)
    write_array(same, found, count)


@table.export("nvmlGpuInstanceGetComputeInstanceById", arguments=(GPU_INSTANCE, UINT, _COMPUTE_INSTANCE_OUT))
def _by_id(driver: EmulatedDriver, handle: Any, number: int, out: Any) -> None:
    _, instance = driver.gpu_instance(driver.read(), handle)
    driver.require_config()
    compute = next((c for c in instance.compute_instances if c.id == number), None)
    if compute is None:
        raise Refusal(Code.NOT_FOUND)
    out[0] = _handle(compute)


@table.export(
    "nvmlComputeInstanceGetInfo_v2",
    arguments=(COMPUTE_INSTANCE, PointerTo(pynvml.c_nvmlComputeInstanceInfo_t)),
)
def _info(driver: EmulatedDriver, handle: Any, info: Any) -> None:
    mig = driver.compute_instance(driver.read(), handle)
    set_fields(
        info,
        device=gpu_handle(mig.gpu.minor, DEVICE),
        gpuInstance=instance_handle(Kind.GPU_INSTANCE, mig.instance.serial, GPU_INSTANCE),
        id=mig.compute.id,
        profileId=mig.compute.profile_id,
        placement=_PLACEMENT(*mig.compute.placement),
    )
