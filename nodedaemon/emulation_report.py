"""What `puhui-nodedaemon emulation` prints of emulated cards. Text only; nothing here looks at a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pynvml

from nodedaemon.emulation import Fault, Latency, UuidPolicy, When
from nodedaemon.emulation.state import Gpu, GpuInstance, Node

__all__ = ["fault_line", "latency_lines", "report"]


def report(node: Node, holders: Mapping[int, Sequence[int]]) -> str:
    """Returns the whole node as text.

    Args:
        node: its state.
        holders: serial of a GPU instance -> pids that hold it; 0 is one that cannot be seen.
    """
    lines = [f"{len(node.gpus)} emulated GPU{'s' if len(node.gpus) != 1 else ''}"]
    for gpu in node.gpus:
        lines.append(f"GPU {gpu.minor}: {gpu.model}, {gpu.uuid}, MIG mode {_mode(gpu)}")
        lines += [f"  {line}" for instance in gpu.instances for line in _instance(gpu, instance, holders)]
        if gpu.mig and not gpu.instances:
            lines.append("  no slices")
    kept = "a new UUID" if node.uuid_policy is UuidPolicy.NEW else "its old UUID"
    lines.append(f"A slice that is created again gets {kept}.")
    lines += latency_lines(node.latency)
    lines += [fault_line(fault) for fault in node.faults] or ["No fault waits."]
    return "\n".join(lines)


def fault_line(fault: Fault) -> str:
    """Returns a sentence that says what a fault does to whom."""
    who = f"the next {fault.count} calls of" if fault.count > 1 else "the next call of"
    about = "" if fault.gpu is None else f" about GPU {fault.gpu}"
    passing = f", after {fault.skip} that pass" if fault.skip else ""
    effects = []
    if fault.stale:
        effects.append("the cards as they were before the last change")
    if fault.delay_seconds:
        effects.append(f"{fault.delay_seconds:g} s longer")
    if fault.code:
        effects.append(_code_name(fault.code) + (" although the work is done" if fault.when is When.AFTER else ""))
    return f"Fault: {who} {fault.function}{about}{passing}: {', '.join(effects)}"


def latency_lines(latency: Latency) -> list[str]:
    """Returns how long calls take, a line each."""
    lines = [f"Latency of every call: {latency.default_seconds:g} s"]
    return lines + [f"Latency of {name}: {s:g} s" for name, s in sorted(latency.by_function_seconds.items())]


def _mode(gpu: Gpu) -> str:
    now, pending = ("on" if mode else "off" for mode in (gpu.mig, gpu.mig_pending))
    return now if now == pending else f"{now}, {pending} after the next reset"


def _instance(gpu: Gpu, instance: GpuInstance, holders: Mapping[int, Sequence[int]]) -> Iterator[str]:
    profile = gpu.card.profile(instance.profile_id)
    shape = f"{profile.name if profile else '?'} at {instance.start}:{instance.size}, GPU instance {instance.id}"
    pids = holders.get(instance.serial, [])
    held = ", held by " + ", ".join(f"process {pid}" if pid else "a process unseen from here" for pid in pids)
    for compute in instance.compute_instances:
        yield f"{compute.uuid}: {shape}, compute instance {compute.id}{held if pids else ''}"
    if not instance.compute_instances:
        yield f"{shape}, no compute instance{held if pids else ''}"


def _code_name(code: int) -> str:
    for name in dir(pynvml):
        if name.startswith("NVML_ERROR_") and getattr(pynvml, name) == code:
            return name.removeprefix("NVML_ERROR_")
    return str(code)
