"""Builds what a configuration describes and runs its steps, on a device or on tensors without data. Needs torch."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.nn import functional

from predictor_onnx.configuration import Configuration, Precision
from predictor_onnx.measure.out_of_memory import card_was_full
from predictor_onnx.trace import torchvision_ops

_AUTOCAST: Final = {Precision.AMP_FLOAT16: torch.float16, Precision.AMP_BFLOAT16: torch.bfloat16}
_WHOLE: Final = {Precision.FLOAT16: torch.float16, Precision.BFLOAT16: torch.bfloat16}


class CannotBuildError(Exception):
    """A configuration names a network or an optimizer that is not there."""


class Step:
    """A network with its optimizer.

    Attributes:
        model: the network.
        parameters: numbers in its weights.
    """

    def __init__(
        self,
        configuration: Configuration,
        device: str = "cpu",
        network: Callable[[Configuration], Any] | None = None,
    ) -> None:
        """Build it.

        Args:
            configuration: what is built.
            device: where.
            network: makes the network, where it is not made as usual.

        Raises:
            CannotBuildError: the network or the optimizer is unknown, or the library that has it is not installed.
        """
        self._asked = configuration
        self._device = device
        # Made in its place, and not moved there: tensors without data cannot be moved.
        with torch.device(device), _default_type(_WHOLE.get(configuration.precision, torch.float32)):
            self.model = (network or build_network)(configuration)
        if configuration.channels_last:
            for weight in self.model.parameters():
                if weight.dim() == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.model.train(configuration.training)
        if configuration.checkpointing:
            _checkpoint(self.model)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self._optimizer = _optimizer(configuration, self.model) if configuration.training else None

    def run(
        self, starts: Callable[[], None] = lambda: None, data: Callable[[torch.Tensor], None] = lambda _: None
    ) -> None:
        """One step on made-up samples.

        Args:
            starts: called before each forward pass.
            data: called with each tensor of samples.
        """
        samples: tuple[torch.Tensor, ...] = ()  # they live through the update, as a loop's variables do
        for _ in range(self._asked.accumulation):
            starts()
            samples = self._samples()
            for tensor in samples:
                data(tensor)
            if self._asked.training:
                self._loss(*samples).backward()
            else:
                with torch.no_grad():
                    self._loss(*samples)
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        asked, device = self._asked, self._device
        if asked.source == "transformers" and len(asked.shape) == 1:
            tokens = torch.randint(0, 1000, (asked.batch, *asked.shape), device=device)
            return tokens, tokens
        inputs = torch.randn(asked.batch, *asked.shape, device=device)
        if asked.precision in _WHOLE:
            inputs = inputs.to(_WHOLE[asked.precision])
        if asked.channels_last:
            inputs = inputs.to(memory_format=torch.channels_last)
        return inputs, torch.randint(0, asked.classes, (asked.batch,), device=device)

    def _loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        low = _AUTOCAST.get(self._asked.precision)
        with torch.autocast(self._device, low) if low is not None else contextlib.nullcontext():
            if self._asked.source == "transformers":
                name = "input_ids" if len(self._asked.shape) == 1 else "pixel_values"
                told = self.model(**{name: inputs}, labels=labels)
                loss: torch.Tensor = told.loss
                return loss
            out = self.model(inputs)
            if hasattr(out, "logits"):
                out = out.logits
            if isinstance(out, tuple | list):
                out = out[0]
            return functional.cross_entropy(out, labels)


@contextlib.contextmanager
def _default_type(kind: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_network(asked: Configuration) -> Any:
    """The network alone.

    Raises:
        CannotBuildError: it is unknown, or the library that has it is not installed.
    """
    try:
        if asked.source == "layers":
            return torch.nn.Sequential(*(_layer(*entry) for entry in json.loads(asked.model)))
        if asked.source in ("timm", "torchvision"):
            torchvision_ops.define()
        if asked.source == "timm":
            import timm

            if asked.attention:
                timm.layers.set_fused_attn(asked.attention == "fused")
            return timm.create_model(asked.model)
        if asked.source == "torchvision":
            from torchvision import models

            # Nothing is downloaded: some networks of segmentation have a backbone with weights unless told not to.
            backbone = inspect.signature(models.get_model_builder(asked.model)).parameters
            return models.get_model(
                asked.model, **({"weights_backbone": None} if "weights_backbone" in backbone else {})
            )
        if asked.source == "transformers":
            from predictor_onnx.transformer_networks import build

            return build(asked.model, asked.attention, asked.classes)
    except torch.OutOfMemoryError:
        raise  # of the card, not of the network
    except (ImportError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RuntimeError) and card_was_full(str(error)):
            raise
        raise CannotBuildError(f"{asked.source} has no {asked.model[:100]} that can be built: {error}") from error
    raise CannotBuildError(f"networks do not come from {asked.source!r}")


def _layer(name: str, *arguments: Any) -> Any:
    return getattr(torch.nn, name)(*arguments)


def _checkpoint(model: Any) -> None:
    for method in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        if hasattr(model, method):
            getattr(model, method)()
            return
    raise CannotBuildError("this network does not know how to compute its activations anew")


_OPTIMIZERS: Final = {name.lower(): name for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam")}


def _optimizer(asked: Configuration, model: Any) -> Any:
    if not asked.optimizer:
        return None
    name = _OPTIMIZERS.get(asked.optimizer)
    if name is None:
        raise CannotBuildError(f"there is no optimizer {asked.optimizer!r}; there are {', '.join(sorted(_OPTIMIZERS))}")
    extra = {"momentum": asked.momentum} if asked.optimizer in ("sgd", "rmsprop") else {}
    return getattr(torch.optim, name)(model.parameters(), lr=1e-3, **extra)
