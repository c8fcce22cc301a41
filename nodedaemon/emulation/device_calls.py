"""NVML calls that read one device: what it is, its sensors, who runs on it."""

import ctypes
from typing import Any

import pynvml

from nodedaemon.emulation import sensors
from nodedaemon.emulation.abi import (
    TEXT_OUT,
    UINT,
    UINT_OUT,
    CallTable,
    PointerTo,
    set_fields,
    write_text,
)
from nodedaemon.emulation.compute_instances import owner_profile
from nodedaemon.emulation.driver import EmulatedDriver, MigDevice
from nodedaemon.emulation.geometry import Architecture, known
from nodedaemon.emulation.handles import gpu_handle, mig_handle
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import Gpu
from nodedaemon.emulation.system_calls import DEVICE, DEVICE_OUT, pci_bus

_ARCHITECTURES = {
    Architecture.AMPERE: pynvml.NVML_DEVICE_ARCH_AMPERE,
    Architecture.HOPPER: pynvml.NVML_DEVICE_ARCH_HOPPER,
    Architecture.BLACKWELL: pynvml.NVML_DEVICE_ARCH_BLACKWELL,
}

table = CallTable()


@table.export("nvmlDeviceGetHandleByUUID", arguments=(ctypes.c_char_p, DEVICE_OUT))
def _by_uuid(driver: EmulatedDriver, uuid: bytes, device: Any) -> None:
    wanted = uuid.decode(errors="replace")
    for gpu in driver.read().gpus:
        if gpu.uuid == wanted:
            device[0] = gpu_handle(gpu.minor, DEVICE)
            return
        for _, compute in gpu.mig_devices():
            if compute.uuid == wanted:
                device[0] = mig_handle(gpu.minor, compute.mig_index, DEVICE)
                return
    raise Refusal(Code.NOT_FOUND)


@table.export("nvmlDeviceGetName", arguments=(DEVICE, TEXT_OUT, UINT))
def _name(driver: EmulatedDriver, handle: Any, name: Any, length: int) -> None:
    device = driver.device(driver.read(), handle)
    if isinstance(device, MigDevice):
        profile = owner_profile(device.gpu, device.instance)
        partial = device.compute.size < profile.compute_slices
        shape = f"{device.compute.size}c.{profile.name}" if partial else profile.name
        write_text(name, length, f"{device.gpu.card.name} MIG {shape}")
    else:
        write_text(name, length, device.card.name)


@table.export("nvmlDeviceGetUUID", arguments=(DEVICE, TEXT_OUT, UINT))
def _uuid(driver: EmulatedDriver, handle: Any, uuid: Any, length: int) -> None:
    device = driver.device(driver.read(), handle)
    write_text(uuid, length, device.compute.uuid if isinstance(device, MigDevice) else device.uuid)


@table.export("nvmlDeviceGetIndex", arguments=(DEVICE, UINT_OUT))
def _index(driver: EmulatedDriver, handle: Any, index: Any) -> None:
    device = driver.device(driver.read(), handle)
    index[0] = device.compute.mig_index if isinstance(device, MigDevice) else device.minor


@table.export("nvmlDeviceGetMinorNumber", arguments=(DEVICE, UINT_OUT))
def _minor(driver: EmulatedDriver, handle: Any, minor: Any) -> None:
    minor[0] = _sensor_gpu(driver, handle).minor


@table.export("nvmlDeviceGetPciInfo_v3", arguments=(DEVICE, PointerTo(pynvml.nvmlPciInfo_t)))
def _pci_info(driver: EmulatedDriver, handle: Any, pci: Any) -> None:
    gpu = _sensor_gpu(driver, handle)
    bus = pci_bus(gpu.minor)
    set_fields(
        pci,
        busIdLegacy=f"0000:{bus:02X}:00.0",
        busId=f"00000000:{bus:02X}:00.0",
        domain=0,
        bus=bus,
        device=0,
        pciDeviceId=known(gpu.card.pci_device_id),
        pciSubSystemId=0,
    )


@table.export("nvmlDeviceGetArchitecture", arguments=(DEVICE, PointerTo(pynvml._nvmlDeviceArchitecture_t)))
def _architecture(driver: EmulatedDriver, handle: Any, architecture: Any) -> None:
    device = driver.device(driver.read(), handle)
    gpu = device.gpu if isinstance(device, MigDevice) else device
    architecture[0] = _ARCHITECTURES[gpu.card.architecture]


@table.export(
    "nvmlDeviceGetCudaComputeCapability",
    arguments=(DEVICE, PointerTo(ctypes.c_int), PointerTo(ctypes.c_int)),
)
def _capability(driver: EmulatedDriver, handle: Any, major: Any, minor: Any) -> None:
    device = driver.device(driver.read(), handle)
    gpu = device.gpu if isinstance(device, MigDevice) else device
    major[0], minor[0] = gpu.card.compute_capability


