"""What the measuring process and the one that starts it say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Where torch's allocator reads its settings.
ALLOCATOR: Final = "PYTORCH_CUDA_ALLOC_CONF"


@dataclass(frozen=True)
class Settings:
    """How all configurations of a file are measured.

    Attributes:
        cudnn_benchmark: let cuDNN try its algorithms out; faster steps, larger workspaces.
        expandable_segments: let segments of torch's allocator grow.
        warm_up: steps before the timed ones.
    """

    cudnn_benchmark: bool = False
    expandable_segments: bool = False
    warm_up: int = 5

    def environment(self) -> dict[str, str]:
        """What the measuring process has in its environment because of them."""
        return {ALLOCATOR: f"expandable_segments:{self.expandable_segments}", "HF_HUB_OFFLINE": "1"}
