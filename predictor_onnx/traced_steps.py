"""The steps that were traced, and those that are being traced while whoever asked has an answer from reading alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Final, Protocol

from predictor_onnx.configuration import Configuration
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.tracer import CannotTraceError, TracerStartingError

#: People submit the same step again and again.
_REMEMBERED: Final = 256
#: Steps that wait for their turn; more are not begun, as nobody will be there to hear of them.
_MOST_WAITING: Final = 4
#: Most networks take a second or two, the largest a minute.
_LONGEST_S: Final = 60.0


class Tracing(Protocol):
    """What traces: `Tracer`, or what stands in for it."""

    def begin(self) -> None:
        """Gets ready."""

    def trace(self, asked: list[Configuration], within_s: float) -> list[TracedStep]:
        """Traces; see `Tracer.trace`."""

    def close(self) -> None:
        """Ends what it began."""


class TracedSteps:
    """Traces one step after the other, each once. May be asked from any thread.

    A step that is not traced when its asker has to answer is traced to its end all the same: the next one who asks has
    it. What cannot be traced is remembered as well.
    """

    def __init__(self, tracer: Tracing) -> None:
        """Begin nothing yet."""
        self._tracer = tracer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracing")
        self._closed = False
        self._known: OrderedDict[Configuration, Future[TracedStep | None]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Get ready, in the background, so that the first who asks need not wait for libraries."""
        self._thread.submit(self._tracer.begin)

    def of(self, asked: Configuration, within_s: float) -> TracedStep | None:
        """The step; None when it cannot be traced, or not in time.

        Args:
            asked: the step.
            within_s: longest wait, in seconds.
        """
        with self._lock:
            found = self._known.get(asked)
            if found is None:
                if self._closed or sum(not one.done() for one in self._known.values()) >= _MOST_WAITING:
                    return None
                found = self._known[asked] = self._thread.submit(self._trace, asked)
                self._forget()
            self._known.move_to_end(asked)
        try:
            return found.result(max(within_s, 0.0))
        except (TimeoutError, CancelledError):
            return None

    def _trace(self, asked: Configuration) -> TracedStep | None:
        try:
            (step,) = self._tracer.trace([asked], _LONGEST_S)
        except TracerStartingError:
            with self._lock:
                self._known.pop(asked, None)
            return None
        except CannotTraceError:
            return None
        return step

    def _forget(self) -> None:
        ended = [one for one, step in self._known.items() if step.done()]
        for one in ended[: max(0, len(self._known) - _REMEMBERED)]:
            del self._known[one]

    def close(self) -> None:
        """End the tracing; whatever waits for it has None."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._tracer.close()
