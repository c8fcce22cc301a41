"""NVML calls about MIG mode and MIG devices."""

from typing import Any

import pynvml

from nodedaemon.emulation import mig_mode
from nodedaemon.emulation.abi import UINT, UINT_OUT, CallTable, PointerTo, set_fields
from nodedaemon.emulation.compute_instances import compute_profile, owner_profile
from nodedaemon.emulation.driver import EmulatedDriver, MigDevice
from nodedaemon.emulation.geometry import known
from nodedaemon.emulation.gpu_instances import require_mig
from nodedaemon.emulation.handles import gpu_handle, mig_handle
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.system_calls import DEVICE, DEVICE_OUT

table = CallTable()


@table.export("nvmlDeviceGetMigMode", arguments=(DEVICE, UINT_OUT, UINT_OUT))
def _get_mode(driver: EmulatedDriver, handle: Any, current: Any, pending: Any) -> None:
    gpu = driver.gpu(driver.read(), handle)
    current[0], pending[0] = int(gpu.mig), int(gpu.mig_pending)


@table.export("nvmlDeviceSetMigMode", arguments=(DEVICE, UINT, UINT_OUT))
def _set_mode(driver: EmulatedDriver, handle: Any, mode: int, status: Any) -> None:
    with driver.change() as change:
        gpu = driver.gpu(change.node, handle)
        if mode not in (pynvml.NVML_DEVICE_MIG_DISABLE, pynvml.NVML_DEVICE_MIG_ENABLE):
            raise Refusal(Code.INVALID_ARGUMENT)
        driver.require_root()
        status[0] = mig_mode.set_mode(gpu, enabled=mode == pynvml.NVML_DEVICE_MIG_ENABLE)


@table.export("nvmlDeviceGetMaxMigDeviceCount", arguments=(DEVICE, UINT_OUT))
def _most_devices(driver: EmulatedDriver, handle: Any, count: Any) -> None:
    gpu = driver.gpu(driver.read(), handle)
    count[0] = gpu.card.compute_slices if gpu.mig else 0


@table.export("nvmlDeviceGetMigDeviceHandleByIndex", arguments=(DEVICE, UINT, DEVICE_OUT))
def _device_by_index(driver: EmulatedDriver, handle: Any, index: int, device: Any) -> None:
    gpu = driver.gpu(driver.read(), handle)
    require_mig(gpu)
    if index >= gpu.card.compute_slices:
        raise Refusal(Code.INVALID_ARGUMENT)
    if all(compute.mig_index != index for _, compute in gpu.mig_devices()):
        raise Refusal(Code.NOT_FOUND)
    device[0] = mig_handle(gpu.minor, index, DEVICE)


@table.export("nvmlDeviceIsMigDeviceHandle", arguments=(DEVICE, UINT_OUT))
def _is_mig_device(driver: EmulatedDriver, handle: Any, answer: Any) -> None:
    answer[0] = isinstance(driver.device(driver.read(), handle), MigDevice)


def _mig_device(driver: EmulatedDriver, handle: Any, on_gpu: Code) -> MigDevice:
    device = driver.device(driver.read(), handle)
    if not isinstance(device, MigDevice):
        raise Refusal(on_gpu)
    return device


@table.export("nvmlDeviceGetGpuInstanceId", arguments=(DEVICE, UINT_OUT))
def _gpu_instance_id(driver: EmulatedDriver, handle: Any, number: Any) -> None:
    number[0] = _mig_device(driver, handle, Code.INVALID_ARGUMENT).instance.id


@table.export("nvmlDeviceGetComputeInstanceId", arguments=(DEVICE, UINT_OUT))
def _compute_instance_id(driver: EmulatedDriver, handle: Any, number: Any) -> None:
    number[0] = _mig_device(driver, handle, Code.INVALID_ARGUMENT).compute.id


@table.export("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", arguments=(DEVICE, DEVICE_OUT))
def _parent(driver: EmulatedDriver, handle: Any, device: Any) -> None:
    mig = _mig_device(driver, handle, Code.INVALID_ARGUMENT)
    device[0] = gpu_handle(mig.gpu.minor, DEVICE)


@table.export("nvmlDeviceGetAttributes_v2", arguments=(DEVICE, PointerTo(pynvml.c_nvmlDeviceAttributes)))
def _attributes(driver: EmulatedDriver, handle: Any, attributes: Any) -> None:
    mig = _mig_device(driver, handle, Code.NOT_SUPPORTED)
    owner = owner_profile(mig.gpu, mig.instance)
    set_fields(
        attributes,
        multiprocessorCount=known(compute_profile(mig.gpu, mig.instance, mig.compute.profile_id).sm),
        sharedCopyEngineCount=known(owner.copy_engines),
        sharedDecoderCount=known(owner.decoders),
        sharedEncoderCount=known(owner.encoders),
        sharedJpegCount=known(owner.jpeg),
        sharedOfaCount=known(owner.ofa),
        gpuInstanceSliceCount=owner.compute_slices,
        computeInstanceSliceCount=mig.compute.size,
        memorySizeMB=known(owner.memory_mib),
    )
