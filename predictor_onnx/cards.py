"""What cards can do at best, from their makers' data sheets: how a step time measured on one carries over to another.

Nothing here is measured. Arithmetic is taken to scale with the dense peak of the precision in use, memory traffic with
the peak bandwidth. Half precision counts tensor cores that add in float32; float32 counts no tensor cores, because
PyTorch leaves TF32 off for matrix products unless told otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Card:
    """Peaks of one card: dense TFLOP/s by precision, and GB/s."""

    half_tflops: float
    single_tflops: float
    bandwidth_gb_s: float


#: By a part of the product's name, the most particular first.
CARDS: Final[dict[str, Card]] = {
    "H200": Card(989.0, 67.0, 4800.0),
    "H100 NVL": Card(835.0, 60.0, 3900.0),
    "H100 PCIe": Card(756.0, 51.0, 2000.0),
    "H100": Card(989.0, 67.0, 3350.0),
    "A100-SXM4-40GB": Card(312.0, 19.5, 1555.0),
    "A100-PCIE-40GB": Card(312.0, 19.5, 1555.0),
    "A100 80GB PCIe": Card(312.0, 19.5, 1935.0),
    "A100": Card(312.0, 19.5, 2039.0),
    "A30": Card(165.0, 10.3, 933.0),
    "RTX 3090": Card(71.0, 35.6, 936.0),
}
#: The card that the step times were measured on, in half precision.
MEASURED: Final = "RTX 3090"


def card_named(product: str) -> Card | None:
    """The card of a product name such as ``NVIDIA A100-SXM4-40GB``; None for one that is not in the table."""
    wanted = product.lower().replace("-", " ")
    return next((card for name, card in CARDS.items() if name.lower().replace("-", " ") in wanted), None)
