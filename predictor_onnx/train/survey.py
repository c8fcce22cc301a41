"""A survey of configurations that nobody has measured: precisions, optimizers, recomputing and networks of every kind.

They are the first of the measuring harness's plan, traced. What the traced half of the model says of them teaches the
half that reads code what measured rows do not show: all of those are trained with Adam in float32. It is never counted
in a figure of accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from predictor_onnx import catalog
from predictor_onnx.configuration import Configuration
from predictor_onnx.measure.plan import family, plan
from predictor_onnx.source import CodeBundle
from predictor_onnx.static.analysis import analyse
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.train import traces
from predictor_onnx.train.program import program

#: Memory of the card that the survey is of, in MiB, and what draws its networks.
_CARD_MIB: Final = 80 * 1024.0
_SEED: Final = 20


@dataclass(frozen=True)
class Surveyed:
    """One configuration, as it is read and as it was traced.

    Attributes:
        family: what must never be on both sides of a split; the same words as of measured rows.
        configuration: the step.
        vector: its features as it is read, in the order of ``FEATURES``.
        traced: its features as the tracer saw it, in the order of ``TRACED_FEATURES``.
    """

    family: str
    configuration: Configuration
    vector: tuple[float, ...]
    traced: tuple[float, ...]


def key_of(asked: Configuration) -> traces.Key:
    """What a surveyed step is kept by."""
    return asked.source, asked.to_json(), asked.batch


def wanted(count: int) -> list[list[Configuration]]:
    """The first ``count`` configurations of the plan; those that differ in their batch only are together."""
    groups: dict[Configuration, list[Configuration]] = {}
    for planned in plan(catalog.load(), _CARD_MIB, _SEED)[:count]:
        groups.setdefault(replace(planned.configuration, batch=0), []).append(planned.configuration)
    return list(groups.values())


def read(steps: Mapping[traces.Key, TracedStep] | None = None) -> list[Surveyed]:
    """What was surveyed; what the static analysis cannot read is left out."""
    found = []
    for (_, text, _), step in (traces.read(traces.SURVEYED) if steps is None else steps).items():
        asked = Configuration.from_json(text)
        work = analyse(CodeBundle({"train.py": program(asked)}), ["python3", "train.py"])
        if work.known:
            found.append(Surveyed(family(asked), asked, tuple(work.vector()), tuple(step.vector())))
    return found
