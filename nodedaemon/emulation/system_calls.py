"""NVML calls about the library and the node."""

import ctypes
from pathlib import Path
from typing import Any

import pynvml

from nodedaemon.emulation.abi import TEXT_OUT, UINT, UINT_OUT, CallTable, PointerTo, write_text
from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.handles import gpu_handle
from nodedaemon.emulation.refusal import Code, Refusal

# The branch whose nvml.h this emulation follows; the suffix says what it is to whoever reads it.
DRIVER_VERSION = "580.95.05-emulated"
NVML_VERSION = "13.580.95.05-emulated"
_CUDA_VERSION = 13000
_PCI_FIRST_BUS = 0x10

DEVICE = pynvml.c_nvmlDevice_t
DEVICE_OUT = PointerTo(DEVICE)

table = CallTable()


def pci_bus(minor: int) -> int:
    """Return the PCI bus number of a card."""
    return _PCI_FIRST_BUS + minor


@table.export("nvmlInit_v2", needs_init=False)
def _init(driver: EmulatedDriver) -> None:
    driver.init()


@table.export("nvmlInitWithFlags", arguments=(UINT,), needs_init=False)
def _init_with_flags(driver: EmulatedDriver, flags: int) -> None:
    driver.init()


@table.export("nvmlShutdown", needs_init=False)
def _shutdown(driver: EmulatedDriver) -> None:
    driver.shutdown()


@table.export("nvmlSystemGetDriverVersion", arguments=(TEXT_OUT, UINT))
def _driver_version(driver: EmulatedDriver, version: Any, length: int) -> None:
    write_text(version, length, DRIVER_VERSION)


@table.export("nvmlSystemGetNVMLVersion", arguments=(TEXT_OUT, UINT), needs_init=False)
def _nvml_version(driver: EmulatedDriver, version: Any, length: int) -> None:
    write_text(version, length, NVML_VERSION)


@table.export(
    "nvmlSystemGetCudaDriverVersion",
    "nvmlSystemGetCudaDriverVersion_v2",
    arguments=(PointerTo(ctypes.c_int),),
    needs_init=False,
)
def _cuda_version(driver: EmulatedDriver, version: Any) -> None:
    version[0] = _CUDA_VERSION


@table.export("nvmlSystemGetProcessName", arguments=(UINT, TEXT_OUT, UINT))
def _process_name(driver: EmulatedDriver, pid: int, name: Any, length: int) -> None:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as error:
        raise Refusal(Code.NOT_FOUND) from error
    # As on hardware, a buffer that is too short gets the beginning.
    text = command.partition(b"\0")[0].decode(errors="replace")
    write_text(name, length, text.encode()[: max(length - 1, 0)].decode(errors="ignore"))


@table.export("nvmlDeviceGetCount_v2", arguments=(UINT_OUT,))
def _count(driver: EmulatedDriver, count: Any) -> None:
    count[0] = len(driver.read().gpus)


@table.export("nvmlDeviceGetHandleByIndex_v2", arguments=(UINT, DEVICE_OUT))
def _by_index(driver: EmulatedDriver, index: int, device: Any) -> None:
    if index >= len(driver.read().gpus):
        raise Refusal(Code.INVALID_ARGUMENT)
    device[0] = gpu_handle(index, DEVICE)


@table.export("nvmlDeviceGetHandleByPciBusId_v2", arguments=(ctypes.c_char_p, DEVICE_OUT))
def _by_pci_bus_id(driver: EmulatedDriver, bus_id: bytes, device: Any) -> None:
    try:
        domain, bus, rest = bus_id.decode().split(":")
        slot, _, function = rest.partition(".")
        address = (int(domain, 16), int(bus, 16), int(slot, 16), int(function or "0", 16))
    except ValueError as error:
        raise Refusal(Code.INVALID_ARGUMENT) from error
    for gpu in driver.read().gpus:
        if address == (0, pci_bus(gpu.minor), 0, 0):
            device[0] = gpu_handle(gpu.minor, DEVICE)
            return
    raise Refusal(Code.NOT_FOUND)
