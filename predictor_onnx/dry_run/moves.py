"""What a program says to tensors about their device, answered as if the card were there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from predictor_onnx.dry_run.card import CARD, CardRecorder, is_card
from predictor_onnx.trace.recorder import Recorder

_HOST: Final = torch.device("cpu")
#: Numbers of a tensor up to which it gets real ones when it comes back from the card.
_SMALL: Final = 1 << 14


class Moves(TorchFunctionMode):
    """Takes every device argument and every question about devices."""

    def __init__(self, recorder: CardRecorder) -> None:
        super().__init__()
        self._card = recorder
        tensor = torch.Tensor
        self._instead: dict[Any, Callable[..., Any]] = {
            tensor.to: self._to,
            tensor.cuda: self._cuda,
            tensor.cpu: lambda one, *_, **__: self._home(one),
            tensor.numpy: lambda one, *_, **__: _real(one).numpy(),
            tensor.__array__: lambda one, dtype=None: _real(one).numpy().astype(dtype) if dtype else _real(one).numpy(),
            tensor.tolist: lambda one: _real(one).tolist(),
            tensor.__format__: _formatted,
            tensor.pin_memory: lambda one, *_, **__: one,
            tensor.is_pinned: lambda *_, **__: False,
            tensor.share_memory_: lambda one: one,
            tensor.record_stream: lambda *_: None,
            tensor.get_device: lambda one: 0 if self._card.holds(one) else -1,
            tensor.is_cuda.__get__: self._card.holds,
            tensor.type: self._type,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        instead = self._instead.get(func)
        if instead is not None and args and isinstance(args[0], torch.Tensor):
            return instead(*args, **kwargs)
        if func in (torch._C._nn._parse_to, torch.device) and args and type(args[0]) is int:
            # A bare number is a card, and torch knows of none.
            return func(CARD, *args[1:], **kwargs) if func is torch._C._nn._parse_to else CARD
        asked = kwargs.get("device")
        if asked is not None and is_card(asked):
            with self._card.forcing():
                return func(*args, **{**kwargs, "device": _HOST})
        if asked is None and any(self._card.holds(leaf) for leaf in tree_leaves((args, kwargs))):
            with self._card.forcing():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        named = [one for one in (*args[:1], kwargs.get("device")) if _is_device(one)]
        like = [one for one in (*args[:1], kwargs.get("other")) if isinstance(one, torch.Tensor)]
        if like:
            target = CARD if self._card.holds(like[0]) else _HOST
            return self._to(tensor, target, like[0].dtype)
        rest = args[1:] if args and _is_device(args[0]) else args
        more = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
        rest = tuple(one for at, one in enumerate(rest) if not (isinstance(one, bool) and at == len(rest) - 1))
        if not named:
            return self._stays(tensor, rest, more)
        if is_card(named[0]):
            return self._stays(tensor, rest, more) if self._card.holds(tensor) else self._sent(tensor, rest, more)
        home = self._home(tensor)
        return home.to(*rest, **more) if rest or more else home

    def _stays(self, tensor: torch.Tensor, rest: Any, more: Any) -> torch.Tensor:
        return tensor.to(*rest, **more) if rest or more else tensor

    def _sent(self, tensor: torch.Tensor, rest: Any = (), more: Any = None) -> torch.Tensor:
        kind = next((one for one in (*rest, (more or {}).get("dtype")) if isinstance(one, torch.dtype)), tensor.dtype)
        layout = (more or {}).get("memory_format")
        with self._card.forcing():
            if layout is not None:
                sent = tensor.to(_HOST, kind, copy=True, memory_format=layout)
            else:
                sent = tensor.to(_HOST, kind, copy=True)
        self._card.arrived(sent)
        return sent

    def _cuda(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor if self._card.holds(tensor) else self._sent(tensor)

    def _home(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._card.holds(tensor):
            return tensor
        if tensor.numel() <= _SMALL and not (tensor.requires_grad and torch.is_grad_enabled()):
            return _real(tensor).clone()
        with self._card.forcing(to_host=True):
            return tensor.clone()

    def _type(self, tensor: torch.Tensor, dtype: Any = None, *_: Any, **__: Any) -> Any:
        if dtype is None:
            name: str = _real(tensor[:0] if tensor.dim() else tensor).type()
            return name.replace("torch.", "torch.cuda.") if self._card.holds(tensor) else name
        if isinstance(dtype, str) and dtype.startswith("torch.cuda."):
            return self._cuda(tensor).type("torch." + dtype.rpartition(".")[2])
        return tensor.type(dtype)


def _is_device(value: Any) -> bool:
    return isinstance(value, str | torch.device) or (isinstance(value, int) and not isinstance(value, bool))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that can be read: ones, in no more memory than one number, where it held nothing."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return torch.ones((), dtype=tensor.dtype).expand(tensor.shape)


def _formatted(tensor: torch.Tensor, how: str) -> str:
    return format(tensor.item(), how) if tensor.dim() == 0 else format(str(tensor), how)


@contextmanager
def told(recorder: CardRecorder, moves: Moves) -> Iterator[None]:
    """Tensors of the card say that they are on it, and backward passes know what is.

    A backward pass is begun by a call that has left the mode, and may run parts of the program again.
    """
    own: Any = FakeTensor.device
    engine = torch.autograd._engine_run_backward

    def device(tensor: FakeTensor) -> torch.device:
        true: torch.device = own.fget(tensor)
        return CARD if not recorder.computing and true.type == "cpu" and recorder.holds(tensor) else true

    def run(*args: Any, **kwargs: Any) -> Any:
        with moves:
            return engine(*args, **kwargs)

    FakeTensor.device = property(device, own.fset)  # type: ignore[method-assign,unused-ignore]
    torch.autograd._engine_run_backward = run
    try:
        yield
    finally:
        FakeTensor.device = own
        torch.autograd._engine_run_backward = engine


def weightless(fakes: FakeTensorMode, recorder: Recorder) -> Callable[..., Any]:
    """What to do when a module registers a weight: it holds nothing, whatever it was made from."""

    def registered(_module: Any, _name: str, weight: torch.Tensor | None) -> Any:
        if weight is None or isinstance(weight, FakeTensor) or type(weight) is not torch.nn.Parameter:
            return None
        fake = fakes.from_tensor(weight.detach(), static_shapes=True)
        return torch.nn.Parameter(fake, requires_grad=weight.requires_grad)

    return registered
