"""NVML calls about who runs on a card or on a MIG device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pynvml

from nodedaemon.emulation.abi import UINT_OUT, CallTable, PointerTo
from nodedaemon.emulation.driver import EmulatedDriver, MigDevice
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import Gpu
from nodedaemon.emulation.system_calls import DEVICE

_NO_ID = 0xFFFFFFFF
_PROCESSES = (DEVICE, UINT_OUT, PointerTo(pynvml.c_nvmlProcessInfo_v2_t, nullable=True))
_COMPUTE_MODE = 0  # of nvmlProcessDetailList_t; 1 is graphics, 2 is MPS
_LAST_MODE = 2

table = CallTable()


class _Running(NamedTuple):
    pid: int
    gpu_instance: int
    compute_instance: int


@table.export(
    "nvmlDeviceGetComputeRunningProcesses_v2",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    arguments=_PROCESSES,
)
def _compute_processes(driver: EmulatedDriver, handle: Any, count: Any, infos: Any) -> None:
    running = _all_running(driver, handle)
    capacity, count[0] = count[0], len(running)
    if running and (not infos or capacity < len(running)):
        raise Refusal(Code.INSUFFICIENT_SIZE)
    for position, process in enumerate(running):
        info = infos[position]
        info.pid = process.pid
        info.gpuInstanceId = process.gpu_instance
        info.computeInstanceId = process.compute_instance
        info.usedGpuMemory = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value


@table.export(
    "nvmlDeviceGetRunningProcessDetailList",
    arguments=(DEVICE, PointerTo(pynvml.c_nvmlProcessDetailList_t)),
)
def _process_details(driver: EmulatedDriver, handle: Any, details: Any) -> None:
    wanted = details.contents
    if wanted.version != pynvml.nvmlProcessDetailList_v1:
        raise Refusal(Code.ARGUMENT_VERSION_MISMATCH)
    if wanted.mode > _LAST_MODE:
        raise Refusal(Code.INVALID_ARGUMENT)
    running = _all_running(driver, handle)
    if wanted.mode != _COMPUTE_MODE:
        running = []
    capacity, wanted.numProcArrayEntries = wanted.numProcArrayEntries, len(running)
    if running and (not wanted.procArray or capacity < len(running)):
        raise Refusal(Code.INSUFFICIENT_SIZE)
    for position, process in enumerate(running):
        detail = wanted.procArray[position]
        detail.pid = process.pid
        detail.gpuInstanceId = process.gpu_instance
        detail.computeInstanceId = process.compute_instance
        detail.usedGpuMemory = 0  # pynvml 13 fails on "not available" here, unlike in the calls above
        detail.usedGpuCcProtectedMemory = 0


def _all_running(driver: EmulatedDriver, handle: Any) -> list[_Running]:
    """Return who runs on a device.

    Raises:
        Refusal: NO_PERMISSION for a card in MIG mode, where nvml.h gives aggregate information "only
            if the caller has appropriate privileges"; who runs on a MIG device is anybody's to see.
    """
    device = driver.device(driver.read(), handle)
    if not isinstance(device, MigDevice):
        driver.require_monitor(device)
    return list(_running(driver, device))


def _running(driver: EmulatedDriver, device: Gpu | MigDevice) -> Iterator[_Running]:
    """Yield who holds a compute instance, and for a whole card who holds only a GPU instance."""
    nodes: dict[Path, tuple[int, int]] = {}
    if isinstance(device, MigDevice):
        node = driver.caps.compute_instance(device.gpu, device.instance, device.compute)
        nodes[node] = (device.instance.id, device.compute.id)
    else:
        for instance, compute in device.mig_devices():
            node = driver.caps.compute_instance(device, instance, compute)
            nodes[node] = (instance.id, compute.id)
        for instance in device.instances:
            nodes[driver.caps.gpu_instance(device, instance)] = (instance.id, _NO_ID)
    if not nodes:
        return
    seen: set[tuple[int, int]] = set()
    for node, pids in driver.processes(nodes).items():
        gpu_instance, compute_instance = nodes[node]
        for pid in pids:
            if compute_instance == _NO_ID and (pid, gpu_instance) in seen:
                continue
            seen.add((pid, gpu_instance))
            yield _Running(pid, gpu_instance, compute_instance)


@table.export(
    "nvmlDeviceGetGraphicsRunningProcesses_v2",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    arguments=_PROCESSES,
)
def _other_processes(driver: EmulatedDriver, handle: Any, count: Any, infos: Any) -> None:
    driver.device(driver.read(), handle)
    count[0] = 0
