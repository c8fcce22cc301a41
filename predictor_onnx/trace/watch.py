"""Records whatever code runs inside, and knows its weights, gradients and optimizer state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from predictor_onnx.trace.cuda_path import CudaPath
from predictor_onnx.trace.events import Category, Phase
from predictor_onnx.trace.recorder import Recorder


@contextmanager
def watched(recorder: Recorder | None = None) -> Iterator[tuple[Recorder, FakeTensorMode]]:
    """Everything inside runs on tensors without data and is recorded as on a CUDA device.

    Weights are told by their registration with a module, gradients and state by the optimizer that steps. What is made
    before the first forward pass of the code counts as built; ``Recorder.enter`` says when a forward pass begins.

    Args:
        recorder: what writes it down, where that is not a new one of everything.
    """
    recorder = recorder if recorder is not None else Recorder()
    with ExitStack() as stack:
        fakes = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        path = stack.enter_context(CudaPath())
        stack.enter_context(recorder)
        stack.enter_context(_backward_passes(recorder, path))
        for hook in _hooks(recorder):
            stack.callback(hook)
        yield recorder, fakes


@contextmanager
def _backward_passes(recorder: Recorder, path: CudaPath) -> Iterator[None]:
    """Tells of every backward pass, whoever begins it.

    Torch has no hook for it. It runs with the CUDA path entered once more: the call that began it has left it, and a
    backward pass may compute parts of the forward pass anew (checkpointing).
    """
    real = torch.autograd._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        with recorder.inside(Phase.BACKWARD), path:
            return real(*args, **kwargs)

    torch.autograd._engine_run_backward = run
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = real


def _hooks(recorder: Recorder) -> Iterator[Callable[[], None]]:
    def registered(_module: Any, _name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            recorder.mark(tensor, Category.PARAMETER)

    def stepping(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            _as_on_cuda(group)
            for weight in group["params"]:
                if weight.grad is not None:
                    recorder.mark(weight.grad, Category.GRADIENT)
        recorder.enter(Phase.UPDATE)

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        for value in itertools.chain.from_iterable(state.values() for state in optimizer.state.values()):
            if isinstance(value, torch.Tensor):
                recorder.mark(value, Category.OPTIMIZER)
        recorder.enter(Phase.FORWARD)

    for handle in (
        register_module_parameter_registration_hook(registered),
        register_module_buffer_registration_hook(registered),
        register_optimizer_step_pre_hook(stepping),
        register_optimizer_step_post_hook(stepped),
    ):
        yield handle.remove


def _as_on_cuda(group: dict[str, Any]) -> None:
    if "foreach" in group and group["foreach"] is None and not group.get("fused"):
        group["foreach"] = True
