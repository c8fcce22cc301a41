"""Makes functions on tensors without data take the path that they take on a CUDA device.

The tensors are CPU tensors (the backward pass of CUDA ones needs a device). A few functions choose another
implementation by device, with other memory: dropout keeps a mask of bytes, attention is fused, and optimizers work on
all weights at once (``foreach``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from predictor_onnx.trace.fused_attention import fused_attention


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
    if query.dim() < 3:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    out: torch.Tensor = fused_attention(query, key, value, attn_mask)[0]
    return out


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: A002
    if not training or p == 0.0:
        return input
    out: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return out


def _dropout_by_train(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: A002
    return _dropout(input, p, train)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.dropout: _dropout,
    torch.dropout: _dropout_by_train,
}


class CudaPath(TorchFunctionMode):
    """Replaces what differs between CPU and CUDA while it is entered."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))
