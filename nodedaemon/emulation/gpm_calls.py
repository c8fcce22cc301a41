"""NVML calls about GPU performance monitoring (GPM): Hopper and later."""

from typing import Any

import pynvml

from nodedaemon.emulation import gpm
from nodedaemon.emulation.abi import UINT, UINT_OUT, CallTable, PointerTo, set_fields
from nodedaemon.emulation.driver import EmulatedDriver, MigDevice
from nodedaemon.emulation.geometry import Architecture
from nodedaemon.emulation.gpu_instances import require_mig
from nodedaemon.emulation.handles import Kind, decode_serial, instance_handle
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import Gpu
from nodedaemon.emulation.system_calls import DEVICE

_SAMPLE = pynvml.c_nvmlGpmSample_t

table = CallTable()


def _has_gpm(gpu: Gpu) -> bool:
    return gpu.card.architecture is not Architecture.AMPERE


def _gpm_gpu(driver: EmulatedDriver, handle: Any) -> Gpu:
    gpu = driver.gpu(driver.read(), handle)
    if not _has_gpm(gpu):
        raise Refusal(Code.NOT_SUPPORTED)
    return gpu


@table.export("nvmlGpmQueryDeviceSupport", arguments=(DEVICE, PointerTo(pynvml.c_nvmlGpmSupport_t)))
def _support(driver: EmulatedDriver, handle: Any, support: Any) -> None:
    if support.contents.version != pynvml.NVML_GPM_SUPPORT_VERSION:
        raise Refusal(Code.ARGUMENT_VERSION_MISMATCH)
    device = driver.device(driver.read(), handle)
    gpu = device.gpu if isinstance(device, MigDevice) else device
    set_fields(support, isSupportedDevice=int(_has_gpm(gpu)))


@table.export("nvmlGpmSampleAlloc", arguments=(PointerTo(_SAMPLE),))
def _allocate(driver: EmulatedDriver, sample: Any) -> None:
    sample[0] = instance_handle(Kind.GPM_SAMPLE, driver.samples.allocate(), _SAMPLE)


@table.export("nvmlGpmSampleFree", arguments=(_SAMPLE,))
def _free(driver: EmulatedDriver, sample: Any) -> None:
    driver.samples.free(decode_serial(sample, Kind.GPM_SAMPLE))


@table.export("nvmlGpmSampleGet", arguments=(DEVICE, _SAMPLE))
def _sample_gpu(driver: EmulatedDriver, handle: Any, sample: Any) -> None:
    gpu = _gpm_gpu(driver, handle)
    driver.samples.fill(decode_serial(sample, Kind.GPM_SAMPLE), driver.gpm_counters.read(gpu, None))


@table.export("nvmlGpmMigSampleGet", arguments=(DEVICE, UINT, _SAMPLE))
def _sample_instance(driver: EmulatedDriver, handle: Any, number: int, sample: Any) -> None:
    gpu = _gpm_gpu(driver, handle)
    require_mig(gpu)
    instance = next((i for i in gpu.instances if i.id == number), None)
    if instance is None:
        raise Refusal(Code.INVALID_ARGUMENT)
    driver.samples.fill(decode_serial(sample, Kind.GPM_SAMPLE), driver.gpm_counters.read(gpu, instance))


@table.export("nvmlGpmMetricsGet", arguments=(PointerTo(pynvml.c_nvmlGpmMetricsGet_t),))
def _metrics(driver: EmulatedDriver, request: Any) -> None:
    wanted = request.contents
    if wanted.version != pynvml.NVML_GPM_METRICS_GET_VERSION:
        raise Refusal(Code.ARGUMENT_VERSION_MISMATCH)
    if wanted.numMetrics > pynvml.NVML_GPM_METRIC_MAX or not wanted.sample1 or not wanted.sample2:
        raise Refusal(Code.INVALID_ARGUMENT)
    first = driver.samples.reading(decode_serial(wanted.sample1, Kind.GPM_SAMPLE))
    second = driver.samples.reading(decode_serial(wanted.sample2, Kind.GPM_SAMPLE))
    gpm.check_pair(first, second)
    for position in range(wanted.numMetrics):
        metric = wanted.metrics[position]
        answer = gpm.answer(metric.metricId, first, second)
        metric.nvmlReturn = int(answer.code)
        metric.value = answer.percent


@table.export("nvmlGpmQueryIfStreamingEnabled", arguments=(DEVICE, UINT_OUT))
def _streaming(driver: EmulatedDriver, handle: Any, state: Any) -> None:
    state[0] = int(_gpm_gpu(driver, handle).gpm_streaming)


@table.export("nvmlGpmSetStreamingEnabled", arguments=(DEVICE, UINT))
def _set_streaming(driver: EmulatedDriver, handle: Any, state: int) -> None:
    _gpm_gpu(driver, handle)
    if state not in (pynvml.NVML_FEATURE_DISABLED, pynvml.NVML_FEATURE_ENABLED):
        raise Refusal(Code.INVALID_ARGUMENT)
    with driver.change() as change:
        driver.gpu(change.node, handle).gpm_streaming = bool(state)
