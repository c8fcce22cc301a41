"""Lets torchvision, which timm imports, be imported beside a torch that its compiled ops were not built for.

No network that is traced uses those ops (boxes that overlap); their names must exist.
"""

from __future__ import annotations

import importlib
import sys

import torch


def define() -> None:
    """Declare the ops, unless torchvision brings its own, or is not there."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


#: What a library defines is there for as long as the library is.
_KEPT: list[torch.library.Library] = []
