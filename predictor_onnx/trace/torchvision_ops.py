"""Lets torchvision, which timm imports, be imported beside a torch that its compiled ops were not built for.

No network that is traced uses those ops (boxes that overlap); their names must exist.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def define() -> None:
    """Declare the ops, unless torchvision brought its own."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
