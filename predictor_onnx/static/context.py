"""What the ops and layers see of the evaluation that runs them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Protocol

from predictor_onnx.static.recorder import Recorder
from predictor_onnx.static.values import Value

_NAMES: Final = (
    ("batch", re.compile(
        r"^(per_device_train_|per_gpu_|train_|mini_?|micro_)?(batch|bs|bsz|batch_?size|batchsize)$",
        re.IGNORECASE)),
    ("sequence", re.compile(
        r"^(block_size|(max_|model_max_)?(seq|sequence)_?(len|length)|max_len(gth)?|context(_len(gth)?"
        r"|_size|_window)?|ctx_len|n_ctx|n_positions|seqlen|bptt|window(_size)?)$", re.IGNORECASE)),
    ("image", re.compile(
        r"^(image_?size|img_?size|imgsz|im_size|resolution|crop_?size|input_res|train_crop_size"
        r"|img_dim|image_dim)$", re.IGNORECASE)),
)  # fmt: skip

#: Used where the code says nothing; each use counts as a guess and widens the answer.
DEFAULT_BATCH: Final = 32
DEFAULT_SEQUENCE: Final = 512
DEFAULT_IMAGE: Final = 224
_LARGEST_HINT: Final = 1 << 20


@dataclass
class Hints:
    """Sizes that the code names (``batch_size = 64``), for where no tensor carries them."""

    found: dict[str, int] = field(default_factory=dict)
    last_spatial: tuple[int | None, ...] = ()

    def note(self, name: str, value: Value) -> None:
        """Remember ``value`` if ``name`` is one that people give to a size."""
        if isinstance(value, bool) or not isinstance(value, int):
            return
        if not 0 < value < _LARGEST_HINT:
            return
        for meaning, pattern in _NAMES:
            if pattern.match(name):
                self.found[meaning] = value

    @property
    def batch(self) -> int:
        """Samples per step."""
        return self.found.get("batch", DEFAULT_BATCH)

    @property
    def sequence(self) -> int:
        """Tokens per sample."""
        return self.found.get("sequence", DEFAULT_SEQUENCE)

    @property
    def image(self) -> int:
        """Pixels along one side of an image."""
        return self.found.get("image", DEFAULT_IMAGE)


class Context(Protocol):
    """The evaluator, as ops and layers see it."""

    rec: Recorder
    hints: Hints

    def call(self, target: Value, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Call a value of the evaluated program."""
        ...

    def place(self) -> tuple[str, int, int]:
        """File, line and column that are being evaluated."""
        ...
