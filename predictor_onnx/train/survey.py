"""A survey of configurations that nobody has measured: precisions, optimizers, recomputing and networks of every kind.

They are the first of the measuring harness's plan, traced. Measured rows are all trained with Adam in float32, and none
is a language model. What the physics of traced steps says of these teaches the half of the model that reads code what
measured rows do not show, such as the logits of a large vocabulary. Both halves are compared on the families that are
held out: that says where they disagree, and nothing of how near either is to what a card would show.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from predictor_onnx import catalog
from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.measure.plan import family, plan
from predictor_onnx.model import MemoryModel
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


def families() -> list[str]:
    """Those of the whole plan."""
    return sorted({planned.family for planned in plan(catalog.load(), _CARD_MIB, _SEED)})


def wanted(count: int) -> list[list[Configuration]]:
    """The first ``count`` configurations of the plan; those that differ in their batch only are together."""
    groups: dict[Configuration, list[Configuration]] = {}
    for planned in plan(catalog.load(), _CARD_MIB, _SEED)[:count]:
        groups.setdefault(replace(planned.configuration, batch=0), []).append(planned.configuration)
    return list(groups.values())


def compared(model: MemoryModel, surveyed: Sequence[Surveyed], held: Container[str]) -> list[dict[str, Any]]:
    """How far the answer from reading is from the answer from the trace, by way to compute.

    Args:
        model: the exported model.
        surveyed: the steps.
        held: families that it never saw.
    """
    ways: dict[str, list[float]] = {}
    for one in surveyed:
        if one.family not in held:
            continue
        read, traced = model.estimate(list(one.vector)), model.estimate_traced(list(one.traced))
        ways.setdefault(_way(one.configuration), []).append(100 * (read.quantiles[0] / traced.quantiles[0] - 1))
    return [
        {
            "way": way,
            "rows": len(differences),
            "median_pct": float(np.median(differences)),
            "mean_size_pct": float(np.abs(differences).mean()),
        }
        for way, differences in sorted(ways.items(), key=lambda found: -len(found[1]))
    ]


def _way(asked: Configuration) -> str:
    """What of it is not as in the measured rows."""
    said = [
        asked.precision.value if asked.precision is not Precision.FLOAT32 else "",
        asked.optimizer if asked.optimizer not in ("", "adam") else "",
        "" if asked.training else "inference",
        "checkpointing" if asked.checkpointing else "",
        "accumulation" if asked.accumulation > 1 else "",
        "channels last" if asked.channels_last else "",
        f"{asked.attention} attention" if asked.attention else "",
    ]
    kind = asked.source if asked.source in ("transformers", "layers") else "images"
    return ", ".join([kind, *(one for one in said if one)])


def read(steps: Mapping[traces.Key, TracedStep] | None = None) -> list[Surveyed]:
    """What was surveyed; what the static analysis cannot read is left out."""
    found = []
    for (_, text, _), step in (traces.read(traces.SURVEYED) if steps is None else steps).items():
        asked = Configuration.from_json(text)
        work = analyse(CodeBundle({"train.py": program(asked)}), ["python3", "train.py"])
        if work.known:
            found.append(Surveyed(family(asked), asked, tuple(work.vector()), tuple(step.vector())))
    return found
