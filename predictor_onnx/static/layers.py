"""The layers of ``torch.nn``: what they weigh, and what their forward pass allocates and keeps.

A layer is described by the signature of its constructor, a function from its settings to the shapes of its
weights, and a function that runs it on a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from predictor_onnx.static import layer_weights, ops, products
from predictor_onnx.static.context import Context
from predictor_onnx.static.layer_weights import Weights, count
from predictor_onnx.static.operands import alias, dtype_of
from predictor_onnx.static.shapes import numel, pair, reshape, sizes, windowed_all
from predictor_onnx.static.values import UNKNOWN, Layer, Tensor, Value, tensor_of

Kwargs = dict[str, Value]
Forward = Callable[[Context, Layer, list[Value]], Value]


@dataclass(frozen=True)
class Kind:
    """One class of layer; ``signature`` gives the constructor's parameters and defaults."""

    signature: dict[str, Value]
    weights: Weights
    forward: Forward


def _guess(ctx: Context, wanted: tuple[int | None, ...]) -> Tensor:
    """An input for a layer whose real input is not known."""
    ctx.rec.guesses += 1
    return tensor_of(wanted)


# --- forward


def _linear(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    x = args[0] if args else UNKNOWN
    if not isinstance(x, Tensor):
        tokens = (ctx.hints.sequence,) if "sequence" in ctx.hints.found else ()
        x = _guess(ctx, (ctx.hints.batch, *tokens, count(layer.hyper, "in_features")))
    return products.linear(ctx, [x, layer.params["weight"]], {})


def _conv(width: int, *, transposed: bool = False) -> Forward:
    def run(ctx: Context, layer: Layer, args: list[Value]) -> Value:
        s = layer.hyper
        x = args[0] if args else UNKNOWN
        if not isinstance(x, Tensor) or len(x.shape) != width + 2:
            spatial = ctx.hints.last_spatial
            if len(spatial) != width:
                spatial = (ctx.hints.image,) * width
            x = _guess(ctx, (ctx.hints.batch, count(s, "in_channels"), *spatial))
        dtype = ctx.rec.compute_dtype(x, half=True)
        x = ctx.rec.cast(x, dtype)
        if transposed:
            strides = pair(s["stride"], width) or (1,) * width
            kernels = pair(s["kernel_size"], width) or strides
            pads = pair(s["padding"], width) or (0,) * width
            more = pair(s["output_padding"], width) or (0,) * width
            spatial = tuple(None if d is None else (d - 1) * t + k - 2 * p + o for d, t, k, p, o
                            in zip(x.shape[2:], strides, kernels, pads, more, strict=True))  # fmt: skip
        else:
            spatial = windowed_all(x.shape[2:], s["kernel_size"], s["stride"], s["padding"],
                                   s["dilation"])  # fmt: skip
        ctx.hints.last_spatial = spatial
        weight = layer.params["weight"]
        shape = (x.shape[0], count(s, "out_channels"), *spatial)
        # The weight's first size is of the side that each product is counted on: outputs, or inputs if transposed.
        products_each = numel(weight.shape[1:]) or 0
        return ctx.rec.op(shape, dtype, "conv", [x, weight], saved=[x] if weight.grad else [],
                          macs=float((numel(x.shape if transposed else shape) or 0) * products_each))  # fmt: skip

    return run


def _norm(*, half: bool) -> Forward:
    def run(ctx: Context, layer: Layer, args: list[Value]) -> Value:
        x = args[0] if args else UNKNOWN
        if not isinstance(x, Tensor):
            return UNKNOWN
        if not half:
            x = ctx.rec.cast(x, ctx.rec.compute_dtype(x, half=False))
        weights = list(layer.params.values())
        return ctx.rec.op(x.shape, x.dtype, "norm", [x, *weights], saved=[x])

    return run


def _embedding(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    x = args[0] if args else UNKNOWN
    if not isinstance(x, Tensor):
        x = _guess(ctx, (ctx.hints.batch, ctx.hints.sequence))
        x.dtype = "int64"
    weight = layer.params["weight"]
    return ctx.rec.op((*x.shape, weight.shape[-1]), weight.dtype, "other", [weight, x], saved=[x])


def _recurrent(gates: int) -> Forward:
    def run(ctx: Context, layer: Layer, args: list[Value]) -> Value:
        s = layer.hyper
        hidden = count(s, "hidden_size") or 0
        x = args[0] if args else UNKNOWN
        if not isinstance(x, Tensor):
            x = _guess(ctx, (ctx.hints.batch, ctx.hints.sequence, count(s, "input_size")))
        directions = 2 if s["bidirectional"] is True else 1
        layers = count(s, "num_layers") or 1
        shape = (*x.shape[:-1], hidden * directions)
        steps = float(numel(x.shape[:-1]) or 0)
        # cuDNN's reserve space: every gate, and cell and hidden state, of every step and layer.
        reserve = steps * hidden * directions * layers * (gates + 2) * 4
        weights = list(layer.params.values())
        macs = steps * sum(float(numel(w.shape) or 0) for w in weights if len(w.shape) == 2)
        out = ctx.rec.op(shape, ctx.rec.compute_dtype(x, half=True), "matmul", [x, *weights],
                         saved=[x], save_output=True, extra_bytes=reserve, macs=macs)  # fmt: skip
        batch_first = s["batch_first"] is True
        if ctx.rec.forward_depth or out.grad or out.on_gpu:
            length = (x.shape[-2] if batch_first else x.shape[0]) if len(x.shape) > 1 else None
            ctx.rec.current.recurrent_steps += (length or 1) * layers * directions
        if not batch_first and len(x.shape) == 3 and x.shape[1]:
            ctx.rec.note_time_major(x.shape[0], x.shape[1])
        batch = x.shape[0 if batch_first else 1] if len(x.shape) > 1 else 1
        state = tensor_of((layers * directions, batch, hidden), grad=out.grad)
        return (out, (state, state)) if gates == 4 else (out, state)

    return run


def _self_attention(ctx: Context, layer: Layer, q: Tensor, k: Tensor, *, weights: bool) -> Tensor:
    width = q.shape[-1]
    rec = ctx.rec
    dtype = rec.compute_dtype(q, half=True)
    q, k = rec.cast(q, dtype), (rec.cast(k, dtype) if k is not q else rec.cast(q, dtype))
    heads = count(layer.hyper, "num_heads") or 1
    inner, outer = layer.params["in_proj_weight"], layer.params["out_proj_weight"]
    three = None if width is None else 3 * width
    macs = float(3 * (numel(q.shape) or 0) * (width or 0))
    qkv = rec.op((*q.shape[:-1], three), dtype, "matmul", [q, k, inner], saved=[q, k], macs=macs)
    if weights:
        first = layer.hyper.get("batch_first") is True
        batch, queries = (q.shape[0], q.shape[-2]) if first else (q.shape[-2], q.shape[0])
        keys = k.shape[-2] if first else k.shape[0]
        scores = rec.op((batch, heads, queries, keys), dtype, "matmul", [qkv], saved=[qkv])
        scores = ops.unary("softmax")(ctx, [scores], {})
        scores = ops.dropout(ctx, [scores, layer.hyper.get("dropout", 0.0)], {})
        mixed = rec.op(q.shape, dtype, "matmul", [scores, qkv], saved=[scores])
    else:
        rows = float((numel(q.shape[:-1]) or 0) * heads)
        mixed = rec.op(q.shape, dtype, "matmul", [qkv], saved=[qkv], save_output=True,
                       extra_bytes=4 * rows)  # fmt: skip
    return rec.op(q.shape, dtype, "matmul", [mixed, outer], saved=[mixed], macs=macs / 3)


def _attention(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    q = args[0] if args else UNKNOWN
    if not isinstance(q, Tensor):
        q = _guess(ctx, (ctx.hints.batch, ctx.hints.sequence, count(layer.hyper, "embed_dim")))
    k = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else q
    wanted = layer.hyper.get("need_weights") is not False
    return (_self_attention(ctx, layer, q, k, weights=wanted), UNKNOWN)


def _sequential(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    for child in layer.children.values():
        args = [ctx.call(child, args, {})]
    return args[0] if args else UNKNOWN


def _dropout(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    if not args or not isinstance(args[0], Tensor):
        return UNKNOWN
    inplace = {"inplace": layer.hyper.get("inplace", False)}
    if layer.hyper.get("training") is False:
        return args[0]
    return ops.dropout(ctx, [args[0], layer.hyper["p"]], inplace)


def _identity(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    return args[0] if args else UNKNOWN


def _functional(name: str, *settings: str) -> Forward:
    """A layer that is a function with settings."""

    def run(ctx: Context, layer: Layer, args: list[Value]) -> Value:
        if not args or not isinstance(args[0], Tensor):
            return UNKNOWN
        given = {key: layer.hyper.get(key) for key in settings}
        return ops.OPS[name](ctx, list(args), given)

    return run


def _unflatten(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    x = args[0] if args else UNKNOWN
    if not isinstance(x, Tensor):
        return UNKNOWN
    at = layer.hyper.get("dim", 1)
    inner = sizes([layer.hyper.get("unflattened_size", ())])
    if not isinstance(at, int):
        return UNKNOWN
    return alias(x, (*x.shape[:at], *reshape(x.shape[at : at + 1], inner), *x.shape[at + 1 :]))


_CONV: Final[dict[str, Value]] = {
    "in_channels": UNKNOWN, "out_channels": UNKNOWN, "kernel_size": UNKNOWN, "stride": 1,
    "padding": 0, "dilation": 1, "groups": 1, "bias": True,
}  # fmt: skip
_DECONV: Final[dict[str, Value]] = {
    "in_channels": UNKNOWN, "out_channels": UNKNOWN, "kernel_size": UNKNOWN, "stride": 1,
    "padding": 0, "output_padding": 0, "groups": 1, "bias": True, "dilation": 1,
}  # fmt: skip
_RNN: Final[dict[str, Value]] = {
    "input_size": UNKNOWN, "hidden_size": UNKNOWN, "num_layers": 1, "bias": True,
    "batch_first": False, "dropout": 0.0, "bidirectional": False,
}  # fmt: skip
_BATCH_NORM: Final[dict[str, Value]] = {
    "num_features": UNKNOWN, "eps": 1e-5, "momentum": 0.1, "affine": True,
}  # fmt: skip
_POOL: Final[dict[str, Value]] = {"kernel_size": 2, "stride": None, "padding": 0}


def _activation(name: str) -> Kind:
    return Kind({"inplace": False}, layer_weights.nothing, _functional(name, "inplace"))


def _plain(name: str, **signature: Value) -> Kind:
    return Kind(signature, layer_weights.nothing, _functional(name, *signature))


KINDS: Final[dict[str, Kind]] = {
    "Linear": Kind(
        {"in_features": UNKNOWN, "out_features": UNKNOWN, "bias": True}, layer_weights.linear, _linear
    ),
    "LazyLinear": Kind(
        {"out_features": UNKNOWN, "bias": True, "in_features": UNKNOWN}, layer_weights.linear, _linear
    ),
    **{f"Conv{n}d": Kind(_CONV, layer_weights.convolution(n), _conv(n)) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": Kind(_DECONV, layer_weights.convolution(n, transposed=True),
                                  _conv(n, transposed=True)) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": Kind(_BATCH_NORM, layer_weights.affine("num_features", "affine"), _norm(half=True))
       for n in (1, 2, 3)},
    "SyncBatchNorm": Kind(_BATCH_NORM, layer_weights.affine("num_features", "affine"), _norm(half=True)),
    **{f"InstanceNorm{n}d": Kind({**_BATCH_NORM, "affine": False},
                                 layer_weights.affine("num_features", "affine"), _norm(half=True))
       for n in (1, 2, 3)},
    "LayerNorm": Kind({"normalized_shape": UNKNOWN, "eps": 1e-5, "elementwise_affine": True,
                       "bias": True},
                      layer_weights.affine("normalized_shape", "elementwise_affine"), _norm(half=False)),
    "RMSNorm": Kind({"normalized_shape": UNKNOWN, "eps": None, "elementwise_affine": True,
                     "bias": False},
                    layer_weights.affine("normalized_shape", "elementwise_affine"), _norm(half=False)),
    "GroupNorm": Kind({"num_groups": UNKNOWN, "num_channels": UNKNOWN, "eps": 1e-5, "affine": True},
                      layer_weights.affine("num_channels", "affine"), _norm(half=False)),
    "Embedding": Kind({"num_embeddings": UNKNOWN, "embedding_dim": UNKNOWN, "padding_idx": None},
                      layer_weights.embedding, _embedding),
    "LSTM": Kind(_RNN, layer_weights.recurrent(4), _recurrent(4)),
    "GRU": Kind(_RNN, layer_weights.recurrent(3), _recurrent(3)),
    "RNN": Kind(_RNN, layer_weights.recurrent(1), _recurrent(1)),
    "MultiheadAttention": Kind({"embed_dim": UNKNOWN, "num_heads": UNKNOWN, "dropout": 0.0,
                                "bias": True, "add_bias_kv": False, "add_zero_attn": False,
                                "kdim": None, "vdim": None, "batch_first": False},
                               layer_weights.attention, _attention),
    "PReLU": Kind({"num_parameters": 1}, layer_weights.prelu, _functional("prelu")),
    **{name: _activation(op) for name, op in (
        ("ReLU", "relu"), ("ReLU6", "relu6"), ("LeakyReLU", "leaky_relu"), ("ELU", "elu"),
        ("SELU", "selu"), ("GELU", "gelu"), ("SiLU", "silu"), ("Mish", "mish"),
        ("Sigmoid", "sigmoid"), ("Tanh", "tanh"), ("Softplus", "softplus"),
        ("Hardswish", "hardswish"), ("Hardsigmoid", "hardsigmoid"), ("Hardtanh", "hardtanh"),
        ("CELU", "celu"), ("Softsign", "softsign"), ("LogSigmoid", "logsigmoid"))},
    "Softmax": _plain("softmax", dim=None), "LogSoftmax": _plain("log_softmax", dim=None),
    **{name: Kind({"p": 0.5, "inplace": False}, layer_weights.nothing, _dropout)
       for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")},
    "Identity": Kind({}, layer_weights.nothing, _identity),
    "Flatten": Kind({"start_dim": 1, "end_dim": -1}, layer_weights.nothing,
                    _functional("flatten", "start_dim", "end_dim")),
    "Unflatten": Kind({"dim": 1, "unflattened_size": ()}, layer_weights.nothing, _unflatten),
    **{f"MaxPool{n}d": Kind(_POOL, layer_weights.nothing,
                            _functional("max_pool2d", "kernel_size", "stride", "padding"))
       for n in (1, 2, 3)},
    **{f"AvgPool{n}d": Kind(_POOL, layer_weights.nothing,
                            _functional("avg_pool2d", "kernel_size", "stride", "padding"))
       for n in (1, 2, 3)},
    **{f"Adaptive{op}Pool{n}d": Kind({"output_size": 1}, layer_weights.nothing,
                                     _functional("adaptive_avg_pool2d", "output_size"))
       for op in ("Avg", "Max") for n in (1, 2, 3)},
    "Upsample": Kind({"size": None, "scale_factor": None, "mode": "nearest"}, layer_weights.nothing,
                     _functional("interpolate", "size", "scale_factor")),
    "CrossEntropyLoss": Kind({"weight": None}, layer_weights.nothing, _functional("cross_entropy")),
    **{name: Kind({"reduction": "mean"}, layer_weights.nothing, _functional("mse_loss"))
       for name in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss",
                    "BCEWithLogitsLoss", "NLLLoss", "KLDivLoss")},
    "Sequential": Kind({}, layer_weights.nothing, _sequential),
    "ModuleList": Kind({}, layer_weights.nothing, _identity),
    "ModuleDict": Kind({}, layer_weights.nothing, _identity),
}  # fmt: skip


def build(kind: str, args: list[Value], kwargs: Kwargs) -> Layer:
    """Make the layer ``nn.<kind>(*args, **kwargs)``; ``kind`` must be in ``KINDS``."""
    spec = KINDS[kind]
    settings: Kwargs = dict(spec.signature)
    settings.update(zip(spec.signature, args, strict=False))
    settings.update(kwargs)
    layer = Layer(kind, hyper=settings)
    dtype = dtype_of(kwargs.get("dtype"))
    for name, shape in spec.weights(settings).items():
        layer.params[name] = tensor_of(shape, dtype, grad=True, parameter=True)
    return layer


def forward(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    """Run a built-in layer on its inputs."""
    return KINDS[layer.kind].forward(ctx, layer, args)
