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
#: The card that the slowdowns were measured on, in float32 with TF32 on.
SLICED: Final = "A100-SXM4-40GB"
#: Tensor cores do half precision at twice the rate of TF32.
_HALF_PER_TF32: Final = 2.0
HALF: Final = frozenset(["float16", "bfloat16"])


def quicker_than_sliced(card: Card, precision: str) -> tuple[float, float]:
    """How many times quicker arithmetic and memory traffic are than where the slowdowns were measured.

    Half precision is compared with TF32 on tensor cores, float32 with float32.
    """
    sliced = CARDS[SLICED]
    arithmetic = card.single_tflops / sliced.single_tflops
    if precision in HALF:
        arithmetic = _HALF_PER_TF32 * card.half_tflops / sliced.half_tflops
    return arithmetic, card.bandwidth_gb_s / sliced.bandwidth_gb_s


def card_named(product: str) -> Card | None:
    """The card of a product name such as ``NVIDIA A100-SXM4-40GB``; None for one that is not in the table."""
    wanted = product.lower().replace("-", " ")
    return next((card for name, card in CARDS.items() if _words(name) in f" {wanted} "), None)


def _words(name: str) -> str:
    """A name as whole words: an A3000 is no A30, and a GH200 no H200."""
    return f" {name.lower().replace('-', ' ')} "
