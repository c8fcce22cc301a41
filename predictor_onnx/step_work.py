"""What one step makes a card do: arithmetic, bytes through memory, and launches that wait for one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from predictor_onnx.features import KINDS, MIB, Workload

#: Forward, backward by the inputs, backward by the weights: each does about the arithmetic of the forward pass.
_TRAINING_PASSES: Final = 3
#: With checkpointing the forward pass runs twice.
_CHECKPOINTED_PASSES: Final = 4
#: What the trees that correct the step time see: the architecture, never the batch alone.
SHAPE: Final = (
    *(f"share_{kind}" for kind in KINDS),
    "log_bytes_per_flop", "log_flops_per_launch", "log_bytes_per_launch", "log_state_bytes", "log_launches",
)  # fmt: skip


@dataclass(frozen=True)
class StepWork:
    """One step on any card; nothing here depends on which.

    Attributes:
        flops: floating point operations, two for each multiply and add.
        moved_bytes: through device memory for activations: what each op writes, and once more to read it.
        state_bytes: through device memory for weights, gradients and optimizer state.
        launches: kernels that wait for one another; a recurrent layer's time steps count one each.
        kind_shares: share of the kept activations by the kind of op that made them, in the order of ``KINDS``.
    """

    flops: float
    moved_bytes: float
    state_bytes: float
    launches: float
    kind_shares: tuple[float, ...]

    @classmethod
    def of(cls, work: Workload) -> StepWork:
        """From the static analysis.

        State: the forward and the backward pass read the weights; the update reads and writes them, and the
        optimizer's state; gradients are written, added to, read and cleared.
        """
        passes = 1 if not work.training else _CHECKPOINTED_PASSES if work.checkpointing else _TRAINING_PASSES
        state = work.parameter_mib
        if work.training:
            state = 4 * work.parameter_mib + 4 * work.gradient_mib + 2 * work.optimizer_mib
        kept = max(sum(work.activation_by_kind_mib), 1e-9)
        return cls(
            flops=2 * passes * work.macs,
            moved_bytes=2 * passes * work.written_mib * MIB,
            state_bytes=state * MIB,
            launches=float(passes * (work.ops + work.recurrent_steps)),
            kind_shares=tuple(mib / kept for mib in work.activation_by_kind_mib),
        )

    def shape(self) -> tuple[float, ...]:
        """Values of ``SHAPE``, in order."""
        flops, moved, launches = max(self.flops, 1.0), max(self.moved_bytes, 1.0), max(self.launches, 1.0)
        return (
            *self.kind_shares,
            math.log(moved / flops),
            math.log(flops / launches),
            math.log(moved / launches),
            math.log(max(self.state_bytes, 1.0)),
            math.log(launches),
        )
