"""What size of slice a job is to get: an explicit profile wins over explicit memory, which wins over the prediction."""

from __future__ import annotations

import re
from collections.abc import Iterable

from controlplane.fleet import Geometry, Shape
from puhui.v1 import job_pb2, prediction_pb2
from puhui.v1.prediction_pb2 import (
    SIZING_ORIGIN_MEMORY,
    SIZING_ORIGIN_OUTGROWN,
    SIZING_ORIGIN_PREDICTION,
    SIZING_ORIGIN_PROFILE,
    ProfileChoice,
    Sizing,
)

__all__ = [
    "EQUAL_MEMORY",
    "choices_for",
    "largest",
    "need_of",
    "size",
    "size_of_session",
    "size_outgrown",
    "sizing_for",
]

EQUAL_MEMORY = 1.05
"""Memory up to this factor apart is taken as equal: drivers report 3g and 4g of one card some MiB apart."""

_SAID_BY = {
    SIZING_ORIGIN_MEMORY: "were asked for",
    SIZING_ORIGIN_OUTGROWN: "are more than it ran out of",
}
# "1g.10gb+me" and the like carry engines that there are few of; who wants one names it.
_PLAIN = re.compile(r"\d+g\.\d+gb")


def need_of(
    resources: job_pb2.Resources, prediction: prediction_pb2.Prediction | None
) -> tuple[prediction_pb2.SizingOrigin.ValueType, str, int]:
    """Returns who decides, the profile that is named (or ""), and the memory that is needed, in MiB (or 0)."""
    if resources.profile:
        return SIZING_ORIGIN_PROFILE, resources.profile, 0
    if resources.memory_mib:
        return SIZING_ORIGIN_MEMORY, "", resources.memory_mib
    return SIZING_ORIGIN_PREDICTION, "", prediction.required_mib if prediction is not None else 0


def choices_for(profile: str, required_mib: int, geometries: Iterable[Geometry]) -> list[ProfileChoice]:
    """Returns the profiles that satisfy a need, the best first.

    For each GPU model these are the smallest slices with enough memory; among slices of equal memory, the one
    with fewer compute slices comes first, and the others follow for when it does not fit. Over GPU
    models, less memory comes first.

    Args:
        profile: the one profile that is wanted; "" for any.
        required_mib: memory that is needed at least, in MiB.
        geometries: what the GPUs of this centre can be cut into.
    """
    found: dict[tuple[str, str], ProfileChoice] = {}
    for geometry in geometries:
        for shape in _shapes_for(profile, required_mib, geometry):
            found.setdefault(
                (geometry.gpu_model, shape.profile),
                ProfileChoice(
                    profile=shape.profile,
                    gpu_model=geometry.gpu_model,
                    memory_mib=shape.memory_mib,
                    compute_slices=shape.compute_slices,
                ),
            )
    # Slices of one card with equal memory stay together, by compute; cards follow each other by memory.
    least: dict[str, int] = {}
    for choice in found.values():
        least[choice.gpu_model] = min(choice.memory_mib, least.get(choice.gpu_model, choice.memory_mib))
    return sorted(
        found.values(),
        key=lambda choice: (least[choice.gpu_model], choice.gpu_model, choice.compute_slices, choice.memory_mib),
    )


def _shapes_for(profile: str, required_mib: int, geometry: Geometry) -> list[Shape]:
    if profile:
        shape = geometry.by_profile.get(profile)
        return [shape] if shape is not None else []
    enough = [
        shape for shape in geometry.shapes if _PLAIN.fullmatch(shape.profile) and shape.memory_mib >= required_mib
    ]
    if not enough:
        return []
    smallest = min(shape.memory_mib for shape in enough)
    return [shape for shape in enough if shape.memory_mib <= smallest * EQUAL_MEMORY]


def largest(geometries: Iterable[Geometry]) -> Shape | None:
    """Returns the slice with the most memory; None when there is none."""
    return max(
        (shape for geometry in geometries for shape in geometry.shapes),
        key=lambda shape: shape.memory_mib,
        default=None,
    )


def size(
    resources: job_pb2.Resources, prediction: prediction_pb2.Prediction | None, geometries: Iterable[Geometry]
) -> Sizing:
    """Returns the size of slice that a job is to get, among what this centre has now."""
    known = list(geometries)
    origin, profile, required_mib = need_of(resources, prediction)
    choices = choices_for(profile, required_mib, known)
    return Sizing(
        origin=origin,
        required_mib=required_mib,
        choices=choices,
        reason=_reason(origin, profile, required_mib, choices, known),
    )


def size_outgrown(required_mib: int, geometries: Iterable[Geometry]) -> Sizing:
    """Returns the size of slice for a job that ran out of memory on what it had; without choices where none has it."""
    known = list(geometries)
    choices = choices_for("", required_mib, known)
    reason = _reason(SIZING_ORIGIN_OUTGROWN, "", required_mib, choices, known)
    return Sizing(origin=SIZING_ORIGIN_OUTGROWN, required_mib=required_mib, choices=choices, reason=reason)


def size_of_session(resources: job_pb2.Resources, geometries: Iterable[Geometry], default_mib: int = 0) -> Sizing:
    """Returns the size of slice for the runs of a session.

    Args:
        resources: what is asked for.
        geometries: what the GPUs of this centre can be cut into.
        default_mib: memory of a session that asks for nothing; 0 is the smallest slice there is.
    """
    known = list(geometries)
    sizing = size(resources, None, known)
    if sizing.origin != SIZING_ORIGIN_PREDICTION:
        return sizing
    unknown, choices = "what will run in a session is not known", choices_for("", default_mib, known)
    del sizing.choices[:]
    sizing.choices.extend(choices)
    sizing.required_mib = default_mib
    if not choices and default_mib:
        sizing.reason = f"{unknown}; {default_mib} MiB are this centre's default, and no card here has a slice like it"
    elif choices:
        which = f"this centre's default of {default_mib} MiB" if default_mib else "the smallest slice"
        sizing.reason = (
            f"{unknown}, so it gets {which}, {choices[0].profile} ({choices[0].memory_mib} MiB); ask for a profile or "
            "for memory to get another"
        )
    return sizing


def sizing_for(job: job_pb2.Job, choices: list[ProfileChoice]) -> Sizing:
    """Returns the sizing of a job that was submitted earlier, with the choices that this centre has now."""
    sizing = Sizing()
    sizing.CopyFrom(job.sizing)
    if list(sizing.choices) == choices:
        return sizing
    del sizing.choices[:]
    sizing.choices.extend(choices)
    if choices and not job.spec.resources.profile and job.spec.kind != job_pb2.JOB_KIND_SESSION:
        sizing.reason = _reason(sizing.origin, "", sizing.required_mib, choices, [])
    return sizing


def _reason(
    origin: prediction_pb2.SizingOrigin.ValueType,
    profile: str,
    required_mib: int,
    choices: list[ProfileChoice],
    known: list[Geometry],
) -> str:
    if origin == SIZING_ORIGIN_PROFILE:
        return f"{profile}, because it was asked for by name"
    need = f"{required_mib} MiB {_SAID_BY.get(origin, 'are predicted')}"
    if choices:
        best = choices[0]
        return f"{need}; the smallest slice with that much is {best.profile} ({best.memory_mib} MiB)"
    top = largest(known)
    if top is None:
        return f"{need}; no GPU of this centre is known yet"
    return f"{need}; no card here is that large: the largest slice is {top.profile} ({top.memory_mib} MiB)"
