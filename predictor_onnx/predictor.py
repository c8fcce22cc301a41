"""Model code in, required accelerator memory out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from predictor_onnx import catalog, rebuild
from predictor_onnx.features import MIB, Workload
from predictor_onnx.model import Estimate, MemoryModel, TracedEstimate
from predictor_onnx.prediction import Prediction, Request, Tier, gib
from predictor_onnx.source import CodeBundle
from predictor_onnx.static.analysis import analyse
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.traced_steps import TracedSteps

#: Each size that had to be guessed from names, and an architecture beyond anything measured, widens the
#: answer: p90 by this share, p99 by twice it. A judgement, not learnt: nothing measured is like that.
_GUESS_WIDTH: Final = 0.25


class Predictor:
    """Predicts peak device memory from source code that it never executes."""

    def __init__(self, model_path: Path | None = None, steps: TracedSteps | None = None) -> None:
        """Load the model and the catalog once; instances can be shared.

        Args:
            model_path: the ONNX file, where it is not the one of this package.
            steps: traces what has a name; without it the static analysis answers.

        Raises:
            ModelUnavailableError: the ONNX file or the catalog is missing or unusable.
        """
        self._model = MemoryModel(model_path)
        self._steps = steps
        catalog.load()

    @property
    def model_version(self) -> str:
        """Hash of the ONNX file."""
        return self._model.version

    def read(self, code: CodeBundle, request: Request) -> Workload:
        """What the static analysis reads of a step.

        Raises:
            CodeDoesNotParseError: the program is not valid Python; it names file and line.
        """
        return analyse(code, request.argv)

    def predict(
        self, code: CodeBundle, request: Request, trace_s: float = 0.0, dry_run: TracedStep | None = None
    ) -> Prediction:
        """Predict what the code needs.

        Args:
            code: the program.
            request: what is asked of it.
            trace_s: seconds from now until when a traced step is waited for; what is not traced by then is answered
                from reading alone.
            dry_run: a step of the program as its own dry run saw it, where there was one; it is better than reading.

        Raises:
            CodeDoesNotParseError: the program is not valid Python; it names file and line.
        """
        deadline = time.monotonic() + trace_s
        work = analyse(code, request.argv)
        if dry_run is not None:
            return self._ran(work, request, code, dry_run)
        if work.entrypoint and not (work.uses_accelerator or work.notes or work.starts_unknown):
            return self._without_accelerator(work)
        if not work.known:
            return self._unknown(work)
        return self._known(work, request, code, self._traced(work, deadline))

    def _traced(self, work: Workload, deadline: float) -> TracedStep | None:
        """The step as it was traced, if it can be and was in time."""
        asked = rebuild.configuration(work) if self._steps is not None else None
        if asked is None or self._steps is None:
            return None
        return self._steps.of(asked, deadline - time.monotonic())

    def _known(self, work: Workload, request: Request, code: CodeBundle, step: TracedStep | None) -> Prediction:
        if step is not None:
            told = self._model.estimate_traced(step.vector())
            p50, p90, p99 = told.quantiles
            outside = self._model.outside_traced(step.vector())
            breakdown = _traced_breakdown(step, told)
        else:
            estimate = self._model.estimate(work.vector())
            p50, p90, p99 = estimate.quantiles
            outside = self._model.outside(work.vector())
            breakdown = _breakdown(work, estimate)
        guesses = min(work.guesses, 2) + min(len(outside), 1) + (2 if work.unknown_models or work.stopped_early else 0)
        p90 *= 1 + _GUESS_WIDTH * min(guesses, 3)
        p99 *= 1 + 2 * _GUESS_WIDTH * min(guesses, 3)
        read = Tier.STATIC_NAMED if "/" in work.model_name else Tier.STATIC_LAYERS
        return Prediction(
            p50, p90, p99, read if step is None else Tier.TRACED, _sentence(work, p50, p90), breakdown,
            {**_drivers(work), "data_bytes": code.data_bytes + request.input_bytes,
             "beyond_training": bool(outside)},
            self._model.version, work.notes,
        )  # fmt: skip

    def _ran(self, work: Workload, request: Request, code: CodeBundle, step: TracedStep) -> Prediction:
        told = self._model.estimate_traced(step.vector())
        p50, p90, p99 = told.quantiles
        outside = self._model.outside_traced(step.vector())
        wider = _GUESS_WIDTH * min(len(outside), 1)
        p90, p99 = p90 * (1 + wider), p99 * (1 + 2 * wider)
        reason = (
            f"The program was run for two steps without a GPU: its network of {_count(step.parameters)} parameters "
            f"holds {gib(step.allocated_mib)} at most, needs about {gib(p50)} with what CUDA takes besides, and "
            f"nine times in ten under {gib(p90)}."
        )
        return Prediction(
            p50, p90, p99, Tier.DRY_RUN, reason, _traced_breakdown(step, told),
            {**_drivers(work), "parameters": step.parameters, "data_bytes": code.data_bytes + request.input_bytes,
             "beyond_training": bool(outside)},
            self._model.version,
        )  # fmt: skip

    def _unknown(self, work: Workload) -> Prediction:
        p50, p90, p99 = self._model.population
        cause = _cause(work)
        reason = (
            f"The code could not be sized ({cause}), so it is given what nine of ten measured training "
            f"runs need, {gib(p90)}; state --memory or --profile if you know better."
        )
        return Prediction(p50, p90, p99, Tier.UNKNOWN, reason, {"unknown": p50}, _drivers(work),
                          self._model.version, work.notes)  # fmt: skip

    def _without_accelerator(self, work: Workload) -> Prediction:
        reason = (
            "The code imports no library that uses a GPU, so it needs no "
            "device memory and the smallest slice is enough."
        )
        return Prediction(0.0, 0.0, 0.0, Tier.NO_ACCELERATOR_USE, reason, {}, _drivers(work),
                          self._model.version, work.notes)  # fmt: skip


def _cause(work: Workload) -> str:
    """Why the code could not be sized."""
    if work.notes:
        return work.notes[0]
    if work.unknown_models:
        name = work.unknown_models[0].rpartition("/")[2]
        return f"the model {name} is not in the catalog"
    if work.stopped_early:
        return "reading it took too long"
    if work.negative:
        return "some of its sizes are negative"
    if work.ops and not work.unsized:
        return "its sizes are beyond any device"
    if work.unsized:
        return "the sizes of its network come from where the code does not say"
    if work.frameworks:
        return f"what it does with {' and '.join(work.frameworks[:2])} is not read"
    if work.starts_unknown:
        return "it runs another program or code that is made while it runs"
    return "no network was found in it"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _sentence(work: Workload, p50: float, p90: float) -> str:
    name = work.model_name.rpartition("/")[2] or "a network"
    what = f"{name} with {_count(work.parameters)} parameters"
    size = f"batch {work.batch}" if work.batch else f"an assumed batch of {work.assumed_batch}"
    precision = {"float16": "half precision", "bfloat16": "bfloat16"}.get(work.precision, "float32")
    if work.training:
        how = f"training with {work.optimizer or 'no optimizer found'} at {size} in {precision}"
        held = f"{gib(work.activation_mib)} of activations" if work.activation_mib else "gradients"
        how += f", which keeps {held}"
        how += " thanks to checkpointing" if work.checkpointing else ""
    else:
        how = f"inference at {size} in {precision}"
    guess = "; some sizes are guessed" if work.guesses else ""
    return f"{what}, {how}, needs about {gib(p50)} and nine times in ten under {gib(p90)}{guess}."


def _breakdown(work: Workload, estimate: Estimate) -> dict[str, float]:
    """Shares of the median by category; the phase that peaks decides what the working part is."""
    context, resident, backward, update = estimate.parts
    weights = max(work.resident_mib, 1e-9)
    peaks_in_update = update > backward
    moving = max(work.activation_mib + work.transient_mib, 1e-9)
    parts = {
        "context": context,
        "parameters": resident * (work.parameter_mib + work.cast_mib) / weights,
        "optimizer": resident * work.optimizer_mib / weights,
        "data": resident * work.data_mib / weights,
        "gradients": update if peaks_in_update else 0.0,
        "activations": 0.0 if peaks_in_update else backward * work.activation_mib / moving,
        "workspace": 0.0 if peaks_in_update else backward * work.transient_mib / moving,
    }
    scale = estimate.quantiles[0] / max(sum(parts.values()), 1e-9)
    return {name: value * scale for name, value in parts.items()}


def _traced_breakdown(step: TracedStep, told: TracedEstimate) -> dict[str, float]:
    """The same for a traced step: what lives at the peak, and what the allocator has besides."""
    live = step.live_mib
    parts = {
        "context": told.context,
        "parameters": live["parameter"],
        "optimizer": live["optimizer"],
        "data": live["data"],
        "gradients": live["gradient"],
        "activations": live["activation"],
        "workspace": live["temporary"] + max(step.reserved_mib - sum(live.values()), 0.0),
    }
    scale = told.quantiles[0] / max(sum(parts.values()), 1e-9)
    return {name: value * scale for name, value in parts.items()}


def _drivers(work: Workload) -> dict[str, str | int | float | bool]:
    return {
        "model": work.model_name, "parameters": work.parameters,
        "trained_parameters": work.trained_parameters, "batch": work.batch or 0,
        "sequence": work.sequence or 0, "image": work.image or 0, "precision": work.precision,
        "optimizer": work.optimizer, "training": work.training,
        "gradient_checkpointing": work.checkpointing,
        "activation_bytes": round(work.activation_mib * MIB), "macs_per_step": work.macs,
        "guesses": work.guesses,
    }  # fmt: skip
