"""The program that a configuration stands for, as people write it, for the static analysis to read."""

from __future__ import annotations

import json
from typing import Final

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.transformer_networks import architecture

_OPTIMIZERS: Final = {name.lower(): name for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam")}
_AUTOCAST: Final = {Precision.AMP_FLOAT16: "float16", Precision.AMP_BFLOAT16: "bfloat16"}
_WHOLE: Final = {Precision.FLOAT16: "float16", Precision.BFLOAT16: "bfloat16"}
_STEPS: Final = 10


def program(asked: Configuration) -> str:
    """Source code that runs steps of this configuration.

    Raises:
        KeyError: the network or the optimizer is not known.
    """
    text = asked.source == "transformers" and len(asked.shape) == 1
    whole = _WHOLE.get(asked.precision)
    lines = [*_imports(asked), "", *_switches(asked), f"model = {_network(asked)}.cuda()"]
    if whole:
        lines.append(f"model = model.to(torch.{whole})")
    if asked.channels_last:
        lines.append("model = model.to(memory_format=torch.channels_last)")
    if asked.checkpointing:
        lines.append(
            f"model.{'set_grad_checkpointing' if asked.source == 'timm' else 'gradient_checkpointing_enable'}()"
        )
    if asked.training:
        momentum = f", momentum={asked.momentum}" if asked.momentum else ""
        lines.append(f"optimizer = torch.optim.{_OPTIMIZERS[asked.optimizer]}(model.parameters(), lr=1e-3{momentum})")
    else:
        lines.append("model.eval()")
    sides = ", ".join(str(side) for side in asked.shape)
    if text:
        lines.append(f'inputs = torch.randint(0, 1000, ({asked.batch}, {sides}), device="cuda")')
        lines.append("labels = inputs")
    else:
        kind = f", dtype=torch.{whole}" if whole else ""
        lines.append(f'inputs = torch.randn({asked.batch}, {sides}, device="cuda"{kind})')
        if asked.channels_last:
            lines.append("inputs = inputs.to(memory_format=torch.channels_last)")
        lines.append(f'labels = torch.randint(0, {asked.classes}, ({asked.batch},), device="cuda")')
    return "\n".join([*lines, *_loop(asked, text)]) + "\n"


def _imports(asked: Configuration) -> list[str]:
    library = {"timm": ["import timm"], "torchvision": ["import torchvision"], "transformers": ["import transformers"]}
    return [*library.get(asked.source, []), "import torch", "from torch import nn"]


def _switches(asked: Configuration) -> list[str]:
    lines = []
    if asked.precision is Precision.TF32:
        lines.append("torch.backends.cuda.matmul.allow_tf32 = True")
    if asked.source == "timm" and asked.attention:
        lines.append(f"timm.layers.set_fused_attn({asked.attention == 'fused'})")
    return lines


def _network(asked: Configuration) -> str:
    if asked.source == "layers":
        layers = ", ".join(
            f"nn.{name}({', '.join(str(each) for each in arguments)})"
            for name, *arguments in json.loads(asked.model)
        )  # fmt: skip
        return f"nn.Sequential({layers})"
    if asked.source == "timm":
        return f'timm.create_model("{asked.model}")'
    if asked.source == "torchvision":
        return f"torchvision.models.{asked.model}()"
    if asked.source == "transformers":
        attention = {"": "", "fused": ', attn_implementation="sdpa"', "eager": ', attn_implementation="eager"'}
        return f'transformers.{architecture(asked.model)}.from_pretrained("{asked.model}"{attention[asked.attention]})'
    raise KeyError(f"networks do not come from {asked.source!r}")


def _loop(asked: Configuration, text: bool) -> list[str]:
    low = _AUTOCAST.get(asked.precision)
    name = "input_ids" if text else "pixel_values"
    loss = "loss = nn.functional.cross_entropy(model(inputs), labels)"
    if asked.source == "transformers":
        loss = f"loss = model({name}=inputs, labels=labels).loss"
    inner = [loss]
    if low is not None:
        inner = [f'with torch.autocast("cuda", dtype=torch.{low}):', *_indented(inner)]
    if not asked.training:
        return ["with torch.no_grad():", *_indented([f"for step in range({_STEPS}):", *_indented(inner)])]
    inner.append("loss.backward()")
    if asked.accumulation > 1:
        inner = [f"for part in range({asked.accumulation}):", *_indented(inner)]
    return [
        f"for step in range({_STEPS}):", *_indented(["optimizer.zero_grad()", *inner, "optimizer.step()"]),
    ]  # fmt: skip


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
