"""Two records of one step at two batches, from which its record at any batch follows.

What a step does is the same at each batch, and every size is a fixed part plus one that grows with the batch; where a
network behaves otherwise, it is traced at each batch.
"""

from __future__ import annotations

from predictor_onnx.trace.events import Convolution, Events, Kind, Phase
from predictor_onnx.trace.work import Work

Record = tuple[Events, dict[Phase, Work]]


class NotAffineError(Exception):
    """The two records are not of the same sequence."""


class AffineRecord:
    """A record as a function of the batch.

    Args:
        low: the record at the first batch.
        high: the record at the second.
        batches: the two.

    Raises:
        NotAffineError: they differ in more than sizes.
    """

    def __init__(self, low: Record, high: Record, batches: tuple[int, int]) -> None:
        (events, work), (other, more) = low, high
        same = events.kinds == other.kinds and events.subjects == other.subjects
        if not same or any(
            (a.backward, a.kernel, a.depthwise) != (b.backward, b.kernel, b.depthwise)
            for a, b in zip(events.convolutions, other.convolutions, strict=True)
        ):
            raise NotAffineError("the step does other things at another batch")
        self._low, self._high = (events, work), (other, more)
        self._batches = batches

    def at(self, batch: int) -> Record:
        """The record at a batch."""
        (events, work), (other, more) = self._low, self._high
        low, high = self._batches

        def between(a: float, b: float) -> float:
            return a + (b - a) * (batch - low) / (high - low)

        made = Events()
        made.kinds, made.subjects, made.categories = events.kinds, events.subjects, events.categories
        made.sizes = [
            max(1, round(between(a, b))) if kind == Kind.TAKE else 0
            for kind, a, b in zip(events.kinds, events.sizes, other.sizes, strict=True)
        ]
        made.convolutions = [
            Convolution(a.backward, round(between(a.source_bytes, b.source_bytes)),
                        round(between(a.result_bytes, b.result_bytes)), a.kernel, a.depthwise)
            for a, b in zip(events.convolutions, other.convolutions, strict=True)
        ]  # fmt: skip
        done = {
            phase: Work(between(one.flops, more[phase].flops), between(one.moved_bytes, more[phase].moved_bytes),
                        one.kernels)
            for phase, one in work.items()
        }  # fmt: skip
        return made, done
