"""Building a network whose weights hold nothing, though its constructor computes with small tensors.

Constructors take widths, depths and drop rates out of small tensors (``torch.linspace(0, rate, depth).tolist()``), so
those must hold real numbers while the network is built; only large tensors hold none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from predictor_onnx.trace.recorder import Recorder

#: Numbers in a tensor up to which it is real while a network is built.
_SMALL: Final = 1 << 14


class _SmallIsReal(TorchDispatchMode):
    """Ops on real tensors are computed, and what they make is real when it is small."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given) or not (given or _asks_little(func, args)):
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))


def _asks_little(func: Any, args: Any) -> bool:
    """Whether what an op makes from nothing is small; its first argument is its size, or a bound, as the op has it."""
    if func._schema.arguments and func._schema.arguments[0].name == "size":
        return math.prod(int(side) for side in args[0]) <= _SMALL
    return all(abs(float(one)) <= _SMALL for one in args if isinstance(one, int | float))


@contextmanager
def building(recorder: Recorder, fakes: FakeTensorMode) -> Iterator[list[Any]]:
    """Networks put into the list that this gives are made ready to be run, at the end of the block."""
    made: list[Any] = []
    with _SmallIsReal():
        yield made
    for network in made:
        for module in network.modules():
            _empty(module, recorder, fakes)


def _empty(module: Any, recorder: Recorder, fakes: FakeTensorMode) -> None:
    """Takes the numbers out of a module's own weights and buffers."""
    for weights in (module._parameters, module._buffers):
        for name, weight in weights.items():
            if weight is None or isinstance(weight, FakeTensor):
                continue
            fake = fakes.from_tensor(weight.detach(), static_shapes=True)
            if isinstance(weight, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
            recorder.built(fake)
            weights[name] = fake
