"""What a training loop uses besides tensors, in one process and without waiting: loaders, wrappers, files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data._utils import pin_memory

from predictor_onnx.dry_run.card import CARD, CardRecorder
from predictor_onnx.dry_run.downloads import AbsentState
from predictor_onnx.trace import cuda_path
from predictor_onnx.trace.events import Category


def install(recorder: CardRecorder) -> None:
    """Make it so for the rest of this process."""
    _functions()
    _loaders()
    _compilers()
    _files()
    _modules(recorder)
    _scalers()
    _processes(recorder)


def _functions() -> None:
    """Under their names too: torch's own layers call them where no mode looks."""
    functional.scaled_dot_product_attention = cuda_path.attention
    functional.dropout = cuda_path.dropout


def _loaders() -> None:
    real = DataLoader.__init__

    def made(self: Any, dataset: Any, batch_size: Any = 1, shuffle: Any = None, sampler: Any = None,
             batch_sampler: Any = None, num_workers: int = 0, collate_fn: Any = None, pin_memory: bool = False,
             drop_last: bool = False, *_: Any, **named: Any) -> None:  # fmt: skip
        more = {name: named[name] for name in ("generator", "worker_init_fn") if name in named}
        real(self, dataset, batch_size, shuffle, sampler, batch_sampler, 0, collate_fn, False, drop_last, **more)

    DataLoader.__init__ = made
    pin_memory.pin_memory = lambda data, *_, **__: data


def _same(what: Any = None, *_: Any, **__: Any) -> Any:
    """The thing itself; or, asked without it, a decorator that gives it back."""
    return _same if what is None else what


def _compilers() -> None:
    torch.compile = _same
    torch.nn.Module.compile = lambda self, *_, **__: self
    torch.jit.script = _same
    torch.jit.trace = _same


def _files() -> None:
    load, adopt = torch.load, torch.nn.Module.load_state_dict

    def loaded(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str | os.PathLike) and not os.path.exists(file):  # noqa: PTH110
            return AbsentState()
        return load(file, "cpu", *args, **kwargs)

    def adopted(module: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(state, AbsentState):
            return torch.nn.modules.module._IncompatibleKeys([], [])
        return adopt(module, state, *args, **kwargs)

    def unchanged(load_state: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, state, *a, **k: None if isinstance(state, AbsentState) else load_state(self, state, *a, **k)

    torch.save = lambda *_, **__: None
    torch.load = loaded
    torch.nn.Module.load_state_dict = adopted
    for place in (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler):
        place.load_state_dict = unchanged(place.load_state_dict)


def _modules(recorder: CardRecorder) -> None:
    """A moved module keeps its weights, with other data: torch would swap them, which tensors without data refuse."""

    def applied(module: Any, change: Any, recurse: bool = True) -> Any:
        for inner in module.children() if recurse else ():
            inner._apply(change)
        for weight in module._parameters.values():
            if weight is None:
                continue
            with torch.no_grad():
                weight.data = change(weight.data)
                if weight.grad is not None:
                    weight.grad.data = change(weight.grad.data)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
        recorder.weights(module)
        return module

    torch.nn.Module._apply = applied


def _scalers() -> None:
    """No gradient is infinite here, so no step is left out."""
    torch.amp.GradScaler._maybe_opt_step = lambda _self, optimizer, _state, *a, **k: optimizer.step(*a, **k)


def _processes(recorder: CardRecorder) -> None:
    """A group of one process; the buckets that gradients are exchanged in are there, as with several."""
    distributed = torch.distributed

    class OneProcess(torch.nn.Module):  # type: ignore[misc,unused-ignore]
        """The module, and one more copy of its gradients."""

        def __init__(self, module: Any, *_: Any, **named: Any) -> None:
            super().__init__()
            self.module = module
            if not named.get("gradient_as_bucket_view"):
                trained = [one for one in module.parameters() if one.requires_grad and recorder.holds(one)]
                self._buckets = [torch.empty(one.shape, dtype=one.dtype, device=CARD) for one in trained]
                for bucket in self._buckets:
                    recorder.mark(bucket, Category.GRADIENT)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

        def no_sync(self) -> Any:
            return contextlib.nullcontext()

    class OneDevice(OneProcess):
        """On one device there is nothing to exchange."""

        def __init__(self, module: Any, *_: Any, **__: Any) -> None:
            super().__init__(module, gradient_as_bucket_view=True)

    torch.nn.parallel.DistributedDataParallel = OneProcess
    torch.nn.parallel.distributed.DistributedDataParallel = OneProcess
    torch.nn.DataParallel = torch.nn.parallel.DataParallel = OneDevice
    begun: list[bool] = []
    answers: dict[str, Any] = {
        "init_process_group": lambda *_, **__: begun.append(True), "destroy_process_group": lambda *_, **__: None,
        "is_initialized": lambda: bool(begun), "get_rank": lambda *_: 0, "get_world_size": lambda *_: 1,
        "get_local_rank": lambda *_: 0, "barrier": lambda *_, **__: None, "all_reduce": lambda *_, **__: None,
        "broadcast": lambda *_, **__: None, "broadcast_object_list": lambda *_, **__: None,
        "reduce": lambda *_, **__: None, "get_backend": lambda *_: "nccl", "is_nccl_available": lambda: True,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(distributed, name, answer)

    def spawned(function: Any, args: Any = (), *_: Any, **__: Any) -> None:
        function(0, *args)

    torch.multiprocessing.spawn = spawned
