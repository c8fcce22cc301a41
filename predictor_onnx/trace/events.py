"""What a run does to the device's memory, in order: takes, gives, and convolutions that need a workspace."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Category(enum.IntEnum):
    """What a storage is for."""

    PARAMETER = 0
    DATA = 1
    #: Made by a forward pass.
    ACTIVATION = 2
    GRADIENT = 3
    OPTIMIZER = 4
    #: Made by a backward pass or an update, and none of the above.
    TEMPORARY = 5


class Phase(enum.IntEnum):
    """What a run is doing."""

    BUILD = 0
    FORWARD = 1
    BACKWARD = 2
    UPDATE = 3


class Kind(enum.IntEnum):
    """What happened."""

    TAKE = 0
    GIVE = 1
    CONVOLUTION = 2
    PHASE = 3


@dataclass(frozen=True)
class Convolution:
    """A convolution of one pass, as far as its workspace depends on it.

    Attributes:
        backward: whether it makes gradients.
        source_bytes: its input, the whole batch.
        result_bytes: its output, the whole batch.
        kernel: places that its kernel covers.
        depthwise: whether each channel has filters of its own, which CUDA computes without cuDNN.
    """

    backward: bool
    source_bytes: int
    result_bytes: int
    kernel: int
    depthwise: bool


class Events:
    """The record of a run: parallel lists, one entry per event.

    Attributes:
        kinds: a ``Kind`` each.
        subjects: the number of a storage that is taken or given, the place in ``convolutions``, or a ``Phase``.
        sizes: bytes of a take; 0 else.
        categories: ``Category`` of each storage, by its number.
        convolutions: the convolutions, in order.
    """

    def __init__(self) -> None:
        self.kinds: list[int] = []
        self.subjects: list[int] = []
        self.sizes: list[int] = []
        self.categories: list[Category] = []
        self.convolutions: list[Convolution] = []

    def take(self, size: int, category: Category) -> int:
        """A storage of ``size`` bytes begins; the answer is its number."""
        number = len(self.categories)
        self.categories.append(category)
        self._add(Kind.TAKE, number, size)
        return number

    def give(self, number: int) -> None:
        """A storage ends."""
        self._add(Kind.GIVE, number)

    def convolve(self, convolution: Convolution) -> None:
        """A convolution runs."""
        self._add(Kind.CONVOLUTION, len(self.convolutions))
        self.convolutions.append(convolution)

    def enter(self, phase: Phase) -> None:
        """A phase begins."""
        self._add(Kind.PHASE, phase)

    def _add(self, kind: Kind, subject: int, size: int = 0) -> None:
        self.kinds.append(kind)
        self.subjects.append(subject)
        self.sizes.append(size)
