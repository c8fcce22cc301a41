"""What the predictor answers, and how much memory to ask for because of it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


class Tier(enum.Enum):
    """How the answer was found, best first."""

    #: The program itself, run for two steps on tensors without data.
    DRY_RUN = "dry_run"
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


@dataclass(frozen=True)
class Costs:
    """What a wrong slice costs, in any unit.

    An out-of-memory costs a run and another start on the next size up; a slice one size too large costs the difference
    in share while it runs. At nine to one, the expected cost is least at the p90 quantile.

    Attributes:
        out_of_memory: of a slice that is too small; above 0.
        oversized: of one that is larger than it had to be; above 0.
    """

    out_of_memory: float = 9.0
    oversized: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no cost.

        Raises:
            ValueError: a cost is not a number above 0.
        """
        if not all(math.isfinite(cost) and cost > 0 for cost in (self.out_of_memory, self.oversized)):
            raise ValueError("costs are numbers above 0")


COSTS: Final = Costs()
#: So that what is asked for is more than what was seen not to do.
_MARGIN_MIB: Final = 1.0


def required_mib(prediction: Prediction, costs: Costs = COSTS) -> float:
    """Memory to ask for, in MiB: the quantile whose expected cost is least, and one MiB.

    With cost ``a`` for too little and ``b`` for too much the best quantile is ``a / (a + b)``, 0.9 at nine to one
    (the newsvendor rule, Arrow, Harris and Marschak 1951). It holds for slices of given sizes as well: of two sizes the
    smaller is the cheaper one when the odds that it suffices are above ``a / b``.
    """
    level = costs.out_of_memory / (costs.out_of_memory + costs.oversized)
    if level <= 0.5:
        return prediction.p50_mib + _MARGIN_MIB
    if level <= 0.9:
        share = (level - 0.5) / 0.4
        low, high = prediction.p50_mib, prediction.p90_mib
    else:
        share = min(1.0, (level - 0.9) / 0.09)
        low, high = prediction.p90_mib, prediction.p99_mib
    return low + share * (high - low) + _MARGIN_MIB


def fits(prediction: Prediction, slice_memory_mib: float, costs: Costs = COSTS) -> bool:
    """Whether a slice of this memory is the right risk for this prediction."""
    return required_mib(prediction, costs) <= slice_memory_mib


def gib(mib: float) -> str:
    """Write an amount of memory as people read it: "640 MiB", "11.2 GiB"."""
    if mib < 1:
        return "less than 1 MiB"
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
