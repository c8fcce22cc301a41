"""One training or inference step, described well enough to be built: to be traced without a GPU, or measured on one."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass
from typing import Any


class Precision(enum.Enum):
    """What the step computes in."""

    FLOAT32 = "float32"
    #: Float32 whose products of matrices may round their inputs to TF32. It needs the memory of float32.
    TF32 = "tf32"
    #: Autocast: weights stay in float32.
    AMP_FLOAT16 = "amp-float16"
    AMP_BFLOAT16 = "amp-bfloat16"
    #: Weights and all else.
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Configuration:
    """A network and one step of it.

    Attributes:
        source: where the network is from: ``timm``, ``torchvision``, ``transformers``, or ``layers``.
        model: its name there; for ``layers`` a JSON list of ``[layer of torch.nn, arguments...]``.
        batch: samples per forward pass.
        shape: of one sample: channels, height, width of an image; the number of tokens of a text; the width of a row.
        classes: how many classes its loss tells apart.
        precision: what it computes in.
        optimizer: name of a class of ``torch.optim``, in lower case; empty without one.
        momentum: of the optimizer that has one.
        training: whether the step trains; else it is a forward pass without gradients.
        channels_last: whether images and weights are laid out so.
        checkpointing: whether the network computes activations anew in the backward pass, where it knows how to.
        accumulation: forward and backward passes per update.
        attention: ``fused`` for PyTorch's scaled dot product attention, ``eager`` for products and a softmax; empty for
            whatever the network chooses by itself.
    """

    source: str
    model: str
    batch: int
    shape: tuple[int, ...]
    classes: int = 1000
    precision: Precision = Precision.FLOAT32
    optimizer: str = "adam"
    momentum: float = 0.0
    training: bool = True
    channels_last: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    attention: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps({**asdict(self), "precision": self.precision.value}, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Configuration:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: the line is something else.
        """
        try:
            values: dict[str, Any] = json.loads(line)
            return cls(**{**values, "shape": tuple(values["shape"]), "precision": Precision(values["precision"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no configuration: {line[:200]}") from error
