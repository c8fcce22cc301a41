"""The predictor, asked off the event loop and within a time budget. All that is known of `predictor_onnx` is here."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog

import predictor_onnx
from controlplane.fleet import Geometry
from controlplane.observing import ObservedAttempt
from controlplane.profile_outlook import Pace, confidence
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import duration
from puhui.v1 import prediction_pb2
from puhui.v1.prediction_pb2 import (
    PREDICTION_TIER_DRY_RUN,
    PREDICTION_TIER_NO_ACCELERATOR,
    PREDICTION_TIER_STATIC,
    PREDICTION_TIER_TRACE,
    PREDICTION_TIER_UNKNOWN,
)

__all__ = ["COSTS", "Code", "Costs", "DryStep", "OnnxPrediction", "Prediction", "Tracing", "with_history"]

Costs = predictor_onnx.Costs
COSTS = predictor_onnx.COSTS
DryStep = predictor_onnx.TracedStep

_log = structlog.get_logger(__name__)

_TIERS = {
    predictor_onnx.Tier.DRY_RUN: PREDICTION_TIER_DRY_RUN,
    predictor_onnx.Tier.TRACED: PREDICTION_TIER_TRACE,
    predictor_onnx.Tier.STATIC_NAMED: PREDICTION_TIER_STATIC,
    predictor_onnx.Tier.STATIC_LAYERS: PREDICTION_TIER_STATIC,
    predictor_onnx.Tier.UNKNOWN: PREDICTION_TIER_UNKNOWN,
    predictor_onnx.Tier.NO_ACCELERATOR_USE: PREDICTION_TIER_NO_ACCELERATOR,
}


@dataclass(frozen=True)
class Code:
    """What is to be predicted."""

    files: Mapping[str, bytes]
    """Content of the text files, by path."""
    sizes: Mapping[str, int]
    """Size of every file, in bytes, by path."""
    command: Sequence[str]
    input_bytes: int
    """Data that is read beside the bundle."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment of the command."""
    image: str = ""
    """Container image; "" is the centre's default."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of other files that may say what is done, by path."""


class Prediction(Protocol):
    """Says what code needs."""

    async def of(
        self, code: Code, budget_s: float | None = None, dry_run: DryStep | None = None
    ) -> prediction_pb2.Prediction:
        """Returns what the code needs, within so many seconds if they are given, by its dry run if there was one.

        Raises:
            Refusal: INVALID_ARGUMENT with CODE_UNPARSABLE.
        """

    async def fingerprint(self, code: Code) -> str:
        """Returns what tells this code, and what it is asked to do, from other; "" when none can be made."""

    def with_history(
        self, prediction: prediction_pb2.Prediction, observed: Sequence[ObservedAttempt]
    ) -> prediction_pb2.Prediction:
        """Returns a prediction, blended with what earlier attempts of the same code showed."""

    async def paces(self, code: Code, geometries: Sequence[Geometry]) -> dict[tuple[str, str], Pace]:
        """Returns how fast the code is expected to be, by GPU model and profile; nothing where that is not known."""

    async def close(self) -> None:
        """Ends its threads."""


def dry_run_program() -> bytes:
    """Returns the program that watches a dry run: an archive that Python runs."""
    return predictor_onnx.packed()


def dry_step_of(output: bytes) -> tuple[DryStep | None, str]:
    """Returns what a dry run has found, and why nothing where it is nothing.

    Args:
        output: the end of the standard output; the finding is its last line.
    """
    lines = output.splitlines()
    if not lines:
        return None, "it wrote nothing"
    try:
        found = predictor_onnx.Finding.from_json(lines[-1])
    except predictor_onnx.NotAFindingError as error:
        return None, str(error)
    if found.ending is predictor_onnx.Ending.FAILED:
        return None, found.reason
    return found.step, found.reason or found.ending.value


class Tracing(enum.Enum):
    """When the process begins that traces networks; it takes some seconds and half a GiB."""

    AT_START = "at-start"
    WHEN_NEEDED = "when-needed"
    OFF = "off"


