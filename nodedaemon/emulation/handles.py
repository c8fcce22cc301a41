"""Opaque handles: a number in the place of a pointer, which nobody may follow.

NVML's handles are pointers to its own structures. Here the upper bits hold the kind and the lower
ones say which; nothing is ever stored at that address.
"""

import ctypes
from enum import IntEnum
from typing import Any, NamedTuple

from nodedaemon.emulation.refusal import Code, Refusal

_KIND_SHIFT = 40
_MIG_SHIFT = 8


class Kind(IntEnum):
    """What a handle stands for."""

    GPU = 1
    MIG_DEVICE = 2
    GPU_INSTANCE = 3
    COMPUTE_INSTANCE = 4
    GPM_SAMPLE = 5
    EVENT_SET = 6


class DeviceHandle(NamedTuple):
    """A decoded device handle.

    Attributes:
        gpu: Index of the card.
        mig: Index of the MIG device under it, or None for the card itself.
    """

    gpu: int
    mig: int | None


def gpu_handle(index: int, pointer_type: Any) -> Any:
    """Return the handle of a card."""
    return _encode(Kind.GPU, index, pointer_type)


def mig_handle(gpu: int, mig: int, pointer_type: Any) -> Any:
    """Return the handle of a MIG device.

    It names a place, not an instance, as NVML warns: "handles may be reused and their properties
    can change in the process".
    """
    return _encode(Kind.MIG_DEVICE, gpu << _MIG_SHIFT | mig, pointer_type)


def instance_handle(kind: Kind, serial: int, pointer_type: Any) -> Any:
    """Return the handle of an instance or a GPM sample; it dies with what it stands for."""
    return _encode(kind, serial, pointer_type)


def decode_device(handle: Any) -> DeviceHandle:
    """Read a device handle.

    Raises:
        Refusal: INVALID_ARGUMENT, when it is none.
    """
    kind, payload = _decode(handle)
    if kind == Kind.GPU:
        return DeviceHandle(payload, None)
    if kind == Kind.MIG_DEVICE:
        return DeviceHandle(payload >> _MIG_SHIFT, payload & ((1 << _MIG_SHIFT) - 1))
    raise Refusal(Code.INVALID_ARGUMENT)


class Concerned(NamedTuple):
    """What a handle is about: a card, or the instance with a serial."""

    gpu: int | None
    serial: int | None


def concerned(argument: Any) -> Concerned | None:
    """Return what any argument of a call is about; None when it is no handle."""
    if not isinstance(argument, ctypes._Pointer):
        return None
    kind, payload = _decode(argument)
    if kind == Kind.GPU:
        return Concerned(payload, None)
    if kind == Kind.MIG_DEVICE:
        return Concerned(payload >> _MIG_SHIFT, None)
    if kind in (Kind.GPU_INSTANCE, Kind.COMPUTE_INSTANCE):
        return Concerned(None, payload)
    return None


def decode_serial(handle: Any, wanted: Kind) -> int:
    """Read the serial out of the handle of an instance or a GPM sample.

    Raises:
        Refusal: INVALID_ARGUMENT, when it is none of that kind.
    """
    kind, serial = _decode(handle)
    if kind != wanted:
        raise Refusal(Code.INVALID_ARGUMENT)
    return serial


def _encode(kind: Kind, payload: int, pointer_type: Any) -> Any:
    return ctypes.cast(ctypes.c_void_p(kind << _KIND_SHIFT | payload), pointer_type)


def _decode(handle: Any) -> tuple[int, int]:
    value = ctypes.cast(handle, ctypes.c_void_p).value or 0
    return value >> _KIND_SHIFT, value & ((1 << _KIND_SHIFT) - 1)
