"""What cuDNN takes for a moment while it computes a convolution: a term of the model, not a fact.

The gradients of a convolution in TF32 or half precision are computed in a channels-last layout, so cuDNN copies the
input and the output's gradient of a channels-first one. Which algorithm it takes is its own choice by heuristics that
are not published. The rule here was chosen among seventeen by how well the measured memory of the training families
follows it (decision 0016): the backward pass of a kernel of more than one place takes one and a half times its input
and its output; depthwise convolutions run in PyTorch's own kernels without any.
"""

from __future__ import annotations

from predictor_onnx.trace.events import Convolution


def workspace_bytes(convolution: Convolution) -> int:
    """Bytes of the workspace of one pass."""
    if convolution.depthwise or convolution.kernel == 1 or not convolution.backward:
        return 0
    return (convolution.source_bytes + convolution.result_bytes) * 3 // 2
