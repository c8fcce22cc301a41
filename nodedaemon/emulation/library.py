"""The library object that pynvml calls instead of libnvidia-ml.so.1."""

import ctypes
from collections.abc import Callable
from typing import Any

import pynvml

from nodedaemon.emulation import (
    board_calls,
    compute_instance_calls,
    device_calls,
    event_calls,
    feature_calls,
    field_calls,
    gpm_calls,
    gpu_instance_calls,
    memory_calls,
    mig_calls,
    process_calls,
    system_calls,
)
from nodedaemon.emulation.abi import c_function, public_name
from nodedaemon.emulation.driver import EmulatedDriver

_TABLES = (
    system_calls.table,
    device_calls.table,
    mig_calls.table,
    gpu_instance_calls.table,
    compute_instance_calls.table,
    gpm_calls.table,
    board_calls.table,
    memory_calls.table,
    process_calls.table,
    field_calls.table,
    feature_calls.table,
    event_calls.table,
)


def functions() -> frozenset[str]:
    """Return the name of every function that the emulation has, without ``_v2`` and ``_v3``."""
    return frozenset(public_name(call.name) for table in _TABLES for call in table.calls)


class RealDriverLoadedError(RuntimeError):
    """pynvml already talks to a real driver in this process."""


class EmulatedLibrary:
    """Has one C function pointer per implemented symbol, and no other public attribute.

    A symbol that is not implemented is missing, so pynvml answers FUNCTION_NOT_FOUND, as with an
    older real library.
    """

    def __init__(self, driver: EmulatedDriver) -> None:
        for table in _TABLES:
            for call in table.calls:
                setattr(self, call.name, c_function(call, driver))
        self.nvmlErrorString = _error_string()


def _error_string() -> Any:
    """Return ``const char *nvmlErrorString(nvmlReturn_t)``."""
    texts = dict(pynvml.NVMLError._errcode_to_string)
    texts[pynvml.NVML_SUCCESS] = "The operation was successful"
    texts[pynvml.NVML_ERROR_IN_USE] = "In use by another client"
    texts[pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES] = "Insufficient Resources"
    # The caller gets an address and never frees it, so every text lives as long as the function.
    buffers = {code: ctypes.create_string_buffer(text.encode()) for code, text in texts.items()}

    def run(code: int) -> int:
        known = code if code in buffers else pynvml.NVML_ERROR_UNKNOWN
        return ctypes.addressof(buffers[known])

    prototype: Callable[..., Any] = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)
    return prototype(run)


def put_under_pynvml(driver: EmulatedDriver) -> Callable[[], None]:
    """Make pynvml call the emulated driver; pynvml itself stays as it is.

    Returns:
        What puts back what was there.

    Raises:
        RealDriverLoadedError: A real driver is loaded in this process.
    """
    previous = pynvml.nvmlLib
    if isinstance(previous, ctypes.CDLL):
        raise RealDriverLoadedError(
            "This process has loaded the real NVML, and emulated cards never mix with real ones."
            " Start the emulation in a process of its own."
        )
    _replace(EmulatedLibrary(driver))
    return lambda: _replace(previous)


def _replace(library: EmulatedLibrary | None) -> None:
    # pynvml loads the real library only while nvmlLib is None, and keeps the functions it has
    # looked up in a cache.
    with pynvml.libLoadLock:
        pynvml.nvmlLib = library
        pynvml._nvmlGetFunctionPointer_cache.clear()
