"""What the layers of ``torch.nn`` weigh: from a constructor's settings to the shapes of its weights."""

from __future__ import annotations

from collections.abc import Callable

from predictor_onnx.static.shapes import pair, size_or_none, sizes
from predictor_onnx.static.values import Value

Kwargs = dict[str, Value]
Shapes = dict[str, tuple[int | None, ...]]
Weights = Callable[[Kwargs], Shapes]


def count(settings: Kwargs, name: str) -> int | None:
    """A setting as a number; None when it is not known."""
    return size_or_none(settings.get(name))


def nothing(settings: Kwargs) -> Shapes:
    """No weights."""
    return {}


def linear(s: Kwargs) -> Shapes:
    """``Linear``."""
    out = count(s, "out_features")
    weights: Shapes = {"weight": (out, count(s, "in_features"))}
    if s["bias"] is not False:
        weights["bias"] = (out,)
    return weights


def convolution(width: int, *, transposed: bool = False) -> Weights:
    """``Conv`` of ``width`` spatial dimensions, or its transpose."""

    def build(s: Kwargs) -> Shapes:
        inner, out = count(s, "in_channels"), count(s, "out_channels")
        groups = count(s, "groups") or 1
        kernel = pair(s["kernel_size"], width) or (None,) * width
        if transposed:
            first, second = inner, None if out is None else out // groups
        else:
            first, second = out, None if inner is None else inner // groups
        weights: Shapes = {"weight": (first, second, *kernel)}
        if s["bias"] is not False:
            weights["bias"] = (out,)
        return weights

    return build


def affine(name: str, flag: str) -> Weights:
    """A norm: scale and offset of the size in setting ``name``, unless ``flag`` is off."""

    def build(s: Kwargs) -> Shapes:
        if s.get(flag) is False:
            return {}
        shape = sizes([s[name]])
        weights: Shapes = {"weight": shape}
        if s.get("bias") is not False:
            weights["bias"] = shape
        return weights

    return build


def embedding(s: Kwargs) -> Shapes:
    """``Embedding``."""
    return {"weight": (count(s, "num_embeddings"), count(s, "embedding_dim"))}


def recurrent(gates: int) -> Weights:
    """``RNN`` (one gate), ``GRU`` (three) and ``LSTM`` (four)."""

    def build(s: Kwargs) -> Shapes:
        hidden, inner = count(s, "hidden_size"), count(s, "input_size")
        if hidden is None or inner is None:
            return {"weight": (None,)}
        directions = 2 if s["bidirectional"] is True else 1
        weights: Shapes = {}
        for layer in range(min(count(s, "num_layers") or 1, 1024)):
            for direction in range(directions):
                tag = f"l{layer}d{direction}"
                weights[f"weight_ih_{tag}"] = (gates * hidden, inner)
                weights[f"weight_hh_{tag}"] = (gates * hidden, hidden)
                if s["bias"] is not False:
                    weights[f"bias_ih_{tag}"] = weights[f"bias_hh_{tag}"] = (gates * hidden,)
            inner = hidden * directions
        return weights

    return build


def attention(s: Kwargs) -> Shapes:
    """``MultiheadAttention``."""
    width = count(s, "embed_dim")
    three = None if width is None else 3 * width
    weights: Shapes = {
        "in_proj_weight": (three, width), "out_proj_weight": (width, width)
    }  # fmt: skip
    if s["bias"] is not False:
        weights |= {"in_proj_bias": (three,), "out_proj_bias": (width,)}
    return weights


def prelu(s: Kwargs) -> Shapes:
    """``PReLU``."""
    return {"weight": (count(s, "num_parameters") or 1,)}
