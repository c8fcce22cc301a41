"""What a run computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Work:
    """Counts of one phase.

    Attributes:
        flops: floating point operations of matrix products, convolutions and attention; two per multiply-add.
        moved_bytes: bytes read and written by all ops that are no views.
        kernels: ops that are no views.
    """

    flops: float = 0.0
    moved_bytes: float = 0.0
    kernels: int = 0
