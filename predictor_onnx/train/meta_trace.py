"""What one forward pass leaves behind for the backward pass, measured on tensors without data.

The network is built and run on torch's ``meta`` device: shapes and autograd are real, numbers are
not. Counted per op, in order: what it allocates, and what autograd keeps for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Which kind of op made a saved tensor; the runtime sorts its own findings by the same kinds.
KINDS = ("conv", "norm", "act", "matmul", "other")

_ACTIVATIONS = (
    "relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardtanh", "hardsigmoid", "mish",
    "leaky", "elu", "softplus", "softmax",
)  # fmt: skip


def kind_of(op: str) -> str:
    """The kind of an aten op, by its name (``convolution`` is ``conv``)."""
    if "convolution" in op:
        return "conv"
    if "norm" in op:
        return "norm"
    if any(op.startswith(word) for word in _ACTIVATIONS):
        return "act"
    if op in {"addmm", "mm", "bmm", "baddbmm"} or "attention" in op:
        return "matmul"
    return "other"


@dataclass
class ForwardTrace:
    """Bytes and work of one forward pass; every figure is for the whole batch."""

    saved_bytes: float = 0.0
    #: The most that lives at once while the backward pass walks the ops in reverse.
    backward_peak_bytes: float = 0.0
    #: The most that lives at once in a forward pass that keeps nothing for later.
    inference_peak_bytes: float = 0.0
    largest_bytes: float = 0.0
    largest_conv_bytes: float = 0.0
    allocated_bytes: float = 0.0
    macs: float = 0.0
    ops: int = 0
    saved_by_kind: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _nbytes(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


class _OpRecorder(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self, trace: ForwardTrace) -> None:
        super().__init__()
        self.trace = trace
        self.producer: dict[int, str] = {}
        self.saved: set[int] = set()
        self.keep: list[torch.Tensor] = []
        self.steps: list[tuple[float, float]] = []
        self.ignore: set[int] = set()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        if key not in self.saved and key not in self.ignore:
            self.saved.add(key)
            self.keep.append(tensor)
            size = float(_nbytes(tensor))
            self.trace.saved_bytes += size
            self.trace.saved_by_kind[self.producer.get(key, "other")] += size
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Models ask small questions of their masks ("all ones?"); the plain path answers no.
            return False if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        name = str(func._overloadpacket.__name__)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {_key(t) for t in inputs}
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and _key(t) not in known]
        out_bytes = float(sum(_nbytes(t) for t in fresh))
        in_bytes = float(sum({_key(t): _nbytes(t) for t in inputs
                              if _key(t) not in self.ignore}.values()))  # fmt: skip
        for tensor in fresh:
            self.producer[_key(tensor)] = kind_of(name)
            self.keep.append(tensor)  # a storage address must not be used twice
        trace = self.trace
        if out_bytes:
            trace.ops += 1
            trace.allocated_bytes += out_bytes
            trace.largest_bytes = max([trace.largest_bytes, *(float(_nbytes(t)) for t in fresh)])
            trace.inference_peak_bytes = max(trace.inference_peak_bytes, out_bytes + in_bytes)
            self.steps.append((trace.saved_bytes, out_bytes + in_bytes))
            if name == "convolution":
                trace.largest_conv_bytes = max(trace.largest_conv_bytes, out_bytes + in_bytes)
        trace.macs += _macs(name, args, fresh)
        return out


def _macs(name: str, args: Any, fresh: list[torch.Tensor]) -> float:
    if not fresh:
        return 0.0
    if name == "convolution":
        weight = args[1]
        return float(fresh[0].numel() * weight.numel() // max(1, weight.shape[0]))
    if name == "addmm":
        return float(fresh[0].numel() * args[1].shape[-1])
    if name in {"mm", "bmm"}:
        return float(fresh[0].numel() * args[0].shape[-1])
    if "attention" in name and len(args) > 1:
        return float(2 * args[0].numel() * args[1].shape[-2])
    return 0.0


class _FusedAttention(torch.autograd.Function):  # type: ignore[misc]
    """What the memory-efficient kernels keep: q, k, v, the output and one number per row.

    The meta device would fall back to the plain formula, which keeps the whole score matrix.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a trace has no backward pass")


@contextmanager
def _fused_attention(trace: ForwardTrace) -> Iterator[None]:
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        trace.macs += 2.0 * query.numel() * key.shape[-2]
        out: torch.Tensor = _FusedAttention.apply(query, key, value)
        return out

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def trace_forward(model: torch.nn.Module, call: Callable[[torch.nn.Module], object]) -> ForwardTrace:
    """Run ``call(model)`` in training mode on meta tensors and account for its memory.

    The backward pass is not run; its peak is the largest, over the ops in reverse, of what is
    still saved plus that op's gradients of output and input.
    """
    trace = ForwardTrace()
    recorder = _OpRecorder(trace)
    recorder.ignore = {_key(t) for t in (*model.parameters(), *model.buffers())}
    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor),
        recorder,
        _fused_attention(trace),
    ):
        call(model)
    trace.backward_peak_bytes = max([trace.saved_bytes, *(saved + moving for saved, moving in recorder.steps)])
    return trace
