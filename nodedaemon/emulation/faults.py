"""What an operator of the emulation can make go wrong, and how slow a call is."""

import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field


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


class FaultPlan:
    """Calls that are to fail, per function, in the order in which they were asked for.

    It belongs to one process: what another process calls is not touched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: defaultdict[str, deque[int]] = defaultdict(deque)

    def inject(self, function: str, code: int, count: int = 1) -> None:
        """Make the next calls of a function fail before they do anything.

        Args:
            function: NVML function name, such as ``nvmlGpuInstanceDestroy``.
            code: The ``nvmlReturn_t`` that they answer.
            count: How many of them, at least 1.
        """
        with self._lock:
            self._codes[function].extend([code] * count)

    def clear(self) -> None:
        """Forget every fault not yet used."""
        with self._lock:
            self._codes.clear()

    def take(self, function: str) -> int | None:
        """Return the code that this call answers with, and use it up; None lets it run."""
        with self._lock:
            codes = self._codes.get(function)
            return codes.popleft() if codes else None
