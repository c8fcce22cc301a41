"""Training loops that a library runs: transformers' and lightning's ``Trainer``, accelerate's ``Accelerator``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from predictor_onnx.static.operands import argument
from predictor_onnx.static.values import UNKNOWN, Instance, Optimizer, Record, Value, is_module

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator

Kwargs = dict[str, Value]


def training_arguments(ev: Evaluator, args: list[Value], kwargs: Kwargs) -> Value:
    """Transformers' ``TrainingArguments``, its defaults filled in."""
    values = {"per_device_train_batch_size": 8, "fp16": False, "bf16": False,
              "gradient_checkpointing": False, **kwargs}  # fmt: skip
    ev.hints.note("batch_size", values["per_device_train_batch_size"])
    return Record("TrainingArguments", values)


def trainer(ev: Evaluator, args: list[Value], kwargs: Kwargs) -> Value:
    """A ``Trainer`` with its settings."""
    settings = argument(args, kwargs, 1, "args", None)
    values = settings.attrs if isinstance(settings, Record) else {}
    return Record("Trainer", {**values, **kwargs,
                              "model": argument(args, kwargs, 0, "model", None)})  # fmt: skip


def accelerator(ev: Evaluator, args: list[Value], kwargs: Kwargs) -> Value:
    """``accelerate.Accelerator``; it sets autocast for the whole program."""
    half = {"fp16": "float16", "bf16": "bfloat16"}.get(str(kwargs.get("mixed_precision")))
    ev.rec.autocast = half
    ev.rec.autocast_used = half
    return Record("accelerator", {"device": Record("device", {"type": "cuda"})})


def train(ev: Evaluator, trainer: Record, args: list[Value], kwargs: Kwargs) -> Value:
    """``Trainer.train()`` or lightning's ``Trainer.fit(model, loader)``: one step."""
    values = trainer.attrs
    given = values.get("model")
    model = args[0] if args and is_module(args[0]) else given
    if not is_module(model):
        return None
    half = "float16" if values.get("fp16") is True else None
    half = "bfloat16" if values.get("bf16") is True else half
    precision = str(values.get("precision", ""))
    half = next((dtype for start, dtype in (("16", "float16"), ("bf16", "bfloat16")) if precision.startswith(start)),
                half)  # fmt: skip
    if values.get("gradient_checkpointing") is True:
        ev.call(ev.attribute(model, "gradient_checkpointing_enable"), [], {})
    with ev.rec.in_autocast(half):
        batch: Value = UNKNOWN
        loader = _loader(ev, model, args, kwargs)
        if loader is not UNKNOWN:
            batch = next(iter(ev.iterate(loader) or [UNKNOWN]))
        training_step = ev.attribute(model, "training_step")
        if training_step is not UNKNOWN:
            ev.call(ev.attribute(model, "configure_optimizers"), [], {})
            ev.call(training_step, [batch, 0], {})
        else:
            ev.call(model, [], {"labels": UNKNOWN})
    ev.rec.finish_step()
    ev.rec.steps = None  # the library decides how many there are
    if not ev.optimizers:
        ev.optimizers.append(Optimizer("AdamW", 2.0))
    return None


def _loader(ev: Evaluator, model: Value, args: list[Value], kwargs: Kwargs) -> Value:
    """The training data of ``Trainer.fit``: a loader, or what a data module or the model itself makes."""
    given = args[1] if len(args) > 1 else kwargs.get("train_dataloaders", kwargs.get("datamodule", UNKNOWN))
    for owner in (given, model):
        if isinstance(owner, Instance):
            ev.call(ev.attribute(owner, "setup"), ["fit"], {})
            made = ev.call(ev.attribute(owner, "train_dataloader"), [], {})
            if made is not UNKNOWN:
                return made
    return given
