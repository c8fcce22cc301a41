"""NVML calls about memory: of a card, of a MIG device, and the windows onto it.

An emulated process never uses any, so what is free is all there is.
"""

from typing import Any

import pynvml

from nodedaemon.emulation.abi import CallTable, PointerTo, set_fields
from nodedaemon.emulation.boards import board
from nodedaemon.emulation.compute_instances import owner_profile
from nodedaemon.emulation.driver import EmulatedDriver, MigDevice
from nodedaemon.emulation.geometry import known
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.system_calls import DEVICE

_MIB = 1 << 20
_KIB_PER_MIB = 1024

table = CallTable()


def _total_bytes(driver: EmulatedDriver, handle: Any) -> int:
    """Return the memory of a card or of a MIG device.

    Raises:
        Refusal: NO_PERMISSION for a card in MIG mode, where nvml.h gives aggregate information "only
            if the caller has appropriate privileges"; those of a MIG device are anybody's.
    """
    device = driver.device(driver.read(), handle)
    if isinstance(device, MigDevice):
        return known(owner_profile(device.gpu, device.instance).memory_mib) * _MIB
    driver.require_monitor(device)
    return known(device.card.memory_total_mib) * _MIB


@table.export("nvmlDeviceGetMemoryInfo", arguments=(DEVICE, PointerTo(pynvml.c_nvmlMemory_t)))
def _memory(driver: EmulatedDriver, handle: Any, memory: Any) -> None:
    total = _total_bytes(driver, handle)
    set_fields(memory, total=total, free=total, used=0)


@table.export("nvmlDeviceGetMemoryInfo_v2", arguments=(DEVICE, PointerTo(pynvml.c_nvmlMemory_v2_t)))
def _memory_v2(driver: EmulatedDriver, handle: Any, memory: Any) -> None:
    if memory.contents.version != pynvml.nvmlMemory_v2:
        raise Refusal(Code.INVALID_ARGUMENT)
    total = _total_bytes(driver, handle)
    set_fields(memory, total=total, reserved=0, free=total, used=0)


@table.export("nvmlDeviceGetBAR1MemoryInfo", arguments=(DEVICE, PointerTo(pynvml.c_nvmlBAR1Memory_t)))
def _bar1(driver: EmulatedDriver, handle: Any, memory: Any) -> None:
    device = driver.device(driver.read(), handle)
    if isinstance(device, MigDevice):
        # As the MIG user guide shows it: 32767 of 65535 MiB for half of an A100's memory.
        card = device.gpu.card
        total = known(board(card.model).bar1_mib) * _MIB * device.instance.size // card.memory_slices
    else:
        driver.require_monitor(device)
        total = known(board(device.model).bar1_mib) * _MIB
    set_fields(memory, bar1Total=total, bar1Free=total, bar1Used=0)


@table.export(
    "nvmlDeviceGetConfComputeMemSizeInfo",
    arguments=(DEVICE, PointerTo(pynvml.c_nvmlConfComputeMemSizeInfo_t)),
)
def _protected(driver: EmulatedDriver, handle: Any, sizes: Any) -> None:
    gpu = driver.gpu(driver.read(), handle, on_mig=Code.NOT_SUPPORTED)
    unprotected = known(gpu.card.memory_total_mib) * _KIB_PER_MIB
    set_fields(sizes, protectedMemSizeKib=0, unprotectedMemSizeKib=unprotected)
