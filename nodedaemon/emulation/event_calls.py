"""NVML calls about events."""

import ctypes
import time
from functools import partial
from typing import Any

import pynvml

from nodedaemon.emulation.abi import UINT, CallTable, PointerTo, set_fields
from nodedaemon.emulation.driver import EmulatedDriver
from nodedaemon.emulation.events import SUPPORTED, EventSet
from nodedaemon.emulation.handles import Kind, decode_serial, gpu_handle, instance_handle
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.system_calls import DEVICE

_EVENT_SET = pynvml.c_nvmlEventSet_t
_NO_INSTANCE = 0xFFFFFFFF
_LOOK_SECONDS = 0.02  # the state is shared by processes that cannot wake each other

table = CallTable()


@table.export("nvmlEventSetCreate", arguments=(PointerTo(_EVENT_SET),))
def _create(driver: EmulatedDriver, events: Any) -> None:
    events[0] = instance_handle(Kind.EVENT_SET, driver.event_sets.create(), _EVENT_SET)


@table.export("nvmlEventSetFree", arguments=(_EVENT_SET,))
def _free(driver: EmulatedDriver, events: Any) -> None:
    driver.event_sets.free(decode_serial(events, Kind.EVENT_SET))


@table.export("nvmlDeviceGetSupportedEventTypes", arguments=(DEVICE, PointerTo(ctypes.c_ulonglong)))
def _supported(driver: EmulatedDriver, handle: Any, kinds: Any) -> None:
    driver.gpu(driver.read(), handle, on_mig=Code.NOT_SUPPORTED)
    kinds[0] = SUPPORTED


@table.export("nvmlDeviceRegisterEvents", arguments=(DEVICE, ctypes.c_ulonglong, _EVENT_SET))
def _register(driver: EmulatedDriver, handle: Any, kinds: int, events: Any) -> None:
    gpu = driver.gpu(driver.read(), handle, on_mig=Code.NOT_SUPPORTED)
    if kinds & ~SUPPORTED:
        raise Refusal(Code.NOT_SUPPORTED)

    def register(event_set: EventSet) -> None:
        event_set.register(gpu, kinds)

    driver.event_sets.change(decode_serial(events, Kind.EVENT_SET), register)


@table.export("nvmlEventSetWait_v2", arguments=(_EVENT_SET, PointerTo(pynvml.c_nvmlEventData_t), UINT))
def _wait(driver: EmulatedDriver, events: Any, data: Any, timeout_ms: int) -> None:
    number = decode_serial(events, Kind.EVENT_SET)
    deadline = time.monotonic() + timeout_ms / 1000
    while True:
        node = driver.read()
        event = driver.event_sets.change(number, partial(EventSet.next_event, node=node))
        if event is not None:
            break
        left = deadline - time.monotonic()
        if left <= 0:
            raise Refusal(Code.TIMEOUT)
        time.sleep(min(left, _LOOK_SECONDS))
    set_fields(
        data,
        device=gpu_handle(event.gpu, DEVICE),
        eventType=event.kind,
        eventData=0,
        gpuInstanceId=_NO_INSTANCE,
        computeInstanceId=_NO_INSTANCE,
    )
