"""What an operator of the emulation can make go wrong, and how slow a call is."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any


class When(StrEnum):
    """When a fault strikes.

    BEFORE anything is done; or AFTER the call has done its work, so that the caller is told of a
    failure that did not happen: a lost answer.
    """

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a call takes, beyond the work itself.

    Attributes:
        default_seconds: For every function not named below.
        by_function_seconds: NVML function name, without ``_v2``, to seconds.
    """

    default_seconds: float = 0.0
    by_function_seconds: Mapping[str, float] = field(default_factory=dict)

    def of(self, function: str) -> float:
        """Return the seconds that this function takes."""
        return self.by_function_seconds.get(function, self.default_seconds)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to some calls of one function.

    Attributes:
        function: NVML function name, without ``_v2``, such as ``nvmlGpuInstanceDestroy``.
        code: The ``nvmlReturn_t`` that they answer; 0 lets them answer what they would.
        count: How many of them, at least 1.
        skip: How many are let pass first.
        delay_seconds: How much longer they take.
        when: Whether code and delay come before or after the work.
        gpu: Index of the card whose calls are meant, None for all.
        stale: Whether they see the cards as they were before the last change.

    Raises:
        ValueError: A number that makes no sense, or a fault that does nothing.
    """

    function: str
    code: int = 0
    count: int = 1
    skip: int = 0
    delay_seconds: float = 0.0
    when: When = When.BEFORE
    gpu: int | None = None
    stale: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.skip < 0 or self.delay_seconds < 0 or self.code < 0:
            raise ValueError("A fault strikes at least 1 call; what it skips, its delay and its code are not negative.")
        if not (self.code or self.delay_seconds or self.stale):
            raise ValueError("A fault needs an error code, a delay, or stale answers; this one would do nothing.")

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Fault":
        """Read the JSON form back."""
        return cls(**{**document, "when": When(document["when"])})


def strike(faults: list[Fault], function: str, gpu: Callable[[], int | None]) -> Fault | None:
    """Return the fault that this call meets, and use it up.

    The first fault that is meant for the call takes it, be it only to count it among those that
    are let pass.

    Args:
        faults: Changed in place.
        function: NVML function name, without ``_v2``.
        gpu: Index of the card that the call is about; asked only when a fault depends on it.
    """
    for position, fault in enumerate(faults):
        if fault.function != function or (fault.gpu is not None and fault.gpu != gpu()):
            continue
        if fault.skip:
            faults[position] = replace(fault, skip=fault.skip - 1)
            return None
        if fault.count > 1:
            faults[position] = replace(fault, count=fault.count - 1)
        else:
            del faults[position]
        return fault
    return None


class FaultPlan:
    """The faults of one process: what another process calls is not touched."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def inject(self, function: str, code: int, count: int = 1) -> None:
        """Make the next calls of a function fail before they do anything.

        Args:
            function: NVML function name, such as ``nvmlGpuInstanceDestroy``.
            code: The ``nvmlReturn_t`` that they answer.
            count: How many of them, at least 1.
        """
        self.add(Fault(function, code, count))

    def add(self, fault: Fault) -> None:
        """Append a fault."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Forget every fault not yet used."""
        with self._lock:
            self._faults.clear()

    def take(self, function: str, gpu: Callable[[], int | None]) -> Fault | None:
        """Return the fault that this call meets, and use it up; None lets it run."""
        if not self._faults:
            return None
        with self._lock:
            return strike(self._faults, function, gpu)
