"""What one traced step needs and does, and the features that the model predicts from when a job was traced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

#: What is in the device's memory: 1 where convolutions load cuDNN's kernels, and MiB taken from the driver.
TRACED_PHYSICS: Final = ("convolves", "reserved_mib")
#: What the step is like, whatever its size; the boosted correction and the quantile heads see only these.
TRACED_STRUCTURE: Final = (
    "fragmentation", "workspace_share", "expandable_share", "pointwise_share", "depthwise_share", "convolution_share",
    "log_kernels", "log_flops_per_byte", "largest_share", "update_share", "parameter_share",
)  # fmt: skip
TRACED_FEATURES: Final = TRACED_PHYSICS + TRACED_STRUCTURE


@dataclass(frozen=True)
class TracedStep:
    """A step as the tracer saw it, without the CUDA context. Memory in MiB; counts and work are of one step.

    Attributes:
        reserved_mib: what the caching allocator takes from the driver, workspaces of convolutions included.
        plain_reserved_mib: the same without workspaces.
        expandable_reserved_mib: the same, with workspaces, when segments expand (``expandable_segments:True``).
        allocated_mib: most that lives at once, without workspaces.
        live_mib: what that is made of, by category: parameter, data, activation, gradient, optimizer, temporary.
        update_mib: most that lives at once during the optimizer's update.
        largest_mib: the largest single tensor.
        parameters: numbers in the model's weights.
        convolutions: convolutions of a forward pass.
        pointwise: those whose kernel covers one place.
        depthwise: those with filters of their own for each channel.
        kernels: ops of the forward pass that are no views.
        flops: floating point operations of forward and backward pass.
        moved_bytes: bytes that both read and write.
    """

    reserved_mib: float
    plain_reserved_mib: float
    expandable_reserved_mib: float
    allocated_mib: float
    live_mib: dict[str, float]
    update_mib: float
    largest_mib: float
    parameters: int
    convolutions: int
    pointwise: int
    depthwise: int
    kernels: int
    flops: float
    moved_bytes: float

    def vector(self) -> list[float]:
        """Values of ``TRACED_FEATURES``, in order."""
        allocated = max(self.allocated_mib, 1e-6)
        convolutions, kernels = max(self.convolutions, 1), max(self.kernels, 1)
        moved = max(self.moved_bytes, 1.0)
        return [
            float(self.convolutions > 0), self.reserved_mib,
            self.plain_reserved_mib / allocated,
            (self.reserved_mib - self.plain_reserved_mib) / allocated,
            self.expandable_reserved_mib / allocated,
            self.pointwise / convolutions, self.depthwise / convolutions, self.convolutions / kernels,
            math.log(kernels), math.log(max(self.flops, 1.0) / moved),
            self.largest_mib / allocated, self.update_mib / allocated,
            self.live_mib.get("parameter", 0.0) / allocated,
        ]  # fmt: skip
