"""Attention as CUDA devices do it, for tensors without data: an op that allocates what the fused kernels do.

Source: PyTorch's ``_scaled_dot_product_efficient_attention`` and ``_flash_attention_forward`` keep, besides inputs and
output, the logarithm of the sum of exponentials, one float32 per head and query row, rows rounded up to 32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_ROWS = 32


@torch.library.custom_op("puhui::fused_attention", mutates_args=())  # type: ignore[untyped-decorator]
def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and row sums of attention of (..., heads, rows, width) tensors; they hold nothing."""
    return _forward(query, key, value, mask)


@torch.library.custom_op("puhui::fused_attention_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _backward_op(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(grad, query, key, value, mask)


@fused_attention.register_fake  # type: ignore[untyped-decorator]
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    *outer, heads, rows, _ = query.shape
    # Written as (..., rows, heads, width), so that the transpose which follows everywhere costs nothing.
    out = query.new_empty((*outer, rows, heads, value.shape[-1])).transpose(-3, -2)
    sums = query.new_empty((*outer, heads, -(-rows // _ROWS) * _ROWS), dtype=torch.float32)
    return out, sums


@_backward_op.register_fake  # type: ignore[untyped-decorator]
def _backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    for_mask = query.new_empty(0) if mask is None else torch.empty_like(mask)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), for_mask


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, mask = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    query, key, value, mask, *_ = ctx.saved_tensors
    for_query, for_key, for_value, for_mask = _backward_op(grad, query, key, value, mask)
    return for_query, for_key, for_value, for_mask if mask is not None and ctx.needs_input_grad[3] else None


fused_attention.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.puhui.fused_attention)  # type: ignore[untyped-decorator]
def _flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    """Two matrix products."""
    pairs = math.prod(query[:-1]) * key[-2]
    return 2.0 * pairs * (query[-1] + value[-1])


@register_flop_formula(torch.ops.puhui.fused_attention_backward)  # type: ignore[untyped-decorator]
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    """Five: one of the forward pass is done again."""
    pairs = math.prod(query[:-1]) * key[-2]
    return 2.0 * pairs * (3 * query[-1] + 2 * value[-1])
