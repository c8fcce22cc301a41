"""What the predictor answers, and how much memory to ask for because of it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


class Tier(enum.Enum):
    """How the answer was found, best first."""

    #: A model of the catalog, traced step by step on tensors without data.
    TRACED = "traced"
    #: A model of the catalog, by its name.
    STATIC_NAMED = "static_named"
    #: Layers that the code itself defines.
    STATIC_LAYERS = "static_layers"
    #: Accelerator code whose network was not found: the spread of all training configurations.
    UNKNOWN = "unknown"
    #: The code imports no library that could use an accelerator.
    NO_ACCELERATOR_USE = "no_accelerator_use"


@dataclass(frozen=True)
class Request:
    """What is asked besides the code.

    Attributes:
        argv: the entrypoint's command line, such as ``["python3", "train.py", "--batch-size", "64"]``.
        input_bytes: size of inputs declared beside the bundle.
    """

    argv: tuple[str, ...]
    input_bytes: int = 0


@dataclass(frozen=True)
class Prediction:
    """Predicted peak device memory of a job. All memory in MiB.

    Attributes:
        p50_mib: as likely above as below.
        p90_mib: nine of ten jobs like this stay under it.
        p99_mib: ninety-nine of a hundred do.
        tier: how it was found.
        reason: one sentence for people.
        breakdown_mib: by category, adding up to ``p50_mib``.
        features: what drove the answer: model, parameters, batch, precision, optimizer and more.
        model_version: hash of the ONNX file.
    """

    p50_mib: float
    p90_mib: float
    p99_mib: float
    tier: Tier
    reason: str
    breakdown_mib: Mapping[str, float]
    features: Mapping[str, str | int | float | bool]
    model_version: str
    notes: tuple[str, ...] = field(default=())


#: An out-of-memory costs the whole run and a retry on the next size up; a slice one size too large costs
#: the difference in share while it runs. At nine to one, the expected cost is least at the p90 quantile.
OOM_COST: Final = 9.0
OVERSIZE_COST: Final = 1.0
#: An unknown network is no better known by a higher quantile of other people's jobs.
_ABSOLUTE_MARGIN_MIB: Final = 64.0


def required_mib(prediction: Prediction) -> float:
    """Memory to ask for, in MiB: the quantile whose expected cost is least, plus a page of margin.

    With cost ``a`` for too little and ``b`` for too much the best quantile is ``a / (a + b)``, here 0.9
    (the newsvendor rule, Arrow, Harris and Marschak 1951).
    """
    level = OOM_COST / (OOM_COST + OVERSIZE_COST)
    if level <= 0.5:
        return prediction.p50_mib + _ABSOLUTE_MARGIN_MIB
    if level <= 0.9:
        share = (level - 0.5) / 0.4
        low, high = prediction.p50_mib, prediction.p90_mib
    else:
        share = min(1.0, (level - 0.9) / 0.09)
        low, high = prediction.p90_mib, prediction.p99_mib
    return low + share * (high - low) + _ABSOLUTE_MARGIN_MIB


def fits(prediction: Prediction, slice_memory_mib: float) -> bool:
    """Whether a slice of this memory is the right risk for this prediction."""
    return required_mib(prediction) <= slice_memory_mib


def gib(mib: float) -> str:
    """Write an amount of memory as people read it: "640 MiB", "11.2 GiB"."""
    if mib < 1:
        return "less than 1 MiB"
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
