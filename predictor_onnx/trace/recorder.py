"""Writes down what a run allocates and frees, and what it computes, on tensors without data."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from predictor_onnx.trace.events import Category, Convolution, Events, Phase
from predictor_onnx.trace.work import Work

_ATEN: Final[Any] = torch.ops.aten
_FORWARD: Final = _ATEN.convolution.default
_BACKWARD: Final = _ATEN.convolution_backward.default
_READ_VALUE: Final = _ATEN._local_scalar_dense.default
_MADE_IN: Final = {
    Phase.BUILD: Category.DATA,
    Phase.FORWARD: Category.ACTIVATION,
    Phase.BACKWARD: Category.TEMPORARY,
    Phase.UPDATE: Category.TEMPORARY,
}


class Recorder(TorchDispatchMode):
    """Follows every storage from its first to its last use.

    Attributes:
        events: what was seen so far.
        work: what was computed so far, by phase.
        phase: what the run is doing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events = Events()
        self.work = {phase: Work() for phase in Phase}
        self.phase = Phase.BUILD
        #: Number of each living storage, by the identity of its Python object, which lives as long as it does.
        self._numbers: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ_VALUE:
            # Nothing has a value here: a flag is off, a number is one (a loss scale, a step).
            kind = args[0].dtype
            return False if kind == torch.bool else (1.0 if kind.is_floating_point else 1)
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._done(func, args, kwargs, result, made)
        for tensor in made:
            self._seen(tensor)
        return result

    def _done(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[torch.Tensor]) -> None:
        """An op was computed on the device."""
        if func is _FORWARD or func is _BACKWARD:
            self.events.convolve(_convolution(func, args, result))
        if not func.is_view:
            self._count(func, args, kwargs, result, made)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, made: list[torch.Tensor]) -> None:
        work = self.work[self.phase]
        work.kernels += 1
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        work.moved_bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
        if func is _BACKWARD:
            work.flops += _convolution_flops(args[0], args[2], args[7]) * sum(args[10][:2])
        elif func is _FORWARD:
            work.flops += _convolution_flops(result, args[1], args[6])
        elif (counted := flop_registry.get(func._overloadpacket)) is not None:
            work.flops += counted(*args, **(kwargs or {}), out_val=result)

    def _seen(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._numbers or not storage.nbytes():
            return
        number = self.events.take(storage.nbytes(), _MADE_IN[self.phase])
        self._numbers[key] = number

        def ended(_: Any) -> None:
            del self._numbers[key], self._watched[key]
            self.events.give(number)

        self._watched[key] = weakref.ref(storage, ended)

    def built(self, weight: torch.Tensor) -> None:
        """A weight or buffer is there that no op was seen to make."""
        self._seen(weight)
        self.mark(weight, Category.PARAMETER)

    def mark(self, tensor: torch.Tensor, category: Category) -> None:
        """Say what a tensor's storage is for. One that was not seen is left alone."""
        number = self._numbers.get(id(tensor.untyped_storage()))
        if number is not None:
            self.events.categories[number] = category

    def enter(self, phase: Phase) -> None:
        """A phase begins."""
        self.phase = phase
        self.events.enter(phase)

    @contextmanager
    def inside(self, phase: Phase) -> Iterator[None]:
        """A phase that another one is interrupted for."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


def _convolution_flops(out: torch.Tensor, weight: torch.Tensor, transposed: bool) -> float:
    """Two per multiply-add. A transposed one has its weight's first side for its input's channels."""
    # PyTorch's own formula for the gradient takes grouped convolutions for full ones.
    places = math.prod(weight.shape[2:])
    return 2.0 * out.numel() * places * int(weight.shape[0 if transposed else 1])


def _convolution(func: Any, args: Any, result: Any) -> Convolution:
    if func is _BACKWARD:
        out, source, weight, groups = args[0], args[1], args[2], args[9]
    else:
        out, source, weight, groups = result, args[0], args[1], args[8]
    return Convolution(
        backward=func is _BACKWARD,
        source_bytes=source.numel() * source.element_size(),
        result_bytes=out.numel() * out.element_size(),
        kernel=math.prod(weight.shape[2:]),
        depthwise=groups > 1 and groups == source.shape[1],
    )
