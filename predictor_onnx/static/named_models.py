"""Models known by name, as layers: their traced costs, scaled to the batch, size and precision at hand."""

from __future__ import annotations

from typing import Final

from predictor_onnx.catalog import Entry, find
from predictor_onnx.features import KINDS
from predictor_onnx.static import ops
from predictor_onnx.static.context import Context
from predictor_onnx.static.recorder import StepProfile
from predictor_onnx.static.values import UNKNOWN, Layer, Record, Tensor, Value, tensor_of

#: ``Layer.kind`` of a named model.
NAMED: Final = "Named"
#: Share of float32 activation bytes that stays under autocast: norms and losses keep float32 in
#: transformers; a convolutional network's cuDNN norms run in half precision.
_AUTOCAST_SHARE: Final = {"image": 0.55, "text": 0.62}
#: With checkpointing one input per block stays, and one block is recomputed at a time: the median of 34 traced networks
#: (nine tenths of them keep less than 0.29; `predictor_onnx.train.survey`).
_CHECKPOINT_SHARE: Final = 0.09
_FIELDS: Final = ("saved", "backward_peak", "inference_peak", "largest", "largest_conv",
                  "allocated", "macs", "ops")  # fmt: skip


def layer(library: str, name: str, settings: dict[str, Value], dtype: str = "float32") -> Layer | None:
    """A named model as a layer; None when the catalog does not have it."""
    entry = find(library, name)
    if entry is None:
        return None
    return make(f"{library}/{name}", entry, settings, dtype)


def make(name: str, entry: Entry, settings: dict[str, Value], dtype: str = "float32") -> Layer:
    """A layer from a catalog entry, its classifier resized to ``num_classes``."""
    count = float(entry["params"])
    classes, head = settings.get("num_classes"), entry.get("head_in", 0)
    if isinstance(classes, int) and head and entry.get("classes"):
        count += (classes - entry["classes"]) * (head + 1)
    weight = tensor_of((int(count),), dtype, grad=True, parameter=True)
    return Layer(NAMED, params={"weight": weight},
                 hyper={"name": name, "entry": entry, "checkpointing": False})  # fmt: skip


def _profile(figures: Entry, factor: float) -> StepProfile:
    values = {name: float(figures[name]) for name in _FIELDS}
    work, count = values.pop("macs"), int(values.pop("ops"))
    kinds = dict(zip(KINDS, (value * factor for value in figures["kinds"]), strict=True))
    scaled = {name: value * factor for name, value in values.items()}
    return StepProfile(**scaled, macs=work * factor / 4, ops=count, recurrent_steps=0, kinds=kinds)


def _at_length(entry: Entry, length: int) -> Entry:
    """Figures at a text length: through both traced points, linear and quadratic part not negative."""
    (x1, low), (x2, high) = sorted((int(key[3:]), value) for key, value in entry.items()
                                   if key.startswith("at_"))  # fmt: skip

    def at(one: float, two: float) -> float:
        square = max(0.0, (two / x2 - one / x1) / (x2 - x1))
        return max(0.0, one / x1 - square * x1) * length + square * length**2

    result: Entry = {name: at(low[name], high[name]) for name in _FIELDS if name != "ops"}
    result["kinds"] = [at(a, b) for a, b in zip(low["kinds"], high["kinds"], strict=True)]
    return {**result, "ops": low["ops"]}


def _input(ctx: Context, entry: Entry, args: list[Value], kwargs: dict[str, Value]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and len(value.shape) >= 2:
            return value
    ctx.rec.guesses += 1
    if "input" in entry:
        size = ctx.hints.found.get("image")
        spatial = [size] * 2 if size is not None and len(entry["input"]) == 3 else entry["input"][1:]
        return tensor_of((ctx.hints.batch, entry["input"][0], *spatial))
    return tensor_of((ctx.hints.batch, ctx.hints.sequence), "int64")


def run(ctx: Context, model: Layer, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """Forward pass of a named model: its traced costs, scaled to this batch and size."""
    entry: Entry = model.hyper["entry"]
    x = _input(ctx, entry, args, kwargs)
    rec, weight = ctx.rec, model.params["weight"]
    rec.networks.append((str(model.hyper["name"]), x.shape, weight.numel or 0))
    batch = x.shape[0] if x.shape[0] is not None else ctx.hints.batch
    image = "input" in entry
    if image:
        area = 1.0
        for size, native in zip(x.shape[2:], entry["input"][1:], strict=False):
            area *= (size if size is not None else native) / native
        figures, scale = entry, area
        out = tensor_of((batch, entry.get("classes") or entry.get("head_in") or 1000), kind="matmul")
    else:
        length = x.shape[1] if x.shape[1] is not None else ctx.hints.sequence
        figures, scale = _at_length(entry, length), 1.0
        out = tensor_of((batch, length, entry.get("vocabulary", 1)), kind="matmul")
        out.storage.nbytes = 0.0  # the logits are part of the trace
    share = 1.0
    if rec.autocast is not None:
        share = _AUTOCAST_SHARE["image" if image else "text"]
    elif weight.dtype in {"float16", "bfloat16", "half"}:
        share = 0.5
    profile = _profile(figures, 4 * batch * scale * share)
    if model.hyper.get("checkpointing"):
        profile.saved *= _CHECKPOINT_SHARE
        profile.backward_peak *= _CHECKPOINT_SHARE
        rec.checkpointing = True
    trains = rec.grad and (weight.grad or x.grad)
    if not trains:
        profile.saved = profile.backward_peak = 0.0
        profile.kinds = dict.fromkeys(KINDS, 0.0)
    rec.current = rec.current.plus(profile)
    out.grad = trains
    if image and "transformers/" not in str(model.hyper["name"]):
        return out
    loss = UNKNOWN
    if any(key in kwargs for key in ("labels", "label_ids")) or not image:
        logits = tensor_of(out.shape, "float32", grad=trains)
        if "labels" in kwargs:
            loss = ops.cross_entropy(ctx, [logits, kwargs["labels"]], {})
    return Record("output", {"logits": out, "loss": loss, "last_hidden_state": out,
                             "pooler_output": out})  # fmt: skip
