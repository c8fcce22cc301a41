"""What the GPU driver tells: GPUs, profiles and instances, and its refusals. Plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import pynvml

__all__ = ["ComputeInstance", "DriverError", "GpuFacts", "GpuInstance", "Mig", "ProfileFacts", "Span", "ask"]


class DriverError(Exception):
    """The driver refused a call.

    Attributes:
        call: name of the NVML function.
        code: the nvmlReturn_t.
        text: what NVML says about the code.
    """

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call}: {text} ({code})")
        self.call = call
        self.code = code
        self.text = text


def ask(call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls pynvml.

    Raises:
        DriverError: the driver refused.
    """
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        raise DriverError(call.__name__, int(error.value), str(error)) from error


class Mig(IntEnum):
    """Whether a GPU can be cut. The values are those of puhui.v1.MigMode."""

    UNKNOWN = 0
    NOT_SUPPORTED = 1
    DISABLED = 2
    ENABLED = 3


@dataclass(frozen=True, order=True)
class Span:
    """Where a slice sits on its GPU, in memory slices."""

    start: int
    size: int

    def overlaps(self, other: Span) -> bool:
        """Says whether both want a memory slice in common."""
        return self.start < other.start + other.size and other.start < self.start + self.size


@dataclass(frozen=True)
class GpuFacts:
    """One physical GPU."""

    uuid: str
    """Empty when the GPU did not say it since this daemon runs."""
    index: int
    minor: int
    model: str
    memory_mib: int
    """0 is unknown."""
    pci_bus_id: str
    mig: Mig
    notice: str = ""
    """What it did not answer, in a sentence; empty when all is well. `mig` is UNKNOWN then."""


@dataclass(frozen=True)
class ProfileFacts:
    """One MIG shape that a GPU offers."""

    name: str
    profile_id: int
    memory_mib: int
    compute_slices: int
    multiprocessors: int
    max_instances: int
    placements: tuple[Span, ...]


@dataclass(frozen=True)
class ComputeInstance:
    """One compute instance. `uuid` is empty when no MIG device shows it."""

    id: int
    compute_slices: int
    uuid: str


@dataclass(frozen=True)
class GpuInstance:
    """One GPU instance and the compute instances in it."""

    gpu_uuid: str
    id: int
    profile: ProfileFacts
    span: Span
    compute_instances: tuple[ComputeInstance, ...]
