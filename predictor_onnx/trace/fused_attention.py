"""Attention as CUDA devices do it, for tensors without data: an op that allocates what the fused kernels do.

Source: PyTorch's ``_scaled_dot_product_efficient_attention`` and ``_flash_attention_forward`` keep, besides inputs and
output, the logarithm of the sum of exponentials, one float32 per head and query row, rows rounded up to 32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

_ROWS = 32
_HALF = (torch.float16, torch.bfloat16)
#: Bytes to which the kernels want each row of a head aligned, and numbers to which those of a mask.
_ROW_BYTES = 16
_MASK_ROW = 8
_GRADIENT_ROW = 16
#: Widest head of the kernel that takes no mask.
_WIDEST = 256


def is_fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a CUDA device of compute capability 8 and more has a fused kernel for this attention.

    Others are computed step by step and keep all weights. Source: ``can_use_flash_attention`` and
    ``can_use_mem_efficient_attention`` of PyTorch's sdp_utils.
    """
    three = (query, key, value)
    if any(one.dim() != 4 or (one.stride(-1) != 1 and one.shape[-1] > 1) for one in three):
        return False
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        return False
    if mask is None and query.dtype in _HALF and query.shape[-1] == value.shape[-1] <= _WIDEST:
        return True
    return all(one.shape[-1] * one.element_size() % _ROW_BYTES == 0 for one in (query, value))


def as_kernels_take_it(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask for all rows of all heads: a view, of a copy with longer rows where they are not aligned.

    Source: ``preprocess_mask`` of PyTorch's attention.cpp.
    """
    if mask.stride(-1) != 1 or any(step % _MASK_ROW for step in mask.stride()[:-1]):
        width = mask.shape[-1]
        mask = functional.pad(mask, (0, _MASK_ROW - width % _MASK_ROW))[..., :width]
    return mask.expand(*query.shape[:-1], key.shape[-2])


@torch.library.custom_op("puhui::fused_attention", mutates_args=())  # type: ignore[untyped-decorator]
def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and row sums of attention of (..., heads, rows, width) tensors; they hold nothing."""
    return _forward(query, key, value, mask)


@torch.library.custom_op("puhui::fused_attention_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _backward_op(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    for_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(grad, query, key, value, mask, for_mask)


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
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    for_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    # A learnt mask's gradient is written for every row before it is summed; rows as long as the kernel stores them.
    rows = query.new_empty(0)
    if for_mask and mask is not None:
        rows = query.new_empty((*mask.shape[:-1], -(-mask.shape[-1] // _GRADIENT_ROW) * _GRADIENT_ROW))
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), rows


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, mask = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    query, key, value, mask, *_ = ctx.saved_tensors
    learnt = mask is not None and ctx.needs_input_grad[3]
    for_query, for_key, for_value, for_mask = _backward_op(grad, query, key, value, mask, learnt)
    return for_query, for_key, for_value, for_mask[..., : mask.shape[-1]] if learnt else None


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
