"""Runs the measuring process, one for each configuration, so that what one does is lost with it alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol

from predictor_onnx.configuration import Configuration
from predictor_onnx.measure.protocol import Settings
from predictor_onnx.measure.rows import Ending, Header, Outcome, header_of, outcome_of

_DETAIL: Final = 300
_PROBE_S: Final = 120.0
_WORKER: Final = (sys.executable, "-m", "predictor_onnx.measure.worker")


class NothingToMeasureOnError(Exception):
    """This machine has no GPU that can be measured on; the message says what is missing."""


@dataclass(frozen=True)
class Machine:
    """What is measured on: a file's header, and the UUID that NVML knows the card or slice by."""

    header: Header
    uuid: str


class Worker(Protocol):
    """Measures one configuration after the other."""

    def probe(self) -> Machine:
        """What is measured on.

        Raises:
            NothingToMeasureOnError: there is no GPU, or what drives it is missing.
        """
        ...

    def measure(self, configuration: Configuration, machine: Machine, within_s: float) -> Outcome:
        """What becomes of a configuration; every ending is an outcome.

        Args:
            configuration: the step.
            machine: what `probe` said.
            within_s: seconds that it may take.
        """
        ...


@dataclass(frozen=True)
class _Told:
    """What a process said and how it ended; ``code`` is None when it was ended because its time was up."""

    code: int | None
    out: bytes
    err: str
    wall_s: float

    @property
    def last_words(self) -> str:
        """The last line of its errors, shortened."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1].strip()[:_DETAIL] if lines else ""


class ProcessWorker:
    """Starts a process for each request and ends it, with all that it started, when its time is up."""

    def __init__(self, settings: Settings, command: Sequence[str] = _WORKER) -> None:
        """Start nothing yet.

        Args:
            settings: how all configurations are measured.
            command: what starts the measuring process.
        """
        self._settings = settings
        self._command = list(command)

    def probe(self) -> Machine:
        """See `Worker`."""
        told = self._ask({}, _PROBE_S)
        try:
            answer = json.loads(told.out)
            if "no_card" in answer:
                raise NothingToMeasureOnError(str(answer["no_card"]))
            return Machine(header_of(json.dumps(answer["header"])), str(answer["uuid"]))
        except (ValueError, KeyError, TypeError) as error:
            why = "it took too long" if told.code is None else told.last_words or f"it ended with {told.code}"
            raise NothingToMeasureOnError(f"the measuring process could not tell of a GPU: {why}") from error

    def measure(self, configuration: Configuration, machine: Machine, within_s: float) -> Outcome:
        """See `Worker`."""
        told = self._ask({"configuration": json.loads(configuration.to_json()), "uuid": machine.uuid}, within_s)
        if told.code is None:
            return Outcome(Ending.TIMED_OUT, told.wall_s, detail=f"ended after {within_s:.0f} s")
        if told.code != 0:
            how = signal.Signals(-told.code).name if told.code < 0 else f"exit code {told.code}"
            return Outcome(Ending.CRASHED, told.wall_s, detail=f"{how}: {told.last_words}")
        try:
            answer = json.loads(told.out)
            if isinstance(answer, dict) and "no_card" in answer:
                # It says nothing of the configuration, and none that follows would fare better.
                raise NothingToMeasureOnError(str(answer["no_card"])[:_DETAIL])
            # The process knows its own time from when torch was loaded only.
            return replace(outcome_of(answer), wall_s=told.wall_s)
        except ValueError as error:
            return Outcome(Ending.GARBLED, told.wall_s, detail=str(error)[:_DETAIL])

    def _ask(self, request: dict[str, Any], within_s: float) -> _Told:
        began = time.monotonic()
        line = json.dumps({**request, "settings": asdict(self._settings)}).encode() + b"\n"
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **self._settings.environment()}, start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                out, err = process.communicate(line, within_s)
                code: int | None = process.returncode
            except subprocess.TimeoutExpired:
                _end(process)
                out, err = process.communicate()
                code = None
            except BaseException:
                # Ctrl-C: nothing may stay on the card.
                _end(process)
                raise
        return _Told(code, out, err.decode(errors="replace"), time.monotonic() - began)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