def _sensor_gpu(driver: EmulatedDriver, handle: Any) -> Gpu:
    """Return the card; what is read of a whole card is not supported on a MIG device."""
    return driver.gpu(driver.read(), handle, on_mig=Code.NOT_SUPPORTED)


@table.export("nvmlDeviceGetPowerUsage", arguments=(DEVICE, UINT_OUT))
def _power(driver: EmulatedDriver, handle: Any, milliwatts: Any) -> None:
    gpu = _sensor_gpu(driver, handle)
    limit = known(gpu.card.power_limit_watts)
    milliwatts[0] = sensors.power_milliwatts(limit, sensors.busy_share(driver, gpu))


@table.export(
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetPowerManagementLimit",
    "nvmlDeviceGetPowerManagementDefaultLimit",
    arguments=(DEVICE, UINT_OUT),
)
def _power_limit(driver: EmulatedDriver, handle: Any, milliwatts: Any) -> None:
    milliwatts[0] = 1000 * known(_sensor_gpu(driver, handle).card.power_limit_watts)


@table.export("nvmlDeviceGetTemperature", arguments=(DEVICE, UINT, UINT_OUT))
def _temperature(driver: EmulatedDriver, handle: Any, sensor: int, celsius: Any) -> None:
    if sensor != pynvml.NVML_TEMPERATURE_GPU:
        raise Refusal(Code.INVALID_ARGUMENT)
    gpu = _sensor_gpu(driver, handle)
    celsius[0] = sensors.temperature_celsius(sensors.busy_share(driver, gpu))


@table.export("nvmlDeviceGetTemperatureV", arguments=(DEVICE, PointerTo(pynvml.c_nvmlTemperature_v1_t)))
def _temperature_v(driver: EmulatedDriver, handle: Any, reading: Any) -> None:
    if (
        reading.contents.version != pynvml.nvmlTemperature_v1
        or reading.contents.sensorType != pynvml.NVML_TEMPERATURE_GPU
    ):
        raise Refusal(Code.INVALID_ARGUMENT)
    gpu = _sensor_gpu(driver, handle)
    set_fields(reading, temperature=sensors.temperature_celsius(sensors.busy_share(driver, gpu)))


@table.export("nvmlDeviceGetEccMode", arguments=(DEVICE, UINT_OUT, UINT_OUT))
def _ecc_mode(driver: EmulatedDriver, handle: Any, current: Any, pending: Any) -> None:
    _sensor_gpu(driver, handle)
    current[0] = pending[0] = pynvml.NVML_FEATURE_ENABLED


@table.export(
    "nvmlDeviceGetTotalEccErrors",
    arguments=(DEVICE, UINT, UINT, PointerTo(ctypes.c_ulonglong)),
)
def _ecc_errors(driver: EmulatedDriver, handle: Any, kind: int, counter: int, count: Any) -> None:
    _sensor_gpu(driver, handle)
    if kind >= pynvml.NVML_MEMORY_ERROR_TYPE_COUNT or counter >= pynvml.NVML_ECC_COUNTER_TYPE_COUNT:
        raise Refusal(Code.INVALID_ARGUMENT)
    count[0] = 0


@table.export("nvmlDeviceGetPersistenceMode", arguments=(DEVICE, UINT_OUT))
def _persistence(driver: EmulatedDriver, handle: Any, mode: Any) -> None:
    _sensor_gpu(driver, handle)
    mode[0] = pynvml.NVML_FEATURE_ENABLED


def _idle_gpu(driver: EmulatedDriver, handle: Any) -> None:
    """Refuse with NOT_SUPPORTED in MIG mode, as hardware does.

    Without MIG mode nothing can run on an emulated card, so what is left to report is 0.
    """
    if _sensor_gpu(driver, handle).mig:
        raise Refusal(Code.NOT_SUPPORTED)


@table.export("nvmlDeviceGetUtilizationRates", arguments=(DEVICE, PointerTo(pynvml.c_nvmlUtilization_t)))
def _utilization(driver: EmulatedDriver, handle: Any, rates: Any) -> None:
    _idle_gpu(driver, handle)
    set_fields(rates, gpu=0, memory=0)


@table.export(
    "nvmlDeviceGetEncoderUtilization",
    "nvmlDeviceGetDecoderUtilization",
    "nvmlDeviceGetJpgUtilization",
    "nvmlDeviceGetOfaUtilization",
    arguments=(DEVICE, UINT_OUT, UINT_OUT),
)
def _codec_utilization(driver: EmulatedDriver, handle: Any, percent: Any, period: Any) -> None:
    _idle_gpu(driver, handle)
    percent[0] = period[0] = 0


@table.export(
    "nvmlDeviceGetProcessUtilization",
    arguments=(
        DEVICE,
        PointerTo(pynvml.c_nvmlProcessUtilizationSample_t, nullable=True),
        UINT_OUT,
        ctypes.c_ulonglong,
    ),
)
def _process_utilization(driver: EmulatedDriver, handle: Any, samples: Any, count: Any, since: int) -> None:
    _idle_gpu(driver, handle)
    raise Refusal(Code.NOT_FOUND)
