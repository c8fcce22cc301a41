"""``nn.TransformerEncoderLayer`` and its relatives, composed of the plain layers they are made of."""

from __future__ import annotations

from predictor_onnx.static import layers, ops
from predictor_onnx.static.context import Context
from predictor_onnx.static.layers import Kwargs
from predictor_onnx.static.shapes import size_or_none
from predictor_onnx.static.values import UNKNOWN, Layer, Tensor, Value, tensor_of

_BLOCK = ("d_model", "nhead", "dim_feedforward", "dropout", "activation")
_DEFAULTS: Kwargs = {"dim_feedforward": 2048, "dropout": 0.1, "activation": "relu",
                     "batch_first": False, "norm_first": False}  # fmt: skip
#: More layers than any real network has; a larger number is hostile.
_MOST_LAYERS = 1024


def _block(settings: Kwargs, *, decoder: bool) -> Layer:
    width, inner = settings.get("d_model", UNKNOWN), settings["dim_feedforward"]
    attention: Kwargs = {"embed_dim": width, "num_heads": settings.get("nhead", 1),
                         "dropout": settings["dropout"], "batch_first": settings["batch_first"],
                         "need_weights": False}  # fmt: skip
    children: dict[str, Value] = {
        "self_attn": layers.build("MultiheadAttention", [], dict(attention)),
        "linear1": layers.build("Linear", [width, inner], {}),
        "linear2": layers.build("Linear", [inner, width], {}),
        "norm1": layers.build("LayerNorm", [width], {}),
        "norm2": layers.build("LayerNorm", [width], {}),
    }
    if decoder:
        children["multihead_attn"] = layers.build("MultiheadAttention", [], dict(attention))
        children["norm3"] = layers.build("LayerNorm", [width], {})
    kind = "TransformerDecoderLayer" if decoder else "TransformerEncoderLayer"
    return Layer(kind, children=children, hyper=settings)


def _stack(block: Layer, count: Value, kind: str) -> Layer:
    number = min(size_or_none(count) or 1, _MOST_LAYERS)
    decoder = block.kind == "TransformerDecoderLayer"
    blocks: dict[str, Value] = {str(i): _block(dict(block.hyper), decoder=decoder) for i in range(number)}
    return Layer(kind, children=blocks)


def build(kind: str, args: list[Value], kwargs: Kwargs) -> Layer | None:
    """Make ``nn.<kind>``; None when it is no transformer class."""
    if kind in {"TransformerEncoderLayer", "TransformerDecoderLayer"}:
        settings = {**_DEFAULTS, **dict(zip(_BLOCK, args, strict=False)), **kwargs}
        return _block(settings, decoder=kind == "TransformerDecoderLayer")
    if kind in {"TransformerEncoder", "TransformerDecoder"}:
        word = "encoder_layer" if kind == "TransformerEncoder" else "decoder_layer"
        block = args[0] if args else kwargs.get(word)
        count = args[1] if len(args) > 1 else kwargs.get("num_layers", 1)
        return _stack(block, count, kind) if isinstance(block, Layer) else None
    if kind == "Transformer":
        names = ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers",
                 "dim_feedforward", "dropout")  # fmt: skip
        settings = {**_DEFAULTS, "d_model": 512, "nhead": 8, "num_encoder_layers": 6,
                    "num_decoder_layers": 6, **dict(zip(names, args, strict=False)), **kwargs}  # fmt: skip
        encoder = _stack(_block(settings, decoder=False), settings["num_encoder_layers"],
                         "TransformerEncoder")  # fmt: skip
        decoder = _stack(_block(settings, decoder=True), settings["num_decoder_layers"],
                         "TransformerDecoder")  # fmt: skip
        return Layer(kind, children={"encoder": encoder, "decoder": decoder}, hyper=settings)
    return None


def _run_block(ctx: Context, block: Layer, x: Tensor, memory: Tensor | None) -> Tensor:
    part, drop = block.children, block.hyper["dropout"]

    def residual(left: Tensor, right: Value) -> Tensor:
        right = ops.dropout(ctx, [right, drop], {})
        out: Tensor = ops.binary("add")(ctx, [left, right], {})
        return out

    def norm(name: str, value: Tensor) -> Tensor:
        out: Tensor = layers.forward(ctx, part[name], [value])
        return out

    def attend(name: str, query: Tensor, key: Tensor) -> Value:
        return layers.forward(ctx, part[name], [query, key, key])[0]

    def feed_forward(value: Tensor) -> Value:
        inner = layers.forward(ctx, part["linear1"], [value])
        activation = block.hyper["activation"]
        name = activation if isinstance(activation, str) and activation in ops.OPS else "relu"
        inner = ops.dropout(ctx, [ops.OPS[name](ctx, [inner], {}), drop], {})
        return layers.forward(ctx, part["linear2"], [inner])

    last = "norm3" if memory is not None else "norm2"
    if block.hyper.get("norm_first") is True:
        normed = norm("norm1", x)
        x = residual(x, attend("self_attn", normed, normed))
        if memory is not None:
            x = residual(x, attend("multihead_attn", norm("norm2", x), memory))
        return residual(x, feed_forward(norm(last, x)))
    x = norm("norm1", residual(x, attend("self_attn", x, x)))
    if memory is not None:
        x = norm("norm2", residual(x, attend("multihead_attn", x, memory)))
    return norm(last, residual(x, feed_forward(x)))


def forward(ctx: Context, layer: Layer, args: list[Value]) -> Value:
    """Run a transformer layer, stack or whole transformer."""
    tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
    if not tensors:
        first: Layer = layer
        while first.kind not in {"TransformerEncoderLayer", "TransformerDecoderLayer"}:
            first = next(iter(first.children.values()))
        ctx.rec.guesses += 1
        width = size_or_none(first.hyper.get("d_model"))
        tensors = [tensor_of((ctx.hints.batch, ctx.hints.sequence, width))]
    x, memory = tensors[0], (tensors[1] if len(tensors) > 1 else tensors[0])
    if layer.kind == "Transformer":
        encoded = forward(ctx, layer.children["encoder"], [x])
        return forward(ctx, layer.children["decoder"], [memory, encoded])
    if layer.kind in {"TransformerEncoderLayer", "TransformerDecoderLayer"}:
        decoder = layer.kind == "TransformerDecoderLayer"
        return _run_block(ctx, layer, x, memory if decoder else None)
    for block in layer.children.values():
        x = _run_block(ctx, block, x, memory if layer.kind == "TransformerDecoder" else None)
    return x


KINDS = frozenset({"TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
                   "TransformerDecoder", "Transformer"})  # fmt: skip
