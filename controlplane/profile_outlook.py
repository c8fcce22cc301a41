"""What is expected of a job on each profile of a centre: whether it fits, how fast it is, how long it takes. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from controlplane.fleet import Geometry, Shape
from puhui.rpc.moment import duration
from puhui.v1 import prediction_pb2
from puhui.v1.prediction_pb2 import (
    PREDICTION_CONFIDENCE_HIGH,
    PREDICTION_CONFIDENCE_LOW,
    PREDICTION_CONFIDENCE_MEDIUM,
    PREDICTION_CONFIDENCE_UNSPECIFIED,
    PREDICTION_TIER_NO_ACCELERATOR,
    PREDICTION_TIER_UNKNOWN,
    PREDICTION_TIER_UNSPECIFIED,
    ProfileOutlook,
    Sizing,
)

__all__ = ["Pace", "chance_of_fit", "confidence", "outlooks"]

#: Standard normal quantiles of p90 and p99.
_Z90: Final = 1.2815515655446004
_Z99: Final = 2.3263478740408408
_NARROWEST: Final = 1e-6
#: p90 over p50 up to which an answer is sure, and fairly sure.
_HIGH: Final = 1.1
_MEDIUM: Final = 1.3


@dataclass(frozen=True)
class Pace:
    """How fast steps are on a profile."""

    slowdown_p50: float
    """Times longer than on the whole card."""
    slowdown_p90: float
    duration_p50_s: float | None = None
    """Of all steps, in seconds; None when their number or their time on the whole card is not known."""
    duration_p90_s: float | None = None


def confidence(prediction: prediction_pb2.Prediction) -> prediction_pb2.PredictionConfidence.ValueType:
    """Returns how sure a prediction is."""
    if prediction.tier == PREDICTION_TIER_UNSPECIFIED:
        return PREDICTION_CONFIDENCE_UNSPECIFIED
    if prediction.tier == PREDICTION_TIER_NO_ACCELERATOR:
        return PREDICTION_CONFIDENCE_HIGH
    memory = prediction.memory
    if prediction.tier == PREDICTION_TIER_UNKNOWN or memory.p50_mib <= 0:
        return PREDICTION_CONFIDENCE_LOW
    ratio = memory.p90_mib / memory.p50_mib
    if ratio <= _HIGH:
        return PREDICTION_CONFIDENCE_HIGH
    return PREDICTION_CONFIDENCE_MEDIUM if ratio <= _MEDIUM else PREDICTION_CONFIDENCE_LOW


def chance_of_fit(memory: prediction_pb2.MemoryQuantiles, memory_mib: float) -> float | None:
    """Returns the chance that the peak is not above an amount of memory; None when no quantiles are known.

    The quantiles are taken for those of a distribution whose logarithm is normal piece by piece: between p50 and p90,
    and from p90 on; below p50 it mirrors the first piece.

    Args:
        memory: p50, p90 and p99 of the peak, in MiB.
        memory_mib: the amount.
    """
    if memory.p50_mib <= 0:
        return None
    if memory_mib <= 0:
        return 0.0
    above = math.log(memory_mib / memory.p50_mib)
    first = max(math.log(max(memory.p90_mib / memory.p50_mib, 1.0)), _NARROWEST)
    if above <= first:
        score = above / first * _Z90
    else:
        second = max(math.log(max(memory.p99_mib / memory.p90_mib, 1.0)), _NARROWEST) if memory.p90_mib else first
        score = _Z90 + (above - first) / second * (_Z99 - _Z90)
    return 0.5 * math.erfc(-score / math.sqrt(2))


def outlooks(
    prediction: prediction_pb2.Prediction | None,
    sizing: Sizing,
    geometries: Iterable[Geometry],
    paces: Mapping[tuple[str, str], Pace],
) -> list[ProfileOutlook]:
    """Returns what is expected on each profile, by GPU model and then by size.

    Args:
        prediction: what the code needs; None when nothing was predicted.
        sizing: the size that the job is to get.
        geometries: what the GPUs of this centre can be cut into.
        paces: how fast it is, by GPU model and profile, where that is known.
    """
    may = {(choice.gpu_model, choice.profile) for choice in sizing.choices}
    first = (sizing.choices[0].gpu_model, sizing.choices[0].profile) if sizing.choices else None
    found = []
    for geometry in sorted(set(geometries), key=lambda one: one.gpu_model):
        for shape in sorted(geometry.shapes, key=lambda one: (one.memory_mib, one.compute_slices, one.profile)):
            key = (geometry.gpu_model, shape.profile)
            outlook = ProfileOutlook(
                profile=shape.profile, gpu_model=geometry.gpu_model, memory_mib=shape.memory_mib,
                compute_slices=shape.compute_slices, satisfies=key in may, chosen=key == first,
                reason=_reason(key, first, may, shape, sizing),
            )  # fmt: skip
            chance = _chance(prediction, shape.memory_mib)
            if chance is not None:
                outlook.chance_of_fit = chance
            _add_pace(outlook, paces.get(key))
            found.append(outlook)
    return found


def _chance(prediction: prediction_pb2.Prediction | None, memory_mib: int) -> float | None:
    if prediction is None:
        return None
    if prediction.tier == PREDICTION_TIER_NO_ACCELERATOR:
        return 1.0
    return chance_of_fit(prediction.memory, memory_mib)


def _add_pace(outlook: ProfileOutlook, pace: Pace | None) -> None:
    if pace is None:
        return
    outlook.slowdown_p50, outlook.slowdown_p90 = pace.slowdown_p50, pace.slowdown_p90
    if pace.duration_p50_s is not None and pace.duration_p90_s is not None:
        outlook.duration_p50.CopyFrom(duration(pace.duration_p50_s))
        outlook.duration_p90.CopyFrom(duration(pace.duration_p90_s))


def _reason(
    key: tuple[str, str], first: tuple[str, str] | None, may: set[tuple[str, str]], shape: Shape, sizing: Sizing
) -> str:
    named = sizing.origin == prediction_pb2.SIZING_ORIGIN_PROFILE
    if key == first:
        return "asked for" if named else "the smallest with enough memory"
    if key in may:
        return "would do as well"
    if named:
        return "not what was asked for"
    if shape.memory_mib < sizing.required_mib:
        return "too small"
    return "more than is needed"
