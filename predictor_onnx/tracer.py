"""Traces steps in a process beside this one: torch is large, may be missing, and may die of a network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from predictor_onnx.configuration import Configuration
from predictor_onnx.traced_step import TracedStep

_KILLED_WITHIN_S: Final = 5.0
#: The process says so when it has its libraries, which takes seconds, or a minute of a busy machine.
READY: Final = "ready"
_READY_WITHIN_S: Final = 120.0
#: Bytes of an answer beyond which it is none.
_MOST_ANSWER: Final = 1 << 20


class CannotTraceError(Exception):
    """A step could not be traced; the message says why."""


class TracerStartingError(CannotTraceError):
    """The tracing process did not yet have its libraries; that is no fault of the step."""


def can_trace() -> bool:
    """Whether torch is installed for this Python."""
    return importlib.util.find_spec("torch") is not None


class Tracer:
    """A tracing process, begun when it is first needed and anew when it has died. Calls take turns."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "predictor_onnx.trace")) -> None:
        """Begin nothing yet.

        Args:
            command: what starts the process.
        """
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._begun = 0.0
        self._closed = False
        self._turn = threading.Lock()

    def begin(self) -> None:
        """Begin the process, if it does not run, so that it has its libraries when it is asked.

        Raises:
            CannotTraceError: it cannot be begun.
        """
        with self._turn:
            try:
                self._running()
            except OSError as error:
                raise CannotTraceError(f"the tracing process cannot be begun ({error.strerror})") from error

    def trace(self, asked: Sequence[Configuration], within_s: float) -> list[TracedStep]:
        """Trace configurations that differ in their batch only.

        Args:
            asked: the configurations.
            within_s: seconds to answer in; the process is ended when they have passed and it was at this.

        Raises:
            TracerStartingError: the process could not begin with it in time.
            CannotTraceError: a network is unknown or does not bear to be traced, or it took too long.
        """
        deadline = time.monotonic() + within_s
        if not self._turn.acquire(timeout=max(0.0, within_s)):
            raise CannotTraceError("another step is being traced")
        try:
            line = json.dumps([one.to_json() for one in asked]).encode() + b"\n"
            answer = self._exchange(line, deadline)
            if isinstance(answer, dict):
                # What torch did not bear may have left it broken (seen: a segmentation fault later on).
                self._end()
                raise CannotTraceError(str(answer.get("error", "the tracer gave no reason")))
        finally:
            self._turn.release()
        return [TracedStep(**step) for step in answer]

    def _exchange(self, line: bytes, deadline: float) -> Any:
        try:
            process = self._running()
            into, out = process.stdin, process.stdout
            if into is None or out is None:
                raise OSError("the tracing process has no pipes")
            if not self._ready and not self._becomes_ready(out.fileno(), deadline):
                raise TracerStartingError("the tracing process is being started")
            into.write(line)
            into.flush()
            return json.loads(_line(out.fileno(), deadline))
        except (OSError, ValueError, TimeoutError) as error:
            self._end()
            why = "it took too long" if isinstance(error, TimeoutError) else "the tracing process died of it"
            raise CannotTraceError(why) from error

    def _becomes_ready(self, descriptor: int, deadline: float) -> bool:
        """Whether the process is ready by the deadline; it is left alone when it is not, for it will be.

        Raises:
            TimeoutError: it should long have been.
            ValueError: what it said is something else.
        """
        last = self._begun + _READY_WITHIN_S
        try:
            if _line(descriptor, min(deadline, last)).decode().strip() != READY:
                raise ValueError("no tracing process")
        except TimeoutError:
            if time.monotonic() >= last:
                raise
            return False
        self._ready = True
        return True

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise CannotTraceError("the tracer is closed")
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._ready, self._begun = False, time.monotonic()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(OSError):
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        process.wait(_KILLED_WITHIN_S)

    def close(self) -> None:
        """End the process, also one that is at something, and begin no other."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._turn:
            self._end()


def _line(descriptor: int, deadline: float) -> bytes:
    """One line from a pipe.

    Raises:
        TimeoutError: the deadline passed first.
        ValueError: the pipe ended first, or the line has no end.
    """
    found = bytearray()
    waited = select.poll()  # not select(), which takes no descriptor above 1023
    waited.register(descriptor, select.POLLIN)
    while not found.endswith(b"\n"):
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not waited.poll(math.ceil(left_s * 1000)):
            raise TimeoutError
        part = os.read(descriptor, 1 << 16)
        if not part or len(found) > _MOST_ANSWER:
            raise ValueError("no answer")
        found += part
    return bytes(found)
