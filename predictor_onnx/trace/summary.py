"""From the record of a run of several steps to what one step needs and does."""

from __future__ import annotations

from collections.abc import Mapping

from predictor_onnx.trace.allocator import MIB
from predictor_onnx.trace.events import Category, Events, Kind, Phase
from predictor_onnx.trace.replay import replay
from predictor_onnx.trace.work import Work
from predictor_onnx.traced_step import TracedStep


def summarise(events: Events, work: Mapping[Phase, Work], parameters: int, steps: int) -> TracedStep:
    """Replay a record in each way that the features need.

    Args:
        events: what was allocated and freed.
        work: what was computed, by phase, in all steps.
        parameters: numbers in the model's weights.
        steps: how many steps were recorded.
    """
    full, plain, expandable = replay(events), replay(events, workspaces=False), replay(events, expandable=True)
    forward = [one for one in events.convolutions if not one.backward]
    passes = (work[Phase.FORWARD], work[Phase.BACKWARD])
    return TracedStep(
        reserved_mib=full.reserved / MIB,
        plain_reserved_mib=plain.reserved / MIB,
        expandable_reserved_mib=expandable.reserved / MIB,
        allocated_mib=plain.allocated / MIB,
        live_mib={category.name.lower(): full.live[category] / MIB for category in Category},
        update_mib=full.by_phase[Phase.UPDATE] / MIB,
        largest_mib=max((size for kind, size in zip(events.kinds, events.sizes, strict=True) if kind == Kind.TAKE),
                        default=0) / MIB,
        parameters=parameters,
        convolutions=len(forward) // steps,
        pointwise=sum(one.kernel == 1 for one in forward) // steps,
        depthwise=sum(one.depthwise for one in forward) // steps,
        kernels=passes[0].kernels // steps,
        flops=sum(one.flops for one in passes) / steps,
        moved_bytes=sum(one.moved_bytes for one in passes) / steps,
    )  # fmt: skip
