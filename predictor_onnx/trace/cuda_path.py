"""Makes functions on tensors without data take the path that they take on a CUDA device.

The tensors are CPU tensors (the backward pass of CUDA ones needs a device). A few functions choose another
implementation by device, with other memory: dropout keeps a mask of bytes, attention is fused, and optimizers work on
all weights at once (``foreach``). Autocast keeps more functions in float32 than on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from predictor_onnx.trace.fused_attention import as_kernels_take_it, fused_attention, is_fused


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
              dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
              enable_gqa: bool = False) -> torch.Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` as CUDA does it."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.scalar_tensor(-torch.inf, dtype=query.dtype))
    if not is_fused(query, key, value, attn_mask):
        alone: torch.Tensor = torch._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return alone
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    if attn_mask is not None:
        attn_mask = as_kernels_take_it(attn_mask, query, key)
    out: torch.Tensor = fused_attention(query, key, value, attn_mask)[0]
    return out


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: A002
    """``dropout``, which keeps a mask of bytes."""
    if not training or p == 0.0:
        return input
    out: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return out


def _dropout_by_train(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: A002
    return dropout(input, p, train)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: attention,
    functional.dropout: dropout,
    torch.dropout: _dropout_by_train,
}


def _named(*names: str) -> Iterator[Any]:
    for name in names:
        for place in (torch, functional, torch.Tensor):
            if hasattr(place, name):
                yield getattr(place, name)


#: What autocast computes in float32 on CUDA devices, and in what it is given on CPUs. Source: the lists "CUDA Ops that
#: can autocast to float32" and "CPU Ops ..." of PyTorch's documentation of ``torch.amp``.
_IN_FLOAT32: Final = frozenset(
    _named(
        "acos", "asin", "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy", "cumprod", "cumsum",
        "dist", "erfinv", "exp", "expm1", "group_norm", "hinge_embedding_loss", "kl_div", "l1_loss", "layer_norm",
        "log", "log10", "log1p", "log2", "log_softmax", "logsumexp", "margin_ranking_loss", "mse_loss", "nll_loss",
        "norm", "normalize", "pow", "reciprocal", "rsqrt", "sinh", "smooth_l1_loss", "softmax", "softplus", "sum",
        "tan", "triplet_margin_loss", "binary_cross_entropy_with_logits",
    )
)  # fmt: skip


class CudaPath(TorchFunctionMode):
    """Replaces what differs between CPU and CUDA while it is entered."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return _INSTEAD.get(func, func)(*args, **kwargs)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if narrow else value