#: Of the time that there is, what is kept for the answer itself.
_ANSWER_S = 0.1


class OnnxPrediction:
    """The trained predictor, in three threads, so that one piece of odd code does not hold up the others."""

    def __init__(
        self,
        budget_s: float,
        tracing: Tracing = Tracing.WHEN_NEEDED,
        costs: Costs = COSTS,
    ) -> None:
        """Loads the models.

        Args:
            budget_s: how long an answer may take, in seconds.
            tracing: whether networks are traced, if torch is installed.
            costs: of slices that are too small or too large.
        """
        self._budget_s = budget_s
        self._costs = costs
        self._steps: predictor_onnx.TracedSteps | None = None
        if tracing is not Tracing.OFF and predictor_onnx.can_trace():
            self._steps = predictor_onnx.TracedSteps(predictor_onnx.Tracer())
            if tracing is Tracing.AT_START:
                self._steps.begin()
        self._predictor = predictor_onnx.Predictor(steps=self._steps)
        self._speed = predictor_onnx.SpeedModel()
        self._threads = ThreadPoolExecutor(3, thread_name_prefix="predictor")
        # What is said of code that nothing is known of is the answer when time runs out.
        self._unknown = self._predictor.predict(predictor_onnx.CodeBundle({}), predictor_onnx.Request(()))

    async def close(self) -> None:
        """Ends its threads; what they are busy with is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._steps is not None:
            await asyncio.to_thread(self._steps.close)

    async def of(
        self, code: Code, budget_s: float | None = None, dry_run: DryStep | None = None
    ) -> prediction_pb2.Prediction:
        """Returns what the code needs, within so many seconds if they are given, by its dry run if there was one."""
        started = time.monotonic()
        budget_s = self._budget_s if budget_s is None else budget_s
        asked = asyncio.get_running_loop().run_in_executor(
            self._threads, self._predict, code, started + budget_s - _ANSWER_S, dry_run
        )
        try:
            answer = await asyncio.wait_for(asked, budget_s)
        except predictor_onnx.CodeDoesNotParseError as error:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "CODE_UNPARSABLE",
                str(error),
                path=error.path,
                line=str(error.line),
            ) from error
        except TimeoutError:
            answer = self._unknown
            note = f"the prediction was not ready within {budget_s:g} s; "
        except Exception as error:  # noqa: BLE001 - whatever the code does to the predictor, the job is accepted
            _log.error("prediction failed unforeseen", exc_info=error)
            answer = self._unknown
            note = f"the predictor failed on this code ({type(error).__name__}); "
        else:
            note = ""
        message = _message(answer, note, self._costs)
        message.elapsed.CopyFrom(duration(time.monotonic() - started))
        return message

    async def paces(self, code: Code, geometries: Sequence[Geometry]) -> dict[tuple[str, str], Pace]:
        """Returns how fast the code is expected to be, by GPU model and profile; nothing where that is not known."""
        if not geometries:
            return {}
        asked = asyncio.get_running_loop().run_in_executor(self._threads, self._paces, code, geometries)
        try:
            return await asyncio.wait_for(asked, self._budget_s)
        except predictor_onnx.CodeDoesNotParseError:
            return {}  # `of` refuses it, and says why
        except TimeoutError:
            _log.warning("how fast some code is was not found in time", after_s=self._budget_s)
        except Exception as error:  # noqa: BLE001 - as in `of`: an answer without paces is one all the same
            _log.error("paces failed unforeseen", exc_info=error)
        return {}

    def _paces(self, code: Code, geometries: Sequence[Geometry]) -> dict[tuple[str, str], Pace]:
        bundle = predictor_onnx.CodeBundle(code.files, code.sizes)
        work = self._predictor.read(bundle, predictor_onnx.Request(tuple(code.command), code.input_bytes))
        found = {}
        for geometry in geometries:
            names = [shape.profile for shape in geometry.shapes]
            whole = self._speed.step_time(work, geometry.gpu_model)
            for profile, slower in self._speed.slowdowns(work, names, product=geometry.gpu_model).items():
                takes = predictor_onnx.duration(work.steps, whole, slower)
                found[geometry.gpu_model, profile] = Pace(
                    slower.p50, slower.p90, takes.p50_s if takes else None, takes.p90_s if takes else None
                )
        return found

    async def fingerprint(self, code: Code) -> str:
        """Returns what tells this code, and what it is asked to do, from other code; "" when none can be made."""
        made = asyncio.get_running_loop().run_in_executor(self._threads, _fingerprint, code)
        try:
            return await asyncio.wait_for(made, self._budget_s)
        except TimeoutError:
            _log.warning("code has no fingerprint, so its history is not known", after_s=self._budget_s)
        except Exception as error:  # noqa: BLE001 - as above
            _log.error("the fingerprint failed unforeseen", exc_info=error)
        return ""

    def with_history(
        self, prediction: prediction_pb2.Prediction, observed: Sequence[ObservedAttempt]
    ) -> prediction_pb2.Prediction:
        """Returns a prediction, blended with what earlier attempts of the same code showed."""
        return with_history(prediction, observed, self._costs)

    def _predict(self, code: Code, deadline: float, dry_run: DryStep | None) -> predictor_onnx.Prediction:
        return self._predictor.predict(
            predictor_onnx.CodeBundle(code.files, code.sizes),
            predictor_onnx.Request(tuple(code.command), code.input_bytes),
            trace_s=deadline - time.monotonic(),
            dry_run=dry_run,
        )


def _fingerprint(code: Code) -> str:
    bundle = predictor_onnx.CodeBundle(code.files, code.sizes, code.digests)
    return predictor_onnx.fingerprint(bundle, code.command, code.environment, code.image, code.input_bytes)


def with_history(
    prediction: prediction_pb2.Prediction,
    observed: Sequence[ObservedAttempt],
    costs: Costs = COSTS,
) -> prediction_pb2.Prediction:
    """Returns a prediction, blended with what earlier attempts of the same code showed."""
    if not observed:
        return prediction
    model = predictor_onnx.Prediction(
        prediction.memory.p50_mib,
        prediction.memory.p90_mib,
        prediction.memory.p99_mib,
        predictor_onnx.Tier.UNKNOWN,
        prediction.reason,
        {part.category: part.mib for part in prediction.parts},
        {},
        prediction.model_version,
    )
    seen = [
        predictor_onnx.Observation(
            one.peak_mib, one.at_least_mib, one.duration_s, one.utilization, emulated=one.emulated
        )
        for one in observed
    ]
    answer = predictor_onnx.blended(model, seen)
    blended = prediction_pb2.Prediction()
    blended.CopyFrom(prediction)
    blended.memory.p50_mib, blended.memory.p90_mib = answer.p50_mib, answer.p90_mib
    blended.memory.p99_mib = answer.p99_mib
    blended.required_mib = math.ceil(predictor_onnx.required_mib(answer, costs))
    blended.confidence = confidence(blended)
    blended.reason = answer.reason
    blended.facts.add(name="earlier_runs", value=str(len(observed)))
    del blended.parts[:]
    blended.parts.extend(
        prediction_pb2.MemoryPart(category=name, mib=mib) for name, mib in answer.breakdown_mib.items()
    )
    return blended


def _message(answer: predictor_onnx.Prediction, note: str, costs: Costs) -> prediction_pb2.Prediction:
    message = prediction_pb2.Prediction(
        tier=_TIERS[answer.tier],
        memory=prediction_pb2.MemoryQuantiles(p50_mib=answer.p50_mib, p90_mib=answer.p90_mib, p99_mib=answer.p99_mib),
        required_mib=math.ceil(predictor_onnx.required_mib(answer, costs)),
        parts=[prediction_pb2.MemoryPart(category=category, mib=mib) for category, mib in answer.breakdown_mib.items()],
        facts=[
            prediction_pb2.CodeFact(name=name, value=str(value))
            for name, value in answer.features.items()
            if value or isinstance(value, bool)  # what was not found is no fact
        ],
        reason=note + answer.reason,
        model_version=answer.model_version,
    )
    message.confidence = confidence(message)
    return message
